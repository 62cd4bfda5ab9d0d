"""Every callback x every promise. Later callbacks add rows to ``contract_rows.py``; later promises add tests here."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from lightning_compress import LearningRateSchedule
from tests.contract_rows import ALONE, ROWS, TOGETHER
from tests.helpers import (
    BATCHES,
    FEATURES,
    Crash,
    CrashAt,
    InfiniteGradientAt,
    LazyNet,
    ManualNet,
    Net,
    QuietNet,
    RawManualNet,
    StatefulLoader,
    TiedNet,
    TwoOptimizerNet,
    held_out,
    hooks_of,
    loss_scaling,
    same,
    seeded,
    snapshot,
    trainer,
    zeros,
)

every_row = pytest.mark.parametrize("row", list(ALONE.values()), ids=list(ALONE))
STEPS = 4 * BATCHES


def fit(tmp_path: Path, row: Any, make: Any = Net, callbacks: Any = (), **kwargs: Any) -> tuple[Any, Any, Any]:
    module, callback = seeded(make), row.make(tmp_path)
    run = trainer(tmp_path, [callback, *callbacks], **kwargs)
    run.fit(module, StatefulLoader(), held_out())
    return module, callback, run


@pytest.mark.parametrize(
    ("make", "step"),
    [
        *((Net, step) for step in sorted(random.Random(0).sample(range(1, STEPS), 5))),
        (ManualNet, 7),
        (TwoOptimizerNet, 22),
    ],
)
@pytest.mark.parametrize("name", ["none", *ALONE, "all", "all_saved_first"])
def test_resumes_bit_identically(tmp_path: Path, name: str, step: int, make: Any) -> None:
    def callbacks(extra: list[Callback]) -> list[Callback]:
        names = {"none": [], "all": TOGETHER, "all_saved_first": TOGETHER}.get(name, [name])
        ours = [ROWS[n].make(tmp_path) for n in names]
        return [*extra, *ours] if name == "all_saved_first" else [*ours, *extra]

    def run(extra: list[Callback], ckpt_path: Any = None) -> Any:
        module = seeded(make)
        own = callbacks(extra)
        started = trainer(tmp_path, own)
        started.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
        states = {c.state_key: c.state_dict() for c in own if hasattr(c, "technique")}
        return snapshot(module, started) | {"callbacks": states}

    whole = run([])
    with pytest.raises(Crash):
        run([CrashAt(step, tmp_path / "crash.ckpt")])
    torch.load(tmp_path / "crash.ckpt", weights_only=True)
    resumed = run([], ckpt_path=tmp_path / "crash.ckpt")
    assert same(whole, resumed)


@every_row
@pytest.mark.parametrize(
    "situation",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 3},
        {"limit_train_batches": 5, "limit_val_batches": 0},
        {"max_epochs": -1, "max_steps": 20},
        {"max_epochs": 50, "max_steps": 20},
    ],
    ids=str,
)
def test_situation(tmp_path: Path, row: Any, situation: dict[str, Any]) -> None:
    row.check(*fit(tmp_path, row, **situation))


@every_row
@pytest.mark.parametrize("make", [ManualNet, RawManualNet, TwoOptimizerNet, TiedNet, LazyNet])
def test_module(tmp_path: Path, row: Any, make: Any) -> None:
    row.check(*fit(tmp_path, row, make))


@every_row
@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.Adam, lambda p: torch.optim.AdamW(p, lr=0.01), lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2)],
    ids=["adam", "adamw", "lbfgs"],
)
def test_optimizer(tmp_path: Path, row: Any, optimizer: Any) -> None:
    row.check(*fit(tmp_path, row, lambda: Net(optimizer=optimizer)))


@every_row
def test_double_precision(tmp_path: Path, row: Any) -> None:
    row.check(*fit(tmp_path, row, precision="64-true"))


@every_row
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # Dynamo's own, at graph breaks
def test_compiled(tmp_path: Path, row: Any) -> None:
    module, callback = seeded(QuietNet), row.make(tmp_path)
    module.example_input_array = torch.randn(4, FEATURES)  # compiled code does not tell what it receives
    run = trainer(tmp_path, [callback])
    run.fit(torch.compile(module, backend="eager"), StatefulLoader(), held_out())
    row.check(module, callback, run)

    inside = seeded(QuietNet)
    inside.example_input_array = module.example_input_array
    inside.net = torch.compile(inside.net, backend="eager")
    row.check(*fit(tmp_path, row, lambda: inside))


@every_row
def test_skipped_step_is_like_the_float32_run(tmp_path: Path, row: Any) -> None:
    module, callback, run = fit(tmp_path, row, callbacks=[InfiniteGradientAt(3)], plugins=[loss_scaling()])
    assert all(torch.isfinite(p).all() for p in module.parameters())
    row.check(module, callback, run)


@every_row
def test_test_from_checkpoint(tmp_path: Path, row: Any) -> None:
    module, _, run = fit(tmp_path, row)
    run.save_checkpoint(tmp_path / "end.ckpt")
    here = run.test(module, held_out(), verbose=False)
    fresh = trainer(tmp_path, [row.make(tmp_path)])
    other = seeded(Net, seed=7)
    there = fresh.test(other, held_out(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert here == there
    assert fresh.validate(other, held_out(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    plain = seeded(Net, seed=7)
    plain.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
    assert same(dict(plain.state_dict()), dict(module.state_dict()))


@every_row
def test_one_object_serves_many_runs(tmp_path: Path, row: Any) -> None:
    module, callback = seeded(Net), row.make(tmp_path)
    run = trainer(tmp_path, [callback])
    loaders = StatefulLoader(), held_out()
    before = hooks_of(module)
    run.fit(module, *loaders)
    row.check(module, callback, run)
    first = run.test(module, loaders[1], verbose=False)
    run.validate(module, loaders[1], verbose=False)
    assert run.test(module, loaders[1], verbose=False) == first
    run.fit_loop.max_epochs = 6
    run.fit(module, *loaders)
    row.check(module, callback, run)
    assert hooks_of(module) == before

    count, loaders_before = zeros(module), loaders[0].state_dict()
    other = seeded(lambda: Net(width=24))
    second = trainer(tmp_path, [callback])
    second.fit(other, *loaders)
    row.check(other, callback, second)
    assert zeros(module) == count
    assert hooks_of(module) == before == hooks_of(other, second)

    reference = row.make(tmp_path)
    again = seeded(lambda: Net(width=24))
    fresh_loaders = StatefulLoader(), held_out()
    fresh_loaders[0].load_state_dict(loaders_before)
    trainer(tmp_path, [reference]).fit(again, *fresh_loaders)
    assert same(dict(again.state_dict()), dict(other.state_dict()))


@every_row
def test_leaves_nothing_behind_after_an_exception(tmp_path: Path, row: Any) -> None:
    module = seeded(Net)
    run = trainer(tmp_path, [row.make(tmp_path), CrashAt(9, tmp_path / "crash.ckpt")])
    with pytest.raises(Crash):
        run.fit(module, StatefulLoader(), held_out())
    assert hooks_of(module, run) == 0


@every_row
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    "average",
    [lambda: EMAWeightAveraging(decay=0.8), lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)],
    ids=["ema", "swa"],
)
def test_with_averaged_weights(tmp_path: Path, row: Any, average: Any, is_first: bool) -> None:
    callback, module = row.make(tmp_path), seeded(Net)
    has_schedule = isinstance(callback, LearningRateSchedule)
    run = trainer(tmp_path, [average(), callback] if is_first else [callback, average()])
    with warnings.catch_warnings():
        # StochasticWeightAveraging ends every schedule by its own, and says so.
        warnings.filterwarnings("ignore", "SWA is currently only|Swapping scheduler" if has_schedule else "(?!)")
        run.fit(module, StatefulLoader(), held_out())
    if not (has_schedule and isinstance(average(), StochasticWeightAveraging)):
        row.check(module, callback, run)


@every_row
@pytest.mark.filterwarnings("ignore:ModelCheckpoint.* may keep an epoch that is not compressed")
def test_with_lightnings_own_callbacks(tmp_path: Path, row: Any) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_last=True)
    stop = EarlyStopping("val_loss", patience=50)
    row.check(*fit(tmp_path, row, callbacks=[best, stop], enable_checkpointing=True))


@every_row
def test_barebones_and_fast_dev_run(tmp_path: Path, row: Any) -> None:
    for kwargs in ({"barebones": True}, {"fast_dev_run": 3}):
        module, callback = seeded(QuietNet), row.make(tmp_path)
        quiet = {
            "enable_checkpointing": None,
            "logger": None,
            "barebones": False,
            "enable_progress_bar": None,
            "enable_model_summary": None,
        }
        run = trainer(tmp_path, [callback], **(quiet | kwargs))
        run.fit(module, StatefulLoader(), held_out())


# Every callback comes first, last, and right before and after others; all permutations would be minutes.
ORDERS = [
    tuple(order[i:] + order[:i]) for order in (list(TOGETHER), list(reversed(TOGETHER))) for i in range(len(TOGETHER))
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_all_together_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    module, callbacks = seeded(Net), {name: ROWS[name].make(tmp_path) for name in order}
    run = trainer(tmp_path, callbacks.values())
    run.fit(module, StatefulLoader(), held_out())
    for name, callback in callbacks.items():
        ROWS[name].check(module, callback, run)


def test_two_processes(tmp_path: Path) -> None:
    """Each rank has other data and another seed; all must end with the same weights, masks and rates."""
    root = Path(__file__).parents[1]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(root / "tests" / "ddp_worker.py"),
            str(tmp_path),
        ],
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
    )
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert set(results[0]) == {*ALONE, "module", "all", "resumed"}
    assert same(results[0], results[1])
    assert same(results[0]["all"], results[0]["resumed"])
