"""Run by ``test_guard.py`` in two processes: ranks that log different values of the watched metric."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_compress import GradualPruning
from lightning_compress.guard import AccuracyGuard
from tests.helpers import BATCHES, Crash, CrashAt, Net, StatefulLoader, seeded, snapshot, trainer

warnings.filterwarnings("ignore")

VALUES = ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9], [0.9, 0.5, 0.9, 0.9, 0.5, 0.9])  # of each rank, epoch by epoch


class RankNet(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", VALUES[self.trainer.global_rank][self.trainer.current_epoch], batch_size=1)


def main(folder: Path) -> None:
    def run(action: Any, epochs: int, extra: Any = (), ckpt_path: Any = None) -> dict[str, Any]:
        prune = GradualPruning(0.8, schedule="linear", begin=0, end=5 * BATCHES, every=1)
        guard = AccuracyGuard("val_acc", action=action)
        started = trainer(
            folder,
            [prune, guard, *extra],
            max_epochs=epochs,
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            use_distributed_sampler=False,
        )
        module = seeded(RankNet, seed=started.global_rank)
        loaders = StatefulLoader(seed=10 + started.global_rank), StatefulLoader(seed=20 + started.global_rank)
        started.fit(module, *loaders, ckpt_path=ckpt_path)
        return snapshot(module, started) | {"pruning": prune.state_dict(), "events": guard.events}

    results = {"hold": run("hold", 4), "rollback": run("rollback", 6), "stop": run("stop", 4)}
    try:
        run("rollback", 6, [CrashAt(21, folder / "guard.ckpt")])
    except Crash:
        results["resumed"] = run("rollback", 6, ckpt_path=folder / "guard.ckpt")
    torch.save(results, folder / f"guard_rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
