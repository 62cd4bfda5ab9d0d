"""Trains a small language model dense and compressed, and compares perplexity, files and speed.

    python examples/language_model.py

A causal transformer reads the sources of Python's own standard library byte by byte. It is trained as it is, and then
twice more with as many steps, each time in one fit that prunes two of each four weights, rounds the others and learns
from the first model's answers: once to 4-bit weights in groups of 32, which makes the smallest file, and once to 8-bit
weights and activations, which makes the fastest. onnxruntime scores held-out files with all three and is timed.
Ends with an error if a file is missing or does not answer as its model does, if its weights are not 2:4, or if they
have more values than their bits allow.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.text import Perplexity

from lightning_compress import (
    ExportCompressed,
    GradualPruning,
    KnowledgeDistillation,
    LearningRateSchedule,
    QuantizationAwareTraining,
)
from lightning_compress.export import integer_kernels, load_compressed

VOCABULARY = 256
CONTEXT = 128
GROUP = 32
NO_LABEL = -100
LARGEST_DIFFERENCE = 0.01
console = Console(highlight=False)


# --- the app: it knows nothing of compression -------------------------------------------------------------------------


class StandardLibrary(L.LightningDataModule):
    """Windows of the modules in the standard library's folder (its packages left out), a byte a token.

    Every tenth file is held out. A file's last window is padded, and the labels there are −100.

    Args:
        batch_size: Windows in a batch.
        held_out: Windows to validate on, the same ones always.
    """

    def __init__(self, batch_size: int = 8, held_out: int = 1024) -> None:
        super().__init__()
        self.batch_size, self.held_out = batch_size, held_out

    def setup(self, stage: str) -> None:
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(folder.glob("*.py"))
        if len(files) < 10:
            raise FileNotFoundError(f"{folder} holds {len(files)} Python sources: this Python came without its own")
        self.training = windows([file for number, file in enumerate(files) if number % 10])
        validation = windows(files[::10])
        order = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))
        self.validation = TensorDataset(*validation[order[: self.held_out].sort().values])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, 64)


def windows(files: list[Path]) -> TensorDataset:
    """Bytes (windows, CONTEXT), and for each the byte that comes next."""
    tokens, labels = [], []
    for file in files:
        text = torch.frombuffer(bytearray(file.read_bytes() or b"\n"), dtype=torch.uint8).long()
        padding = -(len(text) - 1) % CONTEXT
        tokens.append(F.pad(text[:-1], (0, padding)).reshape(-1, CONTEXT))
        labels.append(F.pad(text[1:], (0, padding), value=NO_LABEL).reshape(-1, CONTEXT))
    return TensorDataset(torch.cat(tokens), torch.cat(labels))


class Attention(nn.Module):
    """Self-attention that sees nothing to the right: (B, T, width) → (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward network, each added to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Bytes (B, T) → logits of the byte after each (B, T, 256), T up to CONTEXT: 445 thousand weights at width 128."""

    def __init__(self, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads=width // 32) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


class LanguageModel(L.LightningModule):
    """Cross entropy and perplexity of the next byte."""

    def __init__(self, width: int = 128, layers: int = 2, rate: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.rate = Decoder(width, layers), rate
        self.val_perplexity = Perplexity(ignore_index=NO_LABEL)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        tokens, labels = batch
        self.val_perplexity(self(tokens), labels)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01)


# --- its compression --------------------------------------------------------------------------------------------------


def compressions() -> dict[str, QuantizationAwareTraining]:
    """How the weights that pruning leaves are rounded, by the name of the run."""
    return {
        "2:4, 4-bit groups": QuantizationAwareTraining(4, activation_bits=None, granularity=f"group:{GROUP}"),
        "2:4, 8/8 bits": QuantizationAwareTraining(),
    }


@dataclass
class Result:
    """What a run left behind.

    Args:
        perplexity: Of the held-out files, in PyTorch.
        onnx_perplexity: The same in onnxruntime.
        module: The plain model with the weights of the safetensors file.
        onnx: A file.
        safetensors: Another.
        kernels: On how many integer, 4-bit and float kernels onnxruntime runs the matrix products.
        seconds: Of the fit, with its validation, export and checks.
        quantization: What rounded it; ``None`` for the dense model.
    """

    perplexity: float
    onnx_perplexity: float
    module: LanguageModel
    onnx: Path
    safetensors: Path
    kernels: str
    seconds: float
    quantization: QuantizationAwareTraining | None

    def weights(self) -> list[Tensor]:
        """The matrices that are multiplied with; that of the bytes is one of them."""
        return [layer.weight.detach() for layer in self.module.modules() if isinstance(layer, nn.Linear)]

    def sparsity(self) -> float:
        """The share of zeros."""
        return sum(int((weight == 0).sum()) for weight in self.weights()) / sum(map(Tensor.numel, self.weights()))

    def fullest(self) -> int:
        """The most weights other than zero in four that lie beside each other."""
        return max(int(weight.reshape(-1, 4).count_nonzero(1).max()) for weight in self.weights())

    def values(self) -> int:
        """The most values that weights with one scale have: those of a group, or of a row."""
        is_grouped = self.quantization is not None and self.quantization.granularity != "channel"
        scales = [weight.reshape(-1, GROUP) if is_grouped else weight for weight in self.weights()]
        return max(1 + int((rows.sort(1).values.diff() != 0).sum(1).max()) for rows in scales)


def fit(
    model: LanguageModel,
    data: StandardLibrary,
    steps: int,
    folder: Path,
    compression: Sequence[L.Callback] = (),
) -> Result:
    """Train for some steps, and read from the files at the end what came out."""
    export = ExportCompressed(folder)
    trainer = L.Trainer(
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[*compression, LearningRateSchedule(warmup=0.05, decay="cosine"), export],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    began = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - began
    written = {file.format: file.path for file in export.files if file.agrees}
    if len(written) < len(export.formats):
        sys.exit(f"{folder} does not hold all of {', '.join(export.formats)}; the warning above says why")
    onnx, safetensors = (written[format] for format in export.formats)
    kernels = integer_kernels(onnx)
    return Result(
        perplexity=float(trainer.callback_metrics["val_perplexity"]),
        onnx_perplexity=perplexity(session(onnx), data),
        # nothing is taken on the word of a callback
        module=load_compressed(safetensors, LanguageModel(**model.hparams)),
        onnx=onnx,
        safetensors=safetensors,
        kernels="/".join(str(kernels[kind]) for kind in ("integer", "weight_only", "float")),
        seconds=seconds,
        quantization=next((each for each in compression if isinstance(each, QuantizationAwareTraining)), None),
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the transformer, a multiple of 32 (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of the transformer (%(default)s)")
    parser.add_argument(
        "--start",
        choices=["copy", "random"],
        default="copy",
        help="what the compressed models start from: the dense one's weights, or random ones (%(default)s)",
    )
    parser.add_argument("--held-out", type=int, default=1024, help=f"windows of {CONTEXT} bytes to score (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/language_model"), help="folder (%(default)s)")
    args = parser.parse_args(arguments)
    if args.width < GROUP or args.width % GROUP:
        parser.error(f"--width must be a multiple of {GROUP}, got {args.width}")

    warnings.filterwarnings("ignore", module="lightning.pytorch")  # its advice on how to load data faster
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning beside a new torch
    shutil.rmtree(args.output, ignore_errors=True)
    data = StandardLibrary(held_out=args.held_out)

    def new_model() -> LanguageModel:
        L.seed_everything(args.seed, verbose=False)
        return LanguageModel(args.width, args.layers)

    console.rule("dense")
    teacher = new_model()
    results = {"dense": fit(teacher, data, args.steps, args.output / "dense")}
    for name, quantization in compressions().items():
        console.rule(name)
        initialize = "copy" if args.start == "copy" else None
        # a language model's own probabilities, as sharp as they are, beside the text itself
        distillation = KnowledgeDistillation(teacher, temperature=1.0, weight=0.5, initialize=initialize)
        compression = [GradualPruning(granularity="2:4"), quantization, distillation]
        folder = args.output / f"{quantization.weight_bits}_bits"
        results[name] = fit(new_model(), data, args.steps, folder, compression)

    console.rule()
    console.print(comparison(results))
    if args.start == "copy":
        console.print("The compressed models began with the dense one's weights, so they have trained twice as long.")
    console.print(
        "Speed is onnxruntime's, in CPU time of its one thread. 8-bit integers make it faster. A CPU multiplies zeros "
        "like other numbers; some GPUs leave out the zeros of 2:4. 4-bit weights are unpacked for each product, which "
        "pays where layers are wide and few tokens are read at a time."
    )
    for name, result in results.items():
        console.print(f"{name}: {result.onnx}, {result.safetensors.name}", soft_wrap=True)
    if wrong := [line for name, result in results.items() for line in complaints(name, result)]:
        sys.exit("\n".join(wrong))
    return results


def complaints(name: str, result: Result) -> list[str]:
    """What is not as it was said to be."""
    found = []
    if abs(result.onnx_perplexity / result.perplexity - 1) > LARGEST_DIFFERENCE:
        found.append(f"{name}: perplexity {result.onnx_perplexity:.3f} in onnxruntime, not {result.perplexity:.3f}")
    if result.quantization is not None:
        if result.fullest() > 2:
            found.append(f"{name}: {result.fullest()} of four weights are not zero, not 2 at most")
        if result.values() > 2**result.quantization.weight_bits:
            found.append(f"{name}: {result.values()} values under one scale, too many for the bits")
    return found


def session(file: Path) -> onnxruntime.InferenceSession:
    """Open a file in onnxruntime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def logits(session: onnxruntime.InferenceSession, tokens: Tensor) -> Tensor:
    """Bytes (B, CONTEXT) → logits of the byte after each (B, CONTEXT, 256)."""
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    return torch.from_numpy(found)


def perplexity(session: onnxruntime.InferenceSession, data: StandardLibrary) -> float:
    """exp(mean cross entropy) of the held-out bytes; padding does not count."""
    loss, count = 0.0, 0
    for tokens, labels in data.val_dataloader():
        rows = logits(session, tokens).flatten(0, 1)
        loss += float(F.cross_entropy(rows, labels.flatten(), ignore_index=NO_LABEL, reduction="sum"))
        count += int((labels != NO_LABEL).sum())
    return math.exp(loss / count)


def speeds(files: Sequence[Path], batch: int, seconds: float = 3.0) -> list[float]:
    """The bytes that each file reads in a second of CPU time, median; the files take turns.

    It is the time of this thread, which does all the work: what else runs on the machine does not count.
    """
    sessions, tokens = [session(file) for file in files], torch.randint(VOCABULARY, (batch, CONTEXT))
    times: list[list[float]] = [[] for _ in files]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for one, own in zip(sessions, times, strict=True):
            began = time.thread_time()
            logits(one, tokens)
            own.append(time.thread_time() - began)
    return [tokens.numel() / statistics.median(own) for own in times]


def comparison(results: dict[str, Result]) -> Table:
    """The figures of all runs beside each other."""
    table = Table("", *results)
    for column in table.columns[1:]:
        column.justify = "right"
    dense, runs = results["dense"], list(results.values())

    def add(what: str, *cells: str) -> None:
        table.add_row(what, *cells)

    def bytes_of(run: Result, file: str) -> int:
        return getattr(run, file).stat().st_size

    add("perplexity in PyTorch", *(f"{run.perplexity:.3f}" for run in runs))
    add("in onnxruntime", *(f"{run.onnx_perplexity:.3f}" for run in runs))
    add("zeros", *(f"{run.sparsity():.1%}" for run in runs))
    add("most non-zeros in 4", *(str(run.fullest()) for run in runs))
    add("most values a scale", *("float" if run is dense else str(run.values()) for run in runs))
    add("int8/4-bit/float kernels", *(run.kernels for run in runs))
    for what, file in (("ONNX file", "onnx"), ("safetensors file", "safetensors")):
        sizes = [bytes_of(run, file) for run in runs]
        add(what, f"{sizes[0] / 1e3:,.0f} kB", *(f"{s / 1e3:,.0f} kB, {sizes[0] / s:.1f} ×" for s in sizes[1:]))
    for batch in (1, 16):
        rates = speeds([run.onnx for run in runs], batch)
        cells = (f"{rate:,.0f}, {rate / rates[0]:.2f} ×" for rate in rates[1:])
        add(f"tokens/s, batch {batch}", f"{rates[0]:,.0f}", *cells)
    add("fit, export and checks", *(f"{run.seconds:.0f} s" for run in runs))
    return table


if __name__ == "__main__":
    main()
