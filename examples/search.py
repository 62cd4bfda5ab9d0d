"""Finds how sparse a network may become at the price of one point of accuracy: `python examples/search.py`.

The sparsity rises while the network trains. Where `val_acc` falls more than the tolerance below its best value before,
the guard returns to the last good point, and the sparsity goes on from there, half as fast. The curve is drawn in
`outputs/search/report.png`. Ends with an error if the network is not sparse, or its accuracy outside of the tolerance.
"""

import functools
import sys

import lightning as L
import torch
from data import MNIST5k
from models import LeNet300100
from module import Classifier

from lightning_compress import AccuracyGuard, CompressionReport, GradualPruning, LearningRateSchedule

TOLERANCE = 0.01


def main() -> None:
    L.seed_everything(0)
    module, data = Classifier(LeNet300100(), functools.partial(torch.optim.Adam, lr=2e-3)), MNIST5k()
    guard = AccuracyGuard("val_acc", tolerance=TOLERANCE, action="rollback")
    # Of channels, `GradualPruning(granularity="channel", target_macs=0.5)` finds as many as leave half of the work, and
    # `target_size` and `target_latency` the same of the file and of the time; "auto" asks for none of them.
    pruning = GradualPruning("auto", begin=0.25, end=0.9)
    report = CompressionReport(dir="outputs/search")
    callbacks = [pruning, guard, LearningRateSchedule(), report]
    trainer = L.Trainer(max_epochs=30, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)

    events = {event["step"]: event["action"] for event in guard.events}
    print("\n step  sparsity  val_acc  guard")
    for entry in report.figures["history"]:  # what was validated, before a rollback
        metrics, action = entry["metrics"], events.get(entry["step"], "")
        print(f"{entry['step']:5}  {metrics['compress/sparsity']:8.3f}  {metrics['val_acc']:7.3f}  {action}")

    [result] = trainer.validate(module, data, verbose=False)
    baseline = guard.events[-1]["baseline"]
    zeros = report.figures["totals"]["claimed_sparsity"]
    print(f"{zeros:.1%} of the weights are zero; val_acc {result['val_acc']:.3f}, before compression {baseline:.3f}")
    if zeros < 0.9 or result["val_acc"] < baseline - TOLERANCE - 1e-6:
        sys.exit(f"Not found: 90 % of zeros, no more than {TOLERANCE} below {baseline:.3f}.")


if __name__ == "__main__":
    main()
