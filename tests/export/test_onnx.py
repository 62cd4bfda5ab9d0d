"""ONNX files: integers in them, integer kernels for them, and the numbers of the module that they come from."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.models import ResidualCNN
from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.export import export_onnx, integer_kernels
from tests.quantization.networks import (
    Encoder,
    Moving,
    Tied,
    TwoInputs,
    blobs,
    mlp,
    quantized,
    trained_cnn,
    transposed,
    with_uneven_norms,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def _normal(*shape: int, seed: int) -> Tensor:
    # In nets of random weights one inner number that onnxruntime rounds to its neighbour moves nine outputs.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def run(path: Path, *inputs: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))
    return torch.from_numpy(output)


def step(output: Tensor) -> float:
    """What one of 255 steps over an output's range is."""
    return float(output.max() - output.min()) / 255


def check(tmp_path: Path, net: nn.Module, *inputs: Tensor, share: float = 0.99) -> dict[str, Any]:
    """Export, compare at another batch size than the example's, and return which kernels run.

    The networks are not trained, and where one activation is rounded to the neighbouring integer, outputs that lie
    close together move by several steps: a share of them has to agree to one step.
    """
    path = export_onnx(net, tuple(x[:2] for x in inputs), tmp_path / "net.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    with torch.no_grad():
        expected = net(*inputs)
    error = (run(path, *inputs) - expected).abs() / step(expected)
    assert (error <= 1).float().mean() >= share, error.max()
    assert error.mean() < 2 * (1 - share) + 0.1
    return integer_kernels(path)


def test_residual_network(tmp_path: Path) -> None:
    net = trained_cnn()
    images, labels = blobs(1000, seed=1)
    path = export_onnx(net, images[:2], tmp_path / "net.onnx")
    with torch.no_grad():
        expected = net(images)
    output = run(path, images)
    assert (output.argmax(1) == expected.argmax(1)).sum() >= 999
    assert (expected.argmax(1) == labels).float().mean() > 0.9
    # Biases are rounded to units of int32 sums, which moves one activation in some thousands to the next integer; each
    # residual sum passes that on.
    assert (output - expected).abs().max() <= 2 * step(expected)
    assert integer_kernels(path) == {"integer": 10, "weight_only": 0, "float": 0, "float_nodes": []}


@pytest.mark.parametrize(("bits", "share"), [(8, 0.28), (4, 0.16)])
def test_size(bits: int, share: float, tmp_path: Path) -> None:
    images = torch.randn(2, 1, 28, 28)
    net = ResidualCNN()
    plain = 4 * sum(parameter.numel() for parameter in net.parameters())
    path = export_onnx(quantized(net, images, weight_bits=bits), images, tmp_path / "net.onnx")
    assert path.stat().st_size <= share * plain
    kinds = {t.data_type for t in onnx.load(path).graph.initializer if np.prod(t.dims) > 1000}
    assert kinds == {onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.INT4}
    assert integer_kernels(path)["integer"] == 10


def test_a_float_module_is_written_as_it_is(tmp_path: Path) -> None:
    net = with_uneven_norms(mlp()).eval()
    path = export_onnx(net, X[:2], tmp_path / "net.onnx", metadata={"stage": "float"})
    torch.testing.assert_close(run(path, X), net(X).detach())
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"stage": "float"}
    assert integer_kernels(path)["float"] == 3
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize(
    ("make", "inputs", "settings", "integer", "float_"),
    [
        pytest.param(mlp, (X,), {"scheme": "affine", "weight_bits": 4}, 3, 0, id="mlp-affine-4"),
        pytest.param(mlp, (X,), {"granularity": 32}, 0, 3, id="mlp-groups"),
        pytest.param(Moving, (_normal(8, 1, 10, 10, seed=1),), {}, 4, 0, id="moving"),
        pytest.param(Encoder, (X.view(16, 4, 16),), {}, 9, 0, id="encoder"),
        pytest.param(Encoder, (X.view(16, 4, 16),), {"granularity": 16, "weight_bits": 4}, 2, 7, id="encoder-groups"),
        # onnxruntime has no integer kernel for transposed convolutions, and none for one whose result is not rounded.
        pytest.param(transposed, (_normal(4, 3, 6, 6, seed=2),), {}, 1, 2, id="transposed-one-output"),
    ],
)
def test_agrees(make: Any, inputs: Any, settings: Any, integer: int, float_: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = quantized(with_uneven_norms(make()), *inputs, **settings)
    kernels = check(tmp_path, net, *inputs)
    assert (kernels["integer"], kernels["float"]) == (integer, float_), kernels


def test_affine_channels_of_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = with_uneven_norms(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    )
    net[0].weight.data += 0.2
    images = torch.randn(8, 3, 4, 4)
    kernels = check(tmp_path, quantized(net, images, scheme="affine"), images)
    assert kernels["integer"] == 2


def test_weights_alone_in_groups_of_four_bits(tmp_path: Path) -> None:
    net = quantized(mlp(), X, weight_bits=4, granularity=32, activation_bits=None)
    # onnxruntime's kernel for such weights rounds the activations on its own.
    assert check(tmp_path, net, X, share=0.9)["weight_only"] == 3


@pytest.mark.parametrize(("bits", "granularity"), [(8, "channel"), (4, "tensor"), (4, 32)])
def test_a_tied_weight_is_in_the_file_once(bits: int, granularity: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.arange(96).view(8, 12)
    net = quantized(Tied(), ids, weight_bits=bits, granularity=granularity)
    kernels = check(tmp_path, net, ids)
    assert kernels["float"] == (2 if granularity == 32 else 0)
    parameters = sum(p.numel() for p in net.parameters())
    assert (tmp_path / "net.onnx").stat().st_size <= (0.32 if bits == 8 else 0.2) * 4 * parameters
    assert onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_a_layer_on_rows_of_rows_is_one_integer_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = quantized(Encoder(), X.view(16, 4, 16))
    path = export_onnx(net, X[:2].view(2, 4, 16), tmp_path / "net.onnx")
    nodes = onnx.load(path).graph.node
    kinds = Counter(node.op_type for node in nodes)
    # Biases are the layers' own; the two sums that are left are those of the residual stream.
    assert (kinds["Gemm"], kinds["MatMul"], kinds["Add"], kinds["QuantizeLinear"]) == (7, 2, 2, 9)
    made_by = {name: node.op_type for node in nodes for name in node.output}
    [softmax] = [node for node in nodes if node.op_type == "Softmax"]
    assert made_by[softmax.input[0]] == "MatMul"  # 1 / √(head width) is in a scale
    # To rows, from q, k and v to heads, from heads to rows, and before the mean: the residual stream stays a matrix.
    assert kinds["Reshape"] == 6


class PreNorm(nn.Module):
    """A residual stream that begins as the input itself and whose tensor is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.first, self.gate, self.second = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.shift = nn.Parameter(torch.randn(4, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.second(F.gelu(self.first(y)) * torch.sigmoid(self.gate(y)) / 2.0)
        x = self.norms[1](x + self.shift) + x
        x = x - self.second(F.relu(self.first(self.norms[2](x))) * 0.5)
        return self.head(x)


def test_a_residual_stream_of_matrices_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = quantized(PreNorm(), X.view(16, 4, 16))
    kernels = check(tmp_path, net, X.view(16, 4, 16), share=0.98)
    assert (kernels["integer"], kernels["float"]) == (6, 0)


def test_four_bits_agree_to_the_last_integer(tmp_path: Path) -> None:
    net = trained_cnn(weight_bits=4, activation_bits=4)
    images, _ = blobs(1000, seed=1)
    with torch.no_grad():
        expected = net(images)
    output = run(export_onnx(net, images[:2], tmp_path / "net.onnx"), images)
    assert (output.argmax(1) == expected.argmax(1)).sum() >= 999
    # One activation that is rounded to its neighbour moves an output by several steps.
    assert ((output - expected).abs().amax(1) <= 0.1 * step(expected)).float().mean() >= 0.99


def test_batch_norms_are_folded_where_weights_alone_are_rounded(tmp_path: Path) -> None:
    net = quantized(with_uneven_norms(ResidualCNN((8, 8, 8))), torch.randn(8, 1, 28, 28), activation_bits=None)
    images = torch.randn(16, 1, 28, 28)
    path = export_onnx(net, images[:2], tmp_path / "net.onnx")
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    torch.testing.assert_close(run(path, images), net(images).detach(), rtol=1e-3, atol=1e-3)


def test_narrow_activations_stay_within_their_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = quantized(Moving(), torch.randn(64, 1, 10, 10), activation_bits=4)
    images = 3 * torch.randn(64, 1, 10, 10)
    assert check(tmp_path, net, images, share=0.8)["integer"] == 4


def test_an_emptied_channel_keeps_its_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = mlp()
    with torch.no_grad():
        net[3].weight[5] = 0.0
        net[3].weight[6] *= 1e-9
        net[3].bias[5:7] = torch.tensor([1000.0, -1000.0])
        net[5].weight[:, 6] = 0.01
    assert check(tmp_path, quantized(net, X, weight_bits=4), X)["integer"] == 3


def test_a_clipping_layer_and_a_depthwise_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Hardswish(),
        nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    images = torch.randn(16, 3, 8, 8)
    assert check(tmp_path, quantized(net, images), images)["integer"] == 4


def test_keywords_and_a_fixed_batch(tmp_path: Path) -> None:
    net = quantized(TwoInputs(), X[:, :8], X[:, 8:12])
    inputs = ExampleInputs((X[:, :8],), {"extra": X[:, 8:12]})
    path = export_onnx(net, inputs, tmp_path / "net.onnx", dynamic_batch=False)
    graph = onnx.load(path).graph
    assert [entry.name for entry in graph.input] == ["x", "extra"]
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [16, 8]
    assert [entry.name for entry in graph.output] == ["output"]
    expected = net(X[:, :8], X[:, 8:12]).detach()
    assert (run(path, X[:, :8], X[:, 8:12]) - expected).abs().max() <= step(expected)
    assert integer_kernels(path)["integer"] == 3


def test_nothing_is_said_and_no_name_of_ours_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = export_onnx(quantized(mlp(), X), X[:2], tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert b"/" not in path.read_bytes() or str(Path(__file__).parent).encode() not in path.read_bytes()
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    path = tmp_path / "net.onnx"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="ONNX exporter cannot follow Odd"):
        export_onnx(Odd(), X[:2], path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_large_models_have_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_compress.export.onnx.LARGEST_FILE", 1000)
    net = mlp().eval()
    path = export_onnx(net, X[:2], tmp_path / "net.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    torch.testing.assert_close(run(path, X), net(X).detach())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript: pip install 'lightning_compress\[export\]'"):
        export_onnx(mlp(), X[:2], tmp_path / "net.onnx")


class Clipped(nn.Module):
    def __init__(self, function: Any, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32, bias=bias), nn.Linear(32, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)) * 0.5 + 0.1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [torch.relu, F.relu6, lambda x: x.clamp(max=0.5)])
def test_clipped_numbers_that_stay_floats_come_from_an_integer_kernel(
    function: Any, bias: bool, tmp_path: Path
) -> None:
    kernels = check(tmp_path, quantized(Clipped(function, bias), X), X, share=0.98)
    assert (kernels["integer"], kernels["float"]) == (2, 0)
