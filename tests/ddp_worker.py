"""Run by ``test_contract.py`` in two processes: every row of the contract suite under DDP."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_compress import DistillationModule
from tests.contract_rows import ALONE, ROWS, TOGETHER, Guide
from tests.helpers import Crash, CrashAt, Net, StatefulLoader, seeded, snapshot, trainer

warnings.filterwarnings("ignore")


def main(folder: Path) -> None:
    results: dict[str, Any] = {}

    def run(names: Any, extra: Any = (), ckpt_path: Any = None, wrap: Any = lambda module: module) -> dict[str, Any]:
        callbacks = [ROWS[name].make(folder) for name in names]
        started = trainer(
            folder,
            [*callbacks, *extra],
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            use_distributed_sampler=False,
        )
        # DDP hands out rank 0's weights; everything else differs from rank to rank.
        module = wrap(seeded(Net, seed=started.global_rank))
        loaders = StatefulLoader(seed=10 + started.global_rank), StatefulLoader(seed=20 + started.global_rank)
        started.fit(module, *loaders, ckpt_path=ckpt_path)
        for name, callback in zip(names, callbacks, strict=True):
            if name != "report" or started.is_global_zero:
                ROWS[name].check(module, callback, started)
        states = {name: c.state_dict() for name, c in zip(names, callbacks, strict=True) if hasattr(c, "technique")}
        if "guard" in states:  # metrics that the module does not reduce are each rank's own
            del states["guard"]["good"]["metrics"]
        return snapshot(module, started) | {"callbacks": states}

    for name in ALONE:
        results[name] = run([name])
    results["module"] = run([], wrap=lambda module: DistillationModule(module, Guide(), features={"net.1": "body.0"}))
    results["all"] = run(TOGETHER)
    try:
        run(TOGETHER, [CrashAt(13, folder / "ddp.ckpt")])
    except Crash:
        results["resumed"] = run(TOGETHER, ckpt_path=folder / "ddp.ckpt")
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
