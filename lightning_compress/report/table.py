"""The table that is printed, and the sentences below it, both made of the content of ``report.json``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_compress.example_inputs import spell_shape
from lightning_compress.report.measure import share, spell_bytes, spell_milliseconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ROWS = 20  # layers in the table; all of them are in the file
_WIDTH = 100  # columns of the table where the terminal does not say


def print_table(figures: Mapping[str, Any]) -> None:
    """Print the table."""
    wide_console().print(table(figures))


def wide_console() -> Console:
    """Return a console that is wide enough for a table where there is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=max(_WIDTH, console.width), highlight=False)


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
    shown, rest = most_important(figures["parameters"], _ROWS)
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

    costs = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    costs.add_column("", no_wrap=True)
    for heading in ("before", "after"):
        costs.add_column(heading, justify="right", no_wrap=True)
    costs.add_column("", style="dim", overflow="fold")
    for price in prices(figures):
        costs.add_row(*price)
    outer.add_row(costs)

    sentences = words(figures)
    if sentences:
        bullets = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        bullets.add_column(no_wrap=True)
        bullets.add_column(overflow="fold")
        for word, is_warning in sentences:
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


def most_important(
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


def prices(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return what there is to pay, before and after: name, before, after, remark."""
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
        first, last = (latency_cell(times[moment].get(batch)) for moment in ("before", "after"))
        rows.append((f"forward, batch {batch}", first, last, f"median, {spell_place(latency)}"))
    if work := figures.get("multiply_adds"):
        fewer = (
            "" if work["nonzero"] == work["total"] else f"{work['nonzero']:,} of them with a weight that is not zero"
        )
        rows.append(("multiply-adds, batch 1", "", f"{work['total']:,}", fewer))
    for file in figures.get("exported") or []:
        name = os.path.basename(file["path"])
        metrics = [f"{metric} {value:.4g}" for metric, value in file["metrics"].items() if value is not None]
        rows.append((name, "", spell_bytes(file["bytes"]), ", ".join(["exported", *metrics])))
        for batch, measured in (file["latency"] or {}).items():
            place = f"median, {file['runtime']}, {_spell_threads(latency['threads'])}"
            rows.append((f"{name}, batch {batch}", "", latency_cell(measured), place))
    if run["step_ms"] is not None:
        note = f"median of {run['steps_timed']:,}, without loading the batch"
        rows.append(("training step", "", spell_milliseconds(run["step_ms"]), note))
    for name, value in figures["metrics"].items():
        if value is not None and not name.startswith("compress/"):
            rows.append((name, "", f"{value:.4g}" if isinstance(value, float) else str(value), ""))
    return rows


def latency_cell(measured: Mapping[str, Any] | None) -> str:
    """Return a measured latency as people write it, with a ``?`` where other processes disturbed it."""
    if not measured:
        return ""
    if measured["ms"] is None:
        return "–"
    return spell_milliseconds(measured["ms"]) + (" ?" if measured.get("unsure") else "")


def spell_place(latency: Mapping[str, Any]) -> str:
    """Return the device, of a CPU with its threads."""
    return _spell_threads(latency["threads"]) if latency["device"] == "cpu" else str(latency["device"])


def _spell_threads(threads: int) -> str:
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def words(figures: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return sentences, and whether each is a warning."""
    run, latency = figures["run"], figures["latency"]
    said = []
    for technique in figures["techniques"]:
        said.append((f"{technique['technique']}: {technique['summary']}", False))
        if technique["stage"] < 1:
            said.append((f"{technique['technique']} is not complete: it got to {technique['stage']:.0%}.", True))
    if run["ended_early"]:
        said.append((f"The run ended early, at step {run['steps']:,} of {run['planned_steps']:,}.", True))
    said += [(note, False) for note in figures["notes"]]
    for checkpoint in figures["checkpoints"]:
        said.append(_checkpoint_words(checkpoint))
    if latency["left_out"] is not None:
        said.append((f"Latency was left out: {latency['left_out']}.", False))
    elif latency["inputs"] is not None:
        compiled = ", measured uncompiled" if latency["compiled"] else ""
        inputs = f"the inputs of {latency['inputs_from']} ({latency['inputs']})"
        said.append((f"Latency of {latency['of']} on {inputs}{compiled}.", False))
        if latency["inputs_before"] not in (None, latency["inputs"]):
            said.append((f"Latency before was measured on other inputs: {latency['inputs_before']}.", True))
    for moment in ("before", "after"):
        unsure = [batch for batch, measured in (latency[moment] or {}).items() if measured.get("unsure")]
        if unsure:
            batches = " and ".join(unsure)
            said.append((f"Latency {moment} at batch {batches} is unsure: the machine was busy with other work.", True))
    failures = {
        f"Latency at batch {batch} was left out: {measured['left_out']}."
        for moment in ("before", "after")
        for batch, measured in (latency[moment] or {}).items()
        if measured["ms"] is None
    }
    said += [(failure, True) for failure in sorted(failures)]
    if figures["size"]["left_out"] is not None:
        said.append((f"Size on disk: {figures['size']['left_out']}.", False))
    if figures.get("files"):
        said.append((f"Written: {', '.join(figures['files'])}", False))
    return said


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
