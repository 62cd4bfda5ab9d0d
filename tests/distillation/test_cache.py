"""Each sample's output is computed once, is that of the teacher, and survives what may happen to a run."""

from __future__ import annotations

import json
import multiprocessing
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_compress.distillation.cache import TeacherCache, sample_indices
from lightning_compress.distillation.teacher import EMATeacher, Teacher
from tests.helpers import FEATURES, Net, StatefulLoader, seeded

SIZE = 20


class Counted:
    """A teacher over fixed data that counts the samples that it is asked about."""

    def __init__(self, folder: Path, seed: int = 0, size: int = SIZE) -> None:
        self.teacher = Teacher([seeded(Net, seed)])
        self.x = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(1))
        self.expected = self.teacher((self.x,), {})[0]
        self.cache = TeacherCache(folder, size, self.teacher)
        self.asked = 0

    def compute(self, x: Tensor) -> Callable[[], Tensor]:
        def ask() -> Tensor:
            self.asked += len(x)
            return self.teacher((x,), {})[0]

        return ask

    def lookup(self, rows: Tensor) -> Tensor:
        return self.cache.lookup(rows, [self.x[rows]], self.compute(self.x[rows]))


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "cache")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_from_the_second_epoch_on_nothing_is_computed(counted: Counted, tmp_path: Path) -> None:
    order = torch.randperm(SIZE)
    for rows in order.split(6):
        torch.testing.assert_close(counted.lookup(rows), counted.expected[rows])
    assert counted.asked == SIZE
    first = counted.lookup(torch.arange(SIZE))
    for rows in torch.randperm(SIZE).split(7):  # in other batches
        assert torch.equal(counted.lookup(rows), first[rows])
    again = Counted(tmp_path / "cache")  # another run
    assert torch.equal(again.lookup(order), first[order])
    assert (counted.asked, again.asked) == (SIZE, 0)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "fingerprints.bin",
        "known.bin",
        "meta.json",
        "outputs.bin",
    ]


def test_a_batch_known_in_part_is_computed_and_its_known_rows_stay(counted: Counted) -> None:
    known = counted.lookup(torch.arange(4))
    both = counted.cache.lookup(torch.arange(2, 6), counted.x[2:6], lambda: torch.full((4, 4), 7.0))
    assert torch.equal(both[:2], known[2:])
    assert torch.equal(both[2:], torch.full((2, 4), 7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_any_shape_and_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = TeacherCache(tmp_path, 3, Teacher([nn.Identity()]))
    output = (100 * torch.randn(2, 5, 7)).to(dtype)
    indices = torch.tensor([2, 0], dtype=torch.int32)
    for _ in range(2):
        stored = cache.lookup(indices, {"x": torch.ones(2)}, lambda: output)
        assert stored.dtype == dtype
        assert torch.equal(stored, output)


def test_what_is_not_yet_known_does_not_count(tmp_path: Path) -> None:
    counted = Counted(tmp_path)

    class Crash(Exception):
        pass

    def crash() -> Tensor:
        raise Crash

    class Breaks(torch.Tensor):
        """A file that is written to until the process ends."""

        def __setitem__(self, key: Any, value: Any) -> None:
            raise Crash

    rows = torch.arange(5)
    with pytest.raises(Crash):
        counted.cache.lookup(rows, counted.x[rows], crash)
    counted.lookup(torch.arange(10, 12))
    for name in ("_outputs", "_fingerprints", "_known"):  # in the order in which they are written
        broken = Counted(tmp_path)
        setattr(broken.cache, name, getattr(broken.cache, name).as_subclass(Breaks))
        with pytest.raises(Crash):
            broken.lookup(rows)
        after = Counted(tmp_path)
        assert after.cache._known.nonzero().flatten().tolist() == [10, 11]
    torch.testing.assert_close(after.lookup(rows), after.expected[rows])
    assert after.asked == 5
    assert after.cache._known.sum() == 7


def test_a_run_that_ends_right_after_meta_json_is_taken_up(counted: Counted, tmp_path: Path) -> None:
    counted.lookup(torch.arange(2))
    for path in (tmp_path / "cache").glob("*.bin"):
        path.unlink()
    again = Counted(tmp_path / "cache")
    torch.testing.assert_close(again.lookup(torch.arange(3)), again.expected[:3])
    assert again.asked == 3


def _fill(folder: Path, start: Any, rank: int) -> None:
    counted = Counted(folder, size=400)
    start.wait()
    for rows in torch.arange(100 * min(rank, 1), 300 + 100 * min(rank, 1)).split(5):
        torch.testing.assert_close(counted.lookup(rows), counted.expected[rows])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes that start at once")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    workers = [context.Process(target=_fill, args=(tmp_path, start, rank)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    counted = Counted(tmp_path, size=400)
    torch.testing.assert_close(counted.lookup(torch.arange(400)), counted.expected)
    assert counted.asked == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_who_comes_second_takes_what_the_first_has_made(tmp_path: Path) -> None:
    first, second = Counted(tmp_path), Counted(tmp_path)  # both before there is anything
    first.lookup(torch.arange(8))
    torch.testing.assert_close(second.lookup(torch.arange(4, 12)), second.expected[4:12])
    assert torch.equal(first.lookup(torch.arange(12)), second.lookup(torch.arange(12)))
    assert first.asked == 8


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_refused(counted: Counted, tmp_path: Path) -> None:
    counted.lookup(torch.arange(2))
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="another teacher: .* Give another folder, or delete this one"):
        Counted(folder, seed=1)
    with pytest.raises(ValueError, match="another number of samples: 20 there, 21 now"):
        Counted(folder, size=21)
    norm = nn.Sequential(seeded(Net).net, nn.BatchNorm1d(4))
    folder = tmp_path / "norm"
    TeacherCache(folder, 3, Teacher([norm])).lookup(torch.arange(2), torch.ones(2, 1), lambda: torch.ones(2, 4))
    assert TeacherCache(folder, 3, Teacher([norm]))
    norm[1].running_mean += 1.0  # a buffer counts too
    with pytest.raises(ValueError, match="another teacher"):
        TeacherCache(folder, 3, Teacher([norm]))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 0}))
    with pytest.raises(ValueError, match="another version of its files: 0 there, 1 now"):
        TeacherCache(folder, 3, Teacher([norm]))
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="no meta.json"):
        TeacherCache(folder, 3, Teacher([norm]))


def test_another_output_is_refused(counted: Counted) -> None:
    counted.lookup(torch.arange(2))
    for output, got in ((torch.zeros(1, 5), "float32 5"), (torch.zeros(1, 4).double(), "float64 4")):
        with pytest.raises(ValueError, match=f"holds outputs float32 4, and the teacher gives {got}"):
            counted.cache.lookup(torch.tensor([9]), counted.x[9:10], lambda output=output: output)
    with pytest.raises(ValueError, match=r"has shape \(3, 4\): its dimension 0 must be the batch"):
        counted.cache.lookup(torch.tensor([9]), counted.x[9:10], lambda: torch.zeros(3, 4))
    with pytest.raises(TypeError, match="the teacher's output is <class 'dict'>"):
        counted.cache.lookup(torch.tensor([9]), counted.x[9:10], lambda: {"logits": torch.zeros(1, 4)})
    assert counted.cache._known.sum() == 2


def _image(shift: int = 0) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)).roll(shift, -1)


_IDS = torch.arange(200).repeat(4, 1)
_MASK = torch.full((4, 8), -torch.inf)


@pytest.mark.parametrize(
    ("inputs", "others"),
    [
        (_image(), [_image().flip(-1), _image(1), 1.001 * _image(), _image() + 0.001, torch.zeros(4, 3, 16, 16)]),
        (torch.full((4, 9), 7), [torch.full((4, 9), 8), torch.arange(9).expand(4, 9)]),
        (30000 + torch.arange(4 * 512).view(4, 512), [30000 + torch.arange(4 * 512).view(4, 512).flip(1)]),
        ([_IDS, torch.zeros(4)], [[_IDS + torch.eye(200, dtype=torch.long)[:4], torch.zeros(4)]]),
        (torch.tensor([[True, False]] * 4), [torch.tensor([[False, True]] * 4)]),
        ({"x": _image(), "mask": _MASK}, [{"x": _image(1), "mask": _MASK}]),
    ],
)
def test_a_known_sample_with_another_input_is_refused(tmp_path: Path, inputs: Any, others: list[Any]) -> None:
    cache = TeacherCache(tmp_path, SIZE, Teacher([nn.Identity()]))
    for _ in range(2):
        cache.lookup(torch.arange(4), inputs, lambda: torch.zeros(4, 2))
    for other in others:
        with pytest.raises(ValueError, match=r"knows sample \d with another input: the data are augmented"):
            cache.lookup(torch.arange(4), other, lambda: torch.zeros(4, 2))


def test_the_last_bit_of_an_input_may_differ(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, SIZE, Teacher([nn.Identity()]))
    image = _image()
    cache.lookup(torch.arange(4), image, lambda: torch.zeros(4, 2))
    cache.lookup(torch.arange(4), torch.nextafter(image, torch.tensor(torch.inf)), lambda: 1 / 0)


def test_one_index_for_two_samples_is_refused_at_once(counted: Counted) -> None:
    with pytest.raises(ValueError, match="sample 0 with another input"):
        counted.cache.lookup(torch.zeros(3, dtype=torch.long), counted.x[:3], counted.compute(counted.x[:3]))
    assert not counted.cache._known.any()
    twice = torch.tensor([5, 1, 5])  # a sampler pads so
    torch.testing.assert_close(counted.lookup(twice), counted.expected[twice])


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        (torch.tensor([0, 20]), ValueError, r"indices lie in \[0, 19\], got 20"),
        (torch.tensor([-1, 0]), ValueError, "got -1"),
        (torch.tensor([0.0, 1.0]), TypeError, r"got float32 of shape \(2,\)"),
        (torch.tensor([[0, 1]]), TypeError, r"got int64 of shape \(1, 2\)"),
    ],
)
def test_indices_that_are_none_are_refused(counted: Counted, indices: Tensor, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        counted.cache.lookup(indices, counted.x[:2], counted.compute(counted.x[:2]))


def test_inputs_without_samples_a_moving_teacher_and_no_samples_are_refused(counted: Counted, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the inputs is a tensor of 2 rows"):
        counted.cache.lookup(torch.arange(2), [torch.ones(3), 1.0], lambda: torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`teacher='ema'` changes at each step"):
        TeacherCache(tmp_path, SIZE, EMATeacher(Net()))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TeacherCache(tmp_path, 0, Teacher([Net()]))


# --- which samples are in a batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["index", "indices", "idx", "sample_index"])
def test_the_batch_says_which_samples_it_holds(key: str) -> None:
    rows = torch.tensor([4, 2])
    shuffled = DataLoader(torch.zeros(8, 1), batch_size=2, shuffle=True)
    for batch in ({key: rows, "x": torch.zeros(2, 1)}, SimpleNamespace(**{key: rows}), namedtuple("Batch", key)(rows)):
        assert sample_indices(batch, shuffled, 0) == (rows, "")


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_loader_in_order_says_which_samples_a_batch_holds(drop_last: bool) -> None:
    data = TensorDataset(torch.arange(11), torch.zeros(11))  # a list, which has a method `index`
    loader = DataLoader(data, batch_size=4, drop_last=drop_last)
    for batch_idx, batch in enumerate(loader):
        found, reason = sample_indices(batch, loader, batch_idx)
        assert reason == ""
        assert torch.equal(found, batch[0])


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(torch.zeros(8, 1), batch_size=2, shuffle=True),
        DataLoader(torch.zeros(8, 1), batch_size=None),
        DataLoader(torch.zeros(8, 1), batch_sampler=[[3, 1], [0, 2]]),
        DataLoader(torch.zeros(8, 1), batch_sampler=BatchSampler(SequentialSampler(range(8)), 3, True)),
        DataLoader(torch.zeros(8, 1), sampler=[3, 1, 0, 2]),
        StatefulLoader(),
        None,
    ],
)
def test_else_nobody_knows(loader: Any) -> None:
    for batch in (torch.zeros(2, 1), {"index": "a", "idx": torch.zeros(2)}, [torch.zeros(2), torch.zeros(2)]):
        found, reason = sample_indices(batch, loader, 0)
        assert found is None
        assert "a dict with its 'index'" in reason
        assert f"{type(loader).__name__}" in reason
