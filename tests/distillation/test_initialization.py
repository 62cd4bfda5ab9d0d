"""A student that starts from the teacher's weights: by name, by a mapping, by the channels that matter most."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from examples.models import LeNet300100, ResidualCNN
from lightning_compress.distillation.initialization import Copied, copy_weights
from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.pruning.removal import load_pruned, remove_pruned_channels
from lightning_compress.quantization.insertion import Settings, insert


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def like(*tensors: Tensor) -> ExampleInputs:
    return ExampleInputs(tensors)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomize(module: nn.Module) -> None:
    """Give batch norms something to say."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias)
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 1.5)


class Wrapped(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# By name -------------------------------------------------------------------------------------------------------------


def test_parameters_and_buffers_of_equal_name_and_shape_are_copied() -> None:
    teacher, student = ResidualCNN((8, 8, 16)), ResidualCNN((8, 8, 16))
    randomize(teacher)
    teacher.stem[1].num_batches_tracked.fill_(7)
    student.requires_grad_(False).stem[0].requires_grad_(True)
    before, numbers = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    copied = copy_weights(student, teacher)
    assert same(student.state_dict(), before)
    assert same(teacher.state_dict(), before)
    assert copied == Copied({name: name for name in before}, {}, {})
    assert copied.describe() == f"copied {len(before)} of {len(before)} tensors from the teacher"
    assert [name for name, parameter in student.named_parameters() if parameter.requires_grad] == ["stem.0.weight"]
    assert torch.equal(torch.get_rng_state(), numbers)


def test_values_take_the_dtype_of_the_student() -> None:
    teacher, student = mlp(4, 3, 2).half(), mlp(4, 3, 2).double()
    copy_weights(student, teacher)
    assert student[0].weight.dtype == torch.float64
    assert torch.equal(student[0].weight, teacher[0].weight.double())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("wrapped", ["student", "teacher", "both"])
def test_a_prefix_of_either_side_is_found(wrapped: str, compiled: bool) -> None:
    def make(side: str) -> nn.Module:
        net = mlp(4, 3, 2)
        net = torch.compile(net, backend="eager") if compiled else net  # type: ignore[assignment]
        return Wrapped(net) if wrapped in (side, "both") else net

    teacher, student = make("teacher"), make("student")
    if wrapped == "both":
        student = nn.ModuleDict({"model": student.net})  # prefixes that differ
    copied = copy_weights(student, teacher)
    assert len(copied.copied) == 4
    assert not copied.left
    for own, given in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(own, given)
    prefix = {"student": "net.", "teacher": "", "both": "model."}[wrapped]
    assert copied.copied[f"{prefix}0.weight"] == ("0.weight" if wrapped == "student" else "net.0.weight")


def test_of_two_prefixes_that_fit_shapes_decide_then_length() -> None:
    student = nn.ModuleDict({"teacher": mlp(5, 3, 2), "student": mlp(4, 3, 2), "net": mlp(4, 3, 2)})
    assert list(copy_weights(student, mlp(4, 3, 2)).copied) == [
        "net.0.weight",
        "net.0.bias",
        "net.2.weight",
        "net.2.bias",
    ]
    del student["net"]
    assert copy_weights(student, mlp(4, 3, 2)).copied["student.0.weight"] == "0.weight"


def test_without_a_common_name_both_sides_are_named() -> None:
    student, teacher = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), mlp(2, 2, 2)
    with pytest.raises(ValueError, match=r"'a.weight', 'a.bias', 'b.weight' and 1 more.*'0.weight'.*\{'student.layer'"):
        copy_weights(student, teacher)


def test_what_has_no_counterpart_or_is_wider_stays() -> None:
    student, teacher = mlp(4, 5, 2, 2), mlp(4, 3, 2)
    before = copy.deepcopy(student.state_dict())
    copied = copy_weights(student, teacher, example=like(torch.randn(3, 4)))
    assert copied.copied == {"2.bias": "2.bias"}
    assert copied.left == {
        "0.weight": "wider than the teacher's",
        "0.bias": "wider than the teacher's",
        "2.weight": "wider than the teacher's",
        "4.weight": "the teacher has none of that name",
        "4.bias": "the teacher has none of that name",
    }
    assert "copied 1 of 6" in copied.describe()
    assert copied.describe().endswith("and 2 more")
    assert torch.equal(student[2].bias, teacher[2].bias)
    del before["2.bias"]
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())


def test_tied_parameters_are_copied_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)

    teacher, student = Tied(), Tied()
    student.head.weight = student.embed.weight
    copied = copy_weights(student, teacher)
    assert copied == Copied({"embed.weight": "embed.weight"}, {}, {})
    assert student.head.weight is student.embed.weight
    assert torch.equal(student.embed.weight, teacher.embed.weight)
    # A mapping has the first word.
    assert copy_weights(student, teacher, {"head": "head"}) == Copied({"head.weight": "head.weight"}, {}, {})
    assert torch.equal(student.embed.weight, teacher.head.weight)


def test_a_tied_parameter_that_stays_is_named_once() -> None:
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    student[1].weight = student[0].weight
    copied = copy_weights(student, nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)))
    assert list(copied.left) == ["0.weight", "2.weight", "2.bias"]
    # One of the two names fits.
    copied = copy_weights(student, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    assert copied.copied["1.weight"] == "1.weight"
    assert list(copied.left) == ["2.weight", "2.bias"]


def test_a_student_with_quantizers_gets_the_weights_alone() -> None:
    teacher, student = mlp(4, 8, 2), mlp(4, 8, 2)
    insert(student, Settings())
    assert len(student.state_dict()) < len([*student.named_parameters(), *student.named_buffers()])
    assert copy_weights(student, teacher).left == {}
    assert same(student.state_dict(), teacher.state_dict())


# By a mapping --------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, layers: int, hidden: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, hidden, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def test_every_second_layer_of_an_encoder() -> None:
    teacher, student = Encoder(6).eval(), Encoder(3).eval()
    copied = copy_weights(student, teacher, {f"encoder.layers.{i}": f"encoder.layers.{2 * i}" for i in range(3)})
    assert not copied.left
    assert not copied.narrowed
    assert copied.copied["encoder.layers.1.linear1.weight"] == "encoder.layers.2.linear1.weight"
    x = torch.randint(10, (4, 5))
    expected = teacher.embed(x)
    for i in (0, 2, 4):
        expected = teacher.encoder.layers[i](expected)
    torch.testing.assert_close(student(x), teacher.head(expected.mean(1)), rtol=0, atol=1e-5)


def test_neighbours_of_a_mapped_layer_stay() -> None:
    teacher, student = Encoder(6), Encoder(3)
    before = copy.deepcopy(student.state_dict())
    copied = copy_weights(student, teacher, {"encoder.layers.1": "encoder.layers.2"})
    for name, value in before.items():
        is_left = name.startswith(("encoder.layers.0", "encoder.layers.2"))
        assert (name in copied.left) == is_left
        assert torch.equal(student.state_dict()[name], value) == is_left
    assert copied.left["encoder.layers.0.linear1.weight"] == "others in 'encoder.layers' are mapped"


def test_a_mapped_part_of_a_layer_speaks_for_the_whole_list() -> None:
    copied = copy_weights(Encoder(2), Encoder(4), {"encoder.layers.1.linear1": "encoder.layers.3.linear1"})
    assert {name for name in copied.copied if "layers" in name} == {
        "encoder.layers.1.linear1.weight",
        "encoder.layers.1.linear1.bias",
    }
    assert {"embed.weight", "head.weight"} < set(copied.copied)


def test_a_list_inside_a_neighbour_stays_too() -> None:
    student, teacher = nn.Sequential(mlp(3, 3, 3), mlp(3, 3, 3)), nn.Sequential(mlp(3, 3, 3), mlp(3, 3, 3))
    copied = copy_weights(student, teacher, {"1": "0"})
    assert set(copied.left) == {"0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"}


def test_the_inner_of_two_mapped_layers_decides_and_the_whole_has_no_name() -> None:
    teacher, student = nn.ModuleDict({"a": nn.ModuleDict({"net": mlp(3, 3, 3)})}), Wrapped(mlp(3, 3, 3))
    copied = copy_weights(student, teacher, {"": "a", "net.2": "a.net.0"})
    assert copied.left == {}
    for i in (0, 2):
        assert torch.equal(student.net[i].weight, teacher["a"]["net"][0].weight)


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        (
            {"encoder.layer.1": "encoder.layers.2"},
            ValueError,
            r"'encoder.layer.1'.*names: .*'encoder.layers.1'",
        ),
        ({"encoder.layers.1": "encoder.layers.9"}, ValueError, r"'encoder.layers.9'.*closest names: 'encoder.layers"),
        ({"encoder.layers.*": "encoder.layers.2"}, ValueError, r"matches no module"),
        ({"head": "encoder.layers.0"}, ValueError, r"'head' and the teacher's 'encoder.layers.0' have no parameter"),
        (
            {"head": "embed"},
            ValueError,
            r"'head.weight' \(3×8\) .*'embed.weight' \(10×8\): narrower .*give `example_inp",
        ),
        ({"embed": "head"}, ValueError, r"'embed.weight' \(10×8\) .*'head.weight' \(3×8\): wider than the teacher's"),
        ({}, ValueError, r"`mapping` must name a pair"),
        ({"head": 1}, TypeError, r"`mapping` must map names"),
        (["head"], TypeError, r"`mapping` must map names"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused_and_nothing_changed(mapping: Any, error: Any, message: str) -> None:
    teacher, student = Encoder(3), Encoder(3)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(error, match=message):
        copy_weights(student, teacher, mapping)
    assert same(student.state_dict(), before)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' of Sequential is not initialized yet"):
        copy_weights(nn.Sequential(nn.LazyLinear(2)), mlp(2, 2))


# The most important channels -----------------------------------------------------------------------------------------


def top(count: int, *weights: Tensor) -> Tensor:
    """Return the channels of largest L2 norm over all the weights that make them, in order."""
    norm = torch.stack([(weight.double() ** 2).flatten(1).sum(1) for weight in weights]).sum(0).sqrt()
    return norm.topk(count).indices.sort().values


def test_without_an_example_a_narrower_layer_stays() -> None:
    copied = copy_weights(mlp(4, 3, 2), mlp(4, 6, 2))
    assert copied.copied == {"2.bias": "2.bias"}
    assert set(copied.left.values()) == {"narrower than the teacher's; give `example_input_array`"}


def test_a_narrower_network_of_neurons() -> None:
    teacher = LeNet300100()
    student = nn.Sequential(nn.Flatten(), *mlp(784, 60, 100, 10))
    before, modes = copy.deepcopy(teacher.state_dict()), teacher.training
    example, numbers = like(torch.randn(2, 1, 28, 28)), torch.get_rng_state()
    copied = copy_weights(Wrapped(student), teacher, example=example)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert same(teacher.state_dict(), before)
    assert teacher.training == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in teacher.modules())
    assert list(copied.narrowed) == ["net.1.weight", "net.1.bias", "net.3.weight"]
    assert list(copied.copied) == ["net.3.bias", "net.5.weight", "net.5.bias"]
    assert not copied.left
    kept = top(60, before["1.weight"])
    assert torch.equal(student[1].weight, before["1.weight"][kept])
    assert torch.equal(student[1].bias, before["1.bias"][kept])
    assert torch.equal(student[3].weight, before["3.weight"][:, kept])


def test_a_teacher_with_more_zero_channels_than_must_go() -> None:
    teacher, student = mlp(4, 8, 2), mlp(4, 5, 2)
    teacher[0].weight.data[[0, 1, 3, 4, 6, 7]] = 0
    teacher[0].bias.data[[0, 1, 3, 4, 6, 7]] = 0
    assert not copy_weights(student, teacher, example=like(torch.randn(3, 4))).left
    x = torch.randn(6, 4)
    torch.testing.assert_close(student(x), teacher(x))


# What makes each width of a residual network, and the batch norms behind it.
RESIDUAL = {
    "first": (["stem.0", "blocks.0.conv2"], ["stem.1", "blocks.0.bn2"]),
    "inner 0": (["blocks.0.conv1"], ["blocks.0.bn1"]),
    "inner 1": (["blocks.1.conv1"], ["blocks.1.bn1"]),
    "second": (["blocks.1.conv2", "blocks.1.shortcut.0"], ["blocks.1.bn2", "blocks.1.shortcut.1"]),
    "inner 2": (["blocks.2.conv1"], ["blocks.2.bn1"]),
    "third": (["blocks.2.conv2", "blocks.2.shortcut.0"], ["blocks.2.bn2", "blocks.2.shortcut.1"]),
}


@pytest.mark.parametrize("widths", [(3, 7, 10), (8, 5, 16)])
def test_a_narrower_residual_network_answers_as_the_teacher_without_these_channels(
    widths: tuple[int, int, int],
) -> None:
    teacher, student = ResidualCNN((8, 12, 16)), ResidualCNN(widths)
    randomize(teacher)
    copied = copy_weights(student, teacher, example=like(torch.randn(2, 1, 28, 28)))
    assert not copied.left
    by_hand = copy.deepcopy(teacher)
    for (makers, norms), width in zip(RESIDUAL.values(), (widths[0], *widths[:2], *widths[1:], widths[2]), strict=True):
        kept = top(width, *(teacher.get_submodule(name).weight.detach() for name in makers))
        for name in norms:
            norm, own = by_hand.get_submodule(name), student.get_submodule(name)
            for part in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(getattr(own, part), getattr(norm, part)[kept])
            gone = torch.ones(norm.num_features, dtype=torch.bool)
            gone[kept] = False
            norm.weight.data[gone] = 0  # a channel that is 0 behind its batch norm is no channel
            norm.bias.data[gone] = 0
    x = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(x), by_hand.eval()(x), rtol=0, atol=1e-5)


def test_widths_that_an_addition_ties_and_the_student_does_not_stay() -> None:
    class Sum(nn.Module):
        def __init__(self, left: int, right: int) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, left), nn.Linear(4, right), nn.Linear(left, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.left(x) + self.right(x)).relu())

    copied = copy_weights(Sum(4, 1), Sum(8, 8), example=like(torch.randn(3, 4)))
    assert set(copied.left) == {"left.weight", "left.bias", "right.weight", "right.bias", "head.weight"}
    assert "differ in how many of the channels of 'left' they have (1 and 4)" in copied.left["left.weight"]


@pytest.mark.parametrize(("widths", "reason"), [((4, 3), None), ((4, 10), "what meets here is narrower")])
def test_widths_that_are_joined_by_a_concatenation(widths: tuple[int, int], reason: str | None) -> None:
    class Joined(nn.Module):
        def __init__(self, first: int, second: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, first), nn.Linear(first, second)
            self.head = nn.Linear(first + second, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.head(torch.cat([x, self.second(x).relu()], 1))

    teacher, student = Joined(8, 6), Joined(*widths)
    copied = copy_weights(student, teacher, example=like(torch.randn(3, 4)))
    assert copied.left.get("head.weight") == (reason and f"{reason} than in the teacher")
    kept = top(4, teacher.first.weight.detach())
    assert torch.equal(student.first.weight, teacher.first.weight[kept])
    if reason is None:
        kept = torch.cat([kept, 8 + top(3, teacher.second.weight.detach())])
        assert torch.equal(student.head.weight, teacher.head.weight[:, kept])


def test_what_cannot_be_cut_stays_with_the_reason() -> None:
    copied = copy_weights(mlp(3, 5, 1), mlp(4, 8, 2), example=like(torch.randn(3, 4)))
    assert copied.narrowed == {"0.bias": "0.bias"}
    assert "its width is that of an output of the model" in copied.left["2.weight"]
    assert "what it lacks is no channel that can be cut" in copied.left["0.weight"]


def test_a_part_of_a_channel_is_none() -> None:
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 2))
    copied = copy_weights(nn.ModuleDict({"2": nn.Linear(30, 2)}), teacher, example=like(torch.randn(3, 1, 4, 4)))
    assert "not have a whole number of the units of '0'" in copied.left["2.weight"]


def test_groups_of_another_size_under_a_norm_stay() -> None:
    def net(width: int, groups: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, width, 3), nn.GroupNorm(groups, width), nn.ReLU(), nn.Conv2d(width, 2, 3))

    teacher, x = net(16, 4), torch.randn(2, 2, 8, 8)
    assert not copy_weights(net(8, 2), teacher, example=like(x)).left
    copied = copy_weights(net(8, 4), teacher, example=like(x))
    assert "of another size" in copied.left["0.weight"]


def test_an_example_by_keyword_and_one_that_does_not_run() -> None:
    teacher, student = Wrapped(mlp(4, 6, 2)), mlp(4, 3, 2)
    assert len(copy_weights(student, teacher, example=ExampleInputs(kwargs={"x": torch.randn(3, 4)})).narrowed) == 3
    with pytest.raises(ValueError, match="do not run through Wrapped"):
        copy_weights(student, teacher, example=like(torch.randn(3, 5)))


def test_mapped_layers_can_be_narrower() -> None:
    teacher, student = Encoder(4), Encoder(2, hidden=6)
    mapping = {"encoder.layers.0": "encoder.layers.1", "encoder.layers.1": "encoder.layers.3"}
    copied = copy_weights(student, teacher, mapping, like(torch.randint(10, (2, 5))))
    assert not copied.left
    assert len(copied.narrowed) == 6
    kept = top(6, teacher.encoder.layers[3].linear1.weight.detach())
    assert torch.equal(student.encoder.layers[1].linear2.weight, teacher.encoder.layers[3].linear2.weight[:, kept])
    with pytest.raises(ValueError, match=r"`mapping`: 'net.2.weight' .*its width is that of an output"):
        copy_weights(Wrapped(mlp(4, 8, 1)), mlp(4, 8, 2), {"net.2": "2"}, like(torch.randn(3, 4)))


# Heads ---------------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self, heads: int, size: int = 8, hidden: int = 24) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.embed = nn.Linear(3, 16)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, heads * size) for _ in range(3))
        self.o_proj = nn.Linear(heads * size, 16)
        self.up, self.head = nn.Linear(16, hidden), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.up(x).relu().mean(1))


def test_fewer_heads_and_fewer_neurons_at_once() -> None:
    teacher, student = Attends(5), Attends(2, hidden=10)
    copied = copy_weights(student, teacher, example=like(torch.randn(2, 6, 3)))
    assert not copied.left
    rows = [layer.weight.detach().reshape(5, -1) for layer in (teacher.q_proj, teacher.k_proj, teacher.v_proj)]
    columns = teacher.o_proj.weight.detach().T.reshape(5, -1)
    by_hand = copy.deepcopy(teacher)
    gone_heads, gone_neurons = torch.ones(5, dtype=torch.bool), torch.ones(24, dtype=torch.bool)
    gone_heads[top(2, *rows, columns)] = False
    gone_neurons[top(10, teacher.up.weight.detach())] = False
    by_hand.o_proj.weight.data[:, gone_heads.repeat_interleave(8)] = 0
    by_hand.head.weight.data[:, gone_neurons] = 0
    x = torch.randn(4, 7, 3)
    with torch.no_grad():
        torch.testing.assert_close(student(x), by_hand(x), rtol=0, atol=1e-5)


def test_heads_of_another_size_stay() -> None:
    copied = copy_weights(Attends(4, size=4), Attends(4, size=8), example=like(torch.randn(2, 6, 3)))
    assert {name.split(".")[0] for name in copied.left} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "heads" in copied.left["q_proj.weight"]


def test_fewer_heads_of_torchs_own_attention() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(3, 32), nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return x + self.attention(x, x, x, need_weights=False)[0]

    teacher, smaller, x = Own(), Own(), torch.randn(2, 5, 3)
    with torch.no_grad():
        lost = torch.cat([torch.arange(first, first + 16) for first in (0, 32, 64)])
        smaller.attention.in_proj_weight[lost] = 0
        smaller.attention.in_proj_bias[lost] = 0
        smaller.attention.out_proj.weight[:, :16] = 0
    student = load_pruned(Own(), remove_pruned_channels(smaller, x).state_dict())
    assert student.attention.in_proj_weight.shape == (48, 32)
    copied = copy_weights(student, teacher, example=like(x))
    assert not copied.left
    heads = [part.detach().reshape(4, -1) for part in teacher.attention.in_proj_weight.chunk(3)]
    gone = torch.ones(4, dtype=torch.bool)
    gone[top(2, *heads, teacher.attention.out_proj.weight.detach().T.reshape(4, -1))] = False
    teacher.attention.out_proj.weight.data[:, gone.repeat_interleave(8)] = 0
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(x), teacher.eval()(x), rtol=0, atol=1e-5)


def test_query_heads_that_share_keys_go_alike_from_each_group() -> None:
    class Grouped(Attends):
        def __init__(self, heads: int) -> None:
            super().__init__(heads)
            self.num_key_value_heads = 2
            self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            q = self.q_proj(x).unflatten(2, (self.num_heads, 8)).transpose(1, 2)
            k, v = (
                layer(x).unflatten(2, (2, 8)).transpose(1, 2).repeat_interleave(self.num_heads // 2, 1)
                for layer in (self.k_proj, self.v_proj)
            )
            x = x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return self.head(self.up(x).relu().mean(1))

    teacher, student, x = Grouped(6), Grouped(4), torch.randn(2, 6, 3)
    assert not copy_weights(student, teacher, example=like(x)).left
    rows = teacher.q_proj.weight.detach().reshape(2, 3, -1).transpose(0, 1).reshape(3, -1)
    columns = teacher.o_proj.weight.detach().T.reshape(2, 3, -1).transpose(0, 1).reshape(3, -1)
    gone = torch.ones(3, dtype=torch.bool)
    gone[top(2, rows, columns)] = False
    teacher.o_proj.weight.data[:, gone.repeat(2).repeat_interleave(8)] = 0
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x), rtol=0, atol=1e-5)
