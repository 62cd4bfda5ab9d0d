"""Case 7: a moment means the same through LightningCLI, YAML files, Hydra overrides and Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_compress import GradualPruning
from lightning_compress.moments import Moment
from tests.helpers import Net

# Lightning uses parts of jsonargparse that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

MOMENTS = {
    "1": Moment(1, "steps"),
    "1.0": Moment(1.0, "fraction"),
    "1e-1": Moment(0.1, "fraction"),
    "0.5": Moment(0.5, "fraction"),
    "3ep": Moment(3.0, "epochs"),
}


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


@pytest.mark.parametrize("text", MOMENTS)
def test_case_7_one_moment_through_four_doors(tmp_path: Path, text: str) -> None:
    expected = MOMENTS[text]
    begin = "--trainer.callbacks.begin=0"
    assert (
        pruning_of(
            cli("--trainer.callbacks+=lightning_compress.GradualPruning", f"--trainer.callbacks.end={text}", begin)
        ).end
        == expected
    )

    (tmp_path / "config.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: lightning_compress.GradualPruning\n    init_args:\n"
        f"      begin: 0\n      end: {text}\n"
    )
    assert pruning_of(cli(f"--config={tmp_path / 'config.yaml'}")).end == expected

    (tmp_path / "hydra.yaml").write_text("_target_: lightning_compress.GradualPruning\nbegin: 0\nend: 0\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        assert hydra.utils.instantiate(hydra.compose("hydra", [f"end={text}"])).end == expected

    (tmp_path / "file.yaml").write_text(f"_target_: lightning_compress.GradualPruning\nbegin: 0\nend: {text}\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        assert hydra.utils.instantiate(hydra.compose("file")).end == expected

    value: Any = {"1": 1, "1.0": 1.0, "1e-1": 1e-1, "0.5": 0.5, "3ep": "3ep"}[text]
    assert GradualPruning(begin=0, end=value).end == expected


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
