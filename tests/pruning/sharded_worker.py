"""Run by ``test_sharding.py`` in two processes: pruning of parameters that ``fully_shard`` (FSDP2) has split."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lightning_compress import GradualPruning, LearningRateSchedule
from tests.helpers import CLASSES, Crash, CrashAt, Net, StatefulLoader, held_out, seeded, trainer

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

TWO_PROCESSES: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
CASES: dict[str, dict[str, Any]] = {
    "magnitude": {"final_sparsity": 0.8},
    "erk": {"final_sparsity": 0.7, "scope": "erk"},
    "gradient_regrowth": {"final_sparsity": 0.7, "criterion": "gradient_weight", "regrowth": 0.3},
    "movement": {"final_sparsity": 0.6, "criterion": "movement"},
    "activation": {"final_sparsity": 0.7, "criterion": "activation_weight", "scope": "layer"},
    "random": {"final_sparsity": 0.5, "criterion": "random"},
    "2:4": {"granularity": "2:4"},
    "blocks": {"final_sparsity": 0.5, "granularity": "block:2x2"},
    "feedback": {"final_sparsity": 0.7, "regrowth": "feedback"},
    "blocks_feedback": {
        "final_sparsity": 0.5,
        "granularity": "block:2x2",
        "criterion": "gradient_weight",
        "regrowth": "feedback",
    },
    "rescue": {"final_sparsity": 0.985},
}
RESUMED = ("gradient_regrowth", "2:4", "feedback", "blocks_feedback")


class UnevenNet(Net):
    """A net whose last layer is so small that it would be emptied."""

    zero_rows = 0

    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.data[: self.zero_rows] = 0.0
        self.net[4].weight.data *= 1e-3


class ShardedNet(UnevenNet):
    """A net whose layers are split over the processes."""

    def configure_model(self) -> None:
        if not hasattr(self.net[0].weight, "to_local"):
            for layer in (self.net[0], self.net[2], self.net[4]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


STRUCTURED: dict[str, dict[str, Any]] = {
    "channel": {"final_sparsity": 0.5, "granularity": "channel", "criterion": "gradient_weight"},
    "channel_macs": {"target_macs": 0.92, "granularity": "channel", "criterion": "gradient_weight"},
    "head": {"final_sparsity": 0.5, "granularity": "head"},
}


class SparseNet(ShardedNet):
    """A net of whose first layer one process holds zeros only."""

    zero_rows = 8


class ColumnNet(ShardedNet):
    """A net whose layers are split along their inputs."""

    def configure_model(self) -> None:
        if not hasattr(self.net[0].weight, "to_local"):
            for layer in (self.net[0], self.net[2], self.net[4]):
                mesh = self.device_mesh["data_parallel"]
                fully_shard(layer, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))


class Structured(Net):
    """Convolutions with a batch norm and a residual addition, and an attention: what is coupled, over odd shards."""

    shards = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                "first": nn.Conv1d(1, 7, 3, padding=1),
                "norm": nn.BatchNorm1d(7),
                "second": nn.Conv1d(7, 7, 3, padding=1, groups=7),
                "third": nn.Conv1d(7, 8, 1),
                "attention": nn.MultiheadAttention(8, 4, batch_first=True),
                "last": nn.Linear(8, CLASSES),
            }
        )

    def configure_model(self) -> None:
        if self.shards and not hasattr(self.net["first"].weight, "to_local"):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net.values():
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x: Any) -> Any:
        net = self.net
        out = torch.relu(net["norm"](net["first"](x[:, None])))
        out = torch.relu(net["third"](out + net["second"](out))).transpose(1, 2)
        return net["last"]((out + net["attention"](out, out, out, need_weights=False)[0]).mean(1))


class Whole(Structured):
    """The same, not split."""

    shards = False


def whole(tensor: Any) -> Any:
    return tensor.full_tensor().detach().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def run(
    folder: Path,
    kwargs: dict[str, Any],
    extra: Any = (),
    ckpt_path: Any = None,
    distributed: bool = False,
    net: Any = ShardedNet,
) -> Any:
    callback = GradualPruning(begin=0.1, end=0.7, every=2, **kwargs)
    strategy: Any = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=distributed,
    )
    strategy = DDPStrategy(process_group_backend="gloo") if net is Whole else strategy
    started = trainer(folder, [callback, LearningRateSchedule(), *extra], strategy=strategy, **TWO_PROCESSES)
    module = seeded(net)
    started.fit(module, StatefulLoader(seed=10 + started.global_rank), held_out(), ckpt_path=ckpt_path)
    assert callback._running.is_sharded == (net is not Whole)
    return {
        "weights": {name: whole(parameter) for name, parameter in module.named_parameters()},
        "state": callback.state_dict(),
        "sparsity": callback._running.sparsity,
        "pruned": None if callback.pruned_module is None else callback.pruned_module.state_dict(),
    }


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, kwargs in CASES.items():
        results[name] = run(folder, kwargs)
    results["already_sparse"] = run(folder, CASES["magnitude"], net=SparseNet)
    for name in ("2:4", "blocks"):
        results[f"{name}_columns"] = run(folder, CASES[name], net=ColumnNet)
    for name, kwargs in STRUCTURED.items():
        for net in (Structured, Whole):
            results[f"{name}_{net.__name__}"] = run(folder, kwargs, net=net)
    path = folder / "structured.ckpt"
    try:
        run(folder, STRUCTURED["channel"], [CrashAt(7, path)], net=Structured)
    except Crash:
        results["channel_resumed"] = run(folder, STRUCTURED["channel"], (), path, net=Structured)
    for distributed in (False, True):
        for name in RESUMED:
            path = folder / f"{name}_{distributed}.ckpt"
            try:
                run(folder, CASES[name], [CrashAt(7, path)], distributed=distributed)
            except Crash:
                results[f"{name}_resumed_{distributed}"] = run(folder, CASES[name], (), path, distributed)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
