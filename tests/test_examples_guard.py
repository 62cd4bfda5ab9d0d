"""The examples of regularization and of the search run to their end, on pictures that are soon learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with noisy copies of three pictures in place of the parsed digits."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (3, 7, 7), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels = torch.arange(3).repeat(180)  # of each 100 are held out
    noise = torch.randint(0, 128, (len(labels), 28, 28), generator=generator)
    pixels = (127 * patterns[labels] + noise).byte().flatten(1)
    path = tmp_path_factory.mktemp("examples")
    (path / "outputs/cache").mkdir(parents=True)
    torch.save({"pixels": pixels, "labels": labels}, path / "outputs/cache/mnist5k.pt")
    return path


def run(folder: Path, example: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / example)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_search_finds_a_sparsity(folder: Path) -> None:
    printed = run(folder, "search.py")
    figures = json.loads((folder / "outputs/search/report.json").read_text())
    found = figures["totals"]["claimed_sparsity"]
    assert found > 0.9
    assert f"{found:.1%} of the weights are zero" in printed
    curve = [line.split() for line in printed.splitlines() if line[:5].strip().isdigit()]
    assert len(curve) == len(figures["history"])
    assert max(float(row[1]) for row in curve) >= found - 0.001
    assert (folder / "outputs/search/report.png").read_bytes().startswith(b"\x89PNG")


def test_the_network_is_slimmed(folder: Path) -> None:
    printed = run(folder, "regularization.py")
    [parameters] = [line for line in printed.splitlines() if line.startswith("parameters")]
    before, after = (int(number.replace(",", "")) for number in parameters.split()[1:4:2])
    assert after < before / 2
