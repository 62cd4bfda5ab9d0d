"""The apps of examples/apps, each by the command of their README, in a folder of its own, with the installed wheel."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_packaging import ROOT, build, python

for needed in ("sklearn", "onnx", "onnxruntime", "onnxscript", "safetensors"):
    pytest.importorskip(needed)

APPS = ROOT / "examples/apps"
COMMANDS = dict(
    re.findall(r"^## (\w+)$.*?^```bash\n(.*?)^```", (APPS / "README.md").read_text(), re.MULTILINE | re.DOTALL)
)
# what saves seconds and changes nothing that is looked at here
QUICK = dict.fromkeys(COMMANDS, " callbacks.report.latency=false callbacks.report.plots=false")
QUICK["template"] += " callbacks.export.verify=false"
QUICK |= {"cli": " --trainer.callbacks.latency=false --trainer.callbacks.plots=false", "plain": ""}


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what `pip install` of the wheel puts into `site-packages`."""
    wheel = build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Any:
    """Run a command in a copy of an app that lies alone; returns its folder and what it printed."""

    def run(app: str, command: str) -> tuple[Path, str]:
        folder = tmp_path / app
        shutil.copytree(APPS / app, folder, ignore=shutil.ignore_patterns("__pycache__"))
        here = Path(sys.executable).parent
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
            "PYTHONPATH": str(installed),
            "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, done.stdout + done.stderr

    return run


def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """Return all Lightning checkpoints below a folder, by name, loaded as anybody does."""
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}


def zeros(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Return how many weights of linear and convolutional layers are zero, and how many there are."""
    weights = [value for value in checkpoint["state_dict"].values() if value.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def report(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("report.json")
    return json.loads(path.read_text())


def test_the_package_is_that_of_the_wheel(installed: Path) -> None:
    find = "from importlib.util import find_spec; print(find_spec('lightning_compress').origin)"
    assert Path(python("-c", find, cwd=installed, path=installed).strip()).is_relative_to(installed)


def test_each_app_has_a_command_and_knows_nothing_of_the_package() -> None:
    assert sorted(COMMANDS) == sorted(path.name for path in APPS.iterdir() if path.is_dir())
    files = [path for path in APPS.rglob("*") if path.suffix in (".py", ".yaml") and path.name != "compressed.py"]
    assert len(files) > 10
    assert not [path for path in files if "lightning_compress" in path.read_text()]


@pytest.mark.parametrize("app", COMMANDS)
def test_the_command_compresses(app: str, run: Any) -> None:
    folder, _ = run(app, COMMANDS[app].rstrip() + QUICK[app])
    found = checkpoints(folder)
    assert found
    for checkpoint in found.values():
        pruned, total = zeros(checkpoint)
        assert pruned == round(0.9 * total)
    figures = report(folder)
    assert figures["totals"]["claimed_zeros"] == pruned
    assert all(technique["stage"] == 1.0 for technique in figures["techniques"])

    if app == "template":  # quantized as well, tested from its best checkpoint, and exported
        assert figures["checkpoints"][0]["monitor"] == "compress/val/acc"
        (file,) = folder.rglob("model.safetensors")
        assert file.parent.parent == next(folder.glob("logs/train/runs/*"))
        assert file.stat().st_size < 0.2 * 4 * total
    if app == "list":  # what was named again has stayed
        assert figures["checkpoints"][0]["monitor"] == "compress/val_acc"
        assert {technique["technique"] for technique in figures["techniques"]} == {"pruning", "quantization"}
    if app == "nemo_like":  # exp_manager's checkpoints, behind our callbacks
        assert (folder / "experiments/digits/checkpoints/last.ckpt").exists()
        assert checkpoint["lr_schedulers"][0].keys() >= {"applied", "base_lrs"}  # ours, in the place of the model's
    if app == "cli":  # `+=` appends
        assert "lr-Adam" in figures["metrics"]


def test_a_sweep_leaves_a_folder_and_two_objectives_for_each_run(run: Any) -> None:
    folder, printed = run(
        "template",
        "python train.py -m '+compress@callbacks=[pruning,export]' callbacks.pruning.final_sparsity=0.5,0.9 "
        "trainer.max_epochs=2 callbacks.model_checkpoint.monitor=compress/val/acc callbacks.export.verify=false "
        "'callbacks.export.formats=[safetensors]' '+optimized_metric=[test/acc,compress/safetensors_bytes]' "
        "+hydra.callbacks.log._target_=hydra.experimental.callbacks.LogJobReturnCallback",
    )
    objectives = [ast.literal_eval(found) for found in re.findall(r"Succeeded with return value: (\[.*\])", printed)]
    runs = sorted(folder.glob("logs/train/multiruns/*/[01]"))
    assert len(objectives) == len(runs) == 2
    for directory, sparsity, (accuracy, size) in zip(runs, (0.5, 0.9), objectives, strict=True):
        pruned, total = zeros(checkpoints(directory)["last"])
        assert pruned == round(sparsity * total)
        assert size == (directory / "export/model.safetensors").stat().st_size
        assert 0.1 < accuracy < 1.0
    assert objectives[1][1] < objectives[0][1]
