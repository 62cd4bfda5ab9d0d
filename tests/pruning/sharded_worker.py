"""Run by ``test_sharding.py`` in two processes: pruning of parameters that ``fully_shard`` (FSDP2) has split."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_compress import GradualPruning, LearningRateSchedule
from tests.helpers import Crash, CrashAt, Net, StatefulLoader, held_out, seeded, trainer

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

CASES: dict[str, dict[str, Any]] = {
    "magnitude": {"final_sparsity": 0.8},
    "erk": {"final_sparsity": 0.7, "scope": "erk"},
    "gradient_regrowth": {"final_sparsity": 0.7, "criterion": "gradient_weight", "regrowth": 0.3},
    "movement": {"final_sparsity": 0.6, "criterion": "movement"},
    "activation": {"final_sparsity": 0.7, "criterion": "activation_weight", "scope": "layer"},
    "random": {"final_sparsity": 0.5, "criterion": "random"},
    "2:4": {"granularity": "2:4"},
    "blocks": {"final_sparsity": 0.5, "granularity": "block:2x2"},
    "rescue": {"final_sparsity": 0.985},
}


class ShardedNet(Net):
    """A net whose layers are split over the processes; the last one scaled down, so that it would be emptied."""

    def configure_model(self) -> None:
        if not hasattr(self.net[0].weight, "to_local"):
            self.net[4].weight.data *= 1e-3
            for layer in (self.net[0], self.net[2], self.net[4]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def whole(tensor: Any) -> Any:
    return tensor.full_tensor().detach().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def run(folder: Path, kwargs: dict[str, Any], extra: Any = (), ckpt_path: Any = None, distributed: bool = False) -> Any:
    callback = GradualPruning(begin=0.1, end=0.7, every=2, **kwargs)
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=distributed,
    )
    started = trainer(
        folder, [callback, LearningRateSchedule(), *extra], strategy=strategy, devices=2, use_distributed_sampler=False
    )
    module = seeded(ShardedNet)
    started.fit(module, StatefulLoader(seed=10 + started.global_rank), held_out(), ckpt_path=ckpt_path)
    state = callback.state_dict()
    weights = {name: whole(parameter) for name, parameter in module.named_parameters()}
    return {"weights": weights, "state": state, "sparsity": callback._running.sparsity}


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, kwargs in CASES.items():
        results[name] = run(folder, kwargs)
    for distributed in (False, True):
        path = folder / f"sharded{distributed}.ckpt"
        for name in ("magnitude", "gradient_regrowth"):
            try:
                run(folder, CASES[name], [CrashAt(13, path)], distributed=distributed)
            except Crash:
                results[f"{name}_resumed_{distributed}"] = run(folder, CASES[name], (), path, distributed)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
