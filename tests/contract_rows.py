"""Every callback of the library, as the contract suite runs it. A new callback is one more row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

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
from lightning_compress.copying import standalone_copy
from lightning_compress.export import load_compressed
from lightning_compress.modules import clean_name
from lightning_compress.quantization.layers import ActivationQuantizer, QuantizedLayer
from tests.helpers import CLASSES, FEATURES, same, zeros


@dataclass(frozen=True)
class Row:
    """A callback and what it promises at the end of a run.

    Args:
        make: Returns a new callback; it may write into the folder that it is given.
        check: Raises where the end of a run is not what the callback promises.
        is_alone: Whether the callback has a use without the others.
    """

    make: Callable[[Path], Callback]
    check: Callable[[LightningModule, Any, Trainer], None]
    is_alone: bool = True


def _is_pruned(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    pruned, total = zeros(module)
    assert abs(pruned / total - 0.8) < 1 / total
    assert callback.stage() == 1.0


def _layers_are_pruned(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
    for name, facts in callback.layers().items():
        assert int((parameters[name] == 0).sum()) == facts["pruned"]
    pruned, total = zeros(module)
    assert abs(pruned / total - 0.7) < 1 / total


def _has_decayed(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        assert all(float(group["lr"]) < 1e-6 for group in optimizer.param_groups)


def _has_shrunk(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    weights = [parameter.detach().abs() for parameter in module.parameters() if parameter.dim() > 1]
    assert sum(weight.sum() for weight in weights) / sum(weight.numel() for weight in weights) < 0.13  # 0.14 at first


def _has_reported(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    report = json.loads((Path(callback.dir) / "report.json").read_text())
    matrices = [p for p in report["parameters"] if len(p["shape"]) > 1]
    assert (sum(p["zeros"] for p in matrices), sum(p["total"] for p in matrices)) == zeros(module)


def _is_exported(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    assert all(file.agrees and file.difference == 0.0 for file in callback.files)
    assert len(callback.files) == trainer.is_global_zero
    plain = standalone_copy(module)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for tensor in plain.state_dict().values():
        tensor.zero_()
    assert same(dict(load_compressed(callback.dir / "model.safetensors", plain).state_dict()), state)


def _channels_are_pruned(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    linears = {clean_name(name): child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    smaller = {
        clean_name(n): child for n, child in callback.pruned_module.named_modules() if isinstance(child, nn.Linear)
    }
    for name, layer in linears.items():
        # A layer that is tied to an embedding hands its inputs on: what makes them keeps its width.
        is_free = name == "net.0" or (name == "net.2" and not hasattr(module, "embedding"))
        gone = (layer.weight == 0).all(1) & (layer.bias == 0)
        assert int(gone.sum()) == (layer.out_features // 2 if is_free else 0), name
        assert smaller[name].out_features == layer.out_features - int(gone.sum())
    x = torch.randn(5, 12, dtype=linears["net.0"].weight.dtype)
    assert torch.allclose(callback.pruned_module(x), module(x), atol=1e-5)


def _works_less(module: LightningModule, callback: Any, trainer: Trainer) -> None:
    before, after = (
        sum(child.in_features * child.out_features for child in whole.modules() if isinstance(child, nn.Linear))
        for whole in (module, callback.pruned_module)
    )
    assert 0.5 * before < after <= 0.6 * before
    assert callback.stage() == 1.0


def _connections(criterion: str, **kwargs: Any) -> Row:
    pattern = {} if kwargs.get("granularity") == "2:4" else {"final_sparsity": 0.75}

    def check(module: LightningModule, callback: Any, trainer: Trainer) -> None:
        pruned, total = zeros(module)
        assert pruned == round((pattern or {"final_sparsity": 0.5})["final_sparsity"] * total)
        assert callback.stage() == 1.0

    return Row(
        lambda path: GradualPruning(criterion=criterion, begin=0.1, end=0.7, every=2, **pattern, **kwargs), check
    )


def _quantized(**kwargs: Any) -> Row:
    def check(module: LightningModule, callback: Any, trainer: Trainer) -> None:
        assert callback.stage() == 1.0
        assert not callback.blind()
        for quantizer in module.modules():
            if isinstance(quantizer, ActivationQuantizer):  # of numbers that are normal, and small sums of them
                assert -30.0 < float(quantizer.low) <= float(quantizer.high) < 30.0
        for layer in module.modules():
            if isinstance(layer, QuantizedLayer):
                # As many values as the bits allow, zero among them.
                rows = layer.weight_quantizer._rows(layer.quantized_weight().detach())
                assert all(len(row.unique()) <= 2**callback.weight_bits for row in rows)
                assert (layer.quantized_weight()[layer.weight == 0] == 0).all()

    return Row(lambda path: QuantizationAwareTraining(begin=0.3, freeze_ranges=0.7, **kwargs), check)


class Guide(nn.Module):
    """A teacher that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(FEATURES, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(20, CLASSES)
        self.first = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.head(self.body(x))


def _distils(teacher: Callable[[], Any] = Guide, **kwargs: Any) -> Row:
    def make(path: Path) -> Callback:
        state = torch.random.get_rng_state()
        callback = KnowledgeDistillation(teacher(), **kwargs)
        torch.random.set_rng_state(state)
        return callback

    def check(module: LightningModule, callback: Any, trainer: Trainer) -> None:
        assert getattr(vars(module).get("training_step"), "stays_behind", False) is False
        if isinstance(callback.teacher, Guide):
            assert callback.teacher.passes > 0
            assert callback.teacher.training
            assert all(parameter.grad is None for parameter in callback.teacher.parameters())
            state = callback.teacher.state_dict()
            assert all(torch.equal(state[name].float(), first) for name, first in callback.teacher.first.items())
        else:
            own = {clean_name(name): parameter for name, parameter in module.named_parameters()}
            average = callback.state_dict()["ema"]
            assert any(not torch.equal(average[name], own[name]) for name in average if name in own)

    return Row(make, check)


ROWS = {
    "pruning": Row(lambda path: GradualPruning(0.8, begin=0.1, end=0.6, every=2), _is_pruned),
    "pruning_erk": Row(
        lambda path: GradualPruning(0.7, scope="erk", schedule="linear", begin=0, end=0.9, every=3), _layers_are_pruned
    ),
    "pruning_gradient": _connections("gradient"),
    "pruning_taylor_regrowth": _connections("gradient_weight", regrowth=0.3),
    "pruning_for_good": _connections("magnitude", regrowth=0.0),
    "pruning_2_4_feedback": _connections("gradient_weight", granularity="2:4", regrowth="feedback"),
    "pruning_activation": _connections("activation_weight", scope="layer"),
    "pruning_movement": _connections("movement"),
    "pruning_random": _connections("random"),
    "pruning_2_4": _connections("activation_weight", granularity="2:4"),
    "pruning_blocks": _connections("gradient", granularity="block:4x1"),
    "pruning_channels": Row(
        lambda path: GradualPruning(0.5, granularity="channel", scope="layer", begin=0.1, end=0.7, every=2),
        _channels_are_pruned,
    ),
    "pruning_neurons_by_gradient": Row(
        lambda path: GradualPruning(
            0.5, granularity="channel", criterion="gradient_weight", scope="layer", begin=0.1, end=0.65, every=2
        ),
        _channels_are_pruned,
    ),
    "pruning_macs": Row(
        lambda path: GradualPruning(granularity="channel", target_macs=0.6, begin=0.1, end=0.7, every=2), _works_less
    ),
    "quantization": _quantized(),
    "quantization_minmax_affine": _quantized(
        weight_bits=4, scheme="affine", range="minmax", granularity="tensor", activation_bits=None
    ),
    "quantization_learned": _quantized(weight_bits=3, activation_bits=4, range="learned"),
    "quantization_groups": _quantized(weight_bits=2, granularity="group:4"),
    "distillation": _distils(losses=["kl", ["dist", 0.5]], weight={"first": 0.9, "last": 0.5}),
    "distillation_features": _distils(features={"net.1": "body.0", "net.3": {"layer": "body.2", "loss": "relation"}}),
    "distillation_ema": _distils(lambda: "ema:0.9", losses="mse"),
    "guard": Row(
        lambda path: AccuracyGuard("val_acc", tolerance=0.9, action="rollback"),
        lambda module, callback, trainer: None,
        is_alone=False,
    ),
    "regularization": Row(
        lambda path: SparsityRegularization("l1", {"first": 0.0, "last": 0.05, "end": 0.5}), _has_shrunk
    ),
    "regularization_proximal": Row(lambda path: SparsityRegularization("proximal_l1", 1.0), _has_shrunk),
    "learning_rate": Row(lambda path: LearningRateSchedule(warmup=0.2, decay="cosine"), _has_decayed),
    "report": Row(lambda path: CompressionReport(dir=str(path), plots=False, latency=False), _has_reported),
    "export": Row(lambda path: ExportCompressed(path / "files", formats=("safetensors",)), _is_exported),
}

ALONE = {name: row for name, row in ROWS.items() if row.is_alone}

# One of each class, for the runs that have all of them.
TOGETHER = ("regularization", "pruning", "quantization", "distillation_features", "learning_rate", "report", "guard")
