"""Draws the Pareto fronts of runs from their ``report.json`` files.

    python -m lightning_compress.report multirun/2026-11-28 --metric val_acc

Writes ``pareto.png`` and ``pareto.html``, and prints the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning_compress.export.files import write_whole
from lightning_compress.report import pareto
from lightning_compress.report.plots import INSTALL
from lightning_compress.report.table import wide_console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where the PNG cannot be drawn."""
    parser = argparse.ArgumentParser(prog="python -m lightning_compress.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", metavar="DIR", nargs="+", help="a folder with runs; searched to the bottom")
    parser.add_argument("--metric", metavar="NAME", help="what the runs are judged by; not needed if there is only one")
    parser.add_argument("--mode", choices=["max", "min"], help="which is better; by default it goes by the name")
    parser.add_argument("--file", choices=pareto.FORMATS, help="the file that is weighed, by default the first in all")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path(), help="where to write; by default here")
    options = parser.parse_args(arguments)
    try:
        reports = pareto.read_reports(options.folders)
        comparison = pareto.compare(reports, options.metric, options.mode, options.file)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if not comparison.runs:
        parser.error(" ".join(comparison.notes))

    console = wide_console()
    console.print(pareto.table(comparison))
    for note in comparison.notes:
        console.print(note, markup=False)
    written, status = {}, 0
    try:
        figures = pareto.drawings(comparison)
        written["pareto.png"] = pareto.picture(comparison)
    except ImportError:
        figures, status = {}, 1
        print(f"pareto.png needs matplotlib, which is not installed: {INSTALL}", file=sys.stderr)
    written["pareto.html"] = pareto.pareto_page(comparison, figures).encode()
    for name, content in written.items():
        write_whole(options.output / name, partial(Path.write_bytes, data=content))
    console.print(f"Written: {', '.join(str(options.output / name) for name in written)}", markup=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
