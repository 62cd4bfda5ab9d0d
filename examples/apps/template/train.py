"""An app in the style of ashleve/lightning-hydra-template: callbacks are a dict, and the app makes them one by one."""

import hydra
import lightning as L
from omegaconf import DictConfig, ListConfig


def instantiate_all(group: DictConfig | None) -> list:
    """Make one object of each entry that has a `_target_`."""
    entries = (group or {}).values()
    return [
        hydra.utils.instantiate(entry) for entry in entries if isinstance(entry, DictConfig) and "_target_" in entry
    ]


def train(cfg: DictConfig) -> dict:
    """Train, test the best checkpoint, and return the metrics of both."""
    if cfg.get("seed") is not None:
        L.seed_everything(cfg.seed, workers=True)
    datamodule = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_all(cfg.get("callbacks"))
    logger = instantiate_all(cfg.get("logger"))
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=logger)

    trainer.fit(model=model, datamodule=datamodule, ckpt_path=cfg.get("ckpt_path"))
    train_metrics = trainer.callback_metrics
    if cfg.get("test"):
        trainer.test(model=model, datamodule=datamodule, ckpt_path=trainer.checkpoint_callback.best_model_path)
    return {**train_metrics, **trainer.callback_metrics}


@hydra.main(version_base="1.3", config_path="configs", config_name="train.yaml")
def main(cfg: DictConfig) -> float | list[float] | None:
    """Run once, and hand a sweeper the metric that it optimizes, or several."""
    metrics = train(cfg)
    name = cfg.get("optimized_metric")
    if name is None:
        return None
    if isinstance(name, ListConfig):
        return [metrics[one].item() for one in name]
    return metrics[name].item()


if __name__ == "__main__":
    main()
