"""What a callback may ask of a running Trainer: how long the run is, and where it stands.

``trainer.estimated_stepping_batches`` builds the training loader; asked before the loops are restored it breaks a
resumed run without a word. So :func:`run_length` may be called from ``on_train_start`` on, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lightning_compress import registry
from lightning_compress.moments import RunLength

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def run_length(trainer: Trainer) -> RunLength:
    """Return the length of the run in the unit of :func:`steps_done`.

    Under automatic optimization that is the trainer's own estimate. Under manual optimization a step is a training
    batch, since nobody can know how often ``training_step`` will step which optimizer; ``max_steps``, which counts the
    steps of every optimizer there, is divided by their number.
    """
    batches = trainer.num_training_batches
    # GradientAccumulationScheduler holds {first epoch: batches a step}
    changing = (callback.scheduling for callback in callbacks(trainer) if hasattr(callback, "scheduling"))
    accumulation = next(changing, {0: trainer.accumulate_grad_batches})
    reason = "neither `max_epochs` nor `max_steps` limits the run"
    per_epoch: int | None = None
    limits = []
    if batches == math.inf:
        reason = "the training loader has no length"
    else:
        if len(accumulation) > 1:
            reason = "`accumulate_grad_batches` changes from epoch to epoch"
        else:
            per_epoch = math.ceil(batches / accumulation[0])
        if trainer.max_epochs not in (None, -1):
            starts = sorted(accumulation)
            for epoch, next_epoch in zip(starts, [*starts[1:], trainer.max_epochs], strict=True):
                limits.append(
                    math.ceil(batches / accumulation[epoch]) * max(min(next_epoch, trainer.max_epochs) - epoch, 0)
                )
            limits = [sum(limits)]
    if trainer.max_steps != -1:
        optimizers = 1 if trainer.lightning_module.automatic_optimization else max(len(trainer.optimizers), 1)
        limits.append(math.ceil(trainer.max_steps / optimizers))
    return RunLength(min(limits) if limits else None, per_epoch, reason)


def steps_done(trainer: Trainer, pl_module: LightningModule) -> int:
    """Return the number of steps that the run has taken, right in ``on_train_start`` and ``on_train_batch_end``.

    Optimizer steps under automatic optimization (a step that loss scaling skipped counts, as it does for the trainer);
    training batches under manual optimization (see :func:`run_length`).
    """
    if pl_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def callbacks(trainer: Trainer) -> list[Callback]:
    """Return the trainer's callbacks."""
    return trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector


def validation(
    module: Any, data: Any, monitor: str | None = None, trainer: Trainer | None = None
) -> tuple[str, float, Callable[[Any], float]]:
    """Return a metric's name and its value, and a function that validates a module and returns that metric.

    Args:
        module: The LightningModule; it is validated once.
        data: A LightningDataModule, or what ``Trainer.validate`` takes as dataloaders.
        monitor: The metric's name; ``None`` takes the only one that is logged.
        trainer: The Trainer to use; by default a quiet one.

    Raises:
        ValueError: If there is no such metric, or several and no name, with the names that there are.
    """
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch import Trainer as NewTrainer

    validating = trainer or NewTrainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    keyword = "datamodule" if isinstance(data, LightningDataModule) else "dataloaders"

    def metrics(module: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for of_a_loader in validating.validate(module, **{keyword: data}, verbose=False):
            found |= of_a_loader
        return found

    found = metrics(module)
    names = list(found)
    if monitor not in (names if monitor is not None or len(names) != 1 else [None]):
        what = "must name a metric" if monitor is None else f"{monitor!r} is no metric"
        raise ValueError(f"`monitor` {what} that the validation logs: {', '.join(map(repr, names)) or 'it logs none'}.")
    name = monitor or names[0]
    return name, float(found[name]), lambda module: float(metrics(module)[name])


def own_metrics(trainer: Trainer) -> dict[str, Any]:
    """Return the metrics without the copies, as ``compress/<name>``, that ``ModelCheckpoint`` is given of them."""
    found = trainer.callback_metrics
    return {
        name: value
        for name, value in found.items()
        if not (name.startswith("compress/") and name.removeprefix("compress/") in found)
    }


def publish_compressed_metrics(trainer: Trainer, pl_module: LightningModule) -> None:
    """Put each metric, as ``compress/<name>``, where ``ModelCheckpoint`` looks; NaN until compression is complete.

    ``ModelCheckpoint(monitor="compress/val_acc", mode="max")`` then keeps the best compressed epoch: it takes NaN for
    the worst value in both modes, so an epoch that is not compressed is kept only until one that is comes. To call in
    ``on_validation_end``, which ``ModelCheckpoint`` is always the last to run; again wherever compression is undone.
    """
    techniques = registry.techniques(pl_module)
    if trainer.sanity_checking or not techniques:
        return
    is_complete = all(technique.stage() >= 1.0 for technique in techniques)
    metrics, logged = trainer.callback_metrics, trainer.logged_metrics
    for name, value in list(metrics.items()):
        key = f"compress/{name}"
        if not name.startswith("compress/") and key not in logged:  # somebody logs a metric of that name
            metrics[key] = value if is_complete else torch.tensor(math.nan, device=value.device)


def warn_if_best_is_uncompressed(trainer: Trainer) -> None:
    """Warn where a ``ModelCheckpoint`` chooses the best epoch among all, and not only among compressed ones.

    To call in ``on_train_start``, once for each run.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.utilities import rank_zero_warn

    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.save_top_k in (0, -1):
            continue
        monitor = callback.monitor
        if monitor is not None and not monitor.startswith("compress/"):
            rank_zero_warn(
                f"ModelCheckpoint(monitor='{monitor}') may keep an epoch that is not compressed yet: a metric is often "
                f"best before compression ends. ModelCheckpoint(monitor='compress/{monitor}', mode='{callback.mode}') "
                f"chooses among compressed epochs only."
            )


def plain(value: Any) -> Any:
    """Return OmegaConf's containers as the plain lists and dicts that they stand for; anything else as it is.

    Hydra hands its own containers to a callback. They are neither ``list`` nor ``dict``, and a checkpoint that holds
    one does not load with ``weights_only=True``.
    """
    if type(value).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        return OmegaConf.to_container(value, resolve=True)
    return value


def is_sharded(trainer: Trainer) -> bool:
    """Return whether the strategy splits parameters among processes; classes derived from Lightning's count."""
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    return bool(kinds & {"FSDPStrategy", "ModelParallelStrategy"}) or any("DeepSpeed" in kind for kind in kinds)


def refuse_sharding(trainer: Trainer, callback: Any, *, but_dtensors: bool = False, but_flat: bool = False) -> None:
    """Raise where the strategy splits parameters among processes.

    Args:
        trainer: The trainer with its strategy.
        callback: The callback that cannot work with it.
        but_dtensors: Whether DTensors (``fully_shard``, FSDP2) are fine.
        but_flat: Whether flat parameters (``FSDPStrategy``, FSDP1) are fine, as long as the original ones show.

    Raises:
        ValueError: With the strategy's name and what to use instead.
    """
    strategy = type(trainer.strategy).__name__
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if "FSDPStrategy" in kinds and but_flat:
        if not trainer.strategy.kwargs.get("use_orig_params", True):  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(callback).__name__} cannot find the parameters that {strategy}(use_orig_params=False) hides: "
                f"leave `use_orig_params` at True."
            )
    elif is_sharded(trainer) and not ("ModelParallelStrategy" in kinds and but_dtensors):
        others = "ModelParallelStrategy with `fully_shard` (FSDP2), " if but_dtensors else ""
        raise ValueError(
            f"{type(callback).__name__} cannot act on the sharded parameters of {strategy}. "
            f"Use {others}Trainer(strategy='ddp') or a single device."
        )
