"""Which layer can bear how much, found without training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor, nn

from lightning_compress.report import sensitivity
from tests.helpers import Net, StatefulLoader, held_out, same, seeded, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Net:
    module = seeded(Net)
    trainer(tmp_path_factory.mktemp("fit")).fit(module, StatefulLoader(), held_out())
    return module


def accuracy(module: nn.Module) -> float:
    data = held_out()
    with torch.no_grad():
        return (module.eval()(data.x).argmax(1) == data.y).float().mean().item()


def test_each_trial_is_the_model_with_one_layer_compressed(trained: Net) -> None:
    before = copy.deepcopy(dict(trained.state_dict()))
    found = sensitivity(trained, held_out(), "val_acc", sparsities=[0.5, 0.9], bits=[8, 2])
    assert same(before, dict(trained.state_dict()))
    assert found.baseline == pytest.approx(accuracy(trained))
    assert len(found.trials) == 3 * 4
    for trial in found.trials:
        twin = copy.deepcopy(trained)
        weight = twin.get_parameter(trial.parameter).data
        if trial.kind == "sparsity":
            zeros = round(trial.level * weight.numel())
            weight.view(-1)[weight.abs().flatten().argsort()[:zeros]] = 0.0
        else:
            top = 2 ** (trial.level - 1) - 1
            scale = weight.abs().amax(1, keepdim=True) / top
            weight.copy_((weight / scale).round() * scale)
        assert trial.metric == pytest.approx(accuracy(twin)), trial


def test_a_datamodule_and_a_function_serve_as_well(trained: Net) -> None:
    class Data(LightningDataModule):
        def val_dataloader(self) -> Any:
            return held_out()

    few: Any = {"sparsities": [0.9], "bits": [], "include": ["net.0"]}
    by_data = sensitivity(trained, Data(), "val_acc", **few)
    by_function = sensitivity(trained, accuracy, **few)
    assert [t.metric for t in by_data.trials] == pytest.approx([t.metric for t in by_function.trials])


def test_shows_what_it_found(trained: Net) -> None:
    found = sensitivity(trained, held_out(), "val_loss", mode="min", sparsities=[0.5, 0.99], bits=[])
    worst = max(found.trials, key=lambda trial: trial.metric)
    assert found.parameters[0] == worst.parameter
    assert found.loss(worst) == pytest.approx(worst.metric - found.baseline)
    console = Console(width=100, record=True)
    console.print(found.table())
    text = console.export_text()
    assert text.index(found.parameters[0]) < text.index(found.parameters[-1])
    assert "99 %" in text
    assert found.picture().startswith(b"\x89PNG")
    assert json.loads(json.dumps(found.as_dict()))["trials"][0]["kind"] == "sparsity"


def test_transposed_convolutions_are_rounded_for_each_output() -> None:
    net = nn.Sequential(nn.ConvTranspose1d(2, 3, 1, bias=False))
    weight = net[0].weight.data
    weight[:, 0], weight[:, 1], weight[:, 2] = 100.0, 1.0, 0.01
    seen: list[Tensor] = []
    sensitivity(net, lambda module: seen.append(weight.clone()) or 0.0, sparsities=[], bits=[2])
    assert torch.allclose(seen[1], seen[0])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"sparsities": [1.0]}, "`sparsities`"),
        ({"bits": [1]}, "`bits`"),
        ({"mode": "up"}, "`mode`"),
        ({"include": ["nothing.*"]}, "`include` pattern"),
        ({"monitor": "val_accuracy"}, "'val_accuracy' is no metric.*'val_loss', 'val_acc'"),
        ({"monitor": None}, "must name a metric.*'val_loss', 'val_acc'"),
    ],
)
def test_bad_arguments(trained: Net, kwargs: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sensitivity(trained, held_out(), **({"monitor": "val_acc"} | kwargs))


def test_weights_come_back_after_an_error(trained: Net) -> None:
    before, calls = copy.deepcopy(dict(trained.state_dict())), []

    def fails(module: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError
        return 0.0

    with pytest.raises(RuntimeError):
        sensitivity(trained, fails)
    assert same(before, dict(trained.state_dict()))


def test_folder_is_left_empty(trained: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sensitivity(trained, held_out(), "val_acc", sparsities=[0.5], bits=[])
    assert list(tmp_path.iterdir()) == []
