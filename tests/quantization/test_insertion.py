"""What is inserted where: nothing changes while it is off, and all of it comes out again."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.quantization.functional import _Watch, _WatchedForward
from lightning_compress.quantization.insertion import Insertion, Settings, dequantize, insert, insertions
from lightning_compress.quantization.layers import (
    ActivationQuantizer,
    PerUse,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    Quantizer,
    WeightQuantizer,
)

LEARNED = Settings(range="learned")


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))


class Scale(nn.Module):
    """A layer of the user's own, without children, that does what its parents do too."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + 0.0 * x


class Residual(nn.Module):
    """Sums of tensors beside sums of sizes, of constants and of buffers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.scale, self.relu = Scale(), nn.ReLU()
        self.register_buffer("shift", torch.full((1, width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2] + 1 - 1
        constant = torch.ones(1) + torch.ones(1)
        shift = self.shift + self.shift
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu((self.scale(y) + x + shift * constant)[:, :, :size])


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two, self.head = Residual(), Residual(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = torch.cat([self.one(x), F.max_pool2d(self.two(x), 3, 1, 1)], 1)
        return self.head(x.mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.norm = nn.Conv1d(3, 8, 3, stride=2), nn.ConvTranspose1d(8, 3, 3, 2), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(self.down(x), output_size=[9]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mlp, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mlp(self.embedding(ids)))


class Bends(nn.Module):
    """No tracer gets through its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.block = nn.Linear(6, 6), nn.Linear(6, 6), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)) if x.sum() > -1e9 else x
        return self.block(x)


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(seed: int = 0) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


MODELS: dict[str, tuple[Any, Any]] = {
    "mlp": (MLP, rows),
    "cnn": (CNN, images),
    "transposed": (Transposed, lambda seed=0: images(seed)[:, :, :, 0].repeat(1, 1, 2)[:, :, :9]),
    "tied": (Tied, lambda seed=0: torch.arange(12).view(3, 4) + seed),
    "bends": (Bends, rows),
}
every_model = pytest.mark.parametrize("name", list(MODELS))


def make(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return MODELS[name][0](), MODELS[name][1]


def train(model: nn.Module, insertion: Insertion, batches: list[Any], steps: int = 2) -> None:
    """Switch on, and let the ranges see data."""
    insertion.switch(True)
    model.train()
    for batch in batches * steps:
        insertion.start_pass()
        insertion.observe(True)
        model(*batch) if isinstance(batch, tuple) else model(batch)
        insertion.observe(False)


def run(model: nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return model(*args, **kwargs)


# --- off --------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("settings", [Settings(), LEARNED, Settings(4, None, "tensor", "affine", "minmax")], ids=str)
def test_nothing_changes_while_off(name: str, settings: Settings) -> None:
    model, data = make(name)
    plain = copy.deepcopy(model)
    insert(model, settings)
    for is_training in (True, False, True):
        model.train(is_training)
        plain.train(is_training)
        x = data()
        ours, theirs = run(model, x), run(plain, x)
        assert torch.equal(ours, theirs)
        model.zero_grad()
        plain.zero_grad()
        ours.sum().backward()
        theirs.sum().backward()
        for key, parameter in plain.named_parameters():
            grad = model.get_parameter(key).grad
            assert (grad is None) == (parameter.grad is None)
            # The two parts of a tied weight's gradient may be added in another order.
            assert grad is None or torch.allclose(grad, parameter.grad, rtol=1e-6, atol=1e-7 * (name == "tied"))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    model.load_state_dict(plain.state_dict(), strict=True)
    # DDP waits for a gradient of each scale.
    assert all(p.grad is not None for p in insertions(model)[0].parameters)


@every_model
def test_on_off_and_out(name: str) -> None:
    model, data = make(name)
    before = [type(child) for child in model.modules()]
    hooks = sum(len(c._forward_hooks) + len(c._forward_pre_hooks) for c in model.modules())
    plain = copy.deepcopy(model)
    insertion = insert(model, Settings(4, 8))
    train(model, insertion, [data(1), data(2)])
    assert not [n for n, q in insertion.observers.items() if not q.has_seen]
    model.eval()
    on = model(data())
    plain.load_state_dict(model.state_dict())
    plain.eval()
    assert not torch.equal(on, plain(data()))
    insertion.switch(False)
    assert torch.equal(model(data()), plain(data()))
    insertion.switch(True)

    # A copy is whole, and so is a pickle.
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(other(data()), on)
        assert insert(other, Settings(4, 8)) is insertions(other)[0] is not insertion
        assert not {id(q) for q in insertions(other)[0].quantizers.values()} & {
            id(q) for q in insertion.quantizers.values()
        }
        insertions(other)[0].switch(False)
        assert torch.equal(other(data()), plain(data()))
    assert torch.equal(model(data()), on)

    for child in model.modules():
        if isinstance(child, QuantizedLayer):
            name = next(n for n, c in model.named_modules() if c is child)
            with torch.no_grad():
                plain.get_parameter(f"{name}.weight").copy_(child.quantized_weight())
    insertions(copied)[0].switch(True)
    assert dequantize(copied) is copied
    dequantize(model)
    for other in (model, copied):
        assert [type(child) for child in other.modules()] == before
        assert sum(len(c._forward_hooks) + len(c._forward_pre_hooks) for c in other.modules()) == hooks
        assert not any("forward" in c.__dict__ or "folded" in c.__dict__ for c in other.modules())
        assert not insertions(other)
        assert torch.equal(other(data()), plain(data()))
    # and in again
    train(model, insert(model, Settings()), [data()])


def test_weights_alone() -> None:
    model, data = make("cnn")
    insertion = insert(model, Settings(3, None))
    assert not insertion.observers
    train(model, insertion, [data()])
    model.eval()
    on = model(data())
    torch.testing.assert_close(dequantize(model)(data()), on, rtol=1e-5, atol=1e-6)


# --- where ------------------------------------------------------------------------------------------------------------


def test_batch_norms_are_folded() -> None:
    model, _ = make("cnn")
    insertion = insert(model, Settings())
    assert sorted(insertion.norms) == ["norm", "one.norm1", "one.norm2", "two.norm1", "two.norm2"]
    assert not insertion.untraced
    # Nothing between a layer and the norm that it is folded into.
    assert not hasattr(model.stem, "output_quantizer")
    assert hasattr(model.norm, "output_quantizer")
    assert model.norm.output_quantizer.is_rectified
    assert not model.one.norm2.output_quantizer.is_rectified if hasattr(model.one.norm2, "output_quantizer") else True


def test_batch_norms_are_folded_where_weights_alone_are_rounded() -> None:
    model, _ = make("cnn")
    insertion = insert(model, Settings(activation_bits=None))
    assert sorted(insertion.norms) == ["norm", "one.norm1", "one.norm2", "two.norm1", "two.norm2"]
    assert not insertion.observers


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_biases_are_multiples_of_what_an_integer_kernel_counts_in(granularity: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(64, 8)
    net.train()(x)
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    plain = copy.deepcopy(net)
    insertion = insert(net, Settings(weight_bits=4, activation_bits=4, granularity=granularity))
    insertion.switch(True)
    insertion.observe(True)
    insertion.freeze_norms(True)
    net(x)
    insertion.observe(False)
    net.eval()
    outputs: dict[int, Tensor] = {}
    for index in (1, 3):
        keep = net[index].register_forward_hook(lambda module, args, out, index=index: outputs.update({index: out}))
        net[index]._forward_hooks.move_to_end(keep.id, last=False)  # before a quantizer changes it
    net(x)

    def scale(weight: Tensor) -> Tensor:
        high = weight.abs().amax(1) if granularity == "channel" else weight.abs().max().expand(len(weight))
        return high / 7

    norm = plain[1]
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    for index, layer, weight in (
        (1, net[0], plain[0].weight.double() * factor[:, None]),
        (3, net[3], plain[3].weight.double()),
    ):
        [read] = layer.input_range
        unit = (read.high - read.low).double() / 15 * scale(weight)
        sums = outputs[index].double() / unit
        assert ((sums - sums.round()).abs() < 1e-3).all()


def test_a_rounded_bias_passes_its_gradient() -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    insertion = insert(net, Settings())
    insertion.switch(True)
    insertion.observe(True)
    net(torch.randn(16, 8)).sum().backward()
    assert (net[0].bias.grad == 16).all()


def test_a_norm_with_another_use_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.norm(self.conv(x)) + self.norm(x))

    class Twice(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.norm(self.conv(self.conv(x))))

    class Read(Shared):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.other(self.norm(y) + y)

    for kind in (Shared, Twice, Read):
        insertion = insert(kind(), Settings())
        assert not insertion.norms
        assert not insertion.untraced


def test_integer_arithmetic_has_what_it_needs() -> None:
    """Each operand of a layer, a sum or a concatenation is rounded: by its producer, or where it is read."""
    model, data = make("cnn")
    insertion = insert(model, Settings(activation_bits=2))
    train(model, insertion, [data()])
    seen: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            seen[name] = len(args[0].unique())

        return hook

    for name, child in model.named_modules():
        if isinstance(child, QuantizedLayer):
            child.register_forward_pre_hook(look(name))
    model.eval()(data(3))
    assert len(seen) == 6
    assert all(count <= 4 or name == "head" for name, count in seen.items()), seen
    assert seen["head"] <= 4


def test_case_9_one_activation_module_has_a_range_for_each_use() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l1, self.l2, self.l3, self.relu = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            small = self.relu(self.l1(x))
            self.small = small
            return self.l3(self.relu(self.l2(100 * small)))

    torch.manual_seed(0)
    model = Net()
    insertion = insert(model, Settings())
    assert not insertion.untraced
    x = torch.randn(64, 16)
    train(model, insertion, [x])
    model.eval()
    seen = []
    model.l2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    exact = 100 * F.relu(F.linear(x, model.l1.weight, model.l1.bias))
    snr = 10 * torch.log10(exact.square().sum() / (seen[0] - exact).square().sum())
    assert snr.item() >= 30


def test_a_shared_layer_has_a_range_for_each_use() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(100 * self.last(self.shared(x))))

    torch.manual_seed(0)
    model = Net()
    insertion = insert(model, Settings(range="minmax"))
    assert not insertion.untraced
    seen: list[Tensor] = []
    model.shared.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    train(model, insertion, [rows()], steps=1)
    assert isinstance(model.shared.output_quantizer, PerUse)
    highs = [float(q.high) for q in model.shared.output_quantizer.quantizers]
    assert highs == pytest.approx([output.max().item() for output in seen], rel=0.02)
    assert highs[1] > 5 * highs[0]


def test_shared_blocks_and_constants_are_counted_right() -> None:
    """One block used twice, with inputs of unlike size; its sum has a range for each use."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.last = Residual(3), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.block(self.block(x)))

    model = Net()
    insertion = insert(model, Settings(range="minmax"))
    assert not insertion.untraced
    highest: list[float] = []
    model.block.register_forward_hook(lambda module, args, output: highest.append(output.max().item()))
    train(model, insertion, [images()], steps=1)
    own = model.block.functional_quantizers
    assert own.calls == [5, 5]
    assert [float(own.quantizers[key].high) for key in ("0_4", "1_4")] == pytest.approx(highest, rel=0.02)
    assert highest[1] > 1.2 * highest[0]
    # evaluation counts as training does, whoever calls, and after an exception too
    model.eval()
    expected = model(images())
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 5, 4, 4))
    insertion.start_pass()
    assert torch.equal(model(images()), expected)


def test_a_forward_that_leaves_its_trace_says_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.first(x)
            if mask is not None:
                y = y + mask
            return self.last(y + x)

    model = Net()
    insert(model, Settings())
    model(rows())
    with pytest.raises(RuntimeError, match=r"Net\.forward has called add 2 times, but 1 times when it was traced"):
        model(rows(), torch.ones(6))


def test_untraceable_models_have_inputs_only_and_say_so() -> None:
    model, data = make("bends")
    insertion = insert(model, Settings())
    assert list(insertion.untraced) == [""]
    assert hasattr(model.first, "input_quantizer")
    assert not hasattr(model.first, "output_quantizer")
    # what is inside and can be traced has the whole of it
    assert hasattr(model.block[0], "output_quantizer") or hasattr(model.block[1], "output_quantizer")
    train(model, insertion, [data()])
    assert all(q.has_seen for q in insertion.observers.values())

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if self.training:
                y = y + torch.ones_like(y)
            return self.last(y + x)

    model = Modes()
    insertion = insert(model, Settings())
    assert "another way in evaluation" in insertion.untraced[""]
    assert model.training


def test_tracing_leaves_no_symbols() -> None:
    class Hoarder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen, self.count = nn.Linear(6, 6), None, 0
            self.register_buffer("last", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen = x
            self.new = self.layer(x)
            self.__dict__["kept"] = self.new
            return self.new + 1

    for model in (Hoarder(), nn.Sequential(Hoarder(), nn.Linear(6, 6))):
        insert(model, Settings())
        for child in model.modules():
            assert not any(isinstance(value, fx.Proxy) for value in vars(child).values())
        holder = model if isinstance(model, Hoarder) else model[0]
        assert holder.count == 0
        assert holder.seen is None
        assert not hasattr(holder, "new")
        copy.deepcopy(model)(rows())


def test_what_stays_float_is_named() -> None:
    class MyLinear(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.plain = MyLinear(6, 6), nn.Linear(6, 6)
            self.rnn = nn.LSTM(6, 6)
            self.grouped = nn.ConvTranspose2d(4, 6, 3, groups=2)
            self.frozen = nn.Embedding(3, 6, max_norm=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.plain(self.own(x)))[0]

    insertion = insert(Net(), Settings())
    assert list(insertion.layers) == ["plain"]
    assert set(insertion.skipped) == {"own", "rnn", "grouped", "frozen"}
    assert "MyLinear is a class of its own" in insertion.skipped["own"]
    assert "groups" in insertion.skipped["grouped"]
    assert "LSTM has no integer form" in insertion.skipped["rnn"]
    with pytest.raises(ValueError, match=r"Nothing to quantize in Sequential: '0': LSTM has no integer form"):
        insert(nn.Sequential(nn.LSTM(2, 2)), Settings())


def test_groups_that_fit_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    insertion = insert(model, Settings(granularity=4))
    assert insertion.skipped == {"0": "its 6 weights an output are no multiple of the group of 4"}
    with pytest.raises(ValueError, match=r"Nothing to quantize.*'0': its 6 weights.*'1': its 8 weights"):
        insert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), Settings(granularity=5))
    with pytest.raises(ValueError, match="Nothing to quantize"):
        insert(nn.Sequential(nn.Linear(6, 8)).double(), Settings(granularity=5, range="learned"))


def test_half_precision_is_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="bf16-mixed"):
            insert(MLP().to(dtype), Settings())


def test_a_layer_has_one_owner() -> None:
    model = MLP()
    insertion = insert(model, Settings())
    assert insert(model, Settings()) is insertion
    with pytest.raises(ValueError, match="'0' is quantized already"):
        insert(model, Settings(4))
    model = MLP()
    first, second = insert(model, Settings(8), include=["0"]), insert(model, Settings(4), exclude=["0"])
    assert (list(first.layers), list(second.layers)) == (["0"], ["3"])
    assert not set(first.quantizers) & set(second.quantizers)
    train(model, first, [rows()])
    train(model, second, [rows()])
    assert all(q.has_seen for q in (*first.observers.values(), *second.observers.values()))
    dequantize(model)
    assert not any(isinstance(child, Quantizer) for child in model.modules())


@pytest.mark.parametrize("pattern", ["one.*", "head", "[!h]*"])
def test_two_owners_of_parts_of_a_residual_model(pattern: str) -> None:
    model, data = make("cnn")
    first, second = insert(model, Settings(8), include=[pattern]), insert(model, Settings(4), exclude=[pattern])
    assert not second.untraced
    train(model, first, [data()])
    train(model, second, [data()])
    assert all(q.has_seen for i in (first, second) for q in i.observers.values())
    model.eval()
    assert torch.equal(copy.deepcopy(model)(data()), model(data()))
    dequantize(model)
    assert not any("forward" in child.__dict__ for child in model.modules())


def test_tied_weights() -> None:
    model, data = make("tied")
    insertion = insert(model, Settings())
    assert model.embedding.weight_quantizer is model.head.weight_quantizer
    assert len(insertion.weights) == 2  # the tied one and the block's
    train(model, insertion, [data()])
    assert torch.equal(model.embedding.quantized_weight(), model.head.quantized_weight())
    dequantize(model)
    assert model.embedding.weight is model.head.weight
    lone, _ = make("tied")
    skipped = insert(lone, Settings(), exclude=["head"]).skipped
    assert "embedding" in skipped or not hasattr(lone.embedding, "weight_quantizer")


def test_keyword_arguments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.up = nn.Linear(6, 6), nn.ConvTranspose1d(3, 4, 3, 2)

        def forward(self, *, rows: Tensor, images: Tensor) -> Any:
            if rows.sum() > -1e9:  # untraceable: inputs are rounded by hooks
                return self.layer(input=rows), self.up(input=images, output_size=[12])
            return None

    model = Net()
    insertion = insert(model, Settings(activation_bits=2))
    insertion.switch(True)
    insertion.observe(True)
    model(rows=rows(), images=torch.randn(2, 3, 5))
    assert all(q.has_seen for q in insertion.observers.values())


def test_case_8_transposed_convolutions() -> None:
    layer, norm = nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.3, 2)
    model = nn.Sequential(layer, norm, nn.ReLU()).eval()
    expected = model(images())
    insertion = insert(model, Settings())
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-5)
    assert layer.weight_quantizer.parameters_of(layer.weight)[0].shape == (8,)
    assert list(insertion.norms) == ["1"]
    train(model, insertion, [images()])
    folded = [layer.weight[:, c] * (norm.weight[c] / (norm.running_var[c] + norm.eps).sqrt()) for c in range(8)]
    rounded = [layer.quantized_weight()[:, c] for c in range(8)]
    assert all(len(r.unique()) > 20 and torch.isfinite(f).all() for r, f in zip(rounded, folded, strict=True))
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    assert list(insert(grouped, Settings()).skipped) == ["0"]


def test_case_19_one_output_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3))
    train(model, insert(model, Settings()), [images()])
    scale, zero_point = model[1].weight_quantizer.parameters_of(model[1].weight)
    assert scale.shape == zero_point.shape == (1,)


@pytest.mark.parametrize("granularity", ["channel", "tensor", 4])
def test_pruned_weights_stay_zero_in_any_layout(granularity: Any) -> None:
    for scheme, dims in itertools.product(("symmetric", "affine"), (torch.contiguous_format, torch.channels_last)):
        model = nn.Sequential(nn.Conv2d(4, 8, 2)).to(memory_format=dims)
        with torch.no_grad():
            model[0].weight[torch.rand_like(model[0].weight) < 0.6] = 0
            model[0].weight[3] = 0
        is_zero = model[0].weight == 0
        insertion = insert(model, Settings(4, 8, granularity, scheme))
        insertion.switch(True)
        assert (model[0].quantized_weight()[is_zero] == 0).all()
        assert (dequantize(model)[0].weight[is_zero] == 0).all()


def test_tensor_granularity_sees_the_folded_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 1e-3, -1.0, 0.0]))
        model[0].weight[0].mul_(1e-3)
    train(model, insert(model, Settings(4, 8, "tensor")), [images()], steps=1)
    norm = model[1]
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    factor = torch.where(factor == 0, 1.0, factor)
    folded = model[0].quantized_weight() * factor
    step = (model[0].weight * factor).abs().max() / 7
    torch.testing.assert_close(folded / step, (folded / step).round(), rtol=0, atol=1e-4)
    assert torch.isfinite(folded).all()


# --- attention --------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "widths": {"kdim": 6, "vdim": 10},
    "bias_k": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
    "no_bias": {"bias": False},
    "dropout": {"dropout": 0.3},
}


def attention_inputs(kwargs: dict[str, Any], is_batch_first: bool, is_batched: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = (8, kwargs.get("kdim", 8), kwargs.get("vdim", 8))
    lengths = (5, 7, 7)
    shapes = [
        (n, w) if not is_batched else ((3, n, w) if is_batch_first else (n, 3, w))
        for n, w in zip(lengths, widths, strict=True)
    ]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def masks(is_batched: bool) -> list[dict[str, Any]]:
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    padding = padding if is_batched else padding[0]
    square = torch.zeros(5, 7, dtype=torch.bool)
    square[:, 6] = True
    additive = torch.zeros(5, 7).masked_fill(square, -torch.inf)
    cube = square.expand((6 if is_batched else 2), 5, 7).clone()
    cube[1, 2, 3] = True
    return [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": square},
        {"attn_mask": additive, "need_weights": False},
        {"attn_mask": cube, "key_padding_mask": padding},
        {"key_padding_mask": padding, "need_weights": False},
        {
            "attn_mask": additive,
            "key_padding_mask": torch.zeros_like(padding, dtype=torch.float).masked_fill(padding, -9),
        },
    ]


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("is_batch_first", [True, False])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_attention(variant: str, is_batch_first: bool, is_batched: bool) -> None:
    kwargs = VARIANTS[variant]
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=is_batch_first, **kwargs)
    ours = copy.deepcopy(plain)
    insertion = insert(nn.ModuleList([ours]), Settings())
    assert isinstance(ours, QuantizedMultiheadAttention)
    inputs = attention_inputs(kwargs, is_batch_first, is_batched)
    for is_training in (True, False):
        ours.train(is_training)
        plain.train(is_training)
        for mask in masks(is_batched):
            for a, b in zip(run(ours, *inputs, **mask), run(plain, *inputs, **mask), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
    # On, but with nothing that rounds: its own arithmetic is that of torch.
    insertion.switch(True)
    for quantizer in insertion.observers.values():
        quantizer.is_on = False
    for weight_quantizer, weight in insertion.weights.values():
        weight_quantizer.bits, weight_quantizer.qmin, weight_quantizer.qmax = 24, -(2**23) + 1, 2**23 - 1
        assert weight.requires_grad
    ours.eval()
    plain.eval()
    for mask in masks(is_batched):
        for a, b in zip(ours(*inputs, **mask), plain(*inputs, **mask), strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5), mask
    if variant == "dropout":
        ours.train()
        assert not torch.equal(run(ours, *inputs)[0], run(ours, *inputs, seed=1)[0])


def test_attention_rounds_what_its_products_read() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    insertion = insert(nn.ModuleList([model]), Settings())
    x, y = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    plain = copy.deepcopy(model)
    dequantize(plain)
    train(model, insertion, [(x, y, y)])
    model.requires_grad_(False)
    unseen = {n for n, q in insertion.observers.items() if not q.has_seen}
    assert unseen == {"0.value_input_quantizer"}  # the value is the key
    assert (model(x, y, y)[0] - plain(x, y, y)[0]).abs().max().item() < 0.05
    dequantize(model)
    assert type(model) is nn.MultiheadAttention
    assert not [n for n, _ in model.named_children() if n != "out_proj"]


def test_an_attentions_projection_goes_with_it() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    class Net(nn.Module):
        def __init__(self, kind: Any = nn.MultiheadAttention) -> None:
            super().__init__()
            self.attention, self.head = kind(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0])

    assert list(insert(Net(), Settings()).layers) == ["attention", "attention.out_proj", "head"]
    assert list(insert(Net(), Settings(), include=["attention"]).layers) == ["attention", "attention.out_proj"]
    # A plain attention reads the weight of its projection and never calls it: rounding there would be a lie.
    for net, patterns in ((Net(Mine), {}), (Net(), {"exclude": ["attention"]})):
        insertion = insert(net, Settings(), **patterns)
        assert list(insertion.layers) == ["head"]
        assert "reads its weight itself" in insertion.skipped["attention.out_proj"]
    with pytest.raises(ValueError, match=r"'attention\.out_proj': 'attention', which stays float, reads"):
        insert(Net(), Settings(), include=["*.out_proj"])
    net = Net()
    insertion = insert(net, Settings(), exclude=["*.out_proj"])
    assert list(insertion.layers) == ["attention", "head"]
    train(net, insertion, [torch.randn(4, 3, 8)])
    assert not hasattr(net.attention, "context_quantizer")


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("is_norm_first", [True, False])
@pytest.mark.parametrize("is_batch_first", [True, False])
def test_transformer_encoder(is_batch_first: bool, is_norm_first: bool, activation_bits: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=is_batch_first, norm_first=is_norm_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=is_batch_first and not is_norm_first)
    plain.eval()  # deterministic
    for norm in (child for child in plain.modules() if isinstance(child, nn.LayerNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    ours = copy.deepcopy(plain)
    had_nested = ours.use_nested_tensor
    insertion = insert(ours, Settings(4, activation_bits))
    x = torch.randn(3, 5, 8) if is_batch_first else torch.randn(5, 3, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    keep = ~padding if is_batch_first else ~padding.T
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    kwargs: list[dict[str, Any]] = [{}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}]
    for is_training, mask in itertools.product((True, False), kwargs):
        ours.train(is_training)
        plain.train(is_training)
        a, b = run(ours, x, **mask), run(plain, x, **mask)
        if is_training:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a[keep], b[keep], rtol=1e-5, atol=1e-5)
    train(ours, insertion, [x])
    ours.eval()
    plain.eval()
    # In evaluation, without gradients, torch would read the weights in one fused kernel and round nothing.
    with torch.no_grad():
        quantized, mask = ours(x), padding
        assert float((quantized - plain(x)).abs().max()) > 1e-3
        padded = ours(x, src_key_padding_mask=mask)
    torch.testing.assert_close(quantized, ours(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded, ours(x, src_key_padding_mask=mask).detach(), rtol=1e-5, atol=1e-5)
    dequantize(ours)
    assert ours.use_nested_tensor == had_nested
    assert type(ours.layers[0].self_attn) is nn.MultiheadAttention
    assert not ours.layers[0].self_attn._forward_pre_hooks


def test_case_15_masks_do_not_blow_up_a_range() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
            self.softmax = nn.Softmax(-1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).transpose(1, 2) / 4 + mask
            self.attention = self.softmax(scores)
            return self.out(self.attention @ self.v(x))

    for lowest in (-torch.inf, torch.finfo(torch.float32).min):
        torch.manual_seed(0)
        model, mask = Block(), torch.zeros(6, 6)
        mask[:, 4:] = lowest
        x = torch.randn(8, 6, 16)
        expected = model(x, mask)
        insertion = insert(model, Settings())
        assert not insertion.untraced
        train(model, insertion, [(x, mask)])
        assert all(float(q.affine_parameters()[0]) < 1e3 for q in insertion.observers.values())
        ours = model(x, mask)
        assert model.attention[..., 4:].abs().max().item() <= 1e-6
        assert torch.isfinite(ours).all()
        assert (10 * torch.log10(expected.square().sum() / (ours - expected).square().sum())).item() >= 20


# --- activation checkpointing, learned ranges -------------------------------------------------------------------------


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_statistics_count_once_under_activation_checkpointing(is_reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self, is_checkpointed: bool) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), Residual(), Residual()
            self.is_checkpointed = is_checkpointed

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in (self.one, self.two):
                x = checkpoint(block, x, use_reentrant=is_reentrant) if self.is_checkpointed else block(x)
            return x

    results = []
    for is_checkpointed in (True, False):
        torch.manual_seed(0)
        model = Net(is_checkpointed)
        insertion = insert(model, Settings())
        insertion.switch(True)
        for seed in range(3):
            insertion.start_pass()
            insertion.observe(True)
            model(images(seed)).square().sum().backward()
            insertion.observe(False)
        if is_checkpointed:  # a batch norm counts twice, whoever quantizes: not ours to mend
            for norm in (c for c in model.modules() if isinstance(c, nn.BatchNorm2d)):
                assert int(norm.num_batches_tracked) == 6
        assert not insertion.untraced
        results.append(({n: q.state() for n, q in insertion.observers.items()}, [p.grad for p in model.parameters()]))
    (ranges, grads), (expected, expected_grads) = results
    assert str(ranges) == str(expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_learned_scales_are_parameters_outside_of_the_state_dict() -> None:
    model, data = make("cnn")
    keys = list(model.state_dict())
    insertion = insert(model, LEARNED)
    assert list(model.state_dict()) == keys
    names = [n for n, _ in model.named_parameters() if n.endswith(".scale")]
    assert len(names) == len(insertion.parameters) == len(insertion.quantizers)
    train(model, insertion, [data()])
    before = [scale.detach().clone() for scale in insertion.parameters]
    model(data()).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    moved = [not torch.equal(a, b) for a, b in zip(before, insertion.parameters, strict=True)]
    assert sum(moved) >= 0.9 * len(moved)
    state = insertion.state()
    other, _ = make("cnn")
    again = insert(other, LEARNED)
    again.load_state(state)
    assert str(again.state()) == str(state)
    del state[next(iter(state))]
    with pytest.raises(ValueError, match="quantizers are not those of the model"):
        again.load_state(state)


def test_own_and_foreign_hooks_stay_and_signatures_show_through() -> None:
    import inspect

    model, data = make("cnn")
    calls: list[str] = []
    model.one.register_forward_hook(lambda *args: calls.append("hook"))
    model.one.register_forward_pre_hook(lambda *args: calls.append("pre-hook"))
    signature = inspect.signature(model.one.forward)
    insertion = insert(model, Settings())
    assert isinstance(model.one.__dict__["forward"], _WatchedForward)
    assert inspect.signature(model.one.forward) == signature
    train(model, insertion, [data()], steps=1)
    dequantize(model)
    model(data())
    assert calls == ["pre-hook", "hook"] * 2  # no tracer has called them


def test_quantizers_are_what_they_say() -> None:
    model, _ = make("cnn")
    insertion = insert(model, Settings(4, 6))
    kinds = {type(child) for child in model.modules()}
    assert {WeightQuantizer, ActivationQuantizer} <= kinds
    assert all(isinstance(q, (WeightQuantizer, ActivationQuantizer)) for q in insertion.quantizers.values())
    assert {q.bits for q in insertion.observers.values()} == {6}
    assert PerUse not in kinds or insertion.counters
    assert "4 bits, symmetric" in repr(model)


@pytest.mark.parametrize(("range", "passes"), [("moving_average", 1), ("learned", 3)])
def test_a_watched_forward_costs_nothing_before_it_rounds(
    range: Any, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has been held against the trace; learned scales are passed by in each forward, for DDP."""
    net, x = nn.Sequential(Residual(), nn.Conv2d(8, 4, 1)), torch.randn(4, 8, 6, 6)
    insertion, entered = insert(net, Settings(range=range)), []
    enter = _Watch.__enter__
    monkeypatch.setattr(_Watch, "__enter__", lambda self: (entered.append(self), enter(self))[1])
    for _ in itertools.repeat(None, 3):
        net(x)
    assert len(entered) == passes
    insertion.switch(True)
    insertion.observe(True)
    insertion.start_pass()
    net(x)
    assert len(entered) == passes + 1
    assert all(quantizer.has_seen for quantizer in insertion.observers.values())


class Between(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 16), nn.Linear(16, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x / 2.0, id="truediv"),
        pytest.param(lambda x: 2.0 / (x.abs() + 1.0), id="rtruediv"),
        pytest.param(lambda x: x % 2.0, id="mod"),
        pytest.param(lambda x: 2.0**x, id="rpow"),
        pytest.param(lambda x: 1.0 - x, id="rsub"),
        pytest.param(lambda x: -x, id="neg"),
        pytest.param(lambda x: x.sort(1).values, id="entry"),
        pytest.param(lambda x: x.max(1, keepdim=True).values + x, id="sum-with-entry"),
        pytest.param(lambda x: (2.0 * x.T).T, id="property"),
    ],
)
def test_what_operators_return_is_rounded(function: Any) -> None:
    torch.manual_seed(0)
    net, x = Between(function), torch.randn(32, 8)
    insertion = insert(net, Settings(activation_bits=2))
    insertion.switch(True)
    insertion.observe(True)
    assert not insertion.untraced
    seen: list[Tensor] = []
    net.second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for mode in (True, False):
        insertion.start_pass()
        net.train(mode)(x)
    assert [len(each.unique()) <= 4 for each in seen] == [True, True]
