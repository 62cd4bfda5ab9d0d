"""LightningCLI: what a command line can say. (Case 7, moments through every door, is in test_hydra.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_compress import GradualPruning
from tests.helpers import Net

# Lightning uses parts of jsonargparse that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


CONF = Path(__file__).parents[1] / "conf/compress"
CALLBACKS = sorted(path.stem for path in CONF.glob("*.yaml") if "defaults:" not in path.read_text())


class CLINet(Net):
    """LightningCLI wants an importable module without arguments."""

    def __init__(self) -> None:
        super().__init__()


def cli(*args: str) -> Any:
    return LightningCLI(
        CLINet,
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false", *args],
    )


def pruning_of(cli: Any) -> GradualPruning:
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, GradualPruning))


def test_other_arguments_through_the_cli() -> None:
    made = pruning_of(
        cli(
            "--trainer.callbacks+=lightning_compress.GradualPruning",
            '--trainer.callbacks.include=["net.0", "net.2"]',
            '--trainer.callbacks.final_sparsity={"net.0": 0.5, "net.2": 0.8}',
            "--trainer.callbacks.exclude=net.4",
            "--trainer.callbacks.scope=erk",
        )
    )
    assert made.include == ("net.0", "net.2")
    assert made.exclude == ("net.4",)
    assert made.final_sparsity == {"net.0": 0.5, "net.2": 0.8}
    assert made.scope == "erk"


@pytest.mark.parametrize("name", CALLBACKS)
def test_each_callback_is_made_from_a_config_file_with_all_its_arguments(name: str, tmp_path: Path) -> None:
    written = yaml.safe_load((CONF / f"{name}.yaml").read_text())[name]
    target = written.pop("_target_")
    given = {"teacher": "ema", "monitor": "val_acc", "dir": "files"}  # what only a user can know
    arguments = {key: given.get(key, value) for key, value in written.items()}
    config = {"trainer": {"callbacks": [{"class_path": target, "init_args": arguments}]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    made = cli(f"--config={tmp_path / 'config.yaml'}").trainer.callbacks
    assert [type(callback).__name__ for callback in made].count(target.rpartition(".")[2]) == 1
