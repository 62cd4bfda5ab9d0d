"""Trains one network twice with the same app, as it is and compressed, and compares what comes out.

    python examples/demo.py

Both runs have the same number of epochs and the same learning rate at each step; the second adds nothing but
callbacks on the command line: it prunes in the first half and quantizes in the second. They run side by side, a thread
each, so that both see the machine in the same state. Then both are tested once more from their checkpoints, in this
process, and exported; onnxruntime classifies the held-out images with both files and is timed.
Ends with an error if the saved weights are not as sparse as was asked for, if a file answers differently from its
model, or if the compressed one is too large.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import hydra
import lightning as L
import onnxruntime
import torch
from data import MNIST5k
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_compress import QuantizationAwareTraining
from lightning_compress.export import export_onnx, integer_kernels
from lightning_compress.export.safetensors import save_compressed

EXAMPLES = Path(__file__).parent
LIGHTNING_BESIDE_NEW_TORCH = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"
SMALLEST_AGREEMENT = 0.999
LARGEST_FILE = 0.28
console = Console(highlight=False)


@dataclass
class Result:
    """What one run left behind."""

    accuracy: float
    step_ms: float
    fit_seconds: float
    weights: int
    zeros: int
    tested: float
    onnx: Path
    safetensors: Path
    onnx_accuracy: float
    agreement: float
    kernels: str

    @classmethod
    def of(cls, folder: Path, model: str, callbacks: list[L.Callback]) -> Result:
        """Read a run's files, test its last checkpoint and export it: nothing is taken on the word of a callback."""
        metrics = json.loads((folder / "metrics.json").read_text())
        checkpoint = folder / "checkpoints/last.ckpt"
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        # the weights of convolutions and linear layers: matrices and above
        weights = [value for name, value in state.items() if name.endswith("weight") and value.dim() > 1]

        module = hydra.utils.instantiate(OmegaConf.load(EXAMPLES / f"configs/model/{model}.yaml"))
        data = MNIST5k()
        trainer = L.Trainer(
            accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        (tested,) = trainer.test(module, data, ckpt_path=checkpoint, verbose=False)
        images, labels = data.held_out.images, data.held_out.labels
        file = export_onnx(module, images[:2], folder / "model.onnx")
        ours = outputs(session(file), images).argmax(1)
        with torch.no_grad():
            torchs = module.eval()(images).argmax(1)
        kernels = integer_kernels(file)
        return cls(
            accuracy=metrics["test_acc"],
            step_ms=metrics["step_ms"],
            fit_seconds=metrics["fit_seconds"],
            weights=sum(weight.numel() for weight in weights),
            zeros=sum(int((weight == 0).sum()) for weight in weights),
            tested=tested["test_acc"],
            onnx=file,
            safetensors=save_compressed(module, folder / "model.safetensors"),
            onnx_accuracy=float((ours == labels).float().mean()),
            agreement=float((ours == torchs).float().mean()),
            kernels=f"{kernels['integer']} of {kernels['integer'] + kernels['weight_only'] + kernels['float']}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the weights to prune (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each run (%(default)s)")
    parser.add_argument("--model", default="residual_cnn", help="one of examples/configs/model (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder (%(default)s)")
    args = parser.parse_args()

    shared = [f"model={args.model}", f"trainer.max_epochs={args.epochs}", "callbacks=[default,timer]"]
    shared += ["callbacks.checkpoint.monitor=null"]  # keep the last epoch, not the one that suits these images best
    overrides = {
        "dense": [*shared, "+compress@callbacks=learning_rate"],
        "compressed": [*shared, "+compress@callbacks=prune_qat", f"callbacks.pruning.final_sparsity={args.sparsity}"],
    }
    train(args.output, overrides)

    warnings.simplefilter("ignore")  # Lightning's advice on how to test faster
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dense = Result.of(args.output / "dense", args.model, [])
    compressed = Result.of(args.output / "compressed", args.model, [QuantizationAwareTraining()])

    console.rule("dense against compressed")
    console.print(comparison(dense, compressed))
    console.print(
        "Latency is onnxruntime's, on one thread. Zeros take as much room in an ONNX file as other numbers and make "
        "nothing faster, integers do both. The safetensors file leaves the zeros out."
    )
    for name, result in (("dense", dense), ("compressed", compressed)):
        where = f"{result.onnx}, {result.safetensors.name} (beside them checkpoints/, csv/, metrics.json)"
        console.print(f"{name}: {where}", soft_wrap=True)
    if wrong := complaints(dense, compressed, args.sparsity):
        sys.exit("\n".join(wrong))


def complaints(dense: Result, compressed: Result, sparsity: float) -> list[str]:
    """What is not as it was said to be."""
    found = []
    if abs(compressed.zeros - sparsity * compressed.weights) > 1:
        found.append(f"{compressed.zeros:,} zeros, but {sparsity * compressed.weights:,.1f} were asked for")
    for result in (dense, compressed):
        if result.agreement < SMALLEST_AGREEMENT:
            found.append(f"{result.onnx} and its model agree on {result.agreement:.2%} of the images only")
        if abs(result.tested - result.accuracy) > 0.0015:  # an image, on another number of threads
            found.append(
                f"{result.onnx.parent}: {result.accuracy:.1%} after fit, {result.tested:.1%} from its checkpoint"
            )
    share = compressed.onnx.stat().st_size / dense.onnx.stat().st_size
    if share > LARGEST_FILE:
        found.append(f"{compressed.onnx} has {share:.3f} of the float file's size, not {LARGEST_FILE} or less")
    return found


def session(file: Path) -> onnxruntime.InferenceSession:
    """Open a file in onnxruntime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def outputs(session: onnxruntime.InferenceSession, images: torch.Tensor) -> torch.Tensor:
    """The logits of some images."""
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


def latencies(files: list[Path], batch: int, seconds: float = 1.5) -> list[float]:
    """The median milliseconds that each file takes for a batch; they take turns, so a busy machine slows all."""
    sessions, images = [session(file) for file in files], torch.randn(batch, 1, 28, 28)
    times: list[list[float]] = [[] for _ in files]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for one, own in zip(sessions, times, strict=True):
            began = time.perf_counter()
            outputs(one, images)
            own.append(1000 * (time.perf_counter() - began))
    return [statistics.median(own) for own in times]


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

    def accuracies(before: float, after: float) -> tuple[str, str, str]:
        return f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"

    def share(result: Result) -> str:
        return f"{result.weights - result.zeros:,} ({1 - result.zeros / result.weights:.1%})"

    remaining = [result.weights - result.zeros for result in (dense, compressed)]
    table = Table("", "dense", "compressed", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [
        ("accuracy in PyTorch", *accuracies(dense.tested, compressed.tested)),
        ("in onnxruntime", *accuracies(dense.onnx_accuracy, compressed.onnx_accuracy)),
        ("same answers", f"{dense.agreement:.1%}", f"{compressed.agreement:.1%}", ""),
        ("non-zero weights", share(dense), share(compressed), f"{remaining[0] / remaining[1]:.1f} times fewer"),
        ("integer kernels", dense.kernels, compressed.kernels, ""),
    ]
    for name, of in (("ONNX file", "onnx"), ("safetensors file", "safetensors")):
        sizes = [getattr(result, of).stat().st_size for result in (dense, compressed)]
        rows.append((name, *(f"{size / 1e3:,.0f} kB" for size in sizes), f"{sizes[0] / sizes[1]:.1f} times smaller"))
    for batch in (1, 64):
        ms = latencies([dense.onnx, compressed.onnx], batch)
        rows.append((f"latency, batch {batch}", *(f"{one:.3f} ms" for one in ms), f"{ms[0] / ms[1]:.1f} times faster"))
    rows += [
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
