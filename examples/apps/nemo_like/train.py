"""A training script as those of NVIDIA NeMo are: one YAML file, `exp_manager`, and a model that makes its own data.

What stands for parts of NeMo is in `nemo_parts.py`.
"""

import hydra
import lightning.pytorch as pl
from nemo_parts import DigitsModel, exp_manager, resolve_trainer_cfg
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    trainer = pl.Trainer(**resolve_trainer_cfg(cfg.trainer))
    exp_manager(trainer, cfg.get("exp_manager", None))
    model = DigitsModel(cfg=cfg.model, trainer=trainer)
    trainer.fit(model)


if __name__ == "__main__":
    main()
