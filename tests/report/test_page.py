"""The page of one run, the pictures in a logger, and the files that an export has written."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_compress import (
    AccuracyGuard,
    CompressionReport,
    ExportCompressed,
    GradualPruning,
    QuantizationAwareTraining,
)
from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.export import export
from lightning_compress.report.exported import exported_figures
from lightning_compress.report.measure import histogram
from lightning_compress.report.work import multiply_adds
from tests.helpers import Net, StatefulLoader, held_out, seeded, trainer


class Page(HTMLParser):
    """Reads a page: its text, its elements, what it would load; raises where a tag is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.loads: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[0] != "#"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[0] != "#"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def run(folder: Path, callbacks: list[Any], module: Any = None, **kwargs: Any) -> tuple[dict[str, Any], Page]:
    torch.set_num_threads(1)
    report = CompressionReport(str(folder / "report"), latency=False)
    fit = trainer(folder, [report, *callbacks], **kwargs)
    fit.fit(module or seeded(Net), StatefulLoader(), held_out())
    return json.loads((folder / "report/report.json").read_text()), Page(folder / "report/report.html")


class Dipping(Net):
    """Its score falls in the second epoch."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", float(self.current_epoch != 1))


def test_the_page_says_and_draws_all_of_it_and_loads_nothing(tmp_path: Path) -> None:
    pruning = GradualPruning(0.8, begin=2, end=20, every=2, scope="layer")
    quantization = QuantizationAwareTraining(begin=26, freeze_ranges=30, freeze_batchnorm=30)
    figures, page = run(tmp_path, [pruning, quantization, AccuracyGuard("score")], seeded(Dipping), max_epochs=5)
    sparsity = figures["parameters"][0]["sparsity"]
    assert not page.loads
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4
    for words in (
        "Sparsity of the compressed weights", "Bits of the weights", "val_acc", "optimizer step",  # over the run
        "Sparsity of each layer", "Weights that are not zero", "net.2.weight",
        f"zero: {100 * sparsity:.1f} %",
        "Size on disk", "state_dict, as torch.save writes it",
        "The zeros are stored dense and computed dense",
    ):  # fmt: skip
        assert words in page.text, words
    [guard] = [technique for technique in figures["techniques"] if technique["technique"] == "guard"]
    assert [event["action"] for event in guard["events"]] == ["hold", "resume"]
    assert "What the guard did" in page.text
    assert f"{guard['events'][0]['baseline']:.4g}" in page.text


def measured(folder: Path, callbacks: list[Any], **kwargs: Any) -> dict[str, Any]:
    """Return the figures of a run of one epoch, without pictures."""
    torch.set_num_threads(1)
    report = CompressionReport(str(folder), plots=False, **kwargs)
    trainer(folder, [report, *callbacks], max_epochs=1).fit(seeded(Net), StatefulLoader(), held_out())
    assert report.figures is not None
    return report.figures


def test_histograms_count_every_weight_that_is_not_zero(tmp_path: Path) -> None:
    figures = measured(tmp_path, [GradualPruning(0.8)], latency=False)
    rows = [row for row in figures["parameters"] if len(row["shape"]) > 1]
    assert len(rows) == 3
    for row in rows:
        assert sum(row["histogram"]["counts"]) == row["total"] - row["zeros"]
    assert all(row["histogram"] is None for row in figures["parameters"] if row not in rows)


@pytest.mark.parametrize("values", [torch.zeros(3), torch.tensor([0.0, torch.nan, torch.inf])])
def test_histogram_of_nothing(values: torch.Tensor) -> None:
    assert histogram(values) is None


class Named(Net):
    """Has names that would be markup in a page, and mathematics in a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"<b>&$x$": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads["<b>&$x$"](self.net(x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val<i>$\\frac$", self.loss(batch))


def test_names_are_text(tmp_path: Path) -> None:
    _, page = run(tmp_path, [GradualPruning(0.5)], seeded(Named), max_epochs=1)
    assert page.text.count("heads.<b>&$x$.weight") >= 3  # bars, histograms, table
    assert page.text.count("val<i>$\\frac$") >= 2
    assert not {"b", "i"} & set(page.tags)


class Board:
    """What TensorBoard's logger has as `experiment`."""

    def __init__(self) -> None:
        self.images: dict[str, Any] = {}

    def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        assert image.dtype.name == "uint8"
        assert len({tuple(pixel) for row in image[::9, ::9] for pixel in row.tolist()}) > 2
        self.images[tag] = (image.shape, step)


class FakeLogger(TensorBoardLogger):
    """Writes nothing."""

    board: Any

    @property
    def experiment(self) -> Any:
        return self.board

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    save = finalize = log_metrics


def test_tensorboard_gets_the_pictures(tmp_path: Path) -> None:
    logger = FakeLogger(tmp_path)
    logger.board = Board()
    run(tmp_path, [GradualPruning(0.8)], logger=logger, max_epochs=1)
    assert set(logger.board.images) == {f"compress/{name}" for name in ("history", "prices", "layers", "weights")}
    assert all(shape[2] == 3 and step == 8 for shape, step in logger.board.images.values())


def test_tensorboard_can_read_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="board")
    run(tmp_path, [GradualPruning(0.8)], logger=logger, max_epochs=1)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert "compress/layers" in events.Tags()["images"]
    assert events.Images("compress/layers")[0].encoded_image_string.startswith(b"\x89PNG")


class WithLogImage(FakeLogger):
    """Takes pictures as Wandb's logger does."""

    board = object()

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.taken = [*getattr(self, "taken", []), key]


def test_a_logger_with_log_image_gets_the_pictures(tmp_path: Path) -> None:
    logger = WithLogImage(tmp_path)
    run(tmp_path, [], logger=logger, max_epochs=1)
    assert "compress/layers" in logger.taken


class Failing(FakeLogger):
    """Lacks a package that it needs for pictures."""

    @property
    def experiment(self) -> Any:
        return self

    def add_image(self, *args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("No module named 'PIL'")


def test_a_logger_that_cannot_take_pictures_does_not_end_the_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Failing took no pictures: ModuleNotFoundError: No module named"):
        figures, _ = run(tmp_path, [], logger=Failing(tmp_path), max_epochs=1)
    assert figures["run"]["steps"] == 8


# Exported files


@pytest.mark.parametrize("is_first", [True, False])
def test_exported_files_are_reported_wherever_the_export_stands(tmp_path: Path, is_first: bool) -> None:
    torch.set_num_threads(1)
    export = ExportCompressed(tmp_path / "files", formats=["safetensors"])
    report = CompressionReport(str(tmp_path), latency=False, plots=False)
    callbacks = [report, GradualPruning(0.8), export] if is_first else [export, GradualPruning(0.8), report]
    trainer(tmp_path, callbacks, max_epochs=1).fit(seeded(Net), StatefulLoader(), held_out())
    assert report.figures is not None
    [file] = report.figures["exported"]
    assert file["bytes"] == Path(file["path"]).stat().st_size


def test_exported_files_are_weighed_and_timed(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    export = ExportCompressed(tmp_path / "files", formats=["onnx", "pt2", "safetensors"])
    report = CompressionReport(str(tmp_path), plots=False)
    callbacks = [report, GradualPruning(0.8), QuantizationAwareTraining(), export]
    trainer(tmp_path, callbacks, max_epochs=1).fit(seeded(Net), StatefulLoader(), held_out())
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures == report.figures
    onnx, pt2, safetensors = figures["exported"]
    for file in (onnx, pt2, safetensors):
        assert file["bytes"] == Path(file["path"]).stat().st_size
        assert file["metrics"]["val_acc"] == pytest.approx(figures["metrics"]["val_acc"], abs=0.05)
    assert safetensors["latency"] is None
    assert [file["runtime"] for file in (onnx, pt2, safetensors)] == ["onnxruntime", "torch.export", None]
    assert all(0 < file["latency"][batch]["ms"] < 100 for file in (onnx, pt2) for batch in ("1", "64"))
    [sentence] = [note for note in figures["notes"] if note.startswith("model.onnx takes")]
    assert re.search(r"at batch 64 onnxruntime takes [\d.]+ ms \(PyTorch before: [\d.]+ ms\)\.$", sentence)


class Rejected(Callback):
    """Says of a file that it did not agree."""

    def __init__(self, folder: Path) -> None:
        from lightning_compress.export import ExportedFile

        self.files = [ExportedFile("onnx", folder / "model.onnx", 100, problem="outputs differ")]


def test_a_file_that_was_not_left_is_not_reported(tmp_path: Path) -> None:
    assert measured(tmp_path, [Rejected(tmp_path)])["exported"] == []


def test_a_file_that_onnxruntime_cannot_run_says_why(tmp_path: Path) -> None:
    from lightning_compress.report.exported import file_latencies

    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    found = file_latencies("onnx", tmp_path / "model.onnx", nn.Linear(2, 2), ExampleInputs((torch.zeros(3, 2),)))
    assert all(measured["ms"] is None and "Protobuf" in measured["left_out"] for measured in found.values())


# What there is to compute


def test_multiply_adds_are_those_of_one_row_and_of_the_weights_that_are_left(tmp_path: Path) -> None:
    figures = measured(tmp_path, [GradualPruning(0.75)])
    weights = [row for row in figures["parameters"] if len(row["shape"]) > 1]
    total, zeros = (sum(row[key] for row in weights) for key in ("total", "zeros"))
    assert figures["multiply_adds"] == {"total": total, "nonzero": total - zeros}
    assert f"{total - zeros:,} of {total:,} multiply-adds have a weight" in " ".join(figures["notes"])


def test_multiply_adds_of_a_convolution_are_those_of_a_loop() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
    with torch.no_grad():
        conv.weight[::2] = 0.0
    inputs = torch.zeros(2, 4, 5, 7)
    batch, channels, height, width = conv(inputs).shape
    each = conv.weight[0].numel()
    work = sum(each for _ in range(batch * channels * height * width))
    assert multiply_adds(conv, ExampleInputs((inputs,))) == (work, work // 2)
    assert not conv._forward_hooks


class WithKeywords(nn.Module):
    """Takes an argument by keyword, and one that is no tensor."""

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: torch.Tensor) -> torch.Tensor:
        return x * scale + shift


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_files_are_timed_on_the_inputs_that_they_take(tmp_path: Path, format: Any) -> None:
    inputs = ExampleInputs((torch.zeros(3, 2), 2.0), {"shift": torch.ones(3, 2)})
    [file] = export(WithKeywords(), inputs, tmp_path, formats=[format], verify=False)
    [figures] = exported_figures([file], WithKeywords(), inputs)
    assert all(measured["ms"] > 0 for measured in figures["latency"].values())
