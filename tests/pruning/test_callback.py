"""GradualPruning inside the Trainer: real training, exact counts, and everything that is refused."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from lightning_compress import GradualPruning, LearningRateSchedule
from tests.helpers import BATCHES, Net, StatefulLoader, held_out, seeded, trainer, zeros


class Record(Callback):
    """Count zeros wherever a checkpoint can be written or validation can run."""

    def __init__(self) -> None:
        self.zeros: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.zeros.append((trainer.global_step, zeros(pl_module)[0]))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            logged = float(trainer.callback_metrics.get("compress/sparsity", 0.0))
            assert zeros(pl_module)[0] == pytest.approx(logged * zeros(pl_module)[1], abs=1e-3)


def run(tmp_path: Any, callback: Any, module: Any = None, extra: Any = (), **kwargs: Any) -> Any:
    module = module or seeded(Net)
    fitted = trainer(tmp_path, [callback, *extra], **kwargs)
    fitted.fit(module, StatefulLoader(), held_out())
    return module, fitted


def test_follows_the_cubic_formula_step_by_step(tmp_path: Any) -> None:
    record = Record()
    run(
        tmp_path,
        GradualPruning(0.9, initial_sparsity=0.1, begin=4, end=20, every=4),
        extra=[record],
        val_check_interval=1,
    )
    total = zeros(Net())[1]
    counts = dict(record.zeros)
    for step in range(1, 4 * BATCHES + 1):
        t = min(max((step - step % 4 - 4) / 16, 0.0), 1.0)
        expected = (0.1 + 0.8 * (1 - (1 - t) ** 3)) * total if step >= 4 else 0.0
        assert abs(counts[step] - expected) <= 1, step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "one_shot", lambda t: t**2])
def test_every_schedule_ends_exactly(tmp_path: Any, schedule: Any) -> None:
    record = Record()
    module, _ = run(tmp_path, GradualPruning(0.73, schedule=schedule, begin=2, end=10, every=1), extra=[record])
    pruned, total = zeros(module)
    assert abs(pruned / total - 0.73) < 1 / total
    if schedule == "one_shot":
        assert [count for step, count in record.zeros if step == 2] == [pruned]


@pytest.mark.parametrize("begin_end", [(0, 0), (0, 1.0), ("1ep", "2ep"), (1.0, 1.0), (0.05, 0.5), ("2", "1e-1")])
def test_moments(tmp_path: Any, begin_end: Any) -> None:
    module, _ = run(tmp_path, GradualPruning(0.8, begin=begin_end[0], end=begin_end[1]))
    pruned, total = zeros(module)
    assert abs(pruned / total - 0.8) < 1 / total


def test_begin_0_prunes_before_the_first_step(tmp_path: Any) -> None:
    seen = []

    class First(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(zeros(pl_module)[0])

    run(tmp_path, GradualPruning(0.8, initial_sparsity=0.5, begin=0, end=10), extra=[First()])
    assert seen[0] == round(0.5 * zeros(Net())[1])


def test_sparsity_by_pattern(tmp_path: Any) -> None:
    module, _ = run(tmp_path, GradualPruning({"net.0": 0.5, "net.[24]": 0.75}, begin=0, end=0.5))
    assert zeros(module, ["net.0.weight"])[0] == round(0.5 * 192)
    assert zeros(module, ["net.2.weight", "net.4.weight"])[0] == round(0.75 * 320)
    with pytest.raises(ValueError, match=r"no pattern for 'net\.4'"):
        run(tmp_path, GradualPruning({"net.0": 0.5, "net.2": 0.8}, include="net.*"))
    module, _ = run(tmp_path, GradualPruning({"net.0": 0.5, "*": 0.8}, include="net.*", exclude="net.4"))
    assert zeros(module, ["net.4.weight"])[0] == 0


def test_two_callbacks_on_disjoint_modules(tmp_path: Any) -> None:
    callbacks = [GradualPruning(0.5, include="net.0"), GradualPruning(0.8, exclude="net.0")]
    module, fitted = run(tmp_path, callbacks[0], extra=callbacks[1:])
    assert callbacks[0].state_key != callbacks[1].state_key
    assert zeros(module, ["net.0.weight"])[0] == round(0.5 * 192)
    assert zeros(module, ["net.2.weight", "net.4.weight"])[0] == round(0.8 * 320)
    assert {"compress/sparsity_0", "compress/sparsity_1"} <= set(fitted.callback_metrics)
    with pytest.raises(ValueError, match=r"Two GradualPruning callbacks claim the parameter 'net\.2\.weight'"):
        run(tmp_path, GradualPruning(0.5, include="net.[02]"), extra=[GradualPruning(0.8, exclude="net.0")])


def test_biases(tmp_path: Any) -> None:
    module, _ = run(tmp_path, GradualPruning(0.5, include="net.0", parameters=("weight", "bias")))
    assert int((module.net[0].weight == 0).sum() + (module.net[0].bias == 0).sum()) == round(0.5 * (192 + 16))


def test_case_5_a_backbone_that_joins_later(tmp_path: Any) -> None:
    class Finetuning(BaseFinetuning):
        def __init__(self, epoch: int) -> None:
            super().__init__()
            self.epoch = epoch

        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[:3])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == self.epoch:
                self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=0.05)

    for epoch in (2, 99):
        module = seeded(lambda: Net(optimizer=lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.1)))
        record = Record()
        callbacks = [GradualPruning(0.8, end=0.7), LearningRateSchedule(warmup=4, decay="linear", final=0.0), record]
        run(tmp_path, Finetuning(epoch), module, callbacks, max_epochs=5)
        pruned, total = zeros(module)
        assert abs(pruned / total - 0.8) < 1 / total
        counts = [count for step, count in record.zeros if step >= 0.7 * 5 * BATCHES]
        assert set(counts) == {pruned}


class Recurrent(LightningModule):
    """Case 19: sums of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head, self.losses = nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, 1), []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.manual_seed(batch_idx)
        x = torch.randn(16, 5, 8)
        loss = nn.functional.mse_loss(self.head(self.rnn(x)[0][:, -1]).squeeze(1), x[..., 0].sum(1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def test_case_19_recurrent_weights(tmp_path: Any) -> None:
    module = seeded(Recurrent)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fitted = trainer(tmp_path, [GradualPruning(0.8, include=["rnn"], end=0.3)], max_epochs=12)
    fitted.fit(module, StatefulLoader())
    weights = [p for name, p in module.rnn.named_parameters() if name.startswith("weight_")]
    total = sum(p.numel() for p in weights)
    assert abs(sum(int((p == 0).sum()) for p in weights) / total - 0.8) < 1 / total
    assert dict(module.named_parameters()).keys() == before.keys()
    assert all((p != 0).all() for name, p in module.named_parameters() if "bias" in name)
    assert (module.head.weight != 0).all()
    assert all(
        weight is getattr(module.rnn, name)
        for weight, name in zip(module.rnn._flat_weights, module.rnn._flat_weights_names, strict=True)
    )
    assert sum(module.losses[-8:]) < 0.7 * sum(module.losses[:8])


def test_case_6_hydra_containers(tmp_path: Any) -> None:
    import hydra
    from omegaconf import OmegaConf

    def make() -> GradualPruning:
        return hydra.utils.instantiate(
            OmegaConf.create(
                {
                    "_target_": "lightning_compress.GradualPruning",
                    "include": ["net.0", "net.2"],
                    "final_sparsity": {"net.0": 0.5, "net.2": 0.8},
                }
            )
        )

    module, fitted = run(tmp_path, make())
    assert zeros(module, ["net.0.weight"])[0] == 96
    assert zeros(module, ["net.2.weight"])[0] == round(0.8 * 256)
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_masks_are_packed_in_the_checkpoint(tmp_path: Any) -> None:
    _, fitted = run(tmp_path, GradualPruning(0.5))
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    [state] = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"].values()
    bits = [entry["bits"] for entry in state["pruner"]["masks"].values()]
    assert {b.dtype for b in bits} == {torch.uint8}
    assert sum(b.numel() for b in bits) == zeros(Net())[1] // 8


def test_a_plain_checkpoint_and_a_sparse_one_can_be_the_start(tmp_path: Any) -> None:
    module, _ = run(tmp_path, GradualPruning(0.6, end=0.5))
    old = [p == 0 for p in module.parameters() if p.dim() > 1]
    record = Record()
    run(tmp_path, GradualPruning(0.9, begin=0.2, end=0.5), module, [record])
    assert all(
        bool((p == 0)[zero].all()) for p, zero in zip([p for p in module.parameters() if p.dim() > 1], old, strict=True)
    )
    assert record.zeros[0][1] == round(0.6 * zeros(module)[1])
    with pytest.warns(UserWarning, match="already sparser than"):
        run(tmp_path, GradualPruning(0.5, end=0.5), module)


def test_says_what_it_does_and_what_it_did_not(tmp_path: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run(tmp_path, GradualPruning(0.9))
    assert "GradualPruning: 512 weights of 3 layers (net.0, net.2, net.4) to a sparsity of 0.9" in caplog.text
    with pytest.warns(UserWarning, match="too short"), pytest.warns(UserWarning, match="stopped before"):
        run(tmp_path, GradualPruning(0.9, begin=0, end=50))

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 8

    with pytest.warns(UserWarning, match=r"the run stopped before `end=0\.5` \(step 16\)"):
        run(tmp_path, GradualPruning(0.9), extra=[Stop()])


def test_nan_stops_with_the_layers_name(tmp_path: Any) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                pl_module.net[2].weight.data[0, 0] = torch.nan

    with pytest.raises(ValueError, match=r"net\.(0|2|4)\.weight.*"):
        run(tmp_path, GradualPruning(0.9, every=1), extra=[Poison()])


@pytest.mark.parametrize("regrowth", [0.0, 0.3, "feedback"])
def test_a_graph_outlives_the_step_of_another_optimizer(tmp_path: Any, regrowth: Any) -> None:
    class Twins(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = Net().net

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (self.net, self.other)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            losses = [nn.functional.cross_entropy(net(batch[0]), batch[1]) for net in (self.net, self.other)]
            for loss, optimizer in zip(losses, self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    module, _ = run(tmp_path, GradualPruning(0.8, end=0.7, every=1, regrowth=regrowth), seeded(Twins))
    assert zeros(module)[0] == round(0.8 * 1024)


def test_momentum_cannot_revive_a_weight(tmp_path: Any) -> None:
    module, fitted = run(tmp_path, GradualPruning(0.8, begin=2, end=3, every=1))
    [optimizer] = fitted.optimizers
    for parameter in module.parameters():
        if parameter.dim() > 1:
            assert optimizer.state[parameter]["momentum_buffer"][parameter == 0].abs().max() < 0.9**20


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"final_sparsity": 1.0}, ValueError, "`final_sparsity`"),
        ({"final_sparsity": 0.0}, ValueError, "`final_sparsity`"),
        ({"final_sparsity": -0.5}, ValueError, "`final_sparsity`"),
        ({"final_sparsity": float("nan")}, ValueError, "`final_sparsity`"),
        ({"final_sparsity": True}, TypeError, "`final_sparsity`"),
        ({"final_sparsity": None}, TypeError, "`final_sparsity`"),
        ({"final_sparsity": {}}, ValueError, "`final_sparsity`"),
        ({"final_sparsity": {"net.*": 1.5}}, ValueError, r"`final_sparsity\['net\.\*'\]`"),
        ({"final_sparsity": 0.5, "initial_sparsity": 0.6}, ValueError, "`initial_sparsity=0.6`"),
        ({"initial_sparsity": -0.1}, ValueError, "`initial_sparsity`"),
        ({"criterion": "size"}, ValueError, "`criterion`"),
        ({"granularity": "4:2"}, ValueError, "`granularity`"),
        ({"granularity": "2:4", "final_sparsity": 0.7}, ValueError, "has a sparsity of 0.5"),
        ({"granularity": "2:4", "scope": "erk"}, ValueError, "`scope='erk'`"),
        ({"granularity": "channel", "parameters": ["weight", "bias"]}, ValueError, "`parameters="),
        ({"regrowth": 1.0}, ValueError, "`regrowth`"),
        ({"regrowth": "gradient"}, ValueError, "`regrowth`.*or give 'feedback'"),
        ({"regrowth": []}, TypeError, "`regrowth`.*or give 'feedback'"),
        ({"regrowth": "feedback", "granularity": "channel"}, ValueError, "`regrowth='feedback'`.*'channel'"),
        ({"regrowth": "feedback", "granularity": "head"}, ValueError, "`regrowth='feedback'`.*'head'"),
        ({"regrowth": "feedback", "criterion": "random"}, ValueError, "`regrowth='feedback'`.*criterion='random'"),
        ({"regrowth": 0.2, "granularity": "2:4"}, ValueError, "`regrowth=0.2`"),
        ({"granularity": "column"}, ValueError, "`granularity`"),
        ({"scope": "block"}, ValueError, "`scope` must be one of global, layer, erk"),
        ({"scope": ["global"]}, (ValueError, TypeError), "`scope`"),
        ({"schedule": "fast"}, ValueError, "`schedule`"),
        ({"begin": 0.6, "end": 0.5}, ValueError, "`begin=0.6` comes after `end=0.5`"),
        ({"begin": -1}, ValueError, "`begin`"),
        ({"end": 1.5}, ValueError, "`end`"),
        ({"every": 0}, ValueError, "`every`"),
        ({"every": 0.0}, ValueError, "`every`"),
        ({"include": []}, ValueError, "`include`"),
        ({"exclude": 3}, TypeError, "`exclude`"),
        ({"parameters": ()}, ValueError, "`parameters`"),
    ],
)
def test_refuses_at_construction(kwargs: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        GradualPruning(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": "ned.*"}, "matches no module.*'net"),
        ({"final_sparsity": {"nett.0": 0.5}}, r"`final_sparsity` pattern 'nett\.0' matches no module.*'net\.0'"),
        ({"final_sparsity": {"*": 0.5, "net.0": 0.9}}, r"`final_sparsity` pattern 'net\.0' governs nothing"),
        ({"final_sparsity": {"net.0": 0.5, "net.2": 0.9}, "include": "net.0"}, r"pattern 'net\.2' governs nothing"),
        ({"begin": 0.5, "end": 1}, r"`end=1`.*`end=1\.0`"),
        ({"final_sparsity": 0.999, "scope": "layer"}, "would leave 0 of the"),
        ({"parameters": ("kernel",)}, "no parameter 'kernel'"),
    ],
)
def test_refuses_before_the_first_step(tmp_path: Any, kwargs: dict[str, Any], message: str) -> None:
    record = Record()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, GradualPruning(**kwargs), extra=[record], num_sanity_val_steps=0)
    assert record.zeros == []


class Endless:
    def __iter__(self) -> Any:
        while True:
            yield from StatefulLoader()


def test_unknown_length(tmp_path: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`begin=0\.05` is a fraction of the run, but the training loader has no length"
    ):
        trainer(tmp_path, [GradualPruning(0.8)], max_epochs=2).fit(seeded(Net), Endless(), held_out())
    module = seeded(Net)
    trainer(tmp_path, [GradualPruning(0.8, begin=0, end=9, every=2)], max_epochs=-1, max_steps=12).fit(
        module, Endless(), held_out()
    )
    assert zeros(module)[0] == round(0.8 * 512)


def test_a_layer_with_one_weight_left_stays_sparse(tmp_path: Any) -> None:
    module, _ = run(tmp_path, GradualPruning(0.99))
    before = zeros(module)[0]
    record = Record()
    run(tmp_path, GradualPruning(0.99, begin=0.5, end=0.9), module, [record], limit_val_batches=0)
    assert before == round(0.99 * 512) == record.zeros[0][1]


def test_trial_runs_do_not_refuse(tmp_path: Any) -> None:
    run(tmp_path, GradualPruning(0.5, begin=10, end=0.5), fast_dev_run=True)
    run(tmp_path, GradualPruning(0.5, begin="2ep", end=0.9), fast_dev_run=2)


def test_parameters_without_entries_are_left_out(tmp_path: Any) -> None:
    for scope in ("global", "layer", "erk"):
        module = seeded(Net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on initializing nothing
            module.extra = nn.Linear(0, 5)
        run(tmp_path, GradualPruning(0.8, scope=scope, end=0.5), module)
        assert abs(zeros(module)[0] / 512 - 0.8) < 1 / 512


def test_a_schedule_that_leaves_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="`schedule` must stay within"):
        GradualPruning(schedule=lambda t: 1.1 if 0.8 < t < 0.95 else t)
    with pytest.raises(TypeError, match="`schedule` must be a function of progress"):
        GradualPruning(schedule=lambda a, b: 1.0)  # type: ignore[misc, arg-type]
