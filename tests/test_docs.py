"""The code of the README and of each page runs, the blocks of a page one after another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# What the README's reader has: a module and its data.
GIVEN = """
import torch
from tests.helpers import Net, StatefulLoader, held_out
model, teacher = Net(), Net(width=32)
import lightning as L
class Data(L.LightningDataModule):
    def train_dataloader(self): return StatefulLoader()
    def val_dataloader(self): return held_out()
data = Data()
"""


PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(page.read_text())
]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_the_page_runs(tmp_path: Path, page: str) -> None:
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    code = "import torch\ntorch.set_num_threads(1)\n" + (GIVEN if page == "README.md" else "") + "\n".join(blocks)
    (tmp_path / "page.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "page.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
