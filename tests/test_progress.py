"""What a user sees while it trains: one line of each callback at the start, and ramps in the progress bar."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_compress import (
    AccuracyGuard,
    CompressionReport,
    ExportCompressed,
    GradualPruning,
    KnowledgeDistillation,
    LearningRateSchedule,
    QuantizationAwareTraining,
    SparsityRegularization,
)
from tests.helpers import BATCHES, Net, StatefulLoader, held_out, seeded, trainer


class Shown(Callback):
    """Keeps what the progress bar shows when a training batch begins."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.metrics.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_ramps_show_in_the_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: type[ProgressBar]
) -> None:
    shown = Shown()
    pruning = GradualPruning({"net.0": 0.75}, begin=0, end=BATCHES, include=["net.0"])
    quantization = QuantizationAwareTraining(weight_bits=4, begin=BATCHES + 3, freeze_ranges=1.0, freeze_batchnorm=1.0)
    callbacks = [kind(), pruning, quantization, AccuracyGuard("val_acc", tolerance=1.0), shown]
    trainer(tmp_path, callbacks, enable_progress_bar=True, max_epochs=2).fit(seeded(Net), StatefulLoader(), held_out())

    def of(name: str) -> list[Any]:
        return [metrics.get(f"compress/{name}") for metrics in shown.metrics]

    sparsity = of("sparsity")
    assert sparsity[1:] == sorted(sparsity[1:])
    assert len(set(sparsity)) > 4
    assert sparsity[-1] == 0.75
    assert of("weight_bits")[BATCHES:] == [32] * 3 + [4] * (BATCHES - 3)
    assert of("held")[BATCHES] == 0
    printed = capsys.readouterr()
    assert "compress/sparsity" in printed.out + printed.err


def test_each_callback_says_in_one_line_what_it_will_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [
        GradualPruning(0.5, include=["net.*"], exclude=["net.4"]),
        QuantizationAwareTraining(exclude=["net.0"]),
        SparsityRegularization(include=["net.2"]),
        KnowledgeDistillation(seeded(Net)),
        LearningRateSchedule(warmup=0.25),
        AccuracyGuard("val_acc"),
        CompressionReport(dir=str(tmp_path / "report"), latency=False, plots=False),
        ExportCompressed(tmp_path / "files", formats=["safetensors"]),
    ]

    class Begin(Callback):
        """Ends the run when all others have begun."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.lines = [record.getMessage() for record in caplog.records]

    begin = Begin()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [*callbacks, begin], max_epochs=1).fit(seeded(Net), StatefulLoader(), held_out())
    expected = {
        "GradualPruning": "448 weights of 2 layers (net.0, net.2)",
        "QuantizationAwareTraining": "8-bit weights and 8-bit activations in 2 layers (net.2, net.4",
        "SparsityRegularization": "l1 on 256 weights of 1 layers (net.2)",
        "KnowledgeDistillation": "Net teaches by kl",
        "LearningRateSchedule": "2 steps of warm-up",
        "AccuracyGuard": "holds compression (pruning, quantization, regularization, distillation) when val_acc",
        "CompressionReport": "without latency (CompressionReport(latency=False))",
        "ExportCompressed": "Net as safetensors to",
    }
    for name, words in expected.items():
        own = [line for line in begin.lines if line.startswith(name)]
        assert len(own) == 1, own
        assert words in own[0]
