"""Each recipe in conf/compress that combines callbacks: composed by Hydra, and trained on data that can be learnt."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_compress import _hydra_plugin
from lightning_compress.export import load_compressed
from lightning_compress.quantization import dequantize
from tests.helpers import trainer, zeros

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf/compress"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml") if "defaults" in OmegaConf.load(path))
COMPRESSED = {"pruning", "quantization", "distillation"}
CHANNELS, WIDTH, SIDE = 4, 32, 6


class ConvNet(LightningModule):
    """Two convolutions with batch norm: the class of an image is the channel whose mean is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, CHANNELS, SIDE, SIDE)
        self.net = nn.Sequential(
            nn.Conv2d(CHANNELS, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTH, CHANNELS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        # what the recipes say they replace
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}

    def layers(self) -> list[nn.Conv2d | nn.Linear]:
        return [layer for layer in self.net if isinstance(layer, (nn.Conv2d, nn.Linear))]


def images(seed: int, count: int) -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CHANNELS, (count,), generator=generator)
    x = torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator)
    x += 0.5 * nn.functional.one_hot(y, CHANNELS)[:, :, None, None]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32)


def teacher(folder: Path) -> Path:
    """Return the checkpoint of a dense model that has learnt the task."""
    torch.manual_seed(1)
    fit = trainer(folder, max_epochs=3)
    fit.fit(ConvNet(), images(0, 512), images(1, 256))
    fit.save_checkpoint(folder / "teacher.ckpt")
    return folder / "teacher.ckpt"


class Run:
    """A recipe, made by Hydra in an app that knows nothing of it, and trained."""

    def __init__(self, name: str, folder: Path) -> None:
        overrides = f"callbacks.report.dir={folder / 'report'}", "callbacks.report.plots=false"
        self.config = compose(name, *overrides, folder=folder)
        self.callbacks = {key: hydra.utils.instantiate(entry) for key, entry in self.config.items()}
        torch.manual_seed(0)
        self.module = ConvNet()
        self.dense = folder / "dense.safetensors"
        save_file(self.module.net.state_dict(), self.dense)
        self.trainer: Trainer = trainer(folder, self.callbacks.values(), max_epochs=6)
        self.trainer.fit(self.module, images(0, 512), images(1, 256))

    def plain(self) -> ConvNet:
        """The trained model with rounded weights and without quantizers."""
        return dequantize(copy.deepcopy(self.module))

    def levels(self) -> int:
        """The most different values that the weights of an output channel have, zero among them."""
        return max(len(row.unique()) for layer in self.plain().layers() for row in layer.weight.detach().flatten(1))


def compose(name: str, *overrides: str, folder: Path) -> Any:
    (folder / "app.yaml").write_text("callbacks: {}\n")
    asked = [f"+compress@callbacks={name}", *overrides]
    if name == "prune_qat_distill":
        asked.append(f"callbacks.distillation.teacher={teacher(folder)}")
    if name == "deep":
        asked.append(f"callbacks.export.dir={folder / 'export'}")
    state = Singleton.get_state()
    Plugins.instance().register(_hydra_plugin.LightningCompressSearchPathPlugin)
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return hydra.compose("app", overrides=asked).callbacks
    finally:
        Singleton.set_state(state)


@pytest.fixture(scope="module")  # pytest puts tests of one recipe behind each other, and one run is enough
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(request.param, tmp_path_factory.mktemp(request.param))


def recipes(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", names or RECIPES, indirect=True, ids=str)


@recipes()
def test_a_recipe_trains_a_model_that_is_compressed_and_right(run: Run) -> None:
    assert all(isinstance(callback, Callback) for callback in run.callbacks.values())
    assert {getattr(callback, "technique", None) for callback in run.callbacks.values()} & COMPRESSED
    [result] = run.trainer.validate(run.module, images(1, 256), verbose=False)
    assert result["val_acc"] > 0.9
    assert [group["lr"] for group in run.trainer.optimizers[0].param_groups] == [0.0]  # the end of the cosine
    assert (Path(run.config.report.dir) / "report.json").exists()


@recipes("prune", "prune_qat", "prune_qat_distill", "deep")
def test_single_weights_are_pruned_to_what_the_file_says(run: Run) -> None:
    found, total = zeros(run.module)
    assert found == round(run.config.pruning.final_sparsity * total)


@recipes("slimming")
def test_slimming_cuts_out_half_of_the_channels(run: Run) -> None:
    smaller = run.callbacks["pruning"].pruned_module
    assert [tuple(layer.weight.shape[:2]) for layer in smaller.layers()][-1] == (CHANNELS, smaller.net[3].out_channels)
    assert smaller.net[0].out_channels + smaller.net[3].out_channels == WIDTH  # of 2 · WIDTH
    x = next(iter(images(1, 256)))[0]
    assert torch.allclose(smaller.eval()(x), run.module.eval()(x), atol=1e-5)


@recipes("two_four")
def test_two_of_each_four_consecutive_inputs_are_zero(run: Run) -> None:
    for layer in run.module.layers():
        weight = layer.weight.detach()
        groups = weight.movedim(1, -1).reshape(-1, 4)  # four inputs, at the same place of a kernel
        assert ((groups == 0).sum(1) == 2).all()


@recipes("prune_qat", "prune_qat_distill", "two_four", "deep")
def test_weights_are_integers_of_as_many_bits_as_the_file_says(run: Run) -> None:
    most = 2**run.config.quantization.weight_bits - 1  # symmetric: as many below zero as above
    assert 2 < run.levels() <= most


@recipes("deep")
def test_deep_leaves_a_file_that_is_small_and_holds_the_model_exactly(run: Run) -> None:
    file = Path(run.config.export.dir) / "model.safetensors"
    assert list(file.parent.iterdir()) == [file]
    assert file.stat().st_size < run.dense.stat().st_size / 10
    x = next(iter(images(1, 256)))[0]
    loaded = load_compressed(file, ConvNet())
    assert torch.equal(loaded.eval()(x), run.plain().eval()(x))


@recipes("two_four", "deep", "prune_qat", "prune_qat_distill")
def test_rounding_begins_when_the_ramp_of_pruning_has_ended(run: Run) -> None:
    assert run.config.pruning.end == run.config.quantization.begin


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """The demo, and what two runs left behind that it has nothing to complain of."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    demo = importlib.import_module("demo")
    made = []
    for name, size in (("dense", 1300), ("compressed", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(bytes(size))
        rows = {"conv": (16 if size == 100 else 32, 32), "head": (10, 10)}
        made.append(
            demo.Result(0.98, 1.0, 1.0, rows, 0.98, tmp_path / name / "model.onnx", tmp_path, size, 0.98, 1.0, (2, 2))
        )
    return demo, *made


@pytest.mark.parametrize(
    ("changed", "milliseconds", "size", "complaint"),
    [
        ({}, 2.0, 100, None),
        ({"rows": {"conv": (20, 32)}}, 2.0, 100, "12 of 32 channels are gone, but 16 were asked for"),
        ({"weights": 1300}, 2.0, 100, "no channels are cut out"),
        ({"kernels": (1, 2)}, 2.0, 100, "1 of 2 kernels compute with integers"),
        ({"agreement": 0.99}, 2.0, 100, "agree on 99.00% of the images only"),
        ({"tested": 0.97}, 2.0, 100, "98.0% after fit, 97.0% from its checkpoint"),
        ({"onnx_accuracy": 0.975}, 2.0, 100, "0.5 points worse than the dense file"),
        ({}, 3.0, 100, "3.3 times faster at batch 64, not 4"),
        ({}, 2.0, 130, "10.0 times smaller than the dense file, not 12"),
    ],
)
def test_the_demo_says_what_is_not_as_it_promised(
    results: tuple[Any, Any, Any], changed: dict[str, Any], milliseconds: float, size: int, complaint: str | None
) -> None:
    demo, dense, compressed = results
    compressed.onnx.write_bytes(bytes(size))
    found = demo.complaints(dense, dataclasses.replace(compressed, **changed), [10.0, milliseconds], 0.5)
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]
