"""The config group `compress`: what an app gets that asks for it, and that it says what the signatures say."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import ConfigCompositionException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from omegaconf import DictConfig, OmegaConf

import lightning_compress
from lightning_compress import GradualPruning, _hydra_plugin
from lightning_compress.moments import Moment
from tests.helpers import Crash, CrashAt, Net, StatefulLoader, same, seeded, snapshot, trainer, zeros

ROOT = Path(__file__).parents[1]
FILES = {path.stem: OmegaConf.load(path) for path in sorted((ROOT / "conf/compress").glob("*.yaml"))}
RECIPES = [name for name, content in FILES.items() if "defaults" in content]
CALLBACKS = [name for name in FILES if name not in RECIPES]

APP_CONFIG = """
defaults:
  - callbacks: own
  - _self_
lr: 0.1
"""
OWN_CALLBACK = """
own:
  _target_: collections.Counter
"""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Path]:
    """A strange app's config folder; the plugin is known to Hydra as it is where the package is installed."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/own.yaml").write_text(OWN_CALLBACK)
    (tmp_path / "app.yaml").write_text(APP_CONFIG)
    state = Singleton.get_state()
    Plugins.instance().register(_hydra_plugin.LightningCompressSearchPathPlugin)
    yield tmp_path
    Singleton.set_state(state)


def compose(app: Path, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(app), version_base="1.3"):
        return hydra.compose("app", overrides=list(overrides))


def pruning(app: Path, *overrides: str) -> Any:
    """The pruning callback that an app gets by these overrides, made as apps make it: without `_convert_`."""
    return hydra.utils.instantiate(compose(app, "+compress@callbacks=pruning", *overrides).callbacks.pruning)


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_only_the_group_compress_is_shipped() -> None:
    assert [path.name for path in (ROOT / "conf").iterdir()] == ["compress"]
    assert {path.suffix for path in (ROOT / "conf/compress").iterdir()} == {".yaml"}


def test_every_callback_has_a_file() -> None:
    public = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    callbacks = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, Callback)}
    assert callbacks == {FILES[name][name]._target_.removeprefix("lightning_compress.") for name in CALLBACKS}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_file_says_what_the_signature_says(name: str) -> None:
    assert list(FILES[name]) == [name]
    written = OmegaConf.to_container(FILES[name][name])
    assert isinstance(written, dict)
    package, _, attribute = written.pop("_target_").partition(".")
    assert package == "lightning_compress"
    parameters = inspect.signature(getattr(lightning_compress, attribute)).parameters
    assert list(written) == list(parameters)
    for argument, parameter in parameters.items():
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        if default is not inspect.Parameter.empty:  # an argument that must be given shows an example
            assert (type(written[argument]), written[argument]) == (type(default), default), argument


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_is_made_from_its_file_as_it_stands(name: str) -> None:
    config = OmegaConf.create(OmegaConf.to_container(FILES[name][name]))
    for argument, written in OmegaConf.to_container(config).items():
        if "${hydra:" in str(written):  # there is a folder only where an app runs
            config[argument] = "export"
    for argument in OmegaConf.missing_keys(config):  # `???`: only the user can know it
        config[argument] = "val_acc"
    assert isinstance(hydra.utils.instantiate(config), Callback)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_callbacks_of_ours_only(name: str, app: Path) -> None:
    asked = ["callbacks.distillation.teacher=ema"] if name.endswith("distill") else []  # `???` in the file
    callbacks = compose(app, f"+compress@callbacks={name}", *asked).callbacks
    made = {name: entry for name, entry in callbacks.items() if name != "own"}
    if "export" in made:
        made["export"].dir = "export"  # the file's is a folder that only a running app has
    assert len(made) > 1
    for entry in made.values():
        assert entry._target_.startswith("lightning_compress.")
        assert isinstance(hydra.utils.instantiate(entry), Callback)


# --- what an app gets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["+compress", "+compress@callbacks"])
@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("pruning", ["pruning"]),
        ("learning_rate", ["learning_rate"]),
        ("[pruning,report]", ["pruning", "report"]),
        ("[report,learning_rate,pruning]", ["report", "learning_rate", "pruning"]),
        ("prune", ["pruning", "learning_rate", "report"]),
        ("[prune,report]", ["pruning", "learning_rate", "report"]),
        ("prune_qat", ["pruning", "quantization", "learning_rate", "report"]),
    ],
)
def test_callbacks_join_those_of_the_app(app: Path, group: str, asked: str, given: Sequence[str]) -> None:
    config = compose(app, f"{group}={asked}")
    assert list(config) == ["callbacks", "lr"]
    assert list(config.callbacks) == ["own", *given]
    assert config.callbacks.own == {"_target_": "collections.Counter"}


@pytest.mark.parametrize("name", FILES)
def test_an_app_with_another_key_gets_the_same(name: str, app: Path) -> None:
    usual, other = compose(app, f"+compress@callbacks={name}"), compose(app, f"+compress@trainer.own_key={name}")
    del usual.callbacks.own
    # a recipe says `- pruning@_here_`: without it, its files go to `callbacks`, and the recipe's own values elsewhere
    assert other.trainer.own_key == usual.callbacks
    assert list(other.callbacks) == ["own"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_the_place_of_a_configured_scheduler(name: str, app: Path) -> None:
    assert compose(app, f"+compress@callbacks={name}").callbacks.learning_rate.override is True
    assert compose(app, "+compress@callbacks=learning_rate").callbacks.learning_rate.override is False


def test_an_experiment_file_of_the_app_takes_a_recipe_and_changes_it(app: Path) -> None:
    (app / "experiment").mkdir()
    (app / "experiment/small.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /compress@callbacks: prune_qat\n  - _self_\n"
        "callbacks:\n  pruning:\n    final_sparsity: {backbone.*: 0.9, head: 0.5}\n"
    )
    callbacks = compose(app, "+experiment=small", "callbacks.quantization.weight_bits=4").callbacks
    assert list(callbacks) == ["own", "pruning", "quantization", "learning_rate", "report"]
    assert callbacks.pruning.final_sparsity == {"backbone.*": 0.9, "head": 0.5}
    assert (callbacks.pruning.schedule, callbacks.quantization.weight_bits) == ("exponential", 4)
    on_the_command_line = "callbacks.pruning.final_sparsity={backbone.*:0.9,head:0.5}"
    callbacks = compose(app, "+compress@callbacks=prune_qat", on_the_command_line).callbacks
    assert hydra.utils.instantiate(callbacks.pruning).final_sparsity == {"backbone.*": 0.9, "head": 0.5}


def test_rounding_begins_when_the_ramp_of_pruning_has_ended(app: Path) -> None:
    callbacks = compose(app, "+compress@callbacks=prune_qat").callbacks
    assert callbacks.pruning.end == callbacks.quantization.begin


def test_arguments_are_set_and_callbacks_left_out_by_further_overrides(app: Path) -> None:
    config = compose(app, "+compress@callbacks=prune", "callbacks.pruning.begin=2ep", "~callbacks.report")
    assert config.callbacks.pruning.begin == "2ep"
    assert list(config.callbacks) == ["own", "pruning", "learning_rate"]


@pytest.mark.parametrize("asked", ["nonsense", "[pruning,nonsense]"])
def test_what_does_not_exist_is_refused_by_name(app: Path, asked: str) -> None:
    with pytest.raises(ConfigCompositionException, match="compress/nonsense"):
        compose(app, f"+compress@callbacks={asked}")


def test_an_argument_that_does_not_exist_is_refused_by_name(app: Path) -> None:
    with pytest.raises(ConfigCompositionException, match=r"callbacks\.pruning\.sparsity"):
        compose(app, "+compress@callbacks=pruning", "callbacks.pruning.sparsity=0.5")


def test_a_sweep_runs_each_value(app: Path) -> None:
    installed = app / "site-packages/hydra_plugins"
    installed.mkdir(parents=True)
    shutil.copy(ROOT / "lightning_compress/_hydra_plugin.py", installed / "lightning_compress.py")
    (app / "app.py").write_text(
        "import hydra, json\n"
        "from omegaconf import OmegaConf\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='app')\n"
        "def main(config):\n"
        "    print(json.dumps(OmegaConf.to_container(config.callbacks.pruning)))\n"
        "main()\n"
    )
    swept = "callbacks.pruning.final_sparsity=0.5,0.8,0.95"
    done = subprocess.run(
        [sys.executable, "app.py", "-m", "+compress@callbacks=pruning", swept, "callbacks.pruning.end=1,1.0"],
        cwd=app,
        env={"PYTHONPATH": f"{installed.parent}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(one["final_sparsity"], repr(one["end"])) for one in made] == [
        (sparsity, end) for sparsity in (0.5, 0.8, 0.95) for end in ("1", "1.0")
    ]


# --- where the plugin finds the files ---------------------------------------------------------------------------------


def folder_of(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """What the plugin would add if the package lay there."""
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_compress"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return _hydra_plugin._config_folder()


def test_an_installed_package_brings_its_own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lightning_compress"
    (package / "conf/compress").mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "conf/compress").mkdir(parents=True)  # somebody else's, who also installs a folder `conf`
    assert folder_of(package, monkeypatch) == package / "conf"


def test_sources_have_their_configs_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lightning_compress"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "conf/compress").mkdir(parents=True)
    assert folder_of(package, monkeypatch) == tmp_path / "conf"


def test_a_package_without_configs_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lightning_compress"
    package.mkdir()
    (package / "__init__.py").touch()
    assert folder_of(package, monkeypatch) is None


def test_a_package_that_is_gone_adds_nothing(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hydra_plugin, "find_spec", lambda name: None)
    assert list(compose(app).callbacks) == ["own"]


# --- what callbacks are given -----------------------------------------------------------------------------------------

MOMENTS = {
    "1": (1.0, "steps"),
    "1.0": (1.0, "fraction"),
    "1e-1": (0.1, "fraction"),
    "0.5": (0.5, "fraction"),
    "3ep": (3.0, "epochs"),
}


def by_override(app: Path, written: str) -> Any:
    return pruning(app, "callbacks.pruning.begin=0", f"callbacks.pruning.end={written}")


def by_hydra_file(app: Path, written: str) -> Any:
    defaults = "defaults:\n  - app\n  - compress@callbacks: pruning\n  - _self_\n"
    (app / "outer.yaml").write_text(f"{defaults}callbacks:\n  pruning:\n    begin: 0\n    end: {written}\n")
    with hydra.initialize_config_dir(str(app), version_base="1.3"):
        return hydra.utils.instantiate(hydra.compose("outer").callbacks.pruning)


def by_plain_yaml(app: Path, written: str) -> Any:
    return GradualPruning(**yaml.safe_load(f"begin: 0\nend: {written}\n"))


def by_command_line(app: Path, written: str) -> Any:
    prefix = "--trainer.callbacks"
    return lightning_cli(
        app, f"{prefix}+=lightning_compress.GradualPruning", f"{prefix}.begin=0", f"{prefix}.end={written}"
    )


def by_command_line_file(app: Path, written: str) -> Any:
    callback = f"{{class_path: lightning_compress.GradualPruning, init_args: {{begin: 0, end: {written}}}}}"
    (app / "cli.yaml").write_text(f"trainer:\n  callbacks:\n    - {callback}\n")
    return lightning_cli(app, f"--config={app / 'cli.yaml'}")


def lightning_cli(app: Path, *args: str) -> Any:
    quiet = ["--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    made = LightningCLI(Net, run=False, args=[*quiet, f"--trainer.default_root_dir={app}", *args])
    return next(callback for callback in made.trainer.callbacks if isinstance(callback, GradualPruning))


@pytest.mark.parametrize("written", MOMENTS)
@pytest.mark.parametrize("door", [by_override, by_hydra_file, by_plain_yaml, by_command_line, by_command_line_file])
def test_a_moment_is_the_same_through_every_door(
    door: Callable[[Path, str], Any], written: str, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of how Lightning 2.6 calls it
    value, unit = MOMENTS[written]
    assert door(app, written).end == Moment(value, unit)
    python: Any = {"1": 1, "1.0": 1.0, "1e-1": 0.1, "0.5": 0.5, "3ep": "3ep"}[written]
    assert GradualPruning(begin=0, end=python).end == Moment(value, unit)


def test_an_end_at_step_1_behind_a_begin_at_half_the_run_is_refused(app: Path) -> None:
    callback = pruning(app, "callbacks.pruning.begin=0.5", "callbacks.pruning.end=1")
    with pytest.raises(ValueError, match=r"`?begin=0\.5.*end=1\b"):
        trainer(app, [callback]).fit(Net(), StatefulLoader(), StatefulLoader(seed=1))


def test_containers_of_hydra_are_taken_and_leave_no_trace_in_the_checkpoint(app: Path) -> None:
    overrides = [
        "callbacks.pruning.include=[net.0,net.2]",
        "callbacks.pruning.final_sparsity={net.0:0.5,net.2:0.75}",
        "callbacks.pruning.parameters=[weight]",
    ]

    def run(folder: Path, extra: Sequence[Callback] = (), path: Path | None = None) -> tuple[Net, Any]:
        model = seeded(Net)
        fit = trainer(folder, [pruning(app, *overrides), *extra])
        fit.fit(model, StatefulLoader(), StatefulLoader(seed=1), ckpt_path=path)
        return model, snapshot(model, fit)

    model, whole = run(app / "whole")
    for name, sparsity in (("net.0.weight", 0.5), ("net.2.weight", 0.75)):
        pruned, total = zeros(model, [name])
        assert pruned == round(sparsity * total)

    path = app / "stopped.ckpt"
    with pytest.raises(Crash):
        run(app / "stopped", [CrashAt(11, path)])
    torch.load(path, weights_only=True)
    assert same(run(app / "resumed", path=path)[1], whole)
