"""What docs/composition.md says: any order gives the same run, and senseless combinations are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_compress import (
    AccuracyGuard,
    CompressionReport,
    ExportCompressed,
    GradualPruning,
    KnowledgeDistillation,
    LearningRateSchedule,
    QuantizationAwareTraining,
    SparsityRegularization,
)
from tests.helpers import Net, StatefulLoader, held_out, same, seeded, trainer

PAGE = Path(__file__).parents[1] / "docs/composition.md"


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.net[0])


Make = Callable[[Path], list[Callback]]
# in the order of the table's rows: (row, what makes the callbacks, what the error says, module, Trainer's arguments)
REFUSED: list[tuple[int, Make, str, Callable[..., Any], dict[str, Any]]] = [
    (1, lambda _: [GradualPruning(0.5), GradualPruning(0.5, granularity="2:4")], "net.0.weight.*disjoint", Net, {}),
    (1, lambda _: [QuantizationAwareTraining(8), QuantizationAwareTraining(4, include="net.0")], "disjoint", Net, {}),
    (2, lambda _: [LearningRateSchedule(), LearningRateSchedule(0)], "more than one LearningRateSchedule", Net, {}),
    (2, lambda _: [CompressionReport(), CompressionReport()], "more than one.*`CompressionReport`", Net, {}),
    (2, lambda path: [ExportCompressed(path), ExportCompressed(path)], "another `dir`", Net, {}),
    (3, lambda _: [guard("val_acc"), guard("val_loss")], "Two guards.*hold", Net, {}),
    (4, lambda _: [guard("val_acc"), StochasticWeightAveraging(0.1)], "EMAWeightAveraging", Net, {}),
    (5, lambda _: [LearningRateSchedule()], "StepLR.*override=True", Scheduled, {}),
    (6, lambda _: [GradualPruning("auto")], "AccuracyGuard", Net, {}),
    (7, lambda _: [GradualPruning(target_macs=0.5)], "granularity='channel'", Net, {}),
    (8, lambda _: [GradualPruning(0.5, granularity="channel", regrowth="feedback")], "regrowth=0.0", Net, {}),
    (8, lambda _: [GradualPruning(granularity="2:4", regrowth=0.2)], "single weights", Net, {}),
    (9, lambda _: [GradualPruning(granularity="2:4", scope="erk")], "has set already", Net, {}),
    (10, lambda _: [QuantizationAwareTraining(range="learned", scheme="affine")], "scheme='affine'", Net, {}),
    (11, lambda _: [KnowledgeDistillation("ema", features={"net.0": "net.0"})], "student itself", Net, {}),
    (11, lambda _: [KnowledgeDistillation("ema", cache="folder")], "changes at every step", Net, {}),
    (12, lambda _: [KnowledgeDistillation(Net(), cache="a", features={"net.0": "net.0"})], "leave one", Net, {}),
    (13, lambda _: [GradualPruning(0.5)], "'net.0.weight' is computed.*exclude", Normed, {}),
    (13, lambda _: [SparsityRegularization()], "'net.0.weight' is computed.*exclude", Normed, {}),
    (14, lambda _: [QuantizationAwareTraining()], "bf16-mixed", Net, {"precision": "bf16-true"}),
]


def guard(monitor: str) -> AccuracyGuard:
    return AccuracyGuard(monitor, action="rollback")


@pytest.mark.parametrize(("row", "make", "message", "module", "arguments"), REFUSED)
def test_what_makes_no_sense_is_refused_before_the_first_step(
    row: int, make: Make, message: str, module: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    steps: list[int] = []

    class Counting(module):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    def run() -> None:
        trainer(tmp_path, make(tmp_path), **arguments).fit(Counting(), StatefulLoader(), held_out())

    with pytest.raises((ValueError, RuntimeError), match=message):  # two of one kind are refused by Lightning
        run()
    assert not steps


def test_each_row_of_the_table_has_a_case() -> None:
    table = PAGE.read_text().partition("## What is refused")[2].partition("## Which recipe")[0]
    rows = re.findall(r"^\| (?!combination|---)", table, re.MULTILINE)
    sharded = 1  # the last row: FSDP and DeepSpeed are in the tests of each room
    assert {row for row, *_ in REFUSED} == set(range(1, len(rows) + 1 - sharded))


@pytest.mark.filterwarnings("ignore:.* the run stopped before")  # the guard holds both
@pytest.mark.parametrize("order", [(6, 5, 4, 3, 2, 1, 0), (3, 0, 5, 2, 6, 4, 1)])
def test_the_order_in_the_list_changes_nothing(order: tuple[int, ...], tmp_path: Path) -> None:
    def run(folder: Path, places: tuple[int, ...]) -> Any:
        callbacks = [
            GradualPruning(0.5, begin=0.1, end=0.5),
            QuantizationAwareTraining(begin=0.5),
            KnowledgeDistillation(seeded(Net, 1), weight=0.5),
            LearningRateSchedule(),
            SparsityRegularization(strength=1e-3),
            AccuracyGuard("val_loss", mode="min", tolerance=0.01, action="rollback"),
            CompressionReport(str(folder), latency=False, plots=False),
        ]
        model = seeded(Net)
        fit = trainer(folder, [callbacks[place] for place in places], max_epochs=4)
        fit.fit(model, StatefulLoader(), held_out())
        return model.state_dict(), [event["action"] for event in callbacks[5].events]

    listed = run(tmp_path / "listed", tuple(range(7)))
    assert "rollback" in listed[1]
    assert same(listed, run(tmp_path / "other", order))
