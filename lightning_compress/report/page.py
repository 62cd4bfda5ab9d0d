"""Pages that need nothing but themselves: no network, no script, readable in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_compress.example_inputs import spell_shape
from lightning_compress.report.plots import COLOURS, headline, svg
from lightning_compress.report.table import prices, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DARK = {
    "before": "#5b6570", "after": "#58a6e0", "metric": "#ff9448", "file": "#2fc193",
    "ink": "#e6eaf0", "muted": "#9aa4b0", "grid": "#323a43",
}  # fmt: skip

_STYLE = (
    """
:root { color-scheme: light dark; --paper: #ffffff; %s }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; %s } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--grid); }
p, .muted { color: var(--muted); }
table { border-collapse: collapse; font-size: .87rem; display: block; overflow-x: auto; }
th { color: var(--muted); font-weight: normal; }
th, td { text-align: left; padding: .18rem 1.1rem .18rem 0; border-bottom: 1px solid var(--grid); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
li { overflow-wrap: anywhere; }
.warning { color: var(--metric); }
svg { width: 100%%; height: auto; max-width: 46rem; display: block; }
""".strip()
    % tuple(" ".join(f"--{name}: {colour};" for name, colour in colours.items()) for colours in (COLOURS, _DARK))
)

Cell = str | int | float | None


def page(title: str, *parts: str) -> str:
    """Return a whole page.

    Args:
        title: Its title, as plain text.
        parts: What stands in it, as HTML.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a heading and what follows it, ``""`` if nothing does.

    Example::

        >>> print(section("Size", paragraph("5 < 6")))
        <h2>Size</h2>
        <p>5 &lt; 6</p>
    """
    body = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], numbers: Iterable[str] = ()) -> str:
    """Return a table of plain text, without the columns that are empty; ``""`` without a row.

    Args:
        headings: One for each column.
        rows: Of as many cells each; ``None`` is an empty one.
        numbers: The headings of the columns that hold numbers.

    Example::

        >>> print(table(["a", "b", "c"], [["<i>", 2, None]], numbers=["b"]))
        <table>
        <tr><th>a</th><th class="number">b</th></tr>
        <tr><td>&lt;i&gt;</td><td class="number">2</td></tr>
        </table>
    """
    rows, numbers = [tuple(row) for row in rows], set(numbers)
    columns = [
        column for column in zip(headings, *rows, strict=True) if any(cell not in (None, "") for cell in column[1:])
    ]
    kinds = [' class="number"' if column[0] in numbers else "" for column in columns]
    lines = []
    for index, cells in enumerate(zip(*columns, strict=True)):
        tag = "td" if index else "th"
        texts = ["" if cell is None else escape(str(cell)) for cell in cells]
        lines.append("".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True)))
    return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"]) if rows else ""


def report_page(figures: Mapping[str, Any], drawings: Mapping[str, Figure]) -> str:
    """Return the page of one report.

    Args:
        figures: The content of ``report.json``.
        drawings: The figures that :func:`~lightning_compress.report.plots.drawings` makes of it; without matplotlib
            there are none, and the page has the tables alone.
    """

    def drawn(name: str) -> str:
        return svg(drawings[name], name) if name in drawings else ""

    run, versions = figures["run"], figures["versions"]
    steps = f"{run['steps']:,} steps, {run['epochs']} epochs, {run['seconds']:.0f} s"
    said = "\n".join(
        f'<li class="warning">{escape(text)}</li>' if is_warning else f"<li>{escape(text)}</li>"
        for text, is_warning in words(figures)
    )
    alike = (figures["similarity"] or {}).get("layers", {})
    layers = [
        (
            " = ".join([row["name"], *row["aliases"]]),
            spell_shape(row["shape"]),
            f"{row['total']:,}",
            f"{row['zeros']:,}",
            f"{row['sparsity']:.4f}",
            len(row["zero_rows"]) or None,
            min((facts["bits"] for facts in row["techniques"].values() if facts.get("bits")), default=None),
            None if (value := alike.get(row["name"].removesuffix(".weight"))) is None else f"{value:.3f}",
            ", ".join(row["techniques"]),
        )
        for row in figures["parameters"]
    ]
    headings = ["parameter", "shape", "values", "zeros", "sparsity", "zero rows", "bits", "CKA", "by"]
    events = [
        (
            event["step"],
            event["epoch"],
            event["action"],
            None if event["value"] is None else f"{event['value']:.4g}",
            None if event["baseline"] is None else f"{event['baseline']:.4g}",
            f"{event['stage']:.0%}",
            event["returned_to"],
        )
        for technique in figures["techniques"]
        for event in technique["events"]
    ]
    event_headings = ["step", "epoch", "action", "metric", "baseline", "compression", "returned to step"]
    return page(
        f"CompressionReport: {figures['module']}",
        paragraph(f"{headline(figures)} · {steps}"),
        section("In words", f"<ul>\n{said}\n</ul>"),
        section(
            "Before and after",
            drawn("prices"),
            table(["", "before", "after", "remark"], prices(figures), ["before", "after"]),
        ),
        section("Over the run", drawn("history")),
        section("What the guard did", table(event_headings, events, [*event_headings[:2], *event_headings[3:]])),
        section("Layers", drawn("layers"), drawn("weights"), table(headings, layers, headings[2:8])),
        paragraph(", ".join(f"{name} {version}" for name, version in versions.items())),
    )
