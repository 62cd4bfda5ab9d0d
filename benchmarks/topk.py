"""What it costs to choose the smallest of many weights: seconds, and memory above the weights.

    python benchmarks/topk.py [--size 100_000_000] [--sparsity 0.9]

Each contender runs in a process of its own, on the same weights (four parameters), and makes a bool mask of
each; its peak memory is the process's largest resident size less that with the weights alone. Seconds are
the best of `--repeats` runs; torch.nn.utils.prune, which changes the module, runs once. The ratio is to one
comparing pass over the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_compress.pruning.topk import select_smallest

PASS = "w.abs() > t"


class Layer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size).normal_())


def make_layers(size: int) -> nn.ModuleList:
    parts = [size // 2, size // 4, size // 8]
    return nn.ModuleList(Layer(part) for part in [*parts, size - sum(parts)])


def compare(weights: list[Tensor], k: int, threshold: float) -> list[Tensor]:
    return [weight.abs() > threshold for weight in weights]


def compare_signed(weights: list[Tensor], k: int, threshold: float) -> list[Tensor]:
    return [torch.gt(weight, threshold) for weight in weights]


def select(weights: list[Tensor], k: int, threshold: float) -> list[Tensor]:
    return select_smallest(weights, k, absolute=True)


def kthvalue(weights: list[Tensor], k: int, threshold: float) -> list[Tensor]:
    found = torch.cat([weight.abs() for weight in weights]).kthvalue(k).values
    return [weight.abs() <= found for weight in weights]


CONTENDERS: dict[str, Callable[[list[Tensor], int, float], list[Tensor]] | None] = {
    PASS: compare,
    "torch.gt(w, t)": compare_signed,
    "select_smallest": select,
    "torch.cat, kthvalue, compare": kthvalue,
    "prune.global_unstructured": None,  # works on the module
}


def peak_bytes() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(name: str, size: int, k: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    warm = make_layers(1000)
    layers = make_layers(size)
    contender = CONTENDERS[name]
    if contender is None:
        prune.global_unstructured([(layer, "weight") for layer in warm], prune.L1Unstructured, amount=100)
        before, start = peak_bytes(), time.perf_counter()
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=k)
        return {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - before}

    weights = [layer.weight.detach() for layer in layers]
    threshold = NormalDist().inv_cdf((1 + k / size) / 2)
    contender([layer.weight.detach() for layer in warm], 900, threshold)
    before, best = peak_bytes(), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        masks = contender(weights, k, threshold)
        best = min(best, time.perf_counter() - start)
        del masks
    return {"seconds": best, "bytes": peak_bytes() - before}


def in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    flags = [f"--size={arguments.size}", f"--sparsity={arguments.sparsity}", f"--repeats={arguments.repeats}"]
    command = [sys.executable, __file__, *flags, "--contender", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000_000, help="weights in all")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share that is chosen")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one, here, and print JSON")
    arguments = parser.parse_args()
    k = round(arguments.size * arguments.sparsity)
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, arguments.size, k, arguments.repeats)))
        return

    print(f"the {k:,} smallest magnitudes of {arguments.size:,} float32 weights in 4 tensors")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print(f"{'':30}{'seconds':>10}{'of a pass':>11}{'peak GB':>10}{'bytes/weight':>14}")
    one_pass = None
    for name in CONTENDERS:
        cost = in_own_process(name, arguments)
        one_pass = one_pass or cost["seconds"]
        print(
            f"{name:30}{cost['seconds']:10.4f}{cost['seconds'] / one_pass:10.2f}×"
            f"{cost['bytes'] / 1e9:10.2f}{cost['bytes'] / arguments.size:14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
