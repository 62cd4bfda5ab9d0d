"""Trains one model: an ordinary Hydra and Lightning app, which knows of no other package.

    python examples/train.py                                     # ResidualCNN, 8 epochs
    python examples/train.py model=lenet5 trainer.max_epochs=20
    python examples/train.py ckpt_path=path/to/last.ckpt         # goes on where a run stopped

With `lightning_compress` installed, the same app compresses what it trains:

    python examples/train.py +compress@callbacks=pruning callbacks.pruning.final_sparsity=0.95
"""

import json
import logging
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

log = logging.getLogger(__name__)


def instantiate_all(group: DictConfig | None) -> list:
    """One object for each entry of a config group that names a `_target_`; an entry set to null is left out."""
    entries = (group or {}).values()
    return [hydra.utils.instantiate(entry) for entry in entries if entry and "_target_" in entry]


def train(cfg: DictConfig) -> dict[str, float]:
    """Everything that one run does; returns the metrics at its end."""
    L.seed_everything(cfg.seed, workers=True)
    data = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_all(cfg.callbacks)
    loggers = instantiate_all(cfg.logger)
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))

    metrics = {}
    if cfg.train:
        trainer.fit(model, data, ckpt_path=cfg.ckpt_path)
        metrics.update(trainer.callback_metrics)
    if cfg.test:
        # the weights as they are at the end of `fit`, or those of `ckpt_path` where nothing was trained
        trainer.test(model, data, ckpt_path=None if cfg.train else cfg.ckpt_path)
        metrics.update(trainer.callback_metrics)
    return {name: float(value) for name, value in metrics.items()}


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | list[float] | None:
    """Run, write `metrics.json` beside the logs, and hand a sweeper the metric that it optimizes, or several."""
    metrics = train(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    log.info("%s: %s", folder, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if isinstance(cfg.optimized_metric, ListConfig):
        return [metrics[name] for name in cfg.optimized_metric]
    return metrics.get(cfg.optimized_metric)


if __name__ == "__main__":
    main()
