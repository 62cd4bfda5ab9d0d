"""Trains one network twice with the same app, as it is and compressed, and compares what comes out.

    python examples/demo.py

Both runs have the same number of epochs and the same learning rate at each step; the second adds nothing but
callbacks on the command line. They run side by side, a thread each, so that both see the machine in the same state.
Ends with an error if the saved weights are not as sparse as was asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).parent
LIGHTNING_BESIDE_NEW_TORCH = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"
console = Console(highlight=False)


@dataclass
class Result:
    """What one run left behind."""

    accuracy: float
    step_ms: float
    fit_seconds: float
    weights: int
    zeros: int
    saved_bytes: int
    zipped_bytes: int
    file: Path

    @classmethod
    def of(cls, folder: Path) -> Result:
        """Read a run's files: nothing here is taken on the word of a callback."""
        metrics = json.loads((folder / "metrics.json").read_text())
        checkpoint = torch.load(folder / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
        file = folder / "weights.pt"
        torch.save(state, file)
        zipped = folder / "weights.pt.zip"
        with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(file, file.name)
        # the weights of convolutions and linear layers: matrices and above
        weights = [value for name, value in state.items() if name.endswith("weight") and value.dim() > 1]
        return cls(
            accuracy=metrics["test_acc"],
            step_ms=metrics["step_ms"],
            fit_seconds=metrics["fit_seconds"],
            weights=sum(weight.numel() for weight in weights),
            zeros=sum(int((weight == 0).sum()) for weight in weights),
            saved_bytes=file.stat().st_size,
            zipped_bytes=zipped.stat().st_size,
            file=file,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the weights to prune (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each run (%(default)s)")
    parser.add_argument("--model", default="residual_cnn", help="one of examples/configs/model (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder (%(default)s)")
    args = parser.parse_args()

    shared = [f"model={args.model}", f"trainer.max_epochs={args.epochs}", "callbacks=[default,timer]"]
    pruned = ["+compress@callbacks=[pruning,learning_rate,report]", f"callbacks.pruning.final_sparsity={args.sparsity}"]
    overrides = {
        "dense": [*shared, "+compress@callbacks=learning_rate"],
        "compressed": [*shared, *pruned],
    }
    train(args.output, overrides)
    dense, compressed = (Result.of(args.output / name) for name in overrides)

    console.rule("dense against compressed")
    console.print(comparison(dense, compressed))
    console.print(
        "A zero stored as a number takes as much room as any other number: the file gets smaller when it is zipped, "
        "not before. Scattered zeros make nothing faster by themselves either."
    )
    for name, result in (("dense", dense), ("compressed", compressed)):
        console.print(f"{name}: {result.file} (beside it checkpoints/, csv/, metrics.json)", soft_wrap=True)

    asked = args.sparsity * compressed.weights
    if abs(compressed.zeros - asked) > 1:
        sys.exit(f"{compressed.file} holds {compressed.zeros:,} zeros, but {asked:,.1f} were asked for")


def train(output: Path, overrides: dict[str, list[str]]) -> None:
    """Run the app once for each entry, all at the same time; the last one is shown, the others write a log."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    *_, shown = overrides
    runs, logs = {}, {}
    try:
        for name, own in overrides.items():
            arguments = [*own, f"hydra.run.dir={output / name}"]
            console.print(f"{name}: python examples/train.py {shlex.join(arguments)}", markup=False, soft_wrap=True)
            if name != shown or not sys.stdout.isatty():
                arguments.append("callbacks.progress_bar.refresh_rate=0")
            logs[name] = None if name == shown else (output / f"{name}.log").open("w")
            command = [sys.executable, "-W", LIGHTNING_BESIDE_NEW_TORCH, str(EXAMPLES / "train.py"), *arguments]
            runs[name] = subprocess.Popen(command, env=environment, stdout=logs[name], stderr=logs[name])
        for name, run in runs.items():
            if run.wait():
                where = f", see {logs[name].name}" if logs[name] else ""
                sys.exit(f"The {name} run failed with exit code {run.returncode}{where}")
    finally:
        for name, run in runs.items():
            run.terminate()
            run.wait()
            if logs[name]:
                logs[name].close()


def comparison(dense: Result, compressed: Result) -> Table:
    """The figures of both runs beside each other."""

    def change(before: float, after: float) -> str:
        return f"{after / before - 1:+.1%}"

    def share(result: Result) -> str:
        return f"{result.weights - result.zeros:,} ({1 - result.zeros / result.weights:.1%})"

    remaining = [result.weights - result.zeros for result in (dense, compressed)]
    table = Table("", "dense", "compressed", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [
        (
            "accuracy (held out)",
            f"{dense.accuracy:.1%}",
            f"{compressed.accuracy:.1%}",
            f"{100 * (compressed.accuracy - dense.accuracy):+.1f} points",
        ),
        ("non-zero weights", share(dense), share(compressed), f"{remaining[0] / remaining[1]:.1f} times fewer"),
        (
            "file as saved",
            f"{dense.saved_bytes / 1e6:.2f} MB",
            f"{compressed.saved_bytes / 1e6:.2f} MB",
            change(dense.saved_bytes, compressed.saved_bytes),
        ),
        (
            "file, zipped",
            f"{dense.zipped_bytes / 1e6:.2f} MB",
            f"{compressed.zipped_bytes / 1e6:.2f} MB",
            f"{dense.zipped_bytes / compressed.zipped_bytes:.1f} times smaller",
        ),
        (
            "step time (median)",
            f"{dense.step_ms:.1f} ms",
            f"{compressed.step_ms:.1f} ms",
            change(dense.step_ms, compressed.step_ms),
        ),
        (
            "training in total",
            f"{dense.fit_seconds:.1f} s",
            f"{compressed.fit_seconds:.1f} s",
            change(dense.fit_seconds, compressed.fit_seconds),
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
