"""Steps that call `self.forward(...)`, past all hooks, as NeMo's models and lightning-hydra-template do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    CompressionReport,
    ExportCompressed,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
)
from tests.helpers import CLASSES, FEATURES, Net, StatefulLoader, held_out, hooks_of, same, seeded, trainer


class Calls(Net):
    """Two parts, called one after the other: there is no single submodule that stands for the model."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder, self.decoder = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU()), nn.Linear(16, CLASSES)
        del self.net

    def forward(self, signal: Tensor) -> Tensor:
        return self.decoder(self.encoder(signal))

    def logits(self, signal: Tensor) -> Tensor:
        return self(signal=signal)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self.logits(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class CallsForward(Calls):
    def logits(self, signal: Tensor) -> Tensor:
        return self.forward(signal=signal)


def fit(tmp_path: Path, model: Any, *callbacks: Any) -> Any:
    trainer(tmp_path, callbacks, max_epochs=2).fit(model, StatefulLoader(), held_out())
    assert "forward" not in vars(model)
    return model


def test_the_student_learns_as_one_that_calls_itself(tmp_path: Path) -> None:
    models = [
        fit(tmp_path, seeded(kind), KnowledgeDistillation(seeded(Calls)), GradualPruning(0.5))
        for kind in (Calls, CallsForward)
    ]
    assert same(models[0].state_dict(), models[1].state_dict())
    assert not hooks_of(models[1])


@pytest.mark.parametrize("sanity", [0, 2])
def test_channels_latency_and_files_know_their_inputs(tmp_path: Path, sanity: int) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pruning = GradualPruning(0.5, granularity="channel")
    report = CompressionReport(dir=str(tmp_path / "report"), plots=False)
    export = ExportCompressed(tmp_path / "files", formats=["onnx"])
    callbacks = [report, pruning, QuantizationAwareTraining(begin=0.5), export]
    model = seeded(CallsForward)
    trainer(tmp_path, callbacks, max_epochs=2, num_sanity_val_steps=sanity).fit(model, StatefulLoader(), held_out())
    assert "forward" not in vars(model)
    assert pruning.pruned_module.encoder[0].out_features == 8
    [file] = export.files
    assert file.agrees
    assert set(file.metrics) == {"val_acc"}
    assert report.figures["latency"]["inputs"].startswith("signal=float32")
