"""Files are run beside the model: those that agree are left with the right figures, those that do not are not left."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export import ExportedFile, export, export_pt2, load_compressed, save_compressed
from lightning_compress.export import formats as formats_module
from lightning_compress.export.formats import facts
from lightning_compress.export.verify import Comparison, tolerance
from lightning_compress.pruning.removal import remove_pruned_channels
from tests.quantization.networks import Encoder, mlp, quantized

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ALL = ["onnx", "pt2", "safetensors"]
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def plain() -> nn.Module:
    net = mlp()
    net(X)  # statistics of the batch norm
    return net.eval()


def without_channels() -> nn.Module:
    net = plain()
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias, net[1].weight, net[1].bias):
            tensor[:20] = 0.0
    smaller = remove_pruned_channels(net, X[:2])
    assert smaller[0].out_features == 12
    return smaller.eval()


def rounded(bits: int, **kwargs: Any) -> nn.Module:
    return quantized(mlp(), X, weight_bits=bits, activation_bits=bits, **kwargs)


NETS = {
    "float": plain,
    "pruned_channels": without_channels,
    "8_bits": lambda: rounded(8),
    "4_bits": lambda: rounded(4),
    "affine_minmax": lambda: rounded(8, scheme="affine", range="minmax"),
    "4_bit_weights": lambda: quantized(mlp(), X, weight_bits=4, activation_bits=None),
    "in_groups": lambda: quantized(mlp(), X, weight_bits=4, activation_bits=None, granularity=32),
}


@pytest.mark.parametrize("name", NETS)
def test_agreement(name: str, tmp_path: Path) -> None:
    net = NETS[name]()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    files = export(net, X[:3], tmp_path, ALL, batches=[X[:40], X[40:]])
    assert [file.name for file in sorted(tmp_path.iterdir())] == [f"model.{format}" for format in ALL]
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    with torch.no_grad():
        expected = net(X).double()
    span = max(float(expected.max()), 0.0) - min(float(expected.min()), 0.0)
    for file in files:
        # onnxruntime rounds what groups are multiplied with, unasked
        has_steps = name in ("8_bits", "4_bits", "affine_minmax") or (name == "in_groups" and file.format == "onnx")
        assert file.agrees
        assert file.bytes == file.path.stat().st_size
        steps = 2**4 - 1 if name == "4_bits" else 2**8 - 1
        assert file.tolerance == pytest.approx(2 / steps if has_steps else math.sqrt(2**-23))
        assert file.within is not None
        assert file.within >= (0.99 if has_steps else 1.0)
        assert file.metrics == {}
    session = onnxruntime.InferenceSession(files[0].path, providers=["CPUExecutionProvider"])
    outputs = [
        session.run(None, {session.get_inputs()[0].name: X.numpy()})[0],
        torch.export.load(files[1].path).module()(X).detach().numpy(),
    ]
    for file, output in zip(files[:2], outputs, strict=True):
        error = np.abs(output.astype(np.float64) - expected.numpy())
        assert file.difference == pytest.approx(error.max() / span, rel=0.2, abs=1e-6)
        assert file.equal_classes == (output.argmax(1) == expected.numpy().argmax(1)).mean()
    if name != "affine_minmax":  # its weights are rounded a second time
        assert files[2].difference == 0.0


def _tamper_onnx(path: Path, row: int, by: float) -> None:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.size == 8 and values.dtype in (np.float32, np.int32):  # the last bias
            values[row] += by if values.dtype == np.float32 else 10_000
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            break
    else:
        raise AssertionError
    onnx.save(model, path)


def _with_another_bias(write: Callable[..., Any], row: int, by: float) -> Callable[..., Any]:
    def tampered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            module[5].bias[row] += by
            result = write(module, *args, **kwargs)
            module[5].bias[row] -= by
        return result

    return tampered


@pytest.mark.parametrize("name", ["float", "8_bits", "4_bits"])
def test_a_file_that_does_something_else_is_not_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = NETS[name]()
    row, by = 3, 1e-3 if name == "float" else 1.0
    monkeypatch.setattr(formats_module, "save_compressed", _with_another_bias(save_compressed, row, by))
    monkeypatch.setattr(formats_module, "export_pt2", _with_another_bias(export_pt2, row, by))
    whole = formats_module.export_onnx

    def tampered(module: nn.Module, inputs: Any, path: Path, **kwargs: Any) -> None:
        whole(module, inputs, path, **kwargs)
        _tamper_onnx(path, row, by)

    monkeypatch.setattr(formats_module, "export_onnx", tampered)
    (tmp_path / "model.pt2").write_text("of an earlier run")
    with pytest.raises(ValueError, match="outputs differ by") as error:
        export(net, X, tmp_path, ALL)
    assert all(f"model.{format} (" in str(error.value) for format in ALL)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "of an earlier run"
    files = export(net, X, tmp_path, ALL, verify=False)
    assert [file.difference for file in files] == [None] * 3
    assert all(file.agrees and file.path.exists() for file in files)


def test_a_file_that_does_not_open_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "export_pt2", lambda module, inputs, path, **kwargs: path.write_bytes(b"half"))
    with pytest.raises(ValueError, match=r"model\.pt2 \(4 bytes; it cannot be run"):
        export(plain(), X, tmp_path, ["pt2"])
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(module: nn.Module, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(formats_module, "save_compressed", crash)
    with pytest.raises(KeyboardInterrupt):
        export(plain(), X, tmp_path, ["safetensors"])
    assert not list(tmp_path.iterdir())


class Keywords(nn.Module):
    """Keywords, a number, an argument that is left out, and an output that is a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None, *, more: dict[str, Tensor]) -> Any:
        y = self.layer(x) * scale + more["b"] - 2.0 * more["a"]
        return {"logits": y, "rest": (y.argmax(1), None, [x * 2.0])}


def test_keywords_and_trees(tmp_path: Path) -> None:
    inputs = {"more": {"b": torch.randn(5, 1), "a": torch.randn(5, 4)}, "x": torch.randn(5, 3), "scale": 0.5}
    other = {"x": torch.randn(2, 3), "scale": 0.5, "more": {"a": torch.randn(2, 4), "b": torch.randn(2, 1)}}
    for file in export(Keywords(), inputs, tmp_path, ALL, batches=[inputs, other]):
        assert file.difference is not None
        assert file.difference < 1e-6
        assert file.equal_classes == 1.0


def test_positions_and_keywords_are_the_same_call(tmp_path: Path) -> None:
    net = nn.Bilinear(3, 4, 2)
    a, b = torch.randn(5, 3), torch.randn(5, 4)
    export(net, (a, b), tmp_path, ALL, batches=[{"input2": b, "input1": a}])
    export(net, {"input2": b, "input1": a}, tmp_path, ALL, batches=[(a, b)])


class Sum(nn.Module):
    """Any number of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, *parts: Tensor) -> Tensor:
        return self.layer(parts[0]) + parts[1] - parts[2]


def test_any_number_of_arguments(tmp_path: Path) -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    export(Sum(), (x, y, 2.0 * y), tmp_path, ALL, batches=[(x[:4], y[:4], -y[:4])])


def test_attention(tmp_path: Path) -> None:
    x = torch.randn(32, 4, 16)
    files = export(quantized(Encoder(), x), x, tmp_path, ALL)
    assert all(file.within == 1.0 for file in files)


def test_the_safetensors_file_holds_all_state(tmp_path: Path) -> None:
    net = plain()
    (file,) = export(net, X, tmp_path, ["safetensors"])
    again = load_compressed(file.path, mlp()).eval()
    assert torch.equal(again(X), net(X))


# --- figures ----------------------------------------------------------------------------------------------------------


def compared(module: nn.Module, *pairs: tuple[Any, Any]) -> Comparison:
    comparison = Comparison(module)
    for own, other in pairs:
        comparison.add(own, other)
    return comparison


def test_the_span_is_that_of_each_output_over_all_batches() -> None:
    small, large = torch.tensor([[0.1, 0.3]]), torch.tensor([[-1000.0, 1000.0]])
    comparison = compared(nn.Linear(1, 1), ((small, large), (small + 0.03, large)), ((small * 2, large),) * 2)
    assert comparison.difference == pytest.approx(0.03 / 0.6)  # from 0 to 0.6
    assert comparison.within == 0.5
    assert comparison.rows == 2


@pytest.mark.parametrize(
    ("own", "other", "agrees"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], True),
        ([math.nan, 1.0], [0.0, 1.0], False),
        ([1.0, 1.0], [math.nan, 1.0], False),
        ([-math.inf, 1.0], [-math.inf, 1.0], True),
        ([-math.inf, 1.0], [-1e30, 1.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 1.0], False),
        ([3, 4], [3, 4], True),
        ([3, 4], [3, 5], False),
        ([True, False], [True, True], False),
        ([1.0, 2.0], [[1.0, 2.0]], False),
    ],
)
def test_what_agrees(own: Any, other: Any, agrees: bool) -> None:
    assert (compared(nn.Linear(1, 1), (torch.tensor(own), torch.tensor(other))).problem() is None) is agrees


def test_rounded_activations_may_be_a_neighbour() -> None:
    net, own = rounded(8), torch.linspace(0, 255, 1000)[None]
    assert tolerance(net) == (2 / 255, True)
    some = torch.zeros_like(own)
    some[0, :10] = 7.0  # 1 % by 3.5 tolerances
    assert compared(net, (own, own + 1.9 + some / 2)).problem() is None
    assert "99" in str(compared(net, (own, own + 2.1)).problem())
    assert compared(net, (own, own + 9.0 * (some > 0))).problem() is not None
    assert compared(plain(), (own, own + 1.9)).problem() is not None


@pytest.mark.parametrize(
    ("own", "other", "problem"),
    [
        (0.5, 0.51, None),  # a row of a hundred
        (0.5, 0.515, "acc is 0.515 instead of 0.5"),
        (0.5, math.nan, "acc is nan instead of 0.5"),
        (math.nan, math.nan, None),
        (math.inf, math.inf, None),
        (-math.inf, math.inf, "acc is inf instead of -inf"),
        (1e6, 1.0009e6, None),
        (1e6, 1.0011e6, "acc is 1.001e+06 instead of 1e+06"),
    ],
)
def test_metrics(own: float, other: float, problem: str | None) -> None:
    comparison = Comparison(nn.Linear(1, 1))
    comparison.add_metrics({"acc": own, "only_ours": 1.0}, {"acc": other}, 100)
    assert set(comparison.metrics) == {"acc"}
    assert comparison.problem() == problem
    rounding = Comparison(rounded(8))
    rounding.add_metrics({"acc": 0.5}, {"acc": 0.515}, 100)
    assert rounding.problem() is None


def test_a_line_says_what_became_of_a_file() -> None:
    file = ExportedFile("onnx", Path("model.onnx"), 4, metrics={"acc": (0.5, 0.4)}, problem="acc is 0.4 instead of 0.5")
    assert str(file) == "model.onnx (4 bytes; acc is 0.4 instead of 0.5, acc 0.5 → 0.4)"
    assert not file.agrees


# --- words ------------------------------------------------------------------------------------------------------------


def test_every_file_says_what_is_in_it(tmp_path: Path) -> None:
    net = rounded(4)
    with torch.no_grad():
        net[0].weight[:16] = 0.0  # 1024 of 2048 + 1024 + 256
    export(net, X, tmp_path, ALL, metadata={"name": "mine"})
    words: dict[str, str] = {"metadata": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=words)
    import safetensors

    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        dense = file.metadata()
    of_onnx = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    for found in (of_onnx, json.loads(words["metadata"]), dense):
        assert float(found["sparsity"]) == pytest.approx(1024 / 3328, abs=1e-6)
        assert (found["weight_bits"], found["activation_bits"], found["name"]) == ("4", "4", "mine")
        assert json.loads(found["versions"])["torch"] == torch.__version__


def test_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git_revision" not in facts(nn.Linear(2, 2))

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "v1")
    assert facts(nn.Linear(2, 2))["git_revision"] == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert facts(nn.Linear(2, 2))["git_revision"] == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert "git_revision" not in facts(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"formats": []}, ValueError, "at least one"),
        ({"formats": ["onnx", "tflite"]}, ValueError, "'tflite'"),
        ({"formats": "onnx"}, TypeError, "a list of 'onnx'"),
        ({"formats": [1]}, ValueError, "got 1"),
        ({"dir": ""}, ValueError, "`dir`"),
        ({"dir": 3}, TypeError, "`dir`"),
        ({"dir": "s3://bucket/a"}, ValueError, "of this machine"),
        ({"dir": __file__}, ValueError, "is a file"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path: Path, kwargs: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        export(plain(), X, **({"dir": tmp_path / "new"} | kwargs))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = formats_module.importlib.util.find_spec
    monkeypatch.setattr(
        formats_module.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ImportError, match=r"'onnx'.*onnxruntime.*lightning-compress\[export\]"):
        export(plain(), X, tmp_path)
    export(plain(), X, tmp_path, ["pt2", "safetensors"])
