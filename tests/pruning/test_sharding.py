"""FSDP1 and FSDP2: masks act on the pieces of parameters, and selection is exact across them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_compress import GradualPruning
from lightning_compress.pruning import sharding
from lightning_compress.pruning.granularity import BlockField, PatternField
from lightning_compress.pruning.removal import channel_groups, remove_pruned_channels
from lightning_compress.pruning.sharding import Piece
from lightning_compress.training import refuse_sharding
from tests.helpers import same
from tests.pruning.sharded_worker import CASES, RESUMED, STRUCTURED

# Two processes -------------------------------------------------------------------------------------------------------


def in_two_processes(worker: str, folder: Path) -> list[dict[str, Any]]:
    """Run a script in two processes, and return what each of them saved."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(root / "tests" / "pruning" / worker), str(folder)),
        ],
        check=False,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes("sharded_worker.py", tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(scope="module")
def fsdp1(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes("flat_worker.py", tmp_path_factory.mktemp("fsdp1"))


def check_sparsity(results: dict[str, Any]) -> None:
    """Check the zeros with nothing but torch."""
    asked = {"magnitude": 0.8, "erk": 0.7, "gradient_regrowth": 0.7, "movement": 0.6, "activation": 0.7, "random": 0.5}
    asked |= {"2:4": 0.5, "blocks": 0.5, "rescue": 0.985, "feedback": 0.7, "blocks_feedback": 0.5}
    for name, sparsity in asked.items():
        matrices = [weight for weight in results[name]["weights"].values() if weight.dim() > 1]
        zeros, total = sum(int((w == 0).sum()) for w in matrices), sum(w.numel() for w in matrices)
        assert abs(zeros / total - sparsity) < 1 / total, name
        assert all((w != 0).any() for w in matrices)
    for weight in results["2:4"]["weights"].values():
        if weight.dim() > 1:
            assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_dtensors(fsdp2: list[dict[str, Any]]) -> None:
    results, other = fsdp2
    assert results["magnitude"]["sparsity"] == other["magnitude"]["sparsity"]
    assert all(same(results[name], other[name]) for name in CASES)
    check_sparsity(results)
    for distributed in (False, True):
        for name in RESUMED:
            assert same(results[name], results[f"{name}_resumed_{distributed}"]), name
    for name in ("2:4", "blocks"):
        assert same(results[name], results[f"{name}_columns"])


def test_flat_parameters(fsdp1: list[dict[str, Any]]) -> None:
    results, other = fsdp1
    assert same(results, other)
    check_sparsity(results)
    for name in [
        *CASES,
        "already_sparse",
    ]:  # cut anywhere, in the middle of groups and blocks too, and yet to the bit what DDP does
        assert same(results[name], results[f"{name}_ddp"]), name
    assert same(results["blocks_by_layer"], results["blocks"])
    assert same(results["movement_gradients_only"], results["movement"])
    assert results["wrapped"]["layers"].keys() == {"net.0.weight", "net.2.weight", "net.4.weight"}
    assert results["wrapped"]["sparsity"] == results["erk"]["sparsity"]
    for name in RESUMED:
        for kind in ("full", "sharded", "elsewhere"):  # the last: saved under FSDP1, resumed under DDP
            assert same(results[f"{name}_{kind}"], results[name])
    assert "'kernel.weight' was not contiguous (channels_last)" in results["channels_last"]


def test_both_do_the_same(fsdp1: list[dict[str, Any]], fsdp2: list[dict[str, Any]]) -> None:
    for name in [*CASES, "already_sparse"]:
        for part in ("weights", "state"):
            assert same(fsdp1[0][name][part], fsdp2[0][name][part]), name


@pytest.mark.parametrize("name", list(STRUCTURED))
def test_channels_and_heads_of_dtensors(fsdp2: list[dict[str, Any]], name: str) -> None:
    sharded, whole = fsdp2[0][f"{name}_Structured"], fsdp2[0][f"{name}_Whole"]
    assert sharded["sparsity"] == whole["sparsity"] >= 0.5
    assert same(sharded["state"]["pruner"]["masks"], whole["state"]["pruner"]["masks"])
    for part in ("weights", "pruned"):
        assert sharded[part].keys() == whole[part].keys()
        for key, value in sharded[part].items():
            torch.testing.assert_close(value, whole[part][key], rtol=1e-4, atol=1e-5)
            assert torch.equal(value == 0, whole[part][key] == 0)
    assert same(fsdp2[0][f"{name}_Structured"]["weights"], fsdp2[1][f"{name}_Structured"]["weights"])
    shape = sharded["pruned"]["net.first.weight" if name != "head" else "net.attention.in_proj_weight"].shape
    assert shape == ((3, 1, 3) if name != "head" else (12, 8))


def test_channels_of_dtensors_resume(fsdp2: list[dict[str, Any]]) -> None:
    resumed, whole = (fsdp2[0][f"channel_{name}"] for name in ("resumed", "Structured"))
    assert same(resumed, whole)


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    """Make this process a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


# Pieces --------------------------------------------------------------------------------------------------------------


class Ranks:
    """Runs a function once for each rank, in threads, which join tensors as processes do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count, self.barrier, self.given = count, threading.Barrier(count, timeout=20), [None] * count
        self.rank, self.sent = threading.local(), 0
        monkeypatch.setattr(sharding, "_joined", self.joined)

    def joined(self, tensor: Tensor, group: Any) -> Tensor:
        self.given[self.rank.value] = tensor
        self.barrier.wait()
        out = torch.stack(self.given).sum(0).to(tensor.dtype)
        if self.rank.value == 0:
            self.sent += tensor.numel()
        self.barrier.wait()
        return out

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def call(rank: int) -> None:
            self.rank.value = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


SPLITS: list[tuple[int | None, tuple[int, ...]]] = [
    (None, (0, 7, 7, 50, 192)),
    (None, (0, 0, 64, 65, 192)),
    (None, (0, 191, 192, 192, 192)),
    (0, (0, 3, 6, 8, 8)),
    (1, (0, 1, 9, 12, 12)),
    (2, (0, 1, 1, 2, 2)),
]


@pytest.mark.parametrize(("dim", "bounds"), SPLITS)
def test_a_parameter_is_made_of_its_pieces(
    dim: int | None, bounds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, whole = Ranks(monkeypatch, 4), torch.randn(8, 12, 2)
    pieces = [Piece((8, 12, 2), dim, bounds, rank) for rank in range(4)]
    parts = [piece.take(whole) for piece in pieces]
    assert sum(part.numel() for part in parts) == whole.numel()
    assert torch.equal(torch.cat(parts, dim or 0).reshape(whole.shape), whole)
    assert all(torch.equal(out, whole) for out in ranks.run(lambda rank: pieces[rank].gather(parts[rank])))
    for along in range(3):
        sums = torch.stack([piece.sum_along(part, along) for piece, part in zip(pieces, parts, strict=True)]).sum(0)
        torch.testing.assert_close(sums, whole.movedim(along, 0).flatten(1).sum(1))
    for spans in ({}, {1: 4}, {0: 4}, {0: 2, 1: 3}):
        aligned = [piece.aligned(spans) for piece in pieces]
        ranks.sent = 0

        def there(rank: int, aligned: list[Piece] = aligned) -> Tensor:
            return pieces[rank].recut(parts[rank], aligned[rank])

        others = ranks.run(there)
        assert all(torch.equal(other, new.take(whole)) for other, new in zip(others, aligned, strict=True))
        assert ranks.sent <= 3 * 24 * max(spans.values(), default=1)  # no more than is around the three cuts
        back = ranks.run(lambda rank, aligned=aligned, others=others: aligned[rank].recut(others[rank], pieces[rank]))
        assert all(torch.equal(one, part) for one, part in zip(back, parts, strict=True))


@pytest.mark.parametrize(("dim", "bounds"), SPLITS)
@pytest.mark.parametrize("kind", ["2:4", "3:4 of rows", "block"])
def test_groups_that_a_split_cuts_in_two(
    kind: str, dim: int | None, bounds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Any:
        if kind == "block":
            return BlockField("weight", 0, (8, 12, 2), 2, 3)
        return PatternField("weight", 0, (8, 12, 2), *((1, 2, 4) if kind == "2:4" else (0, 3, 4)))

    whole, field = torch.randn(8, 12, 2), make()
    units = field.reduce({0: whole})
    may_go = field.candidates(units, torch.ones_like(units, dtype=torch.bool))
    entries = field.spread(may_go)[0]

    def on_rank(rank: int) -> tuple[Tensor, Tensor, bool]:
        piece, own = Piece((8, 12, 2), dim, bounds, rank), make()
        own.split({0: piece})
        scores = own.reduce({0: piece.take(whole)})
        chosen = own.candidates(scores, torch.ones_like(scores, dtype=torch.bool))
        gathered = own.piece.gather(chosen)
        return gathered, own.spread(chosen)[0], torch.equal(own.piece.take(gathered), chosen)

    for rank, (gathered, part, is_same) in enumerate(Ranks(monkeypatch, 4).run(on_rank)):
        assert is_same
        assert torch.equal(gathered, may_go)
        assert torch.equal(part, Piece((8, 12, 2), dim, bounds, rank).take(entries))


def test_modules_get_their_classes_back() -> None:
    kind = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].__class__ = kind
    with sharding.original_classes(net):
        assert type(net[0]) is nn.Linear
    assert type(net[0]) is kind


# What is refused -----------------------------------------------------------------------------------------------------


def fake(strategy: Any) -> Any:
    return type("Fake", (), {"strategy": strategy})()


def test_flat_parameters_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"GradualPruning .*FSDPStrategy.*fully_shard"):
        refuse_sharding(fake(FSDPStrategy()), GradualPruning(), but_dtensors=True)
    with pytest.raises(ValueError, match=r"GradualPruning .*Mine.*fully_shard"):
        refuse_sharding(fake(type("Mine", (FSDPStrategy,), {})()), GradualPruning(), but_dtensors=True)
    with pytest.raises(ValueError, match=r"FSDPStrategy.*fully_shard"):
        GradualPruning(granularity="channel").setup(fake(FSDPStrategy()), nn.Linear(2, 2), "fit")  # type: ignore


def test_sharded_modules_are_not_cut_in_place(one_process: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    fully_shard(net, mesh=one_process)
    groups, _ = channel_groups(net, torch.randn(3, 4))
    assert [(group.name, group.units) for group in groups] == [("0", 8)]
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded over processes"):
        remove_pruned_channels(net, torch.randn(3, 4))


def test_hidden_parameters_are_refused_by_name() -> None:
    refuse_sharding(fake(FSDPStrategy()), GradualPruning(), but_flat=True)
    with pytest.raises(ValueError, match=r"GradualPruning .*FSDPStrategy\(use_orig_params=False\).*leave"):
        refuse_sharding(fake(FSDPStrategy(use_orig_params=False)), GradualPruning(), but_flat=True)
