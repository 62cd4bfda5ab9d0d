"""Which parameters a pattern means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import registry
from lightning_compress.modules import as_patterns, clean_name, select_parameters


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 6))
        self.attention = nn.MultiheadAttention(8, 2)
        self.rnn = nn.LSTM(8, 4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)


def names(*args: Any, **kwargs: Any) -> list[str]:
    return [target.name for target in select_parameters(*args, **kwargs)]


def test_default_types() -> None:
    assert names(Model()) == [
        "backbone.0.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "head.weight",
    ]


def test_patterns() -> None:
    assert names(Model(), ["backbone.*"]) == ["backbone.0.weight"]
    assert names(Model(), ["backbone.*", "backbone.2"]) == ["backbone.0.weight", "backbone.2.weight"]
    assert names(Model(), ["rnn", "head"], ["rnn"]) == ["head.weight"]
    assert names(Model(), ["head", "backbone.0"], None, ("weight", "bias")) == [
        "backbone.0.weight",
        "backbone.0.bias",
        "head.weight",
        "head.bias",
    ]
    assert names(Model(), ["rnn"], None, ("weight_hh*",)) == ["rnn.weight_hh_l0"]


def test_pattern_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"`include` pattern 'hed' matches no module.*'head'"):
        names(Model(), ["hed"])
    with pytest.raises(ValueError, match=r"`exclude` pattern 'backbon\.\*' matches no module.*'backbone"):
        names(Model(), None, ["backbon.*"])


def test_pattern_that_matches_nothing_of_use() -> None:
    with pytest.raises(ValueError, match=r"'norm' .*LayerNorm.*no parameter 'weight'"):
        names(Model(), ["norm"])
    with pytest.raises(ValueError, match=r"'backbone' .*write 'backbone\.\*'"):
        names(Model(), ["backbone"])
    with pytest.raises(ValueError, match="Nothing to act on"):
        names(nn.Sequential(nn.ReLU()))


def test_shared_parameters_count_once() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    net[2].weight = net[0].weight
    [inner, tied] = select_parameters(net)
    assert (inner.name, tied.name) == ("1.weight", "2.weight")
    [first, _] = select_parameters(net, ["0", "1", "2"])
    assert (first.name, first.aliases) == ("0.weight", ["2.weight"])
    assert names(net, exclude=["0"]) == ["1.weight"]

    shared = nn.Linear(4, 4)
    assert names(nn.Sequential(shared, nn.ReLU(), shared)) == ["0.weight"]


def test_refuses_reparametrized_and_uninitialized_weights() -> None:
    for wrap in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        wrap(net[0])
        with pytest.raises(ValueError, match=r"'0\.weight' is computed"):
            names(net)
        assert names(net, exclude=["0"]) == ["1.weight"]
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialized"):
        names(lazy)


def test_names_are_those_of_the_model_that_the_user_wrote() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    net[0] = torch.compile(net[0], backend="eager")
    assert names(net, ["0.0"]) == ["0.0.weight"]
    assert clean_name("_orig_mod.net._fsdp_wrapped_module.0._checkpoint_wrapped_module") == "net.0"


def test_as_patterns() -> None:
    assert as_patterns("a.*", "include") == ("a.*",)
    assert as_patterns(["a", "b"], "include") == ("a", "b")
    assert as_patterns(None, "include") is None
    for value, error in (([], ValueError), ("", ValueError), ([1], TypeError), (3, TypeError)):
        with pytest.raises(error, match="`include`"):
            as_patterns(value, "include")


def test_two_techniques_of_a_kind_cannot_claim_one_parameter() -> None:
    class Fake:
        def __init__(self, technique: str) -> None:
            self.technique = technique

    net = nn.Linear(2, 2)
    first, second, other = Fake("pruning"), Fake("pruning"), Fake("quantization")
    registry.register(net, first, net.named_parameters())
    registry.register(net, first, net.named_parameters())
    registry.register(net, other, net.named_parameters())
    with pytest.raises(ValueError, match="Two Fake callbacks claim the parameter 'weight'"):
        registry.register(net, second, net.named_parameters())
    assert registry.techniques(net) == [first, other]
    registry.release(net, first)
    registry.register(net, second, net.named_parameters())
    assert registry.techniques(net) == [other, second]
    assert registry.techniques(nn.Linear(1, 1)) == []
