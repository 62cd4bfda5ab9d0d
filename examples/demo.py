"""Trains one network twice with the same app, as it is and compressed, and compares what comes out.

    python examples/demo.py

Both runs have the same number of epochs and the same learning rate at each step; the second adds nothing but
callbacks on the command line: one fit prunes channels in its first half, trains with 8-bit weights and activations in
its second, and leaves an ONNX file without the channels and with integers for weights. The runs go side by side, a
thread each, so that both see the machine in the same state. Then both are tested once more from their checkpoints, in
this process; onnxruntime classifies the held-out images with the files that the fits left and is timed.
Ends with an error if the weights of the checkpoint are not as was asked for, if a file answers differently from its
model, or if the compressed file is too large, too slow or too often wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
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
import onnx
import onnxruntime
import torch
from data import MNIST5k
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_compress import QuantizationAwareTraining
from lightning_compress.export import integer_kernels

EXAMPLES = Path(__file__).parent
LIGHTNING_BESIDE_NEW_TORCH = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"
SMALLEST_AGREEMENT = 0.999
SMALLER, FASTER, WORSE = 12.0, 4.0, 0.003  # times, times at batch 64, of all answers
OLD = ": CPUs without 8-bit dot products (AVX512-VNNI, AVX-VNNI, ARM dotprod) gain less from integers"
console = Console(highlight=False)


@dataclass
class Result:
    """What one run left behind."""

    accuracy: float
    step_ms: float
    fit_seconds: float
    rows: dict[str, tuple[int, int]]
    tested: float
    onnx: Path
    safetensors: Path
    weights: int
    onnx_accuracy: float
    agreement: float
    kernels: tuple[int, int]

    @classmethod
    def of(cls, folder: Path, model: str, callbacks: list[L.Callback]) -> Result:
        """Read a run's files and test its last checkpoint: nothing is taken on the word of a callback."""
        metrics = json.loads((folder / "metrics.json").read_text())
        checkpoint = folder / "checkpoints/last.ckpt"
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        # the weights of convolutions and linear layers: matrices and above
        weights = {name: value.flatten(1) for name, value in state.items() if value.dim() > 1}
        rows = {name: (int(value.any(1).sum()), len(value)) for name, value in weights.items()}

        file = folder / "model.onnx"
        if not file.exists():
            sys.exit(f"The fit left no {file}: its log says why")
        module = hydra.utils.instantiate(OmegaConf.load(EXAMPLES / f"configs/model/{model}.yaml"))
        data = MNIST5k()
        trainer = L.Trainer(
            accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        (tested,) = trainer.test(module, data, ckpt_path=checkpoint, verbose=False)
        images, labels = data.held_out.images, data.held_out.labels
        ours = outputs(session(file), images).argmax(1)
        with torch.no_grad():
            torchs = module.eval()(images).argmax(1)
        stored = onnx.load(file).graph.initializer
        kernels = integer_kernels(file)
        return cls(
            accuracy=metrics["test_acc"],
            step_ms=metrics["step_ms"],
            fit_seconds=metrics["fit_seconds"],
            rows=rows,
            tested=tested["test_acc"],
            onnx=file,
            safetensors=folder / "model.safetensors",
            weights=sum(math.prod(tensor.dims) for tensor in stored if len(tensor.dims) > 1),
            onnx_accuracy=float((ours == labels).float().mean()),
            agreement=float((ours == torchs).float().mean()),
            kernels=(kernels["integer"], kernels["integer"] + kernels["weight_only"] + kernels["float"]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=float, default=0.5, help="share of the channels to cut out (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each run (%(default)s)")
    parser.add_argument("--model", default="residual_cnn", help="one of examples/configs/model (%(default)s)")
    parser.add_argument("--weight-bits", type=int, default=8, help="2 to 8 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of both runs (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder (%(default)s)")
    args = parser.parse_args()

    shared = [f"model={args.model}", f"trainer.max_epochs={args.epochs}", f"seed={args.seed}"]
    # keep the last epoch, not the one that suits these images best
    shared += ["callbacks=[default,timer]", "callbacks.checkpoint.monitor=null"]
    shared += ["callbacks.export.dir=${hydra:runtime.output_dir}"]
    # exponential, the recipe's ramp, suits single weights, which go on learning until it ends; channels are gone
    pruning = {"granularity": "channel", "scope": "layer", "schedule": "cubic", "final_sparsity": args.channels}
    overrides = {
        "dense": [*shared, "+compress@callbacks=[learning_rate,export]"],
        "compressed": [
            *shared,
            "+compress@callbacks=[prune_qat,export]",
            *(f"callbacks.pruning.{name}={value}" for name, value in pruning.items()),
            f"callbacks.quantization.weight_bits={args.weight_bits}",
        ],
    }
    train(args.output, overrides)

    warnings.simplefilter("ignore")  # Lightning's advice on how to test faster
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dense = Result.of(args.output / "dense", args.model, [])
    compressed = Result.of(args.output / "compressed", args.model, [QuantizationAwareTraining(args.weight_bits)])

    times = {batch: latencies([dense.onnx, compressed.onnx], batch) for batch in (1, 64)}
    console.rule("dense against compressed")
    console.print(comparison(dense, compressed, times))
    console.print(
        "Latency is onnxruntime's, on one thread. Channels that are cut out make a file smaller and faster, and so do "
        "integers."
    )
    for name, result in (("dense", dense), ("compressed", compressed)):
        where = f"{result.onnx}, {result.safetensors.name} (beside them checkpoints/, csv/, metrics.json)"
        console.print(f"{name}: {where}", soft_wrap=True)
    if wrong := complaints(dense, compressed, times[64], args.channels):
        sys.exit("\n".join(wrong))


def complaints(dense: Result, compressed: Result, times: list[float], channels: float) -> list[str]:
    """What is not as it was said to be; `times` are those of both files, at batch 64."""
    found = []
    gone = {name: count - left for name, (left, count) in compressed.rows.items() if left < count}
    for name, rows in gone.items():
        count = compressed.rows[name][1]
        if abs(rows - channels * count) > 1:
            found.append(f"{name}: {rows} of {count} channels are gone, but {channels * count:g} were asked for")
    if not gone or compressed.weights >= dense.weights:
        found.append(f"no channels are cut out of {compressed.onnx}")
    if compressed.kernels[0] < compressed.kernels[1]:
        found.append(f"{compressed.onnx}: {ratio(compressed.kernels)} kernels compute with integers")
    for result in (dense, compressed):
        if result.agreement < SMALLEST_AGREEMENT:
            found.append(f"{result.onnx} and its model agree on {result.agreement:.2%} of the images only")
        if abs(result.tested - result.accuracy) > 0.0015:  # an image, on another number of threads
            found.append(
                f"{result.onnx.parent}: {result.accuracy:.1%} after fit, {result.tested:.1%} from its checkpoint"
            )
    smaller = dense.onnx.stat().st_size / compressed.onnx.stat().st_size
    if smaller < SMALLER:
        found.append(f"{compressed.onnx} is {smaller:.1f} times smaller than the dense file, not {SMALLER:g}")
    if times[0] / times[1] < FASTER:
        found.append(f"{compressed.onnx} is {times[0] / times[1]:.1f} times faster at batch 64, not {FASTER:g}{OLD}")
    if dense.onnx_accuracy - compressed.onnx_accuracy > WORSE + 1e-6:
        lost = 100 * (dense.onnx_accuracy - compressed.onnx_accuracy)
        found.append(f"{compressed.onnx} is {lost:.1f} points worse than the dense file, not {100 * WORSE:g} or less")
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
    """The median milliseconds that each file takes for a batch, of this thread's CPU time, which others cannot slow."""
    sessions, images = [session(file) for file in files], torch.randn(batch, 1, 28, 28)
    times: list[list[float]] = [[] for _ in files]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for one, own in zip(sessions, times, strict=True):
            began = time.thread_time()
            outputs(one, images)
            own.append(1000 * (time.thread_time() - began))
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


def comparison(dense: Result, compressed: Result, times: dict[int, list[float]]) -> Table:
    """The figures of both runs beside each other; `times` are those of both files, for each batch."""

    def change(before: float, after: float) -> str:
        return f"{after / before - 1:+.1%}"

    def accuracies(before: float, after: float) -> tuple[str, str, str]:
        return f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"

    table = Table("", "dense", "compressed", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    fewer = f"{dense.weights / compressed.weights:.1f} × fewer"
    rows = [
        ("accuracy in PyTorch", *accuracies(dense.tested, compressed.tested)),
        ("in onnxruntime", *accuracies(dense.onnx_accuracy, compressed.onnx_accuracy)),
        ("same answers", f"{dense.agreement:.1%}", f"{compressed.agreement:.1%}", ""),
        ("weights", f"{dense.weights:,}", f"{compressed.weights:,}", fewer),
        ("integer kernels", ratio(dense.kernels), ratio(compressed.kernels), ""),
    ]
    for name, of in (("ONNX file", "onnx"), ("safetensors file", "safetensors")):
        sizes = [getattr(result, of).stat().st_size for result in (dense, compressed)]
        rows.append((name, *(f"{size / 1e3:,.0f} kB" for size in sizes), f"{sizes[0] / sizes[1]:.1f} × smaller"))
    for batch, ms in times.items():
        rows.append((f"latency, batch {batch}", *(f"{one:.3f} ms" for one in ms), f"{ms[0] / ms[1]:.1f} × faster"))
    for name, of, unit in (("step time (median)", "step_ms", "ms"), ("training in total", "fit_seconds", "s")):
        values = [getattr(result, of) for result in (dense, compressed)]
        rows.append((name, *(f"{value:.1f} {unit}" for value in values), change(*values)))
    for row in rows:
        table.add_row(*row)
    return table


def ratio(kernels: tuple[int, int]) -> str:
    """How many of all."""
    return f"{kernels[0]} of {kernels[1]}"


if __name__ == "__main__":
    main()
