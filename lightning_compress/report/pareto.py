"""Which of several runs are worth having: the Pareto fronts of a metric over size and over latency."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_compress.report.exported import RUNTIMES
from lightning_compress.report.measure import BATCHES, spell_bytes
from lightning_compress.report.table import latency_cell, spell_place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Mode = Literal["max", "min"]

FORMATS = ("onnx", "pt2", "safetensors", "state_dict")
"""The files that a run can be weighed by; of those that all runs have the first is taken."""

_NOISE = 0.05  # times that differ by less are called equal
_ROWS = 20  # runs that the picture names
_ON_FRONT = "●"
_LEGEND = f"{_ON_FRONT} on the Pareto front: no other run is better and costs no more"
_NOISE_LEGEND = f"Times that differ by less than {_NOISE:.0%} count as equal."

_SMALLER_IS_BETTER = ("loss", "err", "perplexity", "ppl", "mse", "mae")


# The front -----------------------------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float | None, float]], mode: Mode = "max", noise: float = 0.0) -> list[int]:
    """Return the positions of the points that no other one dominates, by rising cost.

    A point is dominated by one that is better and costs no more, and by one that is as good and costs less.

    Args:
        points: Of each the cost, of which less is better, and the metric. ``None`` is no cost known: not on the front.
        mode: ``"max"`` where more of the metric is better, else ``"min"``.
        noise: The share by which a cost has to be lower to be called lower: 0.05 for measured times.

    Example::

        >>> front([(10.0, 0.9), (5.0, 0.8), (7.0, 0.7), (20.0, 0.9)])
        [1, 0]
        >>> front([(10.0, 0.9), (9.9, 0.8)]), front([(10.0, 0.9), (9.9, 0.8)], noise=0.05)
        ([1, 0], [0])
    """
    sign = 1.0 if mode == "max" else -1.0
    known = sorted((cost, sign * metric, index) for index, (cost, metric) in enumerate(points) if cost is not None)

    def is_dominated(cost: float, worth: float) -> bool:
        return any(
            (other > worth and its <= cost * (1.0 + noise)) or (other == worth and its * (1.0 + noise) < cost)
            for its, other, _ in known
        )

    return [index for cost, worth, index in known if not is_dominated(cost, worth)]


# Runs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What is compared of one run.

    Args:
        label: What tells it from the others.
        path: Its ``report.json``.
        metric: The metric's value at the end of the run; that of the file, where the export compared the two.
        bytes: Of its file; ``None`` where it is not known.
        latency: For batch ``"1"`` and ``"64"`` what ``report.json`` has: `ms`, and `unsure` or `left_out`.
        sparsity: Of what was made sparse; ``None`` where nothing was.
        bits: The fewest bits of a weight; ``None`` without quantization.
    """

    label: str
    path: Path
    metric: float
    bytes: int | None
    latency: Mapping[str, Mapping[str, Any]]
    sparsity: float | None
    bits: int | None

    def cost(self, axis: str) -> float | None:
        """Return what is paid: ``"size"`` in bytes, or the latency in milliseconds at batch ``"1"`` or ``"64"``."""
        return self.bytes if axis == "size" else (self.latency.get(axis) or {}).get("ms")


@dataclass(frozen=True)
class Comparison:
    """Runs that can be compared, by rising size.

    Args:
        metric: The metric's name.
        mode: ``"max"`` where more of it is better, else ``"min"``.
        format: The file that was weighed, of `FORMATS`.
        place: Where latency was measured.
        runs: Those that can be compared.
        notes: Sentences on what was left out, and on what is to be read with care.
    """

    metric: str
    mode: Mode
    format: str
    place: str
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    def front(self, axis: str) -> list[int]:
        """Return the positions of the runs on the front over size (``"size"``) or latency (``"1"``, ``"64"``)."""
        noise = 0.0 if axis == "size" else _NOISE
        return front([(run.cost(axis), run.metric) for run in self.runs], self.mode, noise)


def read_reports(folders: Iterable[str | os.PathLike[str]]) -> dict[Path, dict[str, Any]]:
    """Return the reports in some folders, and in all folders in them, by their paths.

    Files of this name that are not reports of this package are left out.

    Raises:
        FileNotFoundError: If one of the folders does not exist, or there is no report in it.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(f"there is no folder '{folder}'")
        inside = {}
        for path in sorted([folder] if folder.is_file() else folder.rglob("report.json")):
            try:
                figures = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # a file of another program, or no JSON at all
                continue
            if isinstance(figures, dict) and {"schema", "totals", "metrics", "history"} <= figures.keys():
                inside[path] = figures
        if not inside:
            raise FileNotFoundError(f"there is no report.json of a CompressionReport in '{folder}'")
        found |= inside
    return found


def compare(
    reports: Mapping[Path, Mapping[str, Any]],
    metric: str | None = None,
    mode: Mode | None = None,
    format: str | None = None,
) -> Comparison:
    """Return what can be compared of some runs.

    Args:
        reports: The content of each ``report.json`` by its path, as :func:`read_reports` returns it.
        metric: The metric's name; ``None`` takes the only one that all runs have.
        mode: Which is better, more of it or less; ``None`` goes by the name: less of a loss, an error, a perplexity.
        format: The file that is weighed and timed, of `FORMATS`; ``None`` takes the first that all runs have. For
            ``"onnx"`` and ``"pt2"`` latency is that of the file, else the module's in PyTorch. The ``state_dict`` is
            that of the module without the pruned channels and heads, where there is one.

    Raises:
        ValueError: If there is no such metric or file in all of the runs, with those that there are.
    """
    name = _metric(reports, metric)
    mode = mode or ("min" if any(word in name.lower() for word in _SMALLER_IS_BETTER) else "max")
    format = _format(reports, format)
    labels, notes, runs = _labels(list(reports)), [], []
    for path, figures in reports.items():
        size, latency, of_the_file = _weighed(figures, format)
        value = of_the_file.get(name, figures["metrics"][name])
        if value is None:
            notes.append(f"Left out: {labels[path]} ({name} is no finite number).")
            continue
        bits = [f["bits"] for row in figures["parameters"] for f in row["techniques"].values() if f.get("bits")]
        sparsity = figures["totals"]["claimed_sparsity"]
        runs.append(Run(labels[path], path, value, size, latency, sparsity, min(bits, default=None)))
    places = {_place(figures["latency"], format) for figures in reports.values()}
    if len(places) > 1:
        notes.append(
            f"Latencies were measured in different ways, and are hard to compare: {'; '.join(sorted(places))}."
        )
    if any(measured.get("unsure") for run in runs for measured in run.latency.values()):
        notes.append("Latencies with a ? are unsure: the machine was busy with other work.")
    if any(run.bytes is None for run in runs):
        notes.append("A size that is not known was left out of its report: the parameters were sharded.")
    runs.sort(key=lambda run: (run.bytes is None, run.bytes, run.label))
    return Comparison(name, mode, format, sorted(places)[0], tuple(runs), tuple(notes))


def _metric(reports: Mapping[Path, Mapping[str, Any]], name: str | None) -> str:
    names = [
        {
            name
            for name, value in figures["metrics"].items()
            if not name.startswith("compress/") and (value is None or isinstance(value, (int, float)))
        }
        for figures in reports.values()
    ]
    common = sorted(set.intersection(*names))
    if name is None and len(common) == 1:
        return common[0]
    if name in common:
        return str(name)
    there = ", ".join(common) or "none"
    if name is None:
        raise ValueError(f"name a metric with --metric; all runs have: {there}")
    lacking = [str(path) for path, known in zip(reports, names, strict=True) if name not in known]
    raise ValueError(f"there is no metric '{name}' in {_list(lacking)}; all runs have: {there}")


def _format(reports: Mapping[Path, Mapping[str, Any]], format: str | None) -> str:
    for known in FORMATS if format is None else (format,):
        lacking = [
            str(path)
            for path, figures in reports.items()
            if known != "state_dict" and known not in {file["format"] for file in figures.get("exported") or []}
        ]
        if not lacking:
            return known
    raise ValueError(f"there is no exported {format} file in {_list(lacking)}: add ExportCompressed to the callbacks")


def _list(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _weighed(
    figures: Mapping[str, Any], format: str
) -> tuple[int | None, Mapping[str, Mapping[str, Any]], Mapping[str, float]]:
    """Return bytes, latency and the metrics of its own that a file has, if an export compared some."""
    cut = (figures.get("removed") or {}).get("cut")
    size, latency = (cut["bytes"], cut["latency"]) if cut else (figures["size"]["bytes"], figures["latency"]["after"])
    for file in figures.get("exported") or []:
        if file["format"] == format:
            return file["bytes"], (file["latency"] if file["runtime"] else latency) or {}, file["metrics"]
    return size, latency or {}, {}


def _place(latency: Mapping[str, Any], format: str) -> str:
    if format in RUNTIMES:
        return f"{RUNTIMES[format]}, {spell_place({**latency, 'device': 'cpu'})}"
    return f"PyTorch, {spell_place(latency)}"


# Labels --------------------------------------------------------------------------------------------------------------


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """Return what tells runs apart: the overrides in which Hydra's jobs differ, else the folders."""
    folders = dict(zip(paths, _different([path.absolute().parts[:-1] for path in paths]), strict=True))
    overrides = {path: _overrides(path) for path in paths}
    everywhere = set.intersection(*map(set, overrides.values()))
    keys = {override.partition("=")[0] for own in overrides.values() for override in own if override not in everywhere}
    last = [key.rpartition(".")[2] for key in keys]

    def short(override: str) -> str:
        key, equals, value = override.partition("=")
        name = key.rpartition(".")[2]
        return f"{name if last.count(name) == 1 else key}{equals}{value}".lstrip("+~")

    labels = {path: " ".join(short(o) for o in own if o not in everywhere) for path, own in overrides.items()}
    found = list(labels.values())
    return {
        path: label if label and found.count(label) == 1 else f"{folders[path]} {label}".strip()
        for path, label in labels.items()
    }


def _different(folders: Sequence[Sequence[str]]) -> list[str]:
    """Return folders without what all of them begin and end with; a single one by its name."""
    if len(folders) == 1:
        return [folders[0][-1]]
    shortest = min(map(len, folders)) - 1
    first, last = 0, 0
    while first < shortest and len({folder[first] for folder in folders}) == 1:
        first += 1
    while last < shortest - first and len({folder[-1 - last] for folder in folders}) == 1:
        last += 1
    return ["/".join(folder[first : len(folder) - last]) for folder in folders]


def _overrides(path: Path) -> list[str]:
    """Return the overrides of the Hydra job that wrote a report into its folder, or into one in it."""
    for folder in path.absolute().parents:
        file = folder / ".hydra" / "overrides.yaml"
        if file.exists():
            import yaml  # type: ignore[import-untyped]

            overrides = [str(override) for override in yaml.safe_load(file.read_text(encoding="utf-8")) or []]
            return [override for override in overrides if "$" not in override]  # a reference, most often to a folder
    return []


# What is shown -------------------------------------------------------------------------------------------------------


def axes_of(comparison: Comparison) -> dict[str, str]:
    """Return the costs that at least one run knows, and what they are called."""
    file = "the state_dict" if comparison.format == "state_dict" else f"the {comparison.format} file"
    titles = {"size": f"Size of {file}"}
    for batch in map(str, reversed(BATCHES)):
        titles[batch] = f"Latency at batch {batch} ({comparison.place})"
    return {axis: title for axis, title in titles.items() if any(run.cost(axis) is not None for run in comparison.runs)}


def rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headings, and each run as text: number, label, metric, costs (``●`` on the front), sparsity and bits."""
    axes = axes_of(comparison)
    fronts = {axis: comparison.front(axis) for axis in axes}
    names = ["size" if axis == "size" else f"batch {axis}" for axis in axes]
    found = []
    for index, run in enumerate(comparison.runs):
        costs = []
        for axis in axes:
            size = "" if run.bytes is None else spell_bytes(run.bytes)
            cost = size if axis == "size" else latency_cell(run.latency.get(axis))
            costs.append(f"{_ON_FRONT} {cost}" if index in fronts[axis] else cost)
        sparsity = "" if run.sparsity is None else f"{run.sparsity:.4g}"
        bits = "" if run.bits is None else str(run.bits)
        found.append([str(index + 1), run.label, f"{run.metric:.4g}", *costs, sparsity, bits])
    return ["", "run", comparison.metric, *names, "sparsity", "bits"], found


def summary(comparison: Comparison) -> str:
    """Return in one line what is compared."""
    better = "more" if comparison.mode == "max" else "less"
    return f"{len(comparison.runs)} runs, {comparison.metric} ({better} is better)"


def table(comparison: Comparison) -> Table:
    """Return the table for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    headings, lines = rows(comparison)
    found = Table(
        title=summary(comparison), caption=_LEGEND, box=box.ROUNDED, title_style="bold", border_style="dim"
    )  # fmt: skip
    for heading in headings:
        is_label = heading == "run"
        found.add_column(Text(heading), justify="left" if is_label else "right", overflow="fold", no_wrap=not is_label)
    for line in lines:
        is_best = any(cell.startswith(_ON_FRONT) for cell in line)
        found.add_row(*map(Text, line), style="" if is_best else "dim")
    return found


def drawings(comparison: Comparison) -> dict[str, Figure]:
    """Return a figure for each cost, by its name in :func:`axes_of`.

    Raises:
        ImportError: Without matplotlib.
    """
    from lightning_compress.report.plots import literal_text, new_figure

    found = {}
    with literal_text():
        for axis, title in axes_of(comparison).items():
            found[axis] = figure = new_figure(7.2, 4.0)
            _draw(figure.subplots(), comparison, axis, title)
    return found


def picture(comparison: Comparison) -> bytes:
    """Return a PNG with a picture for each cost.

    Raises:
        ImportError: Without matplotlib.
    """
    from lightning_compress.report.plots import literal_text, new_figure, png

    axes = axes_of(comparison)
    with literal_text():
        figure = new_figure(4.6 * len(axes) + 3.4, 4.4)
        *places, legend = figure.subplots(1, len(axes) + 1, width_ratios=[4.6] * len(axes) + [2.6], squeeze=False)[0]
        for place, (axis, title) in zip(places, axes.items(), strict=True):
            _draw(place, comparison, axis, title)
        _name_runs(legend, comparison)
    return png(figure)


def _draw(axes: Axes, comparison: Comparison, axis: str, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    from lightning_compress.report.plots import COLOURS, plain_axes

    plain_axes(axes, title)
    best = comparison.front(axis)
    points = {i: (cost, run.metric) for i, run in enumerate(comparison.runs) if (cost := run.cost(axis)) is not None}
    axes.plot(*zip(*(points[i] for i in best), strict=True), color=COLOURS["after"], linewidth=1.6, zorder=2)
    for i, (cost, metric) in points.items():
        is_best = i in best
        colour = COLOURS["after" if is_best else "before"]
        axes.plot(cost, metric, "o", color=colour, markersize=7 if is_best else 5, zorder=3)
        axes.annotate(
            str(i + 1), (cost, metric), xytext=(7, -4), textcoords="offset points", va="top", fontsize=8,
            color=COLOURS["ink" if is_best else "muted"], zorder=4,
        )  # fmt: skip
    costs = [cost for cost, _ in points.values()]
    if max(costs) > 4.0 * min(costs) > 0.0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if max(costs) < 1.2 * min(costs):  # a closer look would show noise
            middle = (max(costs) + min(costs)) / 2.0
            axes.set_xlim(0.85 * middle, 1.15 * middle)
    spell = spell_bytes if axis == "size" else lambda ms: f"{ms:.3g} ms"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value) if value > 0.0 else "0"))
    axes.margins(x=0.12, y=0.14)
    axes.grid(axis="x", color=COLOURS["grid"], linewidth=0.8)
    axes.set_ylabel(comparison.metric, color=COLOURS["muted"], fontsize=9)
    axes.set_xlabel("← smaller" if axis == "size" else "← faster", color=COLOURS["muted"], fontsize=9)


def _name_runs(axes: Axes, comparison: Comparison) -> None:
    from lightning_compress.report.plots import COLOURS

    best = {i for axis in axes_of(comparison) for i in comparison.front(axis)}
    shown = sorted(range(len(comparison.runs)), key=lambda i: (i not in best, i))[:_ROWS]
    for row, i in enumerate(sorted(shown)):
        axes.text(
            0.0, 1.0 - (row + 0.5) / _ROWS, f"{i + 1}  {comparison.runs[i].label}", fontsize=8, va="center",
            color=COLOURS["ink" if i in best else "muted"], transform=axes.transAxes,
        )  # fmt: skip
    axes.set_axis_off()


def pareto_page(comparison: Comparison, figures: Mapping[str, Figure]) -> str:
    """Return the page of a comparison.

    Args:
        comparison: What is compared.
        figures: What :func:`drawings` makes of it; without matplotlib there are none.
    """
    from lightning_compress.report.page import page, paragraph, section
    from lightning_compress.report.page import table as html_table
    from lightning_compress.report.plots import svg

    headings, lines = rows(comparison)
    numbers = [heading for heading in headings if heading != "run"]
    titles = axes_of(comparison)
    return page(
        f"Pareto fronts: {summary(comparison)}",
        *(paragraph(note) for note in comparison.notes),
        section("Fronts", *(svg(figure, f"{comparison.metric}: {titles[axis]}") for axis, figure in figures.items())),
        section("Runs", html_table(headings, lines, numbers), paragraph(f"{_LEGEND}. {_NOISE_LEGEND}")),
        section("Reports", html_table(["", "file"], [(i + 1, str(r.path)) for i, r in enumerate(comparison.runs)])),
    )
