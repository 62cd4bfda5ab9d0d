"""What a person looks at: pictures made of the content of ``report.json``. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_compress.report.measure import spell_bytes
from lightning_compress.report.table import latency_cell, most_important, spell_place

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = 'pip install "lightning-compress[plots]"'

_BARS = 16  # layers in the picture
_HISTOGRAMS = 12

COLOURS = {
    # Okabe and Ito's, told apart by everyone, and greys for what is no data
    "before": "#b8bec6", "after": "#0072b2", "metric": "#d55e00", "file": "#009e73",
    "ink": "#22272e", "muted": "#6b737d", "grid": "#e4e7eb",
}  # fmt: skip
"""The colours by what they stand for; a page may give each another value, see :func:`svg`."""


# What is drawn -------------------------------------------------------------------------------------------------------


def drawings(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of a report by name: ``"history"``, ``"prices"``, ``"layers"``, ``"weights"``.

    A ramp and a metric over the steps; latency and size before and after; the sparsity of each layer; the histogram of
    each layer's weights. One that has nothing to show is left out.

    Raises:
        ImportError: Without matplotlib.
    """
    found = {}
    with literal_text():
        panels = _panels(figures)
        if panels:
            found["history"] = figure = new_figure(7.2, 0.6 + 1.9 * len(panels))
            _draw_history(list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]), panels, figures)
        groups = _groups(figures)
        if groups:
            found["prices"] = figure = new_figure(7.2, 0.7 + 0.25 * sum(len(bars) + 1 for _, bars in groups))
            _draw_groups(figure.subplots(), groups, _spell_prices(figures))
        layers, title = _layers(figures)
        if layers:
            found["layers"] = figure = new_figure(7.2, 0.7 + 0.26 * len(layers))
            _draw_layers(figure.subplots(), layers, title)
        if any(row.get("histogram") for row in layers):
            found["weights"] = _weights(layers)
    return found


def picture(figures: Mapping[str, Any]) -> bytes:
    """Return a PNG: a ramp and a metric over the steps, the sparsity of each layer, latency and size before and after.

    Raises:
        ImportError: Without matplotlib.
    """
    with literal_text():
        layers, title = _layers(figures)
        panels, groups = _panels(figures), _groups(figures)
        rows = sum(len(bars) + 1 for _, bars in groups)
        figure = new_figure(11.0, max(5.2, 1.6 + 0.24 * (len(layers) + rows)))
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1.0), wspace=0.03)  # type: ignore[misc]
        figure.suptitle(headline(figures), fontsize=13, fontweight="bold", color=COLOURS["ink"], x=0.016, ha="left")
        _draw_history(list(left.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0]), panels, figures)
        if groups:
            bars, prices = right.subplots(2, 1, height_ratios=(max(len(layers), 3), max(rows, 3)))
            _draw_groups(prices, groups, _spell_prices(figures))
        else:
            bars = right.subplots()
        _draw_layers(bars, layers, title)
    return png(figure)


def headline(figures: Mapping[str, Any]) -> str:
    """Return the report in one line."""
    totals = figures["totals"]
    return f"{figures['module']}: {totals['nonzero']:,} of {totals['parameters']:,} parameters are left non-zero"


# As bytes, as text, as numbers ---------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches that no window knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12)
    figure = Figure((width, height), dpi=150, facecolor="white", layout=engine)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def pixels(figure: Figure) -> np.ndarray[Any, Any]:
    """Return a figure as uint8 ``(height, width, 3)``."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an ``<svg>`` element for a page: text stays text, and each colour is a variable of the page.

    ``COLOURS["ink"]`` becomes ``var(--ink)``, and so on, so that the page can be dark.

    Args:
        figure: The figure.
        name: What it shows, for those who cannot see it; and what makes its inner names differ from another figure's.
    """
    from html import escape

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{escape(name)}"', text, count=1)


@contextmanager
def literal_text() -> Iterator[None]:
    """Take a ``$`` in a name for what it is, not for mathematics."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


# Over the steps ------------------------------------------------------------------------------------------------------

_Panel = tuple[str, str, list[tuple[int, float]]]  # title, colour, (step, value)


def _panels(figures: Mapping[str, Any]) -> list[_Panel]:
    history, metric = figures["history"], _metric_to_draw(figures)

    def points(value: Callable[[Mapping[str, Any]], float | None]) -> list[tuple[int, float]]:
        found = [(point["step"], value(point)) for point in history]
        return [(step, value) for step, value in found if value is not None]

    def bits(point: Mapping[str, Any]) -> float | None:
        widths = [value for name, value in point["metrics"].items() if name.startswith("compress/weight_bits")]
        return min((value for value in widths if value is not None), default=None)

    panels = [
        ("Sparsity of the compressed weights", "after", points(lambda point: point["sparsity"])),
        ("Bits of the weights", "file", points(bits)),
    ]
    if metric is not None:
        panels.append((metric, "metric", points(lambda point: point["metrics"].get(metric))))
    return [panel for panel in panels if panel[2]]


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


def _draw_history(all_axes: Sequence[Axes], panels: Sequence[_Panel], figures: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    if not panels:
        plain_axes(all_axes[0], "No technique claims a sparsity, and no metric was logged")
        return
    steps = [step for _, _, points in panels for step, _ in points]
    length = max(max(steps) - min(steps), 1)
    for axes, (title, colour, points) in zip(all_axes, panels, strict=True):
        plain_axes(axes, title)
        is_share = colour == "after"
        if is_share:
            axes.set_ylim(0.0, 1.05)
            axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
        marker = 3.2 if len(points) < 60 else 0
        style = "steps-post" if colour == "file" else "default"  # bits have no value in between
        axes.plot(
            *zip(*points, strict=True), color=COLOURS[colour], linewidth=1.8, marker="o", markersize=marker,
            drawstyle=style,
        )  # fmt: skip
        last = points[-1][1]
        axes.annotate(
            f"{100.0 * last:.4g} %" if is_share else f"{last:.4g}", points[-1], xytext=(7, 0), va="center",
            textcoords="offset points", color=COLOURS[colour], fontsize=9, fontweight="bold",
        )  # fmt: skip
        axes.set_xlim(min(steps) - 0.04 * length, max(steps) + 0.16 * length)  # room for the number
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.margins(y=0.2)
        for technique in figures["techniques"]:
            for event in technique.get("events") or []:
                axes.axvline(event["step"], color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (3, 3)))
                if axes is all_axes[0]:
                    axes.text(
                        event["step"], 1.0, f" {event['action']}", transform=axes.get_xaxis_transform(), va="top",
                        fontsize=8, color=COLOURS["muted"],
                    )  # fmt: skip
    all_axes[-1].set_xlabel("optimizer step", color=COLOURS["muted"], fontsize=9)


# Layers --------------------------------------------------------------------------------------------------------------


def _layers(figures: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str]:
    layers = [row for row in figures["parameters"] if row["techniques"] or len(row["shape"]) > 1]
    layers, others = most_important(layers, _BARS)
    return layers, f"Sparsity of the {_BARS} largest layers" if others else "Sparsity of each layer"


def _draw_layers(axes: Axes, layers: Sequence[Mapping[str, Any]], title: str) -> None:
    _bare_axes(axes, title)
    names = [_shorten(row["name"]) for row in layers]
    positions = range(len(layers))
    axes.barh(positions, [1.0] * len(layers), color=COLOURS["grid"], height=0.62)
    axes.barh(positions, [row["sparsity"] for row in layers], color=COLOURS["after"], height=0.62)
    for position, row in zip(positions, layers, strict=True):
        colour = COLOURS["ink" if row["techniques"] else "muted"]
        axes.text(1.02, position, _spell_sparsity(row), va="center", fontsize=8, color=colour)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.16)


def _weights(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the histograms of the weights that are not zero, each of its own scale."""
    shown = [row for row in layers if row.get("histogram")][:_HISTOGRAMS]
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = new_figure(7.2, 0.5 + 1.35 * lines)
    figure.suptitle(
        "Weights that are not zero: how many have which value", fontsize=10, color=COLOURS["ink"], x=0.016, ha="left"
    )
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, row in zip(grid, shown, strict=False):
        limit, counts = row["histogram"]["limit"], row["histogram"]["counts"]
        width = 2.0 * limit / len(counts)
        _bare_axes(axes, _shorten(row["name"], 26))
        axes.set_title(axes.get_title("left"), loc="left", fontsize=8, color=COLOURS["ink"])
        axes.bar([-limit + (i + 0.5) * width for i in range(len(counts))], counts, width, color=COLOURS["after"])
        axes.spines["bottom"].set_visible(True)
        axes.set_xticks([-limit, 0.0, limit], [f"{-limit:.2g}", "0", f"{limit:.2g}"], fontsize=7)
        axes.set_yticks([])
        axes.text(
            0.98, 0.94, f"zero: {_spell_sparsity(row)}", transform=axes.transAxes, ha="right", va="top", fontsize=7,
            color=COLOURS["muted"],
        )  # fmt: skip
    for axes in grid:  # those that are left over
        axes.set_visible(False)
    return figure


def _spell_sparsity(row: Mapping[str, Any]) -> str:
    return f"{row['sparsity']:.1%}".replace("%", " %") if row["techniques"] or row["zeros"] else "dense"


# Latency and size ----------------------------------------------------------------------------------------------------

_Group = tuple[str, list[tuple[float, str, str]]]  # label, (value, text, colour)


def _groups(figures: Mapping[str, Any]) -> list[_Group]:
    latency, size, files = figures["latency"], figures["size"], figures.get("exported") or []
    before, after = latency["before"] or {}, latency["after"] or {}
    groups: list[_Group] = []
    for batch in dict.fromkeys([*before, *after]):
        times = [(before.get(batch), "before", "before"), (after.get(batch), "after", "after")]
        times += [
            ((file["latency"] or {}).get(batch), f"{file['format']}, {file['runtime']}", "file") for file in files
        ]
        bars = [
            (measured["ms"], f"{latency_cell(measured)} {when}", colour)
            for measured, when, colour in times
            if measured and measured["ms"] is not None
        ]
        groups.append((f"batch {batch}", bars))
    sizes = [(figures["before"]["bytes"], "before", "before"), (size["bytes"], "after", "after")]
    sizes.append((size["deflated_bytes"], "after, deflated", "after"))
    sizes += [(file["bytes"], file["format"], "file") for file in files]
    groups.append(("file", [(n, f"{spell_bytes(n)} {what}", colour) for n, what, colour in sizes if n is not None]))
    return [group for group in groups if group[1]]


def _spell_prices(figures: Mapping[str, Any]) -> str:
    if not any(figures["latency"][moment] for moment in ("before", "after")):
        return "Size on disk"
    return f"Latency, median ({spell_place(figures['latency'])}), and size"


def _draw_groups(axes: Axes, groups: Sequence[_Group], title: str) -> None:
    _bare_axes(axes, title)
    labels, position = [], 0.0
    for label, bars in groups:
        longest = max(value for value, _, _ in bars) or 1.0
        labels.append((position + 0.4 * (len(bars) - 1), label))
        for value, text, colour in bars:
            # Each group has its own scale: batch 64 would make the bars of batch 1 invisible.
            axes.barh(position, value / longest, color=COLOURS[colour], height=0.7)
            ink = COLOURS["muted" if colour == "before" else "ink"]
            axes.text(value / longest + 0.015, position, text, va="center", fontsize=8, color=ink)
            position += 0.8
        position += 0.5
    axes.set_yticks([where for where, _ in labels], [label for _, label in labels], fontsize=8)
    axes.set_ylim(position - 0.8, -0.6)
    axes.set_xlim(0.0, 1.5)


# Axes ----------------------------------------------------------------------------------------------------------------


def plain_axes(axes: Axes, title: str) -> None:
    """Take away from axes what shows no data."""
    axes.set_title(title, loc="left", fontsize=10, color=COLOURS["ink"], pad=8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    axes.tick_params(colors=COLOURS["muted"], labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["grid"])


def _bare_axes(axes: Axes, title: str) -> None:
    plain_axes(axes, title)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _shorten(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
