"""What a person looks at: the table and the picture, both made of the content of ``report.json``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_compress.example_inputs import spell_shape
from lightning_compress.report.measure import share, spell_bytes, spell_milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_ROWS = 20  # layers in the table; all of them are in the file
_BARS = 16  # layers in the picture
_WIDTH = 100  # columns of the table where the terminal does not say

# Okabe and Ito's colours, told apart by everyone, and greys for what is no data
_BEFORE, _AFTER, _METRIC = "#B8BEC6", "#0072B2", "#D55E00"
_INK, _MUTED, _GRID = "#22272E", "#6B737D", "#E4E7EB"


# The table -----------------------------------------------------------------------------------------------------------


def print_table(figures: Mapping[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(_WIDTH, console.width))
    console.print(table(figures))


def table(figures: Mapping[str, Any]) -> Table:
    """Return the table: the layers, then before and after, then what there is to say in words."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    outer = Table(
        title=f"CompressionReport: {figures['module']}", title_style="bold", box=box.ROUNDED, show_header=False,
        border_style="dim", padding=(0, 1), show_lines=True,
    )  # fmt: skip
    outer.add_column(overflow="fold")

    layers = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    layers.add_column("parameter", overflow="fold")
    layers.add_column("shape", no_wrap=True)
    for heading in ("values", "zeros", "sparsity"):
        layers.add_column(heading, justify="right", no_wrap=True)
    layers.add_column("", no_wrap=True)
    layers.add_column("by")
    alike = (figures.get("similarity") or {}).get("layers", {})
    if alike:
        layers.add_column("CKA", justify="right", no_wrap=True)
    shown, rest = _most_important(figures["parameters"], _ROWS)
    for row in shown:
        layers.add_row(
            " = ".join([row["name"], *row["aliases"]]), spell_shape(row["shape"]), f"{row['total']:,}",
            f"{row['zeros']:,}", f"{row['sparsity']:.4f}", _bar(row["sparsity"]),
            ", ".join(row["techniques"]) or Text("dense" if not row["zeros"] else "–", "dim"),
            *([_alike(row["name"], alike)] if alike else []),
        )  # fmt: skip
    if rest:
        what = "small ones: biases, norms" if len(shown) < _ROWS else "more, in report.json"
        layers.add_row(*_sum_row(f"{len(rest)} {what}", rest), style="dim")
    totals = figures["totals"]
    if totals["claimed"]:
        sparsity = totals["claimed_sparsity"]
        layers.add_row(
            "claimed", "", f"{totals['claimed']:,}", f"{totals['claimed_zeros']:,}", f"{sparsity:.4f}",
            _bar(sparsity), "", style="bold",
        )  # fmt: skip
    layers.add_row(*_sum_row("all parameters", figures["parameters"]), style="bold")
    outer.add_row(layers)

    prices = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    prices.add_column("", no_wrap=True)
    for heading in ("before", "after"):
        prices.add_column(heading, justify="right", no_wrap=True)
    prices.add_column("", style="dim", overflow="fold")
    for price in _prices(figures):
        prices.add_row(*price)
    outer.add_row(prices)

    words = _words(figures)
    if words:
        bullets = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        bullets.add_column(no_wrap=True)
        bullets.add_column(overflow="fold")
        for word, is_warning in words:
            bullets.add_row(Text("!", "bold yellow") if is_warning else Text("·", "dim"), Text(word))
        outer.add_row(bullets)
    return outer


def _alike(parameter: str, alike: Mapping[str, float | None]) -> str:
    layer, _, kind = parameter.rpartition(".")
    value = alike.get(layer) if "weight" in kind else None
    return "" if value is None else f"{value:.3f}"


def _sum_row(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    total, zeros = sum(row["total"] for row in rows), sum(row["zeros"] for row in rows)
    sparsity = share(zeros, total)
    return [name, "", f"{total:,}", f"{zeros:,}", f"{sparsity:.4f}", _bar(sparsity), ""]


def _most_important(
    rows: Sequence[Mapping[str, Any]], most: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the weights, at most so many of them and then the largest, in the model's order; and all that is left."""
    weights = [row for row in rows if row["techniques"] or len(row["shape"]) > 1]
    weights = sorted(weights, key=lambda row: (not row["techniques"], -row["total"]))[:most]
    names = {row["name"] for row in weights}
    return [row for row in rows if row["name"] in names], [row for row in rows if row["name"] not in names]


def _bar(fraction: float, width: int = 10) -> str:
    filled = math.floor(fraction * width)  # full only where nothing is left
    return "█" * filled + "░" * (width - filled)


def _prices(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    totals, before, size = figures["totals"], figures["before"], figures["size"]
    run, latency = figures["run"], figures["latency"]
    rows = []
    if before["parameters"] is not None:
        ratio = before["nonzero"] / totals["nonzero"] if totals["nonzero"] else math.inf
        fewer = f"{ratio:.3g} × fewer" if ratio >= 1.005 else ""
        rows.append(("non-zero parameters", f"{before['nonzero']:,}", f"{totals['nonzero']:,}", fewer))
    if size["bytes"] is not None:
        stored = spell_bytes(before["bytes"]) if before["bytes"] is not None else ""
        rows.append(("file on disk", stored, spell_bytes(size["bytes"]), "state_dict, as torch.save writes it"))
    if size["deflated_bytes"] is not None:
        rows.append(("file, deflated", "", spell_bytes(size["deflated_bytes"]), "as zip makes it"))
    times = {moment: latency[moment] or {} for moment in ("before", "after")}
    for batch in dict.fromkeys([*times["before"], *times["after"]]):
        first, last = (_latency_cell(times[moment].get(batch)) for moment in ("before", "after"))
        rows.append((f"forward, batch {batch}", first, last, f"median, {_spell_place(latency)}"))
    if run["step_ms"] is not None:
        note = f"median of {run['steps_timed']:,}, without loading the batch"
        rows.append(("training step", "", spell_milliseconds(run["step_ms"]), note))
    for name, value in figures["metrics"].items():
        if value is not None and not name.startswith("compress/"):
            rows.append((name, "", f"{value:.4g}" if isinstance(value, float) else str(value), ""))
    return rows


def _latency_cell(measured: Mapping[str, Any] | None) -> str:
    if not measured:
        return ""
    if measured["ms"] is None:
        return "–"
    return spell_milliseconds(measured["ms"]) + (" ?" if measured.get("unsure") else "")


def _spell_place(latency: Mapping[str, Any]) -> str:
    if latency["device"] != "cpu":
        return str(latency["device"])
    return f"cpu, {latency['threads']} thread{'s' if latency['threads'] > 1 else ''}"


def _words(figures: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return sentences, and whether each is a warning."""
    run, latency = figures["run"], figures["latency"]
    words = []
    for technique in figures["techniques"]:
        words.append((f"{technique['technique']}: {technique['summary']}", False))
        if technique["stage"] < 1:
            words.append((f"{technique['technique']} is not complete: it got to {technique['stage']:.0%}.", True))
    if run["ended_early"]:
        words.append((f"The run ended early, at step {run['steps']:,} of {run['planned_steps']:,}.", True))
    words += [(note, False) for note in figures["notes"]]
    for checkpoint in figures["checkpoints"]:
        words.append(_checkpoint_words(checkpoint))
    if latency["left_out"] is not None:
        words.append((f"Latency was left out: {latency['left_out']}.", False))
    elif latency["inputs"] is not None:
        compiled = ", measured uncompiled" if latency["compiled"] else ""
        inputs = f"the inputs of {latency['inputs_from']} ({latency['inputs']})"
        words.append((f"Latency of {latency['of']} on {inputs}{compiled}.", False))
        if latency["inputs_before"] not in (None, latency["inputs"]):
            words.append((f"Latency before was measured on other inputs: {latency['inputs_before']}.", True))
    for moment in ("before", "after"):
        unsure = [batch for batch, measured in (latency[moment] or {}).items() if measured.get("unsure")]
        if unsure:
            batches = " and ".join(unsure)
            words.append(
                (f"Latency {moment} at batch {batches} is unsure: the machine was busy with other work.", True)
            )
    failures = {
        f"Latency at batch {batch} was left out: {measured['left_out']}."
        for moment in ("before", "after")
        for batch, measured in (latency[moment] or {}).items()
        if measured["ms"] is None
    }
    words += [(failure, True) for failure in sorted(failures)]
    if figures["size"]["left_out"] is not None:
        words.append((f"Size on disk: {figures['size']['left_out']}.", False))
    if figures.get("files"):
        words.append((f"Written: {', '.join(figures['files'])}", False))
    return words


def _checkpoint_words(checkpoint: Mapping[str, Any]) -> tuple[str, bool]:
    path, sparsity, final = checkpoint["path"], checkpoint["sparsity"], checkpoint["final_sparsity"]
    if checkpoint["left_out"] is not None:
        return f"best_model_path {path} could not be read ({checkpoint['left_out']}).", True
    if checkpoint["not_begun"]:
        sparse = "" if sparsity is None else f" ({sparsity:.4f} sparse, the final model {final:.4f})"
        return f"best_model_path {path} was written before {' and '.join(checkpoint['not_begun'])} began{sparse}.", True
    if sparsity is None:
        return f"best_model_path {path} is compressed as the final model is.", False
    if abs(sparsity - final) > 1e-6:
        return f"best_model_path {path} is {sparsity:.4f} sparse, the final model {final:.4f}.", True
    return f"best_model_path {path} is as sparse as the final model ({final:.4f}).", False


# The picture ---------------------------------------------------------------------------------------------------------


def picture(figures: Mapping[str, Any]) -> bytes:
    """Return a PNG: sparsity and a metric over the steps, the sparsity of each layer, latency before and after.

    Raises:
        ImportError: Without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layers = [row for row in figures["parameters"] if row["techniques"] or len(row["shape"]) > 1]
    layers, others = _most_important(layers, _BARS)
    latency = figures["latency"]
    has_latency = any(
        measured["ms"] is not None for moment in ("before", "after") for measured in (latency[moment] or {}).values()
    )
    metric = _metric_to_draw(figures)
    size = (11.0, max(5.2, 3.0 + 0.24 * len(layers)))
    figure = Figure(size, dpi=150, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12))
    FigureCanvasAgg(figure)
    left: SubFigure
    right: SubFigure
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1.0), wspace=0.03)  # type: ignore[misc]
    figure.suptitle(_headline(figures), fontsize=13, fontweight="bold", color=_INK, x=0.016, ha="left")

    ramp_axes = left.subplots(2 if metric else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_history(ramp_axes[0], figures, "Sparsity of the compressed weights", None)
    if metric:
        _draw_history(ramp_axes[1], figures, metric, metric)
    ramp_axes[-1].set_xlabel("optimizer step", color=_MUTED, fontsize=9)

    if has_latency:
        heights = (max(len(layers), 3), 3.2)
        bars, times = right.subplots(2, 1, height_ratios=heights)
        _draw_latency(times, latency)
    else:
        bars = right.subplots()
    _draw_layers(bars, layers, f"Sparsity of the {_BARS} largest layers" if others else "Sparsity of each layer")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _headline(figures: Mapping[str, Any]) -> str:
    totals = figures["totals"]
    return f"{figures['module']}: {totals['nonzero']:,} of {totals['parameters']:,} parameters are left non-zero"


def _metric_to_draw(figures: Mapping[str, Any]) -> str | None:
    """Return the metric that the run is about: what a checkpoint watches, else a validation metric."""
    known: dict[str, int] = {}
    for point in figures["history"]:
        for name, value in point["metrics"].items():
            if value is not None and not isinstance(value, list) and not name.startswith("compress/"):
                known[name] = known.get(name, 0) + 1
    watched = [checkpoint["monitor"] for checkpoint in figures["checkpoints"]]
    ranked = sorted(known, key=lambda name: (name not in watched, "val" not in name, "loss" in name, -known[name]))
    return ranked[0] if ranked else None


def _draw_history(axes: Axes, figures: Mapping[str, Any], title: str, metric: str | None) -> None:
    from matplotlib.ticker import MaxNLocator

    points = [
        (point["step"], point["metrics"].get(metric) if metric else point["sparsity"]) for point in figures["history"]
    ]
    points = [point for point in points if point[1] is not None]
    _plain_axes(axes, title)
    if not metric:
        axes.set_ylim(0.0, 1.05)
        axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    if not points:
        axes.text(0.5, 0.5, "no technique claims a sparsity", ha="center", color=_MUTED, transform=axes.transAxes)
        return
    color = _METRIC if metric else _AFTER
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3.2 if len(points) < 60 else 0)
    last = f"{values[-1]:.4g}" if metric else f"{100.0 * values[-1]:.4g} %"
    axes.annotate(
        last,
        (steps[-1], values[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=9,
        fontweight="bold",
    )
    length = max(steps[-1] - steps[0], 1)
    axes.set_xlim(steps[0] - 0.04 * length, steps[-1] + 0.16 * length)  # room for the number
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.margins(y=0.2)


def _draw_layers(axes: Axes, layers: Sequence[Mapping[str, Any]], title: str) -> None:
    _plain_axes(axes, title)
    axes.grid(visible=False)
    names = [_shorten(row["name"]) for row in layers]
    positions = range(len(layers))
    axes.barh(positions, [1.0] * len(layers), color=_GRID, height=0.62)
    axes.barh(positions, [row["sparsity"] for row in layers], color=_AFTER, height=0.62)
    for position, row in zip(positions, layers, strict=True):
        label = f"{row['sparsity']:.1%}".replace("%", " %") if row["techniques"] or row["zeros"] else "dense"
        axes.text(1.02, position, label, va="center", fontsize=8, color=_INK if row["techniques"] else _MUTED)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.16)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_latency(axes: Axes, latency: Mapping[str, Any]) -> None:
    _plain_axes(axes, f"Forward latency, median ({_spell_place(latency)})")
    axes.grid(visible=False)
    before, after = latency["before"] or {}, latency["after"] or {}
    labels, position = [], 0.0
    for batch in dict.fromkeys([*before, *after]):
        pair = [before.get(batch) or {"ms": None}, after.get(batch) or {"ms": None}]
        longest = max(measured["ms"] or 0.0 for measured in pair) or 1.0
        labels.append((position + 0.4, f"batch {batch}"))
        for offset, (measured, color, when) in enumerate(
            zip(pair, (_BEFORE, _AFTER), ("before", "after"), strict=True)
        ):
            ms = measured["ms"]
            if ms is None:
                continue
            # Each batch size has its own scale: 64 would make the bars of 1 invisible.
            axes.barh(position + 0.8 * offset, ms / longest, color=color, height=0.7)
            axes.text(
                ms / longest + 0.015, position + 0.8 * offset, f"{_latency_cell(measured)} {when}", va="center",
                fontsize=8, color=_INK if when == "after" else _MUTED,
            )  # fmt: skip
        position += 2.1
    axes.set_yticks([where for where, _ in labels], [label for _, label in labels], fontsize=8)
    axes.set_ylim(position - 0.8, -0.6)
    axes.set_xlim(0.0, 1.42)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _plain_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK, pad=8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _shorten(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
