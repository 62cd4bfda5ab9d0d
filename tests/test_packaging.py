"""The package as it is installed: from a wheel, from a wheel built out of the sdist, and in place."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# An app that knows nothing of us, and the callback that it has configured itself.
APP = """
import hydra


@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    for name, entry in cfg.callbacks.items():
        made = hydra.utils.instantiate(entry)
        print(name, type(made).__module__, type(made).__name__)


if __name__ == "__main__":
    main()
"""
CONFIG = """
callbacks:
  own:
    _target_: collections.Counter
"""
QUIET = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]


def python(*args: str | Path, cwd: Path, executable: str | Path = sys.executable, path: Path | None = None) -> str:
    """What a Python process of its own prints; it finds no more than is installed, and what lies in `path`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(project: Path, kind: str, output: Path) -> Path:
    python("-m", "hatchling", "build", "-t", kind, "-d", output, cwd=project)
    (made,) = output.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what `pip install` of the wheel puts into `site-packages`."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which the sources are installed in place, beside this environment's packages."""
    folder = tmp_path_factory.mktemp("editable")
    python("-m", "venv", "--without-pip", folder, cwd=ROOT)
    executable = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, executable=executable)
    Path(own.strip(), "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    python("-m", "pip", "--python", executable, "install", *options, "--editable", ROOT, cwd=folder)
    return executable


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "app.yaml").write_text(CONFIG)
    return tmp_path


def test_the_wheel_holds_the_package_the_plugin_and_the_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "hydra_plugins.lightning_compress:" in archive.read(entry_points).decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_compress").rglob("*.py")}
    configs = {f"lightning_compress/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert configs
    plugin = {"hydra_plugins/lightning_compress.py"}
    expected = sources - {"lightning_compress/_hydra_plugin.py"} | configs | plugin | {"lightning_compress/py.typed"}
    assert names == expected


def test_a_wheel_built_out_of_the_sdist_holds_the_same(wheel: Path, tmp_path: Path) -> None:
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        # the filter came with 3.12, and with the latest of older versions
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    again = build(tmp_path / sdist.name.removesuffix(".tar.gz"), "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()


def test_a_strange_app_takes_our_callbacks_from_the_wheel(unpacked: Path, app: Path) -> None:
    printed = python("app.py", "+compress@callbacks=pruning", *QUIET, cwd=app, path=unpacked)
    assert "own collections Counter" in printed
    assert "pruning lightning_compress.pruning.callback GradualPruning" in printed
    search_path = python("app.py", "--info", "searchpath", *QUIET, cwd=app, path=unpacked)
    assert f"file://{unpacked.as_posix()}/lightning_compress/conf " in search_path


def test_a_strange_app_takes_our_callbacks_from_the_sources_installed_in_place(editable: Path, app: Path) -> None:
    printed = python("app.py", "+compress@callbacks=pruning", *QUIET, cwd=app, executable=editable)
    assert "own collections Counter" in printed
    assert "pruning lightning_compress.pruning.callback GradualPruning" in printed
    search_path = python("app.py", "--info", "searchpath", *QUIET, cwd=app, executable=editable)
    assert f"file://{ROOT.as_posix()}/conf " in search_path
    where = python(
        "-c", "import hydra_plugins.lightning_compress as it; print(it.__file__)", cwd=app, executable=editable
    )
    assert Path(where).is_relative_to(editable.parents[1])


@pytest.mark.parametrize("override", ["+compress=pruning", "+compress@callbacks=[pruning,report]"])
def test_the_plugin_warns_of_nothing_and_imports_neither_torch_nor_the_package(
    unpacked: Path, app: Path, override: str
) -> None:
    (app / "lean.py").write_text(
        "import runpy, sys\n"
        "runpy.run_path('app.py', run_name='__main__')\n"
        "heavy = {'torch', 'lightning', 'lightning_compress', 'torchmetrics', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'hydra_plugins.lightning_compress' in sys.modules\n"
    )
    printed = python("-W", "error", "lean.py", override, *QUIET, "--cfg", "job", cwd=app, path=unpacked)
    assert "_target_: lightning_compress.GradualPruning" in printed
