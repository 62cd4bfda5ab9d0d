"""FSDP2: masks act on the sharded parameters, and selection is exact across shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from lightning_compress import GradualPruning
from lightning_compress.training import refuse_sharding
from tests.helpers import same


def test_two_processes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(root / "tests" / "pruning" / "sharded_worker.py"), str(tmp_path)),
        ],
        check=False,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert same(results[0], results[1])

    asked = {"magnitude": 0.8, "erk": 0.7, "gradient_regrowth": 0.7, "movement": 0.6, "activation": 0.7, "random": 0.5}
    for name, sparsity in (asked | {"2:4": 0.5, "blocks": 0.5, "rescue": 0.985}).items():
        matrices = [weight for weight in results[0][name]["weights"].values() if weight.dim() > 1]
        zeros, total = sum(int((w == 0).sum()) for w in matrices), sum(w.numel() for w in matrices)
        assert abs(zeros / total - sparsity) < 1 / total, name
        assert all((w != 0).any() for w in matrices)
    for weight in results[0]["2:4"]["weights"].values():
        if weight.dim() > 1:
            assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    for name in ("magnitude", "gradient_regrowth"):
        for distributed in (False, True):
            assert same(results[0][name], results[0][f"{name}_resumed_{distributed}"])


def test_flat_parameters_are_refused_by_name() -> None:
    class Fake:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match=r"GradualPruning .*FSDPStrategy.*fully_shard"):
        refuse_sharding(Fake(), GradualPruning(), but_dtensors=True)  # type: ignore[arg-type]
