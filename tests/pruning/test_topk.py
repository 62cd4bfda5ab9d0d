from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lightning_compress.pruning import topk
from lightning_compress.pruning.topk import kth_smallest, select_smallest


def reference(
    scores: list[Tensor], k: int, candidates: list[Tensor] | None = None, absolute: bool = False
) -> list[Tensor]:
    """A stable sort of the candidates in float64: lowest score first, then lowest position."""
    flat = torch.cat([score.detach().double().reshape(-1) for score in scores])
    flat = flat.abs() if absolute else flat + 0.0  # −0.0 + 0.0 = 0.0
    allowed = torch.ones(len(flat), dtype=torch.bool)
    if candidates is not None:
        allowed = torch.cat([candidate.reshape(-1) for candidate in candidates])
    positions = allowed.nonzero().squeeze(1)
    order = flat[positions].sort(stable=True).indices
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[positions[order[:k]]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def check(scores: list[Tensor], k: int, candidates: list[Tensor] | None = None, absolute: bool = False) -> None:
    before = [score.detach().clone() for score in scores]
    masks = select_smallest(scores, k, candidates=candidates, absolute=absolute)
    expected = reference(scores, k, candidates, absolute)
    assert len(masks) == len(scores)
    for mask, wanted, score, old in zip(masks, expected, scores, before, strict=True):
        assert mask.dtype == torch.bool
        assert not mask.requires_grad
        assert mask.shape == score.shape
        assert torch.equal(mask, wanted)
        assert torch.equal(score.detach().nan_to_num(nan=9.75), old.nan_to_num(nan=9.75))
    if k:
        chosen = torch.cat([s.detach().double()[m] for s, m in zip(scores, masks, strict=True)])
        largest = (chosen.abs() if absolute else chosen).max()
        assert kth_smallest(scores, k, candidates=candidates, absolute=absolute) == largest


@pytest.fixture(params=["whole", "bracket", "odd blocks", "no bracket"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way through the search, at sizes where all of it runs in a moment."""
    sizes = {
        "whole": {},
        "bracket": {"_BLOCK": 64, "_SMALL": 16, "_SAMPLE": 128, "_SIGMAS": 1.0},
        "odd blocks": {"_BLOCK": 61, "_SMALL": 60, "_SAMPLE": 200, "_SIGMAS": 0.2},
        "no bracket": {"_BLOCK": 64, "_SMALL": 0, "_SAMPLE": 1, "_SIGMAS": 0.0},
    }[request.param]
    for name, value in sizes.items():
        monkeypatch.setattr(topk, name, value)
    return request.param


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "tied":
        return (normal * 2).round().to(dtype)  # −0.0 among them
    if kind == "constant":
        return torch.full(shape, -0.75, dtype=dtype)
    if kind == "mostly zero":
        return torch.where(normal.abs() < 1.5, normal.sign() * 0.0, normal).to(dtype)
    if kind == "extreme":
        return (normal * 30).exp2().mul(normal.sign()).to(dtype).masked_fill(normal > 1.5, math.inf) * 1e-30
    if kind == "close":
        return (1 + normal * 1e-6).to(dtype)
    return normal.to(dtype)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["normal", "tied", "constant", "mostly zero", "extreme", "close"])
def test_equals_a_stable_sort(path: str, kind: str, absolute: bool) -> None:
    generator = torch.Generator().manual_seed(17)
    shapes = [(7, 11), (), (0, 3), (5, 3, 4), (211,)]
    for dtypes in (
        [torch.float32],
        [torch.bfloat16, torch.float32, torch.float16],
        [torch.float16, torch.float32, torch.float64, torch.bfloat16],
    ):
        mixed = itertools.cycle(dtypes)
        scores = [values(kind, shape, next(mixed), generator) for shape in shapes]
        candidates = [torch.rand(shape, generator=generator) < 0.6 for shape in shapes]
        total = sum(score.numel() for score in scores)
        few = sum(int(candidate.sum()) for candidate in candidates)
        for k in (0, 1, total // 2, total - 9, total):
            check(scores, k, None, absolute)
        for k in (1, few // 3, few):
            check(scores, k, candidates, absolute)


@pytest.mark.parametrize("k", [100_000, 2_999_900])
def test_equals_kthvalue_at_full_block_sizes(k: int) -> None:
    scores = [torch.randn(1500, 1500), torch.randn(750_000)]
    flat = torch.cat([score.view(-1) for score in scores]).abs()
    threshold = flat.kthvalue(k).values
    assert kth_smallest(scores, k, absolute=True) == threshold.item()
    masks = select_smallest(scores, k, absolute=True)
    assert sum(int(mask.sum()) for mask in masks) == k
    ties = int((flat == threshold).sum())
    differing = (torch.cat([mask.view(-1) for mask in masks]) != (flat <= threshold)).sum()
    assert differing < ties


def test_a_misled_sample_costs_no_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_SMALL", 100)
    monkeypatch.setattr(topk, "_SAMPLE", 1000)
    scores = torch.rand(20_000)
    stride = len(scores) // 1000 | 1
    scores[::stride] += 10  # all that the sample sees is larger than all that it does not
    check([scores], 10_000)
    scores[::stride] -= 20
    check([scores], 10_000)


def test_the_bracket_is_used_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_SMALL", 1000)
    monkeypatch.setattr(topk, "_SAMPLE", 20_000)
    scores = torch.randn(200_000)
    read = []
    search = topk._radix_select

    def spy(shard, blocks, rank):
        read.append(sum(len(block) for block in blocks()))
        return search(shard, blocks, rank)

    monkeypatch.setattr(topk, "_radix_select", spy)
    check([scores], 180_000)
    assert len(read) == 6  # sample, sample, inside; twice, as check also asks for the k-th
    assert max(read) < 25_000
    assert read[2] < 200_000 // 32


def test_ties_are_chosen_by_position(path: str) -> None:
    scores = [torch.zeros(2, 3), torch.tensor(-0.0), torch.zeros(150)]
    masks = select_smallest(scores, 70)
    assert torch.cat([mask.view(-1) for mask in masks]).tolist() == [True] * 70 + [False] * 87
    masks = select_smallest([torch.tensor([1.0, -1.0, 0.5, 1.0])], 3, absolute=True)
    assert masks[0].tolist() == [True, True, True, False]


def test_both_zeros_are_equal(path: str) -> None:
    assert select_smallest([torch.tensor([0.0, -0.0, -0.0, 0.0])], 1)[0].tolist() == [1, 0, 0, 0]
    assert math.copysign(1, kth_smallest([torch.tensor([-0.0])], 1)) == 1


def test_subnormal_and_infinite_scores_have_their_place(path: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        tiny = torch.finfo(dtype).smallest_normal
        row = torch.tensor([math.inf, tiny, tiny / 4, 0.0, -tiny / 2, -math.inf, tiny / 2], dtype=dtype)
        for k in range(len(row) + 1):
            check([row], k)
            check([row], k, absolute=True)


def test_neighbouring_floats_are_told_apart(path: str) -> None:
    one = torch.ones((), dtype=torch.float64)
    close = torch.stack([torch.nextafter(one, 2 * one), one, torch.nextafter(one, 0 * one)])
    for k in range(4):
        check([close], k)
        check([-close], k)
        check([torch.ones(2), close], k)


def test_strides_do_not_matter(path: str) -> None:
    base = torch.randn(40, 30, 6)
    strided = [
        base.permute(2, 0, 1),
        base[::3, :, 1],
        torch.randn(1, 500).t(),
        torch.randn(1).expand(300),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    ]
    candidates = [torch.rand(score.shape) < 0.5 for score in strided]
    candidates[0] = candidates[0].transpose(0, 1).contiguous().transpose(0, 1)
    check(strided, 3000)
    check(strided, 3000, candidates, absolute=True)
    assert all(mask.is_contiguous() for mask in select_smallest(strided, 3000))


def test_parameters_are_ranked_as_they_are() -> None:
    layer = nn.Linear(20, 10)
    check([layer.weight, layer.bias], 100, absolute=True)
    assert layer.weight.requires_grad
    assert layer.weight.grad is None


def test_no_scores() -> None:
    assert select_smallest([], 0) == []
    assert select_smallest([torch.empty(0)], 0)[0].shape == (0,)


def test_nan_is_refused_by_name(path: str) -> None:
    scores = [torch.zeros(3), torch.randn(20, 20)]
    for sign in (math.nan, -math.nan):
        scores[1][7, 3] = math.copysign(math.nan, sign)
        for k in (0, 1, 200, 403):
            with pytest.raises(ValueError, match=r"`scores` must not be NaN .* in scores\[1\]"):
                select_smallest(scores, k)
            with pytest.raises(ValueError, match=r"NaN in encoder\.weight"):
                select_smallest(scores, k, names=["bias", "encoder.weight"], absolute=True)


def test_nan_outside_the_candidates_is_ignored(path: str) -> None:
    scores = torch.randn(20, 20)
    candidates = torch.rand(20, 20) < 0.7
    scores[~candidates] = math.nan
    scores[0] = -scores[0]  # NaN of either sign
    for k in (0, 1, 100, int(candidates.sum())):
        (mask,) = select_smallest([scores], k, candidates=[candidates])
        (expected,) = reference([scores.nan_to_num(nan=0.0)], k, [candidates])
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("k", [-1, 7, 2.0])
def test_k_out_of_range_is_refused_with_both_numbers(k: int) -> None:
    candidates = [torch.tensor([True, False, True]), torch.ones(2, 2, dtype=torch.bool)]
    scores = [torch.randn(3), torch.randn(2, 2)]
    with pytest.raises(ValueError, match=rf"`k` must be an int from 0 .* candidates, 6; got {k}"):
        select_smallest(scores, k, candidates=candidates)
    with pytest.raises(ValueError, match=r"from 1 .* 6; got 0"):
        kth_smallest(scores, 0, candidates=candidates)


def test_arguments_that_do_not_fit_are_refused() -> None:
    score = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"`scores` must be floating point, got torch.int64 for scores\[1\]"):
        select_smallest([score, torch.arange(3)], 1)
    with pytest.raises(TypeError, match=r"`candidates` must be bool, got torch\.float32 for conv"):
        select_smallest([score], 1, candidates=[torch.ones(2, 3)], names=["conv"])
    with pytest.raises(ValueError, match=r"conv is \(2, 3\) on cpu, its candidates are \(3, 2\) on cpu"):
        select_smallest([score], 1, candidates=[torch.ones(3, 2, dtype=torch.bool)], names=["conv"])
    with pytest.raises(ValueError, match="`candidates` must be as many as `scores`, 1; got 0"):
        select_smallest([score], 1, candidates=[])
    with pytest.raises(ValueError, match="`names` must be as many as `scores`, 1; got 2"):
        select_smallest([score], 1, names=["a", "b"])


def sharded_cases() -> list[tuple[list[list[Tensor]], int]]:
    """Tensors of each rank and k: ties over ranks, an empty rank, mixed dtypes, unequal lengths."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(5, 200, generator=generator)
    return [
        ([[normal[0], normal[1]], [normal[2]]], 450),
        ([[torch.zeros(10), torch.ones(300)], [torch.zeros(500)]], 300),  # the ties reach into rank 1
        ([[torch.zeros(400)], [torch.zeros(5), -torch.ones(3)]], 150),  # they end in rank 0
        ([[], [normal[3]]], 20),
        ([[normal[3]], []], 199),
        ([[normal[0].bfloat16()], [normal[1].double(), normal[2].half()]], 317),
        ([[normal[0]], [normal[1]]], 0),
        ([[normal[0]], [normal[1]]], 400),
    ]


def select_in_shards(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    small = {"_BLOCK": 64, "_SMALL": 16, "_SAMPLE": 128, "_SIGMAS": 1.0}
    for sizes in ({}, small, {"_SMALL": 0, "_SAMPLE": 1, "_SIGMAS": 0.0}):
        for name, value in sizes.items():
            setattr(topk, name, value)
        for shards, k in sharded_cases():
            results.append(select_smallest(shards[rank], k, group=dist.group.WORLD))
        candidates = [torch.arange(6).view(2, 3) % 2 == rank]
        results.append(select_smallest([torch.ones(2, 3)], 4, candidates=candidates, group=dist.group.WORLD))
    errors = []
    scores = torch.ones(100)
    scores[5] = math.nan if rank == 1 else 0.0
    for k in (0, 150, 201):  # NaN on one rank is an error on all; they stay in step
        try:
            select_smallest([scores], k, names=["embedding"], group=dist.group.WORLD)
        except ValueError as error:
            errors.append(str(error))
    torch.save((results, errors), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_over_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(select_in_shards, args=(str(tmp_path),), nprocs=2)
    (first, first_errors), (second, second_errors) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    cases = sharded_cases()
    assert len(first) == len(second) == 3 * (len(cases) + 1)
    for start in range(0, len(first), len(cases) + 1):
        for i, (shards, k) in enumerate(cases):
            got = first[start + i] + second[start + i]
            for mask, expected in zip(got, reference(shards[0] + shards[1], k), strict=True):
                assert torch.equal(mask, expected)
        last = start + len(cases)
        assert first[last][0].tolist() == [[True, False, True], [False, True, False]]
        assert second[last][0].tolist() == [[False, True, False], [False, False, False]]
    for errors, where in ((first_errors, "another rank"), (second_errors, "embedding")):
        assert [error.split(" in ")[-1] for error in errors[:2]] == [where, where]
        assert errors[2].endswith("candidates, 200; got 201")
