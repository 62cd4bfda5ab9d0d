"""The Pareto fronts of several runs: what is read, what is compared, what is drawn."""

from __future__ import annotations

import copy
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compress import CompressionReport, GradualPruning
from lightning_compress.report.__main__ import main
from lightning_compress.report.pareto import compare, front, read_reports
from tests.helpers import StatefulLoader, held_out, seeded, trainer
from tests.report.test_page import Dipping, Page
from tests.report.test_report import is_picture, text


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a run writes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    report = CompressionReport(str(folder), plots=False)
    fit = trainer(folder, [GradualPruning(0.75, scope="layer"), report], max_epochs=1)
    fit.fit(seeded(Dipping), StatefulLoader(), held_out())
    return json.loads((folder / "report.json").read_text())


def write(folder: Path, figures: dict[str, Any], overrides: list[str] | None = None, **changes: Any) -> Path:
    """Write a run as Hydra leaves it: metrics and bytes by name, a path of keys spelled with `__`."""
    figures = copy.deepcopy(figures)
    for keys, value in changes.items():
        *above, last = keys.split("__")
        place = figures
        for key in above:
            place = place[key]
        place[last] = value
    (folder / "csv").mkdir(parents=True)
    (folder / "csv/report.json").write_text(json.dumps(figures))
    if overrides is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra/overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides) or "[]\n")
    return folder


def exported(size: int, ms: float) -> list[dict[str, Any]]:
    latency = {batch: {"ms": ms, "fastest_ms": ms, "repeats": 9, "unsure": False} for batch in ("1", "64")}
    onnx = {"format": "onnx", "bytes": size, "metrics": {}, "runtime": "onnxruntime", "latency": latency}
    packed = {
        "format": "safetensors",
        "bytes": size // 2,
        "metrics": {"score": 0.125},
        "runtime": None,
        "latency": None,
    }
    return [{"path": f"model.{file['format']}", **file} for file in (onnx, packed)]


# The front


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_front_is_what_nobody_dominates(mode: Any) -> None:
    generator = random.Random(0)
    points = [(generator.randrange(8), generator.randrange(8)) for _ in range(60)]
    points[7] = (None, 100 if mode == "max" else -100)

    def dominates(one: Any, other: Any) -> bool:
        better = one[1] > other[1] if mode == "max" else one[1] < other[1]
        return (better and one[0] <= other[0]) or (one[1] == other[1] and one[0] < other[0])

    known = [point for point in points if point[0] is not None]
    expected = {i for i, p in enumerate(points) if p[0] is not None and not any(dominates(q, p) for q in known)}
    found = front(points, mode)
    assert set(found) == expected
    assert len(found) == len(expected) < 20
    costs = [points[i][0] for i in found]
    assert costs == sorted(costs)


def test_noise_does_not_make_a_run_faster() -> None:
    points = [(1.00, 0.9), (0.97, 0.8), (0.90, 0.7)]
    assert front(points, noise=0.05) == [2, 0]
    assert front(points) == [2, 1, 0]


# Reading


def test_reports_are_found_at_any_depth_and_others_are_left_out(tmp_path: Path, figures: dict[str, Any]) -> None:
    write(tmp_path / "a/0", figures)
    write(tmp_path / "b", figures)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/report.json").write_text('{"totals": 1}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/report.json").write_text("<html>")
    assert list(read_reports([tmp_path])) == [tmp_path / "a/0/csv/report.json", tmp_path / "b/csv/report.json"]
    assert list(read_reports([tmp_path / "b", tmp_path / "b/csv/report.json"])) == [tmp_path / "b/csv/report.json"]
    with pytest.raises(FileNotFoundError, match=r"there is no report.json of a CompressionReport in '.*other'"):
        read_reports([tmp_path, tmp_path / "other"])
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
        read_reports([tmp_path / "nowhere"])


# Comparing


def test_the_only_metric_is_taken_and_others_have_to_be_named(tmp_path: Path, figures: dict[str, Any]) -> None:
    write(tmp_path / "a", figures, metrics={"acc": 0.9, "loss": 0.5})
    write(tmp_path / "b", figures, metrics={"acc": 0.8, "compress/acc": 0.8})
    reports = read_reports([tmp_path])
    assert compare(reports).metric == "acc"
    with pytest.raises(ValueError, match=r"there is no metric 'loss' in .*b/csv/report.json; all runs have: acc"):
        compare(reports, "loss")
    both = read_reports([write(tmp_path / "c", figures, metrics={"acc": 0.9, "loss": 0.5})])
    with pytest.raises(ValueError, match="name a metric with --metric; all runs have: acc, loss"):
        compare(both)
    assert compare(both, "acc").mode == "max"
    assert compare(both, "loss").mode == "min"
    assert compare(both, "loss", "max").mode == "max"


def test_a_run_whose_metric_is_not_finite_is_left_out_by_name(tmp_path: Path, figures: dict[str, Any]) -> None:
    write(tmp_path / "good", figures)
    write(tmp_path / "diverged", figures, metrics__score=None)
    found = compare(read_reports([tmp_path]), "score")
    assert [run.label for run in found.runs] == ["good"]
    assert found.notes == ("Left out: diverged (score is no finite number).",)


def test_the_file_that_all_runs_have_is_weighed(tmp_path: Path, figures: dict[str, Any]) -> None:
    write(tmp_path / "a", figures, exported=exported(1000, 2.0))
    write(tmp_path / "b", figures, exported=exported(600, 3.0)[1:])
    write(tmp_path / "c", figures)
    of = [read_reports([tmp_path / name for name in names]) for names in ("a", "ab", "abc")]
    weighed = [compare(reports, "score") for reports in of]
    assert [found.format for found in weighed] == ["onnx", "safetensors", "state_dict"]
    assert [[run.bytes for run in found.runs] for found in weighed] == [
        [1000],
        [300, 500],
        [figures["size"]["bytes"]] * 3,
    ]
    assert weighed[0].runs[0].cost("64") == 2.0
    assert [weighed[0].runs[0].metric, weighed[1].runs[0].metric] == [figures["metrics"]["score"], 0.125]
    assert weighed[1].runs[0].cost("64") == figures["latency"]["after"]["64"]["ms"]
    assert (weighed[0].place, weighed[1].place) == ("onnxruntime, cpu, 1 thread", "PyTorch, cpu, 1 thread")
    with pytest.raises(ValueError, match=r"no exported onnx file in .*b/csv/report.json, .*: add ExportCompressed"):
        compare(of[2], "score", format="onnx")


def test_channels_that_can_be_cut_out_are_not_weighed(tmp_path: Path, figures: dict[str, Any]) -> None:
    latency = {"64": {"ms": 0.5}}
    write(tmp_path, figures, removed={"masked": {}, "cut": {"bytes": 10, "latency": latency}})
    [run] = compare(read_reports([tmp_path]), "score").runs
    assert (run.bytes, run.cost("64"), run.cost("1")) == (10, 0.5, None)


def test_latencies_that_cannot_be_compared_are_said_to_be(tmp_path: Path, figures: dict[str, Any]) -> None:
    write(tmp_path / "a", figures)
    write(tmp_path / "b", figures, latency__threads=4)
    write(tmp_path / "c", figures, latency__after={"1": {"ms": 1.0, "unsure": True}})
    notes = " ".join(compare(read_reports([tmp_path]), "score").notes)
    assert "hard to compare: PyTorch, cpu, 1 thread; PyTorch, cpu, 4 threads." in notes
    assert "? are unsure" in notes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            [["+x@callbacks=[a,b]", "callbacks.pruning.final_sparsity=0.5"], ["+x@callbacks=[a,b]"]],
            ["final_sparsity=0.5", "1"],
        ),
        ([["a.lr=1", "b.lr=2"], ["a.lr=3", "b.lr=2"]], ["lr=1", "lr=3"]),
        ([["a.lr=1", "b.lr=2"], ["a.lr=3", "b.lr=4"]], ["a.lr=1 b.lr=2", "a.lr=3 b.lr=4"]),
        ([["seed=1", "dir=$\\{hydra\\:x\\}"], ["seed=1"]], ["0", "1"]),
        ([None, ["~b", "+seed=1"]], ["0", "b seed=1"]),
    ],
)
def test_hydras_overrides_tell_runs_apart(
    tmp_path: Path, figures: dict[str, Any], overrides: list[Any], expected: list[str]
) -> None:
    for job, own in enumerate(overrides):
        write(tmp_path / str(job), figures, own, size__bytes=100 + job)
    assert [run.label for run in compare(read_reports([tmp_path]), "score").runs] == expected


# The command


def test_the_command_writes_a_picture_and_a_page(
    tmp_path: Path, figures: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for job, (accuracy, size, ms) in enumerate([(0.9, 9000, 1.0), (0.8, 4000, 0.5), (0.7, 5000, 0.51)]):
        override = f"callbacks.<b>.sparsity={job}"
        write(tmp_path / str(job), figures, [override], metrics__score=accuracy, exported=exported(size, ms))
    output = tmp_path / "out"
    assert main([str(tmp_path), "--metric", "score", "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["pareto.html", "pareto.png"]
    assert is_picture(output / "pareto.png")
    printed = text(capsys)
    assert "3 runs, score (more is better)" in printed
    assert "1 sparsity=1 0.8 ● 4 kB ● 0.500 ms ● 0.500 ms 0.75" in printed
    assert "2 sparsity=2 0.7 5 kB 0.510 ms 0.510 ms 0.75" in printed
    page = Page(output / "pareto.html")
    assert not page.loads
    assert page.tags.count("svg") == 3
    assert "Latency at batch 64 (onnxruntime, cpu, 1 thread)" in page.text
    assert "sparsity=2" in page.text
    assert str(tmp_path / "2/csv/report.json") in page.text


def test_without_matplotlib_the_page_has_the_table_alone(
    tmp_path: Path, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path / "a", figures)
    assert main([str(tmp_path), "--metric", "score", "--output", str(tmp_path)]) == 1
    assert 'pareto.png needs matplotlib, which is not installed: pip install "lightning-compress[plots]"' in (
        capsys.readouterr().err
    )
    page = Page(tmp_path / "pareto.html")
    assert "svg" not in page.tags
    assert "1 runs, score (more is better)" in page.text
    assert not (tmp_path / "pareto.png").exists()


def test_runs_of_unknown_size_and_latency_are_listed(tmp_path: Path, figures: dict[str, Any]) -> None:
    nothing = {"size__bytes": None, "latency__after": None}
    write(tmp_path / "sharded", figures, **nothing)
    assert main([str(tmp_path), "--metric", "score", "--output", str(tmp_path)]) == 0
    assert "the parameters were sharded" in Page(tmp_path / "pareto.html").text


def test_the_module_runs_as_a_command(
    tmp_path: Path, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", figures, metrics__score=None)
    for arguments, words in (
        (["--metric", "val"], "there is no metric 'val'"),
        (["--metric", "score"], "Left out: csv (score is no finite number)."),
    ):
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), *arguments])
        monkeypatch.delitem(sys.modules, "lightning_compress.report.__main__", raising=False)
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("lightning_compress.report", run_name="__main__")
        assert words in capsys.readouterr().err
