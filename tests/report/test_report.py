import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import OmegaConf
from torch import nn

from lightning_compress import AccuracyGuard, QuantizationAwareTraining, registry
from lightning_compress.pruning import GradualPruning
from lightning_compress.report import CompressionReport
from tests.helpers import (
    BATCHES,
    Crash,
    CrashAt,
    LazyNet,
    ManualNet,
    Net,
    StatefulLoader,
    TiedNet,
    TwoOptimizerNet,
    held_out,
    hooks_of,
    same,
    seeded,
    snapshot,
    trainer,
    zeros,
)

NAMES = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "net.4.weight", "net.4.bias"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads of a tiny model wait for each other when other processes keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TrainOnly(Net):
    """Has no validation."""

    validation_step = LightningModule.validation_step


def fit(tmp_path, callbacks=(), module=None, report=None, val=True, ckpt_path=None, **kwargs):
    report = report or CompressionReport(dir=str(tmp_path / "report"), plots=False)
    run = trainer(tmp_path, [report, *callbacks], **kwargs)
    module = module if module is not None else seeded(Net)
    run.fit(module, StatefulLoader(), held_out() if val else None, ckpt_path=ckpt_path)
    return module, run, report


def read(report_or_path):
    path = Path(report_or_path.dir if isinstance(report_or_path, CompressionReport) else report_or_path)
    return json.loads((path / "report.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))


def text(capsys):
    """Return what was printed, without the table's borders, on one line."""
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯├┤─]", " ", capsys.readouterr().out))


class Recorder(Logger):
    """Keeps what is logged."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


class FakeTechnique(Callback):
    """Empties some parameters when training starts, and says of itself what a test wants to hear."""

    def __init__(self, layers, stage=1.0, technique="pruning"):
        self.facts, self.reached, self.technique = layers, stage, technique

    def setup(self, trainer, pl_module, stage):
        registry.register(pl_module, self)

    def teardown(self, trainer, pl_module, stage):
        registry.release(pl_module, self)

    def stage(self):
        return self.reached

    def summary(self):
        return "a summary of its own"

    def layers(self):
        return self.facts

    def on_train_batch_end(self, trainer, pl_module, *args):
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters(remove_duplicate=False):
                if name in self.facts:
                    parameter[: len(parameter) // 2] = 0.0


# What is in the report


def test_the_figures_are_those_of_the_model(tmp_path, capsys):
    pruning = GradualPruning(0.8, begin=0.1, end=0.6, every=2, exclude=["net.4"])
    module, run, report = fit(tmp_path, [pruning])
    figures = read(report)
    assert figures == report.figures
    assert figures["schema"] == 1
    assert figures["module"] == "Net"

    parameters = dict(module.named_parameters())
    assert [row["name"] for row in figures["parameters"]] == NAMES
    for row in figures["parameters"]:
        values = parameters[row["name"]].flatten().tolist()
        assert (row["total"], row["zeros"]) == (len(values), values.count(0.0))
        assert row["sparsity"] == values.count(0.0) / len(values)
        assert row["shape"] == list(parameters[row["name"]].shape)
        assert (row["dtype"], row["aliases"]) == ("float32", [])
        assert list(row["techniques"]) == (["pruning"] if row["name"] in ("net.0.weight", "net.2.weight") else [])

    claimed_zeros, claimed = zeros(module, ["net.0.weight", "net.2.weight"])
    total = sum(parameter.numel() for parameter in module.parameters())
    all_zeros = sum(int((parameter == 0).sum()) for parameter in module.parameters())
    assert figures["totals"] == {
        "parameters": total, "nonzero": total - all_zeros, "zeros": all_zeros, "sparsity": all_zeros / total,
        "claimed": claimed, "claimed_zeros": claimed_zeros, "claimed_sparsity": claimed_zeros / claimed,
    }  # fmt: skip
    assert claimed_zeros == round(0.8 * claimed)
    (technique,) = figures["techniques"]
    assert (technique["technique"], technique["callback"], technique["stage"]) == ("pruning", "GradualPruning", 1.0)
    assert (technique["layers"], technique["parameters"], technique["zeros"]) == (2, claimed, claimed_zeros)
    assert technique["summary"] == pruning.summary()

    torch.save(module.state_dict(), tmp_path / "model.pt")
    assert abs(figures["size"]["bytes"] - (tmp_path / "model.pt").stat().st_size) <= 1024
    assert figures["size"]["bytes"] == figures["before"]["bytes"]
    assert figures["size"]["deflated_bytes"] < figures["size"]["bytes"]
    assert figures["before"]["parameters"] == figures["before"]["nonzero"] == total

    assert figures["metrics"]["val_acc"] == float(run.callback_metrics["val_acc"])
    assert [point["step"] for point in figures["history"]] == [8, 16, 24, 32]
    assert [point["epoch"] for point in figures["history"]] == [0, 1, 2, 3]
    ramp = [point["sparsity"] for point in figures["history"]]
    assert 0 < ramp[0] < ramp[1] < ramp[2] == ramp[3] == claimed_zeros / claimed
    assert all(0 <= point["metrics"]["val_acc"] <= 1 for point in figures["history"])

    assert (figures["run"]["steps"], figures["run"]["planned_steps"], figures["run"]["ended_early"]) == (32, 32, False)
    assert (figures["run"]["epochs"], figures["run"]["steps_timed"]) == (4, 22)
    assert 0 < figures["run"]["step_ms"] < 1e3 * figures["run"]["seconds"] < 60_000

    latency = figures["latency"]
    assert latency["left_out"] is None
    assert (latency["of"], latency["inputs"], latency["inputs_from"]) == ("Net", "float32 8×12", "the sanity check")
    assert (latency["device"], latency["threads"]) == ("cpu", torch.get_num_threads())
    for moment in ("before", "after"):
        assert list(latency[moment]) == ["1", "64"]
        assert all(0 < value["fastest_ms"] <= value["ms"] < 1000 for value in latency[moment].values())
    printed = text(capsys)
    for word in ("CompressionReport: Net", "net.0.weight 16×12", "dense", "claimed", "file on disk", "val_acc"):
        assert word in printed
    assert f"all parameters {total:,} {all_zeros:,}" in printed
    assert "The zeros are stored dense and computed dense: in this format the model is neither smaller" in printed
    assert "Not made sparse, 64 values: net.4.weight." in printed
    assert printed.count("CompressionReport: Net") == 1


def test_a_shared_weight_counts_once(tmp_path):
    module, _, report = fit(tmp_path, [GradualPruning(0.5, begin=0.1, end=0.6, every=2)], seeded(TiedNet))
    figures = read(report)
    assert figures["totals"]["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    shared = [row for row in figures["parameters"] if row["aliases"]]
    assert [{row["name"], *row["aliases"]} for row in shared] == [{"net.4.weight", "embedding.weight"}]
    assert shared[0]["zeros"] == int((module.embedding.weight == 0).sum())
    claimed_zeros, claimed = zeros(module)
    assert (figures["totals"]["claimed_zeros"], figures["totals"]["claimed"]) == (claimed_zeros, claimed)
    assert claimed_zeros == claimed // 2


def test_a_technique_that_names_an_alias_or_a_parameter_that_is_gone(tmp_path):
    fake = FakeTechnique({"embedding.weight": {"sparsity": torch.tensor(0.5)}, "gone.weight": {"sparsity": 1.0}})
    _, _, report = fit(tmp_path, [fake], seeded(TiedNet))
    figures = read(report)
    assert (figures["totals"]["claimed"], figures["totals"]["claimed_sparsity"]) == (64, 0.5)
    assert [row["techniques"] for row in figures["parameters"] if row["techniques"]] == [{"pruning": {"sparsity": 0.5}}]


def test_only_sparsity_claims_count_as_sparse(tmp_path):
    quantizing = FakeTechnique({name: {"bits": 8} for name in NAMES}, technique="quantization")
    pruning = FakeTechnique({"net.0.weight": {"sparsity": 0.5}})
    _, _, report = fit(tmp_path, [quantizing, pruning])
    figures = read(report)
    assert (figures["totals"]["claimed"], figures["totals"]["claimed_sparsity"]) == (192, 0.5)
    assert figures["parameters"][0]["techniques"] == {"quantization": {"bits": 8}, "pruning": {"sparsity": 0.5}}


def test_a_run_without_techniques(tmp_path, capsys):
    _, _, report = fit(tmp_path, report=CompressionReport(dir=str(tmp_path)))
    figures = read(report)
    assert figures["totals"]["claimed_sparsity"] is None
    assert figures["techniques"] == []
    assert figures["notes"] == ["Nothing was compressed: no technique acted on this model."]
    assert "Nothing was compressed" in text(capsys)
    assert is_picture(tmp_path / "report.png")


def test_loggers_get_the_same_figures(tmp_path):
    recorder = Recorder()
    loggers = [recorder, CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    _, _, report = fit(tmp_path, [GradualPruning(0.8, begin=0.1, end=0.6, every=2)], logger=loggers)
    figures = read(report)
    step, logged = recorder.logged[-1]
    assert step == 32
    latency = figures["latency"]
    assert logged == {
        "compress/parameters": figures["totals"]["parameters"],
        "compress/nonzero_parameters": figures["totals"]["nonzero"],
        "compress/sparsity": figures["totals"]["claimed_sparsity"],
        "compress/sparsity_of_all": figures["totals"]["sparsity"],
        "compress/file_bytes": figures["size"]["bytes"],
        "compress/file_deflated_bytes": figures["size"]["deflated_bytes"],
        "compress/step_ms": figures["run"]["step_ms"],
        **{f"compress/latency_ms_{m}_batch_{b}": latency[m][b]["ms"] for m in ("before", "after") for b in ("1", "64")},
        **{
            f"compress/layer_sparsity/{row['name']}": row["sparsity"]
            for row in figures["parameters"]
            if len(row["shape"]) > 1
        },
    }
    assert all(type(value) is float for value in logged.values())
    keys = {key for _, metrics in recorder.logged for key in metrics}
    assert not [(a, b) for a in keys for b in keys if b.startswith(f"{a}/")]  # MLflow's file store: a metric is a file
    assert "compress/layer_sparsity/net.0.weight" in (Path(loggers[1].log_dir) / "metrics.csv").read_text()
    assert any(Path(loggers[2].log_dir).iterdir())


# Where it goes


def is_picture(path):
    content = Path(path).read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    from matplotlib.image import imread

    pixels = imread(path)[..., :3].reshape(-1, 3)
    colours = {tuple(colour) for colour in (pixels * 255).round().astype(int)[::7].tolist()}
    return content[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 500 and len(colours) > 20


def test_files_go_to_the_loggers_folder(tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    fit(tmp_path, [GradualPruning(0.8)], report=CompressionReport(), logger=logger)
    folder = Path(logger.log_dir)
    names = ["report.json", "report.png", "report.html"]
    assert read(folder)["files"] == [str(folder / name) for name in names]
    assert is_picture(folder / "report.png")
    assert sorted(path.name for path in folder.iterdir() if "report" in path.name) == sorted(names)


@pytest.mark.parametrize("kwargs", [{"logger": False}, {"logger": Recorder()}, {"fast_dev_run": True}])
def test_files_go_to_the_default_folder_without_a_loggers(tmp_path, kwargs):
    fit(tmp_path, report=CompressionReport(plots=False, latency=False), **kwargs)
    assert read(tmp_path)["files"] == [str(tmp_path / "report.json")]


def test_files_can_go_to_any_filesystem(tmp_path):
    import fsspec

    fit(tmp_path, report=CompressionReport("memory://a/b", plots=False, latency=False))
    with fsspec.filesystem("memory").open("/a/b/report.json") as file:
        assert json.load(file)["module"] == "Net"


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    import lightning_compress.report.callback as room

    room._write(str(tmp_path / "a"), b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(room.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        room._write(str(tmp_path / "a"), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_without_matplotlib_the_plots_are_left_out_and_the_table_says_so(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fit(tmp_path, report=CompressionReport(str(tmp_path), latency=False))
    assert read(tmp_path)["files"] == [str(tmp_path / "report.json"), str(tmp_path / "report.html")]
    assert not (tmp_path / "report.png").exists()
    said = "The plots were left out: matplotlib is not installed"
    assert said in text(capsys)
    page = (tmp_path / "report.html").read_text()
    assert said in page
    assert "net.4.weight" in page
    assert "<svg" not in page


def test_a_live_progress_bar_does_not_eat_the_table(tmp_path, capsys):
    fit(tmp_path, [RichProgressBar()], enable_progress_bar=True)
    assert "all parameters" in text(capsys)


# The best checkpoint


class Worsening(Net):
    """Its accuracy falls as its sparsity grows: the best epoch is the densest."""

    def on_validation_epoch_end(self):
        pruned, total = zeros(self)
        self.log("score", 1.0 - pruned / total / 2)


@pytest.mark.filterwarnings("ignore:ModelCheckpoint.* may keep an epoch that is not compressed")
def test_the_best_checkpoint_is_said_to_be_dense(tmp_path, capsys):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="score", mode="max")
    pruning = GradualPruning(0.95, begin=0.4, end=0.8, every=1)
    module, _, report = fit(tmp_path, [pruning, checkpoint], seeded(Worsening), max_epochs=6, enable_checkpointing=True)
    (entry,) = read(report)["checkpoints"]
    state = torch.load(checkpoint.best_model_path)["state_dict"]
    assert all(bool((tensor != 0).all()) for tensor in state.values())
    assert entry["path"] == checkpoint.best_model_path
    assert (entry["monitor"], entry["sparsity"], entry["left_out"]) == ("score", 0.0, None)
    pruned, total = zeros(module)
    assert entry["final_sparsity"] == pruned / total == pytest.approx(0.95, abs=1 / total)
    assert re.search(r"! best_model_path .* is 0\.0000 sparse, the final model 0\.9492\.", text(capsys))


@pytest.mark.filterwarnings("ignore:ModelCheckpoint.* may keep an epoch that is not compressed")
def test_the_best_checkpoint_is_said_to_be_float(tmp_path, capsys):
    class Falling(Net):
        def on_validation_epoch_end(self):
            self.log("score", -float(self.current_epoch))

    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="score", mode="max")
    quantization = QuantizationAwareTraining(begin=0.5)
    _, _, report = fit(tmp_path, [quantization, checkpoint], seeded(Falling), max_epochs=4, enable_checkpointing=True)
    (entry,) = read(report)["checkpoints"]
    assert (entry["sparsity"], entry["not_begun"], entry["left_out"]) == (None, ["quantization"], None)
    assert re.search(r"! best_model_path .* was written before quantization began", text(capsys))


@pytest.mark.filterwarnings("ignore:GradualPruning. the run stopped before `end=")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_metric_stands_beside_the_sparsity_that_it_was_measured_at(tmp_path, is_first):
    report = CompressionReport(str(tmp_path), plots=False, latency=False)
    guard = AccuracyGuard("score", baseline=1.0, tolerance=0.3, action="rollback")
    callbacks = [GradualPruning(0.95, begin=0.1, end=0.9, every=1), *([report, guard] if is_first else [guard, report])]
    trainer(tmp_path, callbacks, max_epochs=6).fit(seeded(Worsening), StatefulLoader(), held_out())
    assert guard.events
    history = report.figures["history"]
    for row in history:
        assert row["metrics"]["score"] == pytest.approx(1.0 - row["sparsity"] / 2, abs=1e-6)
    assert min(row["metrics"]["score"] for row in history) < 0.7  # the attempt that failed is among them


def test_a_checkpoint_with_objects_is_named(tmp_path):
    class Configured(Net):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"path": Path("data")})

    report = CompressionReport(str(tmp_path), plots=False, latency=False)
    callbacks = [report, GradualPruning(0.5), ModelCheckpoint(tmp_path / "ckpt")]
    trainer(tmp_path, callbacks, enable_checkpointing=True).fit(seeded(Configured), StatefulLoader(), held_out())
    (entry,) = read(report)["checkpoints"]
    assert entry["left_out"] == "torch.load refuses the objects that `save_hyperparameters` has put into it"


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, capsys):
    class Spoils(Callback):
        def on_fit_end(self, trainer, pl_module):
            Path(trainer.checkpoint_callback.best_model_path).write_bytes(b"no checkpoint")

    checkpoint = ModelCheckpoint(tmp_path / "ckpt")
    report = CompressionReport(str(tmp_path), plots=False, latency=False)
    run = trainer(tmp_path, [Spoils(), report, GradualPruning(0.5), checkpoint], enable_checkpointing=True)
    run.fit(seeded(Net), StatefulLoader(), held_out())
    (entry,) = read(report)["checkpoints"]
    assert entry["sparsity"] is None
    assert entry["left_out"]
    assert "could not be read" in text(capsys)


# Runs that stop, resume, repeat


def test_the_report_changes_nothing(tmp_path):
    class Random(Net):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(16))
            self.net.append(nn.Dropout(0.2))

        def forward(self, x):
            return self.net(x) + 0.1 * torch.rand_like(x[:, :4])

    snapshots = []
    for callbacks in ([], [CompressionReport(str(tmp_path), plots=False)]):
        for sanity in (0, 2):
            run = trainer(tmp_path, callbacks, max_epochs=2, num_sanity_val_steps=sanity)
            module = seeded(Random)
            keys = set(module.__dict__)
            torch.manual_seed(1)
            run.fit(module, StatefulLoader(), held_out())
            snapshots.append(snapshot(module, run))
            assert hooks_of(module, run) == 0
            assert not [key for key in set(module.__dict__) - keys if not key.startswith("_")]
    assert all(same(snapshots[0], other) for other in snapshots[1:])


@pytest.mark.parametrize("step", [3, 12, 21])
def test_a_resumed_run_goes_on_with_its_report(tmp_path, step):
    def pruning():
        return GradualPruning(0.8, begin=0.1, end=0.6, every=2)

    whole, _, report = fit(tmp_path, [pruning()])
    expected = read(report)
    with pytest.raises(Crash):
        fit(tmp_path, [pruning(), CrashAt(step, tmp_path / "a.ckpt")])
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["CompressionReport"]
    assert saved == json.loads(json.dumps(saved))
    module, _, report = fit(tmp_path, [pruning()], ckpt_path=tmp_path / "a.ckpt")
    figures = read(report)
    assert figures["history"] == expected["history"]
    assert figures["totals"] == expected["totals"]
    assert figures["before"] == expected["before"]
    assert figures["latency"]["before"] == saved["before"]["latency"]
    assert figures["latency"]["after"]["64"]["ms"] > 0
    assert same(dict(module.state_dict()), dict(whole.state_dict()))


def test_one_object_is_new_in_each_run(tmp_path):
    report = CompressionReport(str(tmp_path), plots=False)
    module, run, _ = fit(tmp_path, [GradualPruning(0.8)], report=report)
    first = report.figures
    run.validate(module, held_out(), verbose=False)
    run.test(module, held_out(), verbose=False)
    assert report.figures is first
    assert hooks_of(module) == 0
    run.fit_loop.max_epochs = 6
    run.fit(module, StatefulLoader(), held_out())
    assert [point["step"] for point in report.figures["history"]] == [40, 48]
    assert report.figures["before"]["nonzero"] == first["totals"]["nonzero"]

    other = seeded(lambda: Net(width=24))
    fit(tmp_path, module=other, report=report)
    assert report.figures["totals"]["parameters"] == sum(parameter.numel() for parameter in other.parameters())
    assert [point["step"] for point in report.figures["history"]] == [8, 16, 24, 32]
    assert report.figures["techniques"] == []
    assert report.figures["before"]["nonzero"] == report.figures["before"]["parameters"]


@pytest.mark.parametrize(
    "at", ["on_sanity_check_start", "on_train_start", "on_train_batch_start", "on_validation_start"]
)
def test_an_interrupted_run_leaves_nothing(tmp_path, at):
    class Stop(Callback):
        pass

    def stop(*args):
        raise Crash

    setattr(Stop, at, stop)
    module, report = seeded(Net), CompressionReport(str(tmp_path))
    run = trainer(tmp_path, [report, Stop()], num_sanity_val_steps=0 if "train" in at else 2)
    with pytest.raises(Crash):
        run.fit(module, StatefulLoader(), held_out())
    assert hooks_of(module) == 0
    assert report.figures is None
    assert not (tmp_path / "report.json").exists()
    fit(tmp_path, module=module.train(), report=report)  # Lightning itself leaves the module in eval mode
    assert hooks_of(module) == 0
    assert read(tmp_path)["run"]["steps"] == 32


def test_a_run_that_ends_early_is_said_to(tmp_path, capsys):
    stop = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    pruning = GradualPruning(0.8, begin=0.2, end=1.0, every=1)
    with pytest.warns(UserWarning, match="stopped before"):
        _, _, report = fit(tmp_path, [stop, pruning])
    figures = read(report)
    assert figures["run"]["ended_early"]
    assert (figures["run"]["steps"], figures["run"]["planned_steps"]) == (2 * BATCHES, 4 * BATCHES)
    assert 0 < figures["techniques"][0]["stage"] < 1
    printed = text(capsys)
    assert "! The run ended early, at step 16 of 32." in printed
    assert "! pruning is not complete: it got to" in printed


def test_averaged_weights_are_what_is_reported(tmp_path):
    for before, after in ([WeightAveraging(), None], [None, WeightAveraging()]):
        callbacks = [before, CompressionReport(str(tmp_path), plots=False), GradualPruning(0.8), after]
        run = trainer(tmp_path, [callback for callback in callbacks if callback])
        module = seeded(Net)
        run.fit(module, StatefulLoader(), held_out())
        pruned, total = zeros(module)
        assert read(tmp_path)["totals"]["claimed_zeros"] == pruned == round(0.8 * total)


@pytest.mark.parametrize("kwargs", [{}, {"limit_val_batches": 0}, {"val_check_interval": 4}, {"max_epochs": 0}])
@pytest.mark.parametrize("make", [Net, ManualNet, TwoOptimizerNet, LazyNet])
def test_unlike_runs(tmp_path, make, kwargs):
    module, run, report = fit(tmp_path, [GradualPruning(0.8, begin=1, end=10, every=2)], seeded(make), **kwargs)
    figures = read(report)
    batches = 8 * run.max_epochs
    assert figures["run"]["steps"] == figures["run"]["planned_steps"] == batches or run.max_epochs == 0
    checks = 2 if "val_check_interval" in kwargs else 1
    assert len(figures["history"]) == max(run.max_epochs * checks, 1)
    assert figures["totals"]["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    if run.max_epochs:
        assert figures["latency"]["left_out"] is None
    assert hooks_of(module) == 0


def test_without_a_validation_loop(tmp_path):
    _, _, report = fit(tmp_path, [GradualPruning(0.8)], seeded(TrainOnly), val=False)
    figures = read(report)
    assert [point["step"] for point in figures["history"]] == [8, 16, 24, 32]
    assert figures["history"][0]["sparsity"] < figures["history"][-1]["sparsity"]
    assert figures["latency"]["inputs_from"] == "the first training batch"
    assert figures["metrics"]["train_loss"] > 0


def test_barebones(tmp_path, capsys):
    report = CompressionReport(str(tmp_path))
    run = Trainer(
        barebones=True, accelerator="cpu", max_epochs=2, callbacks=[GradualPruning(0.8), report],
        default_root_dir=tmp_path,
    )  # fmt: skip

    class Silent(Net):
        def log(self, *args, **kwargs):
            pass

    run.fit(seeded(Silent), StatefulLoader(), held_out())
    assert read(tmp_path)["totals"]["claimed_sparsity"] == pytest.approx(0.8, abs=0.01)
    assert is_picture(tmp_path / "report.png")
    assert "all parameters" in text(capsys)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path, precision):
    seen = []

    class Watched(TrainOnly):
        def forward(self, x):
            if not self.training:
                seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    module = seeded(Watched)
    module.example_input_array = torch.zeros(8, 12)
    _, _, report = fit(tmp_path, module=module, val=False, precision=precision, max_epochs=1)
    latency = read(report)["latency"]
    assert latency["left_out"] is None
    assert latency["precision"] == precision
    assert all(value["ms"] for moment in ("before", "after") for value in latency[moment].values())
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert set(seen) == {(dtype, precision == "bf16-mixed")}


# Latency


def test_latency_can_be_switched_off(tmp_path, capsys):
    class Counts(TrainOnly):
        calls = 0

        def forward(self, x):
            Counts.calls += 1
            return super().forward(x)

    report = CompressionReport(str(tmp_path), latency=False, plots=False)
    fit(tmp_path, module=seeded(Counts), report=report, val=False)
    assert Counts.calls == 32
    assert read(tmp_path)["latency"]["left_out"] == "CompressionReport(latency=False)"
    assert "Latency was left out: CompressionReport(latency=False)." in text(capsys)


def test_latency_before_is_that_of_the_model_before(tmp_path):
    class Slow(Net):
        steps = 0

        def __init__(self):
            super().__init__()
            self.example_input_array = (torch.zeros(3, 12),)

        def forward(self, x):
            if not self.training and Slow.steps:
                time.sleep(0.02)
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            Slow.steps += 1
            return super().training_step(batch, batch_idx)

    _, _, report = fit(tmp_path, module=seeded(Slow), max_epochs=1)
    latency = read(report)["latency"]
    assert latency["inputs_from"] == "example_input_array"
    assert latency["inputs"] == "float32 3×12"
    assert latency["before"]["1"]["ms"] < 20 <= latency["after"]["1"]["ms"]


def test_example_inputs_as_keywords_and_a_forward_that_takes_them(tmp_path):
    class Keywords(Net):
        def __init__(self):
            super().__init__()
            self.example_input_array = {"x": torch.zeros(2, 12)}

        def forward(self, *, x):
            return self.net(x)

        def loss(self, batch):
            return nn.functional.cross_entropy(self(x=batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

    module = seeded(Keywords)
    assert read(fit(tmp_path, module=module, max_epochs=1)[2])["latency"]["inputs"] == "x=float32 2×12"
    module.example_input_array = None
    assert read(fit(tmp_path, module=module, max_epochs=1)[2])["latency"]["inputs"] == "x=float32 8×12"


def test_the_part_that_is_called_is_measured(tmp_path):
    class Parts(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(12, 4)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert read(fit(tmp_path, module=Parts(), val=False, max_epochs=1)[2])["latency"]["of"] == "Parts.net"


def test_unknown_inputs_are_named(tmp_path, capsys):
    class TwoParts(Net):
        def loss(self, batch):
            return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    module = seeded(TwoParts)
    module.head = nn.Linear(4, 4)
    _, _, report = fit(tmp_path, module=module, max_epochs=1)
    latency = read(report)["latency"]
    assert latency["before"] is latency["after"] is None
    assert "'net' and 'head'" in latency["left_out"]
    assert "give TwoParts an `example_input_array`" in text(capsys)
    assert hooks_of(module) == 0


def test_a_forward_that_fails_does_not_end_the_run(tmp_path, capsys):
    module = seeded(Net)
    module.example_input_array = torch.zeros(2, 5)
    _, _, report = fit(tmp_path, module=module, max_epochs=1)
    assert read(report)["latency"]["after"]["1"]["left_out"].startswith("RuntimeError")
    assert "! Latency at batch 1 was left out: RuntimeError" in text(capsys)

    module.example_input_array = [object()]
    _, _, report = fit(tmp_path, module=module, max_epochs=1)
    assert "`example_input_array` cannot be used" in read(report)["latency"]["left_out"]


def test_a_compiled_module(tmp_path):
    compilations = []

    def backend(graph, inputs):
        compilations.append(1)
        return graph.forward

    class Quiet(TrainOnly):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    counts = []
    for callbacks in ([], [CompressionReport(str(tmp_path), plots=False)]):
        compilations.clear()
        torch.compiler.reset()
        module = seeded(Quiet)
        module.example_input_array = torch.zeros(2, 12)
        trainer(tmp_path, callbacks, max_epochs=1).fit(torch.compile(module, backend=backend), StatefulLoader())
        counts.append(len(compilations))
    assert counts[0] == counts[1] > 0
    latency = read(tmp_path)["latency"]
    assert latency["compiled"]
    assert latency["after"]["64"]["ms"] > 0
    module.example_input_array = None
    trainer(tmp_path, callbacks, max_epochs=1).fit(torch.compile(module, backend=backend), StatefulLoader())
    assert (
        "of a compiled module are known: give Quiet an `example_input_array`" in read(tmp_path)["latency"]["left_out"]
    )


# Arguments


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dir": 3}, TypeError, "`dir` must be the path of a folder or None, got 3 of type int"),
        ({"dir": ""}, ValueError, "`dir` must be the path"),
        ({"latency": "yes"}, TypeError, "`latency` must be True or False, got 'yes'"),
        ({"plots": 1}, TypeError, "`plots` must be True or False, got 1 of type int"),
        ({"plots": OmegaConf.create([True])}, TypeError, "`plots` must be True or False"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        CompressionReport(**kwargs)


def test_arguments_from_a_configuration(tmp_path):
    config = OmegaConf.create({"dir": str(tmp_path), "latency": False, "plots": "${latency}", "latency2": 1})
    report = CompressionReport(config.dir, config.latency, plots=False)
    fit(tmp_path, report=report, max_epochs=1)
    assert read(tmp_path)["module"] == "Net"


def test_two_reports_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="CompressionReport"):  # Lightning's own check, at construction
        trainer(tmp_path, [CompressionReport(), CompressionReport()])
    run = trainer(tmp_path, [CompressionReport()])
    run.callbacks.append(CompressionReport())
    with pytest.raises(ValueError, match="two CompressionReport callbacks"):
        run.fit(Net(), StatefulLoader(), held_out())


# Two processes

SCRIPT = """
import json, sys, torch
from pathlib import Path
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_compress.pruning import GradualPruning
from lightning_compress.report import CompressionReport
from tests.helpers import Net, StatefulLoader, held_out, seeded, trainer

class Sharded(Net):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        for layer in (*self.net, self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

folder = Path(sys.argv[1])
for name, make in {"ddp": Net, "sharded": Sharded}.items():
    strategy = {"ddp": DDPStrategy, "sharded": ModelParallelStrategy}[name](process_group_backend="gloo")
    report = CompressionReport(str(folder / name), plots=False)
    callbacks = [report, *([GradualPruning(0.8)] if name == "ddp" else [])]
    run = trainer(folder, callbacks, devices=2, strategy=strategy, max_epochs=2, use_distributed_sampler=False)
    module = seeded(make)
    if name == "sharded":
        with torch.no_grad():
            module.net[0].weight[:5] = 0.0
            module.net[0].weight.requires_grad_(False)
    run.fit(module, StatefulLoader(seed=run.global_rank), held_out())
    (folder / f"{name}{run.global_rank}.txt").write_text(str(report.figures is None))
"""


def test_two_processes(tmp_path):
    (tmp_path / "worker.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, tmp_path / "worker.py", tmp_path], cwd=root, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    total = sum(parameter.numel() for parameter in Net().parameters())
    figures = read(tmp_path / "ddp")
    assert figures["totals"]["claimed_sparsity"] == pytest.approx(0.8, abs=0.002)
    assert figures["totals"]["parameters"] == total
    assert (figures["latency"]["of"], figures["latency"]["inputs"]) == ("Net", "float32 8×12")
    assert [(tmp_path / f"ddp{rank}.txt").read_text() for rank in (0, 1)] == ["False", "True"]

    figures = read(tmp_path / "sharded")
    assert figures["totals"]["parameters"] == total
    assert {row["name"]: row["zeros"] for row in figures["parameters"]}["net.0.weight"] == 60
    assert figures["parameters"][0]["shape"] == [16, 12]
    assert "sharded" in figures["latency"]["left_out"]
    assert figures["size"]["bytes"] is None
    assert done.stdout.count("CompressionReport: ") == 2


# The page


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    code = code.replace(
        "Trainer(", "Trainer(accelerator='cpu', enable_progress_bar=False, enable_model_summary=False, "
    )
    exec(compile(code, "docs/report.md", "exec"), {"__name__": "__main__"})
    figures = read(tmp_path / "report")
    for key in figures:
        assert f"`{key}`" in page.partition("## `report.json`")[2]
    for part in ("totals", "before", "run", "size", "latency"):
        for key in figures[part]:
            assert f"`{key}`" in page
    for part in ("techniques", "parameters", "history", "checkpoints"):
        for key in figures[part][0]:
            assert f"`{key}`" in page
    assert is_picture(tmp_path / "report" / "report.png")
