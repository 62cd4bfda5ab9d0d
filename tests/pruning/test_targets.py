"""A size, work or time of the removed model as the target of pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_compress import AccuracyGuard, GradualPruning
from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.pruning import target
from lightning_compress.pruning.removal import channel_groups
from lightning_compress.pruning.target import Removal
from tests.helpers import BATCHES, Crash, CrashAt, Net, StatefulLoader, held_out, same, seeded, snapshot, trainer
from tests.pruning.test_structure import Attention, GroupedQueries, Module, Residual


def net() -> Net:
    return Net(width=32)


def pruning(**kwargs: Any) -> GradualPruning:
    return GradualPruning(**({"granularity": "channel", "begin": 2, "end": 20, "every": 2} | kwargs))


def fit(path: Path, module: Any, callbacks: Sequence[Callback], ckpt_path: Any = None, **kwargs: Any) -> Any:
    run = trainer(path, callbacks, **kwargs)
    run.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
    return run


def widths(module: Any) -> tuple[int, int]:
    return module.net[0].out_features, module.net[2].out_features


def macs(first: int, second: int) -> int:
    return 12 * first + first * second + second * 4


def size(first: int, second: int) -> int:
    return 4 * (macs(first, second) + first + second + 4)  # weights and biases of float32


@pytest.mark.parametrize(("name", "count"), [("target_macs", macs), ("target_size", size)])
@pytest.mark.parametrize("goal", [0.2, "0.5", 0.93])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"criterion": "gradient_weight", "begin": 0}, {"criterion": "activation_weight", "scope": "layer"}],
    ids=str,
)
def test_the_removed_model_is_at_the_target(
    tmp_path: Path, name: str, count: Callable[[int, int], int], goal: Any, arguments: Any
) -> None:
    callback = pruning(**{name: goal}, **arguments)
    fit(tmp_path, seeded(net), [callback])
    first, second = widths(callback.pruned_module)
    limit = float(goal) * count(32, 32)
    one_more = [count(first + 1, second), count(first, second + 1)]
    assert count(first, second) <= limit
    assert max(one_more) > limit or (arguments.get("scope") == "layer" and count(first + 1, second + 1) > limit)
    assert callback.stage() == 1.0
    assert f"{count(first, second) / count(32, 32):.4g} with the {64 - first - second} that are to go" in (
        callback.summary()
    )


@pytest.mark.parametrize(
    ("make", "shape", "granularity", "goal"),
    [(Residual, (3, 4, 4), "channel", 0.4), (Attention, (6, 3), "head", 0.8), (GroupedQueries, (6, 3), "head", 0.9)],
)
def test_what_the_copy_told_is_what_is_cut(
    tmp_path: Path, make: Any, shape: tuple[int, ...], granularity: str, goal: float
) -> None:
    module, callback = seeded(lambda: Module(make(), shape)), pruning(granularity=granularity, target_size=goal)
    fit(tmp_path, module, [callback])
    left, whole = (
        sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        for model in (callback.pruned_module, module)
    )
    assert callback._aim[1] == left / whole <= goal
    assert left / whole > goal - 0.25


def test_tied_weights_are_counted_once() -> None:
    inputs = ExampleInputs((torch.randn(2, 4),))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert Removal(tied, "", inputs, [], "size")._whole == 4 * (16 + 4 + 4)


@pytest.mark.parametrize("criterion", ["magnitude", "gradient_weight", "random"])
@pytest.mark.parametrize("step", [1, 2, 7, 13, 20, 25])
def test_resumes_bit_identically(tmp_path: Path, step: int, criterion: Any) -> None:
    def run(extra: Sequence[Callback] = (), path: Path | None = None) -> Any:
        module, callback = seeded(net), pruning(target_macs=0.5, criterion=criterion)
        result = fit(tmp_path, module, [callback, *extra], path)
        return snapshot(module, result) | {"pruning": callback.state_dict()}

    whole = run()
    with pytest.raises(Crash):
        run([CrashAt(step, tmp_path / "stopped.ckpt")])
    torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert same(run(path=tmp_path / "stopped.ckpt"), whole)


def test_the_number_is_found_anew_in_each_quarter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    run = trainer(tmp_path, [pruning(target_macs=0.5, begin=4, end=20, every=1)])

    class Counted(Removal):
        def __init__(self, *args: Any) -> None:
            made.append(run.global_step)
            super().__init__(*args)

    monkeypatch.setattr("lightning_compress.pruning.callback.Removal", Counted)
    run.fit(seeded(net), StatefulLoader(), held_out())
    assert made == [0, 4, 8, 12, 16, 20]  # whether it is in reach; then at the updates


def test_a_rollback_brings_the_number_back(tmp_path: Path) -> None:
    class Dips(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.1 if self.trainer.current_epoch == 1 else 0.9, batch_size=1)

    module, callback = seeded(lambda: Dips(width=32)), pruning(target_macs=0.5)
    module.example_input_array = torch.zeros(2, 12)
    guard = AccuracyGuard("val_acc", baseline=0.9, action="rollback")
    fit(tmp_path, module, [callback, guard], max_epochs=8)
    assert [event["action"] for event in guard.events] == ["rollback", "resume"]
    assert callback.stage() == 1.0
    first, second = widths(callback.pruned_module)
    assert macs(first, second) <= 0.5 * macs(32, 32) < max(macs(first + 1, second), macs(first, second + 1))


# --- latency ----------------------------------------------------------------------------------------------------------


def test_latency_is_the_ratio_of_turns_at_batch_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def clock(module: nn.Module, inputs: ExampleInputs, budget: float) -> Any:
        assert inputs.batch == 1
        module(*inputs.args, **inputs.kwargs)
        turns.append(sum(parameter.numel() for parameter in module.parameters()))
        return SimpleNamespace(seconds=turns[-1] * (1.0 + len(turns) // 2 * 0.1))  # the machine slows down

    monkeypatch.setattr(target, "median_latency", clock)
    callback = pruning(target_latency=0.5)
    fit(tmp_path, seeded(net), [callback])
    first, second = widths(callback.pruned_module)
    parameters = [size(a, b) // 4 for a, b in ((first, second), (first + 1, second), (first, second + 1), (32, 32))]
    assert 0.95 * 0.5 * parameters[3] <= parameters[0] <= 1.1 * 0.5 * parameters[3]
    assert turns[1::2] == [parameters[3]] * (len(turns) // 2)  # the dense model beside each smaller one


def test_fewer_channels_take_less_time() -> None:
    torch.set_num_threads(1)
    module = nn.Sequential(nn.Linear(64, 8192), nn.ReLU(), nn.Linear(8192, 64))
    inputs = ExampleInputs((torch.randn(4, 64),))
    groups, _ = channel_groups(module, inputs.args)
    removal = Removal(module, "", inputs, groups, "latency")
    assert removal.share([torch.arange(8192) < 256]) < 0.6
    assert module[0].out_features == removal._model[0].out_features == 8192


def test_inputs_without_rows_have_no_latency() -> None:
    module = nn.Bilinear(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"measured at batch 1, but .*`example_input_array` in Bilinear.*`target_macs`"
    ):
        Removal(module, "", ExampleInputs((torch.zeros(1, 2), torch.zeros(2, 3))), [], "latency")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_macs": 1.0}, ValueError, "`target_macs` must lie between 0 and 1, both excluded, got 1.0"),
        ({"target_size": 0}, ValueError, "`target_size` must lie between"),
        ({"target_latency": True}, TypeError, "`target_latency` must be a number"),
        ({"target_size": 0.5, "target_macs": 0.5}, ValueError, "`target_size` and `target_macs` are given"),
        ({"target_size": 0.5, "granularity": "weight"}, ValueError, "`granularity='weight'` leaves it.*'channel'"),
        ({"target_macs": 0.5, "final_sparsity": 0.5}, ValueError, "leave `final_sparsity` out, got 0.5"),
        ({"target_macs": 0.5, "final_sparsity": "auto"}, ValueError, "leave `final_sparsity` out, got 'auto'"),
    ],
)
def test_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pruning(**arguments)


def test_a_target_out_of_reach_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = seeded(net)
    with pytest.raises(
        ValueError, match=r"`target_macs=0\.01` is out of reach: with one channel left in each of 2 gro"
    ):
        fit(tmp_path, module, [pruning(target_macs=0.01)])
    assert module.trainer.global_step == 0
    assert macs(1, 1) / macs(32, 32) > 0.01


def test_what_has_no_score_in_time_is_said(tmp_path: Path) -> None:
    class Frozen(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[4].parameters(), lr=0.1)

    module, callback = seeded(lambda: Frozen(width=32)), pruning(target_macs=0.5, criterion="gradient")
    with pytest.warns(UserWarning, match=r"nothing was learnt about.*on the way to 0\.5 of the multiply-adds"):
        fit(tmp_path, module, [callback])
    assert callback.pruned_module is None
    assert module.trainer.global_step == BATCHES * 4
