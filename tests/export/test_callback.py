"""Files at the end of a fit: of the right module, compared by the user's own validation, and nobody's run disturbed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import ExportCompressed, GradualPruning, QuantizationAwareTraining
from lightning_compress.export import callback as callback_module
from lightning_compress.export import formats, integer_kernels, load_compressed, save_compressed
from tests.helpers import (
    CLASSES,
    FEATURES,
    CrashAt,
    Net,
    StatefulLoader,
    held_out,
    hooks_of,
    same,
    seeded,
    snapshot,
    trainer,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ALL = ["onnx", "pt2", "safetensors"]
X = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(0))


class Calls(Net):
    """Steps call the network, and not the module; an object of torchmetrics counts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)


def fit(tmp_path: Path, callback: Any, module: Any = None, before: Any = (), val: Any = None, **kwargs: Any) -> Any:
    module = seeded(Net) if module is None else module
    run = trainer(tmp_path, [*before, callback], **({"max_epochs": 1} | kwargs))
    run.fit(module, StatefulLoader(), held_out() if val is None else val)
    return module


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@torch.no_grad()
def own_metrics(module: Net, run: Any) -> dict[str, float]:
    """Compute what `Net` logs in validation, without Lightning."""
    x, y = held_out().x, held_out().y
    output = run(x)
    return {
        "val_loss": float(nn.functional.cross_entropy(output, y)),
        "val_acc": float((output.argmax(1) == y).double().mean()),
    }


def test_all_formats_at_the_end_of_a_plain_fit(tmp_path: Path) -> None:
    callback = ExportCompressed(tmp_path / "files", ALL)
    module = fit(tmp_path, callback)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [f"model.{format}" for format in ALL]
    runs = {
        "onnx": lambda x: run_onnx(tmp_path / "files/model.onnx", x),
        "pt2": torch.export.load(tmp_path / "files/model.pt2").module(),
        "safetensors": load_compressed(tmp_path / "files/model.safetensors", Net()),
    }
    expected = own_metrics(module, module)
    for file in callback.files:
        torch.testing.assert_close(runs[file.format](X), module(X).detach())
        assert file.agrees
        found = own_metrics(module, runs[file.format])
        assert set(file.metrics) == {"val_loss", "val_acc"}
        for name, (own, other) in file.metrics.items():
            assert own == pytest.approx(expected[name], rel=1e-5)
            assert other == pytest.approx(found[name], rel=1e-5)
    words = {entry.key: entry.value for entry in onnx.load(tmp_path / "files/model.onnx").metadata_props}
    assert json.loads(words["metrics"])["val_acc"] == pytest.approx(expected["val_acc"])
    assert set(json.loads(words["versions"])) == {"lightning_compress", "torch", "lightning"}
    assert (words["module"], words["sparsity"], words["steps"]) == ("Net", "0", "8")


def test_channels_are_gone_and_integers_are_integers(tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, granularity="channel", scope="layer", begin=0.1, end=0.4, every=2)
    quantization = QuantizationAwareTraining(begin=0.4, freeze_ranges=0.8)
    callback = ExportCompressed(tmp_path / "files")
    run = trainer(tmp_path, [callback, pruning, quantization], max_epochs=3)  # before them in the list
    run.fit(module := seeded(Net), StatefulLoader(), held_out())
    assert [file.agrees for file in callback.files] == [True, True]
    model = onnx.load(tmp_path / "files/model.onnx")
    shapes = sorted(tuple(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims)
    widths = {size for shape in shapes if len(shape) == 2 for size in shape}
    assert widths == {FEATURES, 8, CLASSES}
    assert integer_kernels(tmp_path / "files/model.onnx")["float"] == 0
    expected = module(X).detach()
    step = float(expected.max() - expected.min()) / 255
    torch.testing.assert_close(run_onnx(tmp_path / "files/model.onnx", X), expected, atol=3 * step, rtol=0.0)
    again = load_compressed(tmp_path / "files/model.safetensors", pruning.pruned_module)
    torch.testing.assert_close(again(X).detach(), expected, atol=3 * step, rtol=0.0)
    sizes = {f"compress/{file.format}_bytes": file.path.stat().st_size for file in callback.files}
    assert sizes.items() <= run.callback_metrics.items()
    assert len(sizes) == 2


def test_the_module_that_the_steps_call(tmp_path: Path) -> None:
    callback = ExportCompressed(tmp_path / "files", ALL)
    module = fit(tmp_path, callback, seeded(Calls))
    loaded = load_compressed(tmp_path / "files/model.safetensors", Calls().net)
    assert torch.equal(loaded(X), module.net(X))
    words = {entry.key: entry.value for entry in onnx.load(tmp_path / "files/model.onnx").metadata_props}
    assert words["module"] == "Calls.net"
    accuracy = float((module.net(held_out().x).argmax(1) == held_out().y).double().mean())
    assert [file.metrics["val_acc"] for file in callback.files] == [pytest.approx((accuracy, accuracy))] * 3


def test_averaged_weights_are_exported(tmp_path: Path) -> None:
    callback = ExportCompressed(tmp_path / "files", ["safetensors"])
    run = trainer(tmp_path, [callback, EMAWeightAveraging(decay=0.8)])
    run.fit(module := seeded(Net), StatefulLoader(), held_out())
    plain = fit(tmp_path, ExportCompressed(tmp_path / "plain", ["safetensors"]), max_epochs=4)
    assert not torch.equal(plain.net[0].weight, module.net[0].weight)
    assert torch.equal(load_compressed(tmp_path / "files/model.safetensors", Net())(X), module(X))


def test_nothing_of_the_run_changes(tmp_path: Path) -> None:
    def ends(*callbacks: Any) -> Any:
        module, loaders = seeded(Net), (StatefulLoader(), held_out())
        run = trainer(tmp_path, callbacks, max_epochs=2)
        run.fit(module, *loaders)
        found = snapshot(module, run) | {"random": (torch.rand(3), random.random())}
        assert hooks_of(module, run) == 0
        return found, run.validate(module, loaders[1], verbose=False)

    random.seed(0)
    alone = ends()
    random.seed(0)
    assert same(alone, ends(ExportCompressed(tmp_path / "files", ["safetensors", "pt2"])))


def test_limit_val_batches_limits_the_comparison(tmp_path: Path) -> None:
    class Counting(StatefulLoader):
        taken = 0

        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                self.taken += 1
                yield batch

    loader = Counting(seed=1, shuffle=False)
    callback = ExportCompressed(tmp_path / "files", ["safetensors"])
    fit(tmp_path, callback, val=loader, limit_val_batches=2, num_sanity_val_steps=0)
    assert loader.taken <= 3 * 3  # one in the fit, two afterwards, each with one batch too many
    assert set(callback.files[0].metrics) == {"val_loss", "val_acc"}
    loader.taken = 0
    callback = ExportCompressed(tmp_path / "files", ["safetensors"], verify=False)
    fit(tmp_path, callback, val=loader, limit_val_batches=2, num_sanity_val_steps=0)
    assert loader.taken <= 3
    assert callback.files[0].difference is None


@pytest.mark.parametrize("example", [True, False])
def test_without_validation_the_outputs_are_compared(tmp_path: Path, example: bool) -> None:
    module = seeded(Net)
    if example:
        module.example_input_array = X
    callback = ExportCompressed(tmp_path / "files", ["safetensors", "pt2"])
    fit(tmp_path, callback, module, limit_val_batches=0)
    assert [(file.agrees, file.difference, file.metrics) for file in callback.files] == [(True, 0.0, {})] * 2


def test_without_inputs_the_weights_alone_are_written(tmp_path: Path) -> None:
    class Own(Net):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(nn.functional.linear(batch[0], self.net[0].weight)[:, :4], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

    callback = ExportCompressed(tmp_path / "files")
    with pytest.warns(UserWarning, match="onnx not written, since no example inputs are known.*`example_input_array`"):
        module = fit(tmp_path, callback, seeded(Own))
    assert [file.format for file in callback.files] == ["safetensors"]
    assert torch.equal(load_compressed(tmp_path / "files/model.safetensors", Net())(X), module(X))


# --- what does not agree ----------------------------------------------------------------------------------------------


class Sensitive(Net):
    """Logs a metric that sees what its outputs hardly show."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("large", 1e4 * self(batch[0]).mean())


def test_a_metric_that_differs_rejects_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tampered(module: nn.Module, *args: Any) -> Path:
        with torch.no_grad():
            module.net[4].bias += 1e-4
            path = save_compressed(module, *args)
            module.net[4].bias -= 1e-4
        return path

    monkeypatch.setattr(formats, "save_compressed", tampered)
    callback = ExportCompressed(tmp_path / "files", ["safetensors", "pt2"])
    with pytest.warns(UserWarning, match=r"not left in .*model\.safetensors .*large is .* instead of"):
        fit(tmp_path, callback, seeded(lambda: Sensitive(width=16)))
    bad, good = callback.files
    own, other = bad.metrics["large"]
    assert other - own == pytest.approx(1.0, rel=0.05)
    assert bad.difference is not None
    assert bad.tolerance is not None
    assert bad.difference < bad.tolerance
    assert (bad.agrees, good.agrees) == (False, True)
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["model.pt2"]


def test_batches_beyond_the_first_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = formats.open_file

    def fails_later(*args: Any) -> Any:
        run, calls = opened(*args), iter(range(1000))
        return lambda *inputs, **kwargs: run(*inputs, **kwargs) + 0.1 * (next(calls) > 8)

    monkeypatch.setattr(formats, "open_file", fails_later)
    callback = ExportCompressed(tmp_path / "files", ["safetensors"])
    with pytest.warns(UserWarning, match="outputs differ by"):
        fit(tmp_path, callback)
    assert not list((tmp_path / "files").iterdir())


def test_an_exporter_that_fails_is_a_warning(tmp_path: Path) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 1e9 else self.net(x) + 0.0

    callback = ExportCompressed(tmp_path / "files", ALL)
    with pytest.warns(UserWarning, match="ExportCompressed") as caught:
        fit(tmp_path, callback, seeded(Odd))
    words = [str(warning.message) for warning in caught if "ExportCompressed" in str(warning.message)]
    assert len(words) == 2
    assert "model.onnx not written: torch's ONNX exporter cannot follow Odd" in words[0]
    assert "model.pt2 not written: torch.export cannot follow Odd" in words[1]
    assert [(file.format, file.agrees) for file in callback.files] == [("safetensors", True)]


def test_a_validation_that_needs_the_users_trainer(tmp_path: Path) -> None:
    class Needs(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])
            self.logger.experiment.add_scalar("a", 1.0)  # another logger stands in for the user's
            assert self.trainer.default_root_dir == str(tmp_path), "the user's own"

    callback = ExportCompressed(tmp_path / "files", ["safetensors"])
    with pytest.warns(UserWarning, match="metrics are not compared.*the user's own"):
        fit(tmp_path, callback, seeded(Needs), logger=DummyLogger())
    assert (callback.files[0].agrees, callback.files[0].difference, callback.files[0].metrics) == (True, 0.0, {})


# --- users' modules and data ------------------------------------------------------------------------------------------


def test_what_builds_the_model_is_not_run_again(tmp_path: Path) -> None:
    class Builds(Net):
        def setup(self, stage: str) -> None:
            self.net = seeded(Net).net

        def configure_callbacks(self) -> Any:
            return [CrashAt(10**9, tmp_path)]

    callback = ExportCompressed(tmp_path / "files", ["safetensors"])
    module = fit(tmp_path, callback, seeded(Builds))
    own, other = callback.files[0].metrics["val_loss"]
    assert own == other == pytest.approx(own_metrics(module, module)["val_loss"], rel=1e-5)


def test_hooks_of_a_datamodule_prepare_the_batches(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return StatefulLoader()

        def val_dataloader(self) -> Any:
            return [held_out(), held_out()]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * (1.0 + dataloader_idx), batch[1]

    class Two(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    callback, module = ExportCompressed(tmp_path / "files", ["safetensors"]), seeded(Two)
    trainer(tmp_path, [callback], max_epochs=1).fit(module, datamodule=Data())
    metrics = callback.files[0].metrics
    for index in range(2):
        expected = own_metrics(module, lambda x, factor=1.0 + index: module(x * factor))["val_loss"]
        assert metrics[f"val_loss/dataloader_idx_{index}"] == pytest.approx((expected, expected), rel=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    callback = ExportCompressed(tmp_path / "files")
    fit(tmp_path, callback, fast_dev_run=True)
    assert callback.files == []
    assert not (tmp_path / "files").exists()


def test_a_second_fit_replaces_the_files(tmp_path: Path) -> None:
    callback = ExportCompressed(tmp_path / "files", ["safetensors"])
    module, run = seeded(Net), trainer(tmp_path, [callback], max_epochs=1)
    run.fit(module, StatefulLoader(), held_out())
    first = (tmp_path / "files/model.safetensors").read_bytes()
    run.fit_loop.max_epochs = 2
    run.fit(module, StatefulLoader(), held_out())
    assert len(callback.files) == 1
    assert (tmp_path / "files/model.safetensors").read_bytes() != first
    assert torch.equal(load_compressed(tmp_path / "files/model.safetensors", Net())(X), module(X))


def test_two_callbacks_need_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="Two ExportCompressed callbacks write into '.*files': give one of them another `dir`"
    ):
        fit(tmp_path, ExportCompressed("files", ["pt2"]), before=[ExportCompressed(tmp_path / "files")])
    both = [ExportCompressed(tmp_path / name, ["safetensors"]) for name in "ab"]
    fit(tmp_path, both[0], before=both[1:])
    assert [(tmp_path / name / "model.safetensors").exists() for name in "ab"] == [True, True]


def test_bad_arguments() -> None:
    for kwargs, error, match in (
        ({"dir": __file__}, ValueError, "is a file"),
        ({"dir": "a", "formats": []}, ValueError, "`formats`"),
        ({"dir": "a", "formats": ["tflite"]}, ValueError, "'tflite'"),
        ({"dir": "a", "verify": 1}, TypeError, "`verify`"),
    ):
        with pytest.raises(error, match=match):
            ExportCompressed(**kwargs)  # type: ignore[arg-type]


def test_what_cannot_be_copied_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise TypeError("no")

    monkeypatch.setattr(callback_module, "standalone_copy", refuse)
    callback = ExportCompressed(tmp_path / "files")
    with pytest.warns(UserWarning, match="nothing written, Net cannot be copied: TypeError: no"):
        fit(tmp_path, callback)
    assert callback.files == []
