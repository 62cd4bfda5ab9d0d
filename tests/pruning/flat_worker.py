"""Run by ``test_sharding.py`` in two processes: pruning of parameters that ``FSDPStrategy`` (FSDP1) has split.

torch and Lightning refuse FSDP1 on a CPU; what they refuse is lifted here, and the rest of it runs as it is.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_sharded_data_parallel
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.fsdp.wrap import wrap

from lightning_compress import GradualPruning, LearningRateSchedule
from tests.helpers import Crash, CrashAt, LazyNet, Net, StatefulLoader, held_out, seeded, trainer
from tests.pruning.sharded_worker import CASES, RESUMED, TWO_PROCESSES, UnevenNet

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def use_the_cpu(state: Any, *args: Any) -> Any:
    state._device_handle = _FSDPDeviceHandle.from_device(torch.device("cpu"))
    return state


fully_sharded_data_parallel._init_device_handle = use_the_cpu
# It frees what it has just moved to the CPU, which is the same memory here.
FlatParamHandle.to_cpu = lambda handle: nullcontext()


class CPUStrategy(FSDPStrategy):
    """Lightning's check is for the class itself."""


class SparseNet(UnevenNet):
    """A net of which a part is pruned already."""

    zero_rows = 8


class WrappedNet(LazyNet):
    """A net that wraps its layers itself, before anybody can see them."""

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(*(wrap(layer) if isinstance(layer, nn.Linear) else layer for layer in Net().net))


class ChannelsLastNet(UnevenNet):
    """A net with a kernel that lies in memory in another order than its indices."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)


def run(
    folder: Path,
    kwargs: dict[str, Any],
    extra: Any = (),
    ckpt_path: Any = None,
    net: Any = UnevenNet,
    **strategy: Any,
) -> Any:
    callback = GradualPruning(begin=0.1, end=0.7, every=2, **kwargs)
    is_flat = strategy.pop("is_flat", True)
    chosen = (CPUStrategy if is_flat else DDPStrategy)(process_group_backend="gloo", **strategy)
    started = trainer(folder, [callback, LearningRateSchedule(), *extra], strategy=chosen, **TWO_PROCESSES)
    module = seeded(net)
    started.fit(module, StatefulLoader(seed=10 + started.global_rank), held_out(), ckpt_path=ckpt_path)
    is_split = any(parameter.dim() < 2 and parameter.numel() > 16 for parameter in module.parameters())
    assert is_split == is_flat or net is WrappedNet
    state, layers = callback.state_dict(), callback.layers()
    with FullyShardedDataParallel.summon_full_params(chosen.model) if is_flat else nullcontext():
        weights = {
            name.replace("_fsdp_wrapped_module.", ""): parameter.detach().clone()
            for name, parameter in module.named_parameters()
        }
    return {"weights": weights, "state": state, "sparsity": callback._running.sparsity, "layers": layers}


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, kwargs in CASES.items():
        results[name] = run(folder, kwargs)
        results[f"{name}_ddp"] = run(folder, kwargs, is_flat=False)
    results["already_sparse"] = run(folder, CASES["magnitude"], net=SparseNet)
    results["already_sparse_ddp"] = run(folder, CASES["magnitude"], net=SparseNet, is_flat=False)
    results["blocks_by_layer"] = run(folder, CASES["blocks"], auto_wrap_policy={nn.Linear})
    results["wrapped"] = run(folder, CASES["erk"], net=WrappedNet)
    results["movement_gradients_only"] = run(folder, CASES["movement"], sharding_strategy="SHARD_GRAD_OP")
    for kind in ("full", "sharded"):
        for name in RESUMED:
            path = folder / f"flat_{name}_{kind}.ckpt"
            try:
                run(folder, CASES[name], [CrashAt(7, path)], state_dict_type=kind)
            except Crash:
                results[f"{name}_{kind}"] = run(folder, CASES[name], (), path, state_dict_type=kind)
            if kind == "full":
                results[f"{name}_elsewhere"] = run(folder, CASES[name], (), path, is_flat=False)
    try:
        run(folder, CASES["magnitude"], net=ChannelsLastNet)
    except ValueError as error:
        results["channels_last"] = str(error)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
