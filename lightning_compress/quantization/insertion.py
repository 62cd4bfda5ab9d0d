"""Inserting quantizers into a model in place, and taking them out again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.attention import PlainMultiheadAttention
from lightning_compress.modules import WEIGHTED, clean_name, select_parameters
from lightning_compress.quantization import affine, functional, layers
from lightning_compress.quantization.layers import (
    PLAIN,
    QUANTIZED,
    ActivationQuantizer,
    PerUse,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    Quantizer,
    Range,
    WeightQuantizer,
)
from lightning_compress.quantization.placement import Place, Placement, Traces, parameters_read, place

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Settings:
    """How a model is quantized.

    Args:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8, or ``None`` for float activations.
        granularity: ``"channel"``, ``"tensor"``, or the length of a group.
        scheme: Of the weights; activations always have a zero point of their own.
        range: ``"minmax"``, ``"moving_average"`` or ``"learned"``.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    granularity: str | int = "channel"
    scheme: affine.Scheme = "symmetric"
    range: Range = "moving_average"


@dataclass(eq=False)
class Insertion:
    """What has been inserted into a model.

    Args:
        settings: How.
        patterns: The patterns that chose the layers.
        layers: The quantized layers by name.
        norms: The batch norms that layers are folded into, by name.
        skipped: Why a layer stays float, by name.
        untraced: Why a module could not be traced, by name: its layers have only their inputs and weights quantized.
        observers: The quantizers of activations, by name.
        weights: The quantizers of weights, by name, each with its weight.
        weight_names: The names of these weights.
    """

    settings: Settings
    patterns: tuple[Any, Any]
    layers: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    observers: dict[str, ActivationQuantizer] = field(default_factory=dict)
    weights: dict[str, tuple[WeightQuantizer, nn.Parameter]] = field(default_factory=dict)
    weight_names: dict[str, str] = field(default_factory=dict)
    counters: list[Any] = field(default_factory=list)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """All quantizers by name."""
        return {**self.observers, **{name: quantizer for name, (quantizer, _) in self.weights.items()}}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The learned scales."""
        return [q.scale for q in self.quantizers.values() if q.scale is not None]

    def switch(self, is_on: bool) -> None:
        """Switch all quantizers on or off."""
        if is_on:
            for quantizer, weight in self.weights.values():
                quantizer.start(weight)
        for each in self.quantizers.values():
            each.is_on = is_on

    def forget(self) -> None:
        """Let all ranges begin anew."""
        for observer in self.observers.values():
            observer.has_seen = observer.is_fixed
        for quantizer, _ in self.weights.values():
            quantizer.is_initialized = False

    def observe(self, is_observing: bool) -> None:
        """Let the ranges of activations move, or keep them where they are."""
        for quantizer in self.observers.values():
            quantizer.is_observing = is_observing

    def freeze_norms(self, is_frozen: bool) -> None:
        """Freeze the statistics of the folded batch norms."""
        for norm in self.norms.values():
            norm.is_frozen = is_frozen

    def start_pass(self) -> None:
        """Begin to count the uses of modules that are used several times."""
        for counter in self.counters:
            counter.use = 0

    def state(self) -> dict[str, dict[str, Any]]:
        """Return all ranges."""
        return {name: quantizer.state() for name, quantizer in self.quantizers.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take all ranges back.

        Raises:
            ValueError: If the names differ: the state is of another model, or of other settings.
        """
        quantizers = self.quantizers
        if set(state) != set(quantizers):
            unlike = sorted(set(state) ^ set(quantizers))
            raise ValueError(
                f"The checkpoint's quantizers are not those of the model: {', '.join(unlike[:3])}"
                f"{', …' if len(unlike) > 3 else ''} in one of them only. "
                f"Give QuantizationAwareTraining the arguments that the checkpoint was trained with."
            )
        for name, values in state.items():
            quantizers[name].load_state(values)


def insertions(module: nn.Module) -> list[Insertion]:
    """Return what has been inserted into a model; a copy of the model has a copy of it."""
    return list(module.__dict__.get("_insertions", []))


def insert(
    module: nn.Module,
    settings: Settings,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Insertion:
    """Insert quantizers into a model, switched off; what is there already for the same arguments is returned.

    Raises:
        ValueError: If there is nothing to quantize, if a pattern matches nothing, if the model is in half precision, or
            if one of the layers has been quantized already with other arguments.
    """
    patterns = (include and tuple(include), exclude and tuple(exclude))
    for insertion in insertions(module):
        if (insertion.settings, insertion.patterns) == (settings, patterns):
            return insertion
    insertion = Insertion(settings, patterns)
    chosen, traces = _choose(module, insertion, include, exclude)
    for name, layer in chosen.items():
        _quantize_layer(name, layer, insertion)
    _Placer(module, chosen, insertion, settings.activation_bits, traces).run()
    _avoid_fused_paths(module, chosen)
    _name_quantizers(module, insertion)
    module.__dict__.setdefault("_insertions", []).append(insertion)
    return insertion


def dequantize(module: nn.Module) -> nn.Module:
    """Take all quantizers out of a model, in place, and leave the rounded weights; returns the model.

    Weights of quantizers that are not on stay as they are. Activations are float again.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.4]]))
        >>> insert(net, Settings(weight_bits=2)).switch(True)
        >>> dequantize(net)[0].weight.tolist(), type(net[0]).__name__
        ([[1.0, 0.0]], 'Linear')
    """
    _round_weights(module)
    for child in list(module.modules()):
        child.__dict__.pop("_insertions", None)
        if child.__dict__.pop("_had_nested_tensor", False):
            cast(Any, child).use_nested_tensor = True
        for hooks in (child._forward_pre_hooks, child._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (layers.round_input, layers.round_output, _stay)]:
                del hooks[key]
                child._forward_pre_hooks_with_kwargs.pop(key, None)
        functional.unwatch(child)
        for name in [name for name, holder in child._modules.items() if isinstance(holder, (Quantizer, PerUse))]:
            del child._modules[name]
        for name in ("folded", "folded_layer", "input_range", "is_frozen"):
            child.__dict__.pop(name, None)
        if type(child) in PLAIN:
            child.__class__ = PLAIN[type(child)]
            if isinstance(child, nn.MultiheadAttention) and child.num_heads * child.head_dim != child.embed_dim:
                child.__class__ = PlainMultiheadAttention  # heads have been cut out: torch's own demands them all
    return module


@torch.no_grad()
def _round_weights(module: nn.Module) -> None:
    rounded: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for child in module.modules():
        if isinstance(child, QuantizedLayer):
            weight = cast(nn.Parameter, child.weight)
            rounded[id(weight)] = (weight, child.quantized_weight())
        elif isinstance(child, QuantizedMultiheadAttention):
            for attribute, quantizer in projection_quantizers(child):
                weight = getattr(child, attribute)
                rounded[id(weight)] = (weight, quantizer(weight))
    for weight, value in rounded.values():
        weight.copy_(value)


def projection_quantizers(attention: nn.MultiheadAttention) -> Iterator[tuple[str, WeightQuantizer]]:
    """Yield the names of an attention's projection weights with their quantizers."""
    for name in _PROJECTIONS:
        if getattr(attention, f"{name}_weight") is not None:
            yield f"{name}_weight", getattr(attention, f"{name}_quantizer")


# --- which layers -----------------------------------------------------------------------------------------------------


def _choose(
    module: nn.Module, insertion: Insertion, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[dict[str, nn.Module], Traces]:
    """Return the layers to quantize by name, each once, and the traces made; note why others are left alone."""
    targets = select_parameters(module, include, exclude, types=(*WEIGHTED, nn.Embedding))
    modules = {clean_name(name): child for name, child in module.named_modules(remove_duplicate=False)}
    names = dict.fromkeys(name.rpartition(".")[0] for target in targets for name in (target.name, *target.aliases))
    chosen: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name in names:
        layer = modules[name]
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if type(layer) in PLAIN or isinstance(layer, (QuantizedLayer, QuantizedMultiheadAttention)):
            raise ValueError(
                f"'{name}' is quantized already, with other arguments. Give each QuantizationAwareTraining disjoint "
                f"`include` and `exclude` patterns, or call lightning_compress.quantization.dequantize(module) first."
            )
        if reason := _why_not(layer, insertion.settings):
            insertion.skipped[name] = reason
        else:
            chosen[name] = layer
    _choose_projections(chosen, insertion, modules, exclude or ())
    ids = {id(layer) for layer in chosen.values()}
    traces = Traces(lambda layer: id(layer) in ids)
    _separate_reads(module, chosen, insertion, traces)
    _separate_ties(chosen, insertion, modules)
    if not chosen:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in insertion.skipped.items())
        raise ValueError(f"Nothing to quantize in {type(module).__name__}: {reasons}.")
    return chosen, traces


def _choose_projections(
    chosen: dict[str, nn.Module], insertion: Insertion, modules: Mapping[str, nn.Module], exclude: Sequence[str]
) -> None:
    """Let the output projections of attentions, which plain attentions read and never call, go with them."""
    names = {id(layer): name for name, layer in chosen.items()}
    for name, attention in modules.items():
        if not isinstance(attention, nn.MultiheadAttention):
            continue
        projection, own_name = attention.out_proj, clean_name(f"{name}.out_proj".lstrip("."))
        taken = names.get(id(projection))
        if id(attention) not in names:
            if taken in chosen:
                insertion.skipped[taken] = f"'{name or 'the model'}', which stays float, reads its weight itself"
                del chosen[taken]
        elif taken is None and not any(fnmatchcase(own_name, pattern) for pattern in exclude):
            if reason := _why_not(projection, insertion.settings):
                insertion.skipped[own_name] = reason
            else:
                chosen[own_name] = projection


def _why_not(layer: nn.Module, settings: Settings) -> str:
    """Return why a layer stays float, or nothing."""
    if type(layer) not in QUANTIZED or isinstance(layer, _NORMS):
        for kind in QUANTIZED:
            if isinstance(layer, kind):
                return f"{type(layer).__name__} is a class of its own, derived from {kind.__name__}"
        return f"{type(layer).__name__} has no integer form here"
    weights = [p for p in layer.parameters() if p.dim() > 1]
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in weights):
        raise ValueError(
            f"A layer of type {type(layer).__name__} is in half precision ({weights[0].dtype}): rounding needs float32 "
            f"weights. Use Trainer(precision='bf16-mixed') or '16-mixed' instead of 'bf16-true' or '16-true'."
        )
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        if layer.groups > 1:
            return "a transposed convolution with groups has its channels on two dimensions"
        if isinstance(settings.granularity, int):
            return "the groups would run along a transposed convolution's outputs"
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
        return "an embedding with `max_norm` or `sparse` changes its weight, or its gradient, on its own"
    if isinstance(settings.granularity, int):
        for weight in weights:
            length = weight[0].numel()
            if length % settings.granularity:
                return f"its {length} weights an output are no multiple of the group of {settings.granularity}"
    return ""


def _separate_reads(module: nn.Module, chosen: dict[str, nn.Module], insertion: Insertion, traces: Traces) -> None:
    """Leave a weight float that a forward reads itself as well: it would compute with other numbers than the layer."""

    def read(module: nn.Module) -> set[int]:
        if not any(True for _ in module.children()) or not any(map(traces.is_target, module.modules())):
            return set()
        if _has_forward(module):
            with contextlib.suppress(Exception):  # whatever a forward may raise on symbols
                return parameters_read(module, traces.of(module))
        return set().union(*map(read, module.children()))

    found = read(module)
    for name, layer in list(chosen.items()):
        if id(getattr(layer, "weight", None)) in found:
            insertion.skipped[name] = "its weight is read outside of it too"
            del chosen[name]


def _separate_ties(chosen: dict[str, nn.Module], insertion: Insertion, modules: Mapping[str, nn.Module]) -> None:
    """Leave a weight float where only some of its uses would be quantized: a file would hold it twice."""
    chosen_ids = {id(layer) for layer in chosen.values()}
    for name, layer in list(chosen.items()):
        weight = getattr(layer, "weight", None)
        if weight is None:
            continue
        for other_name, other in modules.items():
            if getattr(other, "weight", None) is weight and id(other) not in chosen_ids and other is not layer:
                insertion.skipped[name] = f"it shares its weight with '{other_name}', which stays float"
                del chosen[name]
                break


def _quantize_layer(name: str, layer: nn.Module, insertion: Insertion) -> None:
    settings = insertion.settings
    make = functools.partial(
        WeightQuantizer,
        bits=settings.weight_bits,
        scheme=settings.scheme if settings.range != "learned" else "symmetric",
        range=settings.range,
        granularity=settings.granularity,
    )
    layer.__class__ = QUANTIZED[type(layer)]
    insertion.layers[name] = layer
    if isinstance(layer, QuantizedMultiheadAttention):
        for part in _PROJECTIONS:
            weight = getattr(layer, f"{part}_weight")
            if weight is not None:
                layer.add_module(f"{part}_quantizer", make(weight.shape).to(weight.device))
        return
    assert isinstance(layer.weight, nn.Parameter)
    tied = next(
        (
            other.weight_quantizer
            for n, other in insertion.layers.items()
            if n != name and getattr(other, "weight", None) is layer.weight
        ),
        None,
    )
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    layer.weight_quantizer = tied or make(layer.weight.shape, axis=axis).to(layer.weight.device)


# --- where activations are rounded, and which batch norms are folded --------------------------------------------------


class _Placer:
    def __init__(
        self,
        module: nn.Module,
        chosen: dict[str, nn.Module],
        insertion: Insertion,
        bits: int | None,
        traces: Traces,
    ) -> None:
        self.module, self.chosen, self.insertion, self.bits, self.traces = module, chosen, insertion, bits, traces
        self.targets = {id(layer) for layer in chosen.values()}
        self.done: set[int] = set()

    def make(self, *, is_rectified: bool = False, is_probability: bool = False) -> ActivationQuantizer:
        assert self.bits is not None
        device = next(next(iter(self.chosen.values())).parameters()).device
        bounds = (0.0, 1.0) if is_probability else None
        return ActivationQuantizer(
            self.bits, self.insertion.settings.range, is_rectified=is_rectified, bounds=bounds
        ).to(device)

    def make_for(self, found: Place) -> ActivationQuantizer:
        return self.make(is_rectified=found.is_rectified, is_probability=found.is_probability)

    def run(self) -> None:
        self._trace(self.module, "")
        if self.bits is None:
            return
        for layer in self.chosen.values():
            if isinstance(layer, QuantizedMultiheadAttention):
                self._place_attention(layer)
                self.done.add(id(layer.out_proj))
        for layer in self.chosen.values():
            # Nobody knows who reads what of these: inputs only.
            is_known = id(layer) in self.done or isinstance(layer, (nn.Embedding, nn.MultiheadAttention))
            if not is_known and not hasattr(layer, "input_quantizer"):
                quantizer = layer.input_quantizer = self.make()
                cast(Any, layer).input_range = (quantizer,)
                self._hook(layer, "input")

    def _trace(self, module: nn.Module, name: str) -> None:
        if not any(id(child) in self.targets for child in module.modules()):
            return
        if not any(True for _ in module.children()):
            return
        reason = ""
        if _has_forward(module):
            try:
                placement = place(module, self.traces.of(module), lambda layer: id(layer) in self.targets)
            except Exception as error:  # whatever a forward may raise on symbols
                reason = str(error).partition("\n")[0][:200] or type(error).__name__
            else:
                self._apply(module, name, placement)
        children = {
            clean_name(f"{name}.{key}" if name else key): child
            for key, child in module.named_children()
            if any(id(layer) in self.targets and id(layer) not in self.done for layer in child.modules())
        }
        for child_name, child in children.items():
            if not isinstance(child, nn.MultiheadAttention):
                self._trace(child, child_name)
        if reason and any(id(layer) in self.targets for layer in module.children()):
            self.insertion.untraced[name] = reason

    def _apply(self, root: nn.Module, root_name: str, placement: Placement) -> None:
        modules: dict[str, Any] = dict(root.named_modules(remove_duplicate=False))
        for name, norm in placement.folded.items():
            layer = modules[name]
            layer.folded = (modules[norm],)
            modules[norm].__class__ = QUANTIZED.get(type(modules[norm]), type(modules[norm]))
            modules[norm].folded_layer = (layer,)
            self.insertion.norms[clean_name(f"{root_name}.{norm}".lstrip("."))] = modules[norm]
        self.done |= {id(modules[name]) for name in placement.layers}
        if self.bits is None:
            return
        shared: dict[int, ActivationQuantizer] = {}
        by_module: dict[tuple[str, str], list[Place]] = {}
        for found in placement.places:
            by_module.setdefault((found.kind, found.module), []).append(found)
        for (kind, name), places in by_module.items():
            module = modules[name]
            if kind == "functional":
                self._place_functional(module, places, placement.calls[name], shared)
                continue
            if hasattr(module, f"{kind}_quantizer"):
                continue  # another QuantizationAwareTraining rounds this tensor already
            quantizers: list[nn.Module] = [nn.Identity() for _ in range(placement.uses[name])]
            for found in places:
                if found.tensor not in shared:
                    shared[found.tensor] = self.make_for(found)
                quantizers[found.use] = shared[found.tensor]
            module.add_module(f"{kind}_quantizer", quantizers[0] if len(quantizers) == 1 else PerUse(quantizers))
            self._hook(module, kind)

        for name, tensor in placement.inputs.items():
            if tensor in shared:
                modules[name].input_range = (shared[tensor],)
        for name in [name for kind, name in by_module if kind == "functional"]:
            for callee in placement.callees.get(name, ()):
                functional.watch(modules[callee], None)

    def _place_functional(
        self, module: nn.Module, places: list[Place], calls: list[int], shared: dict[int, ActivationQuantizer]
    ) -> None:
        if hasattr(module, "functional_quantizers"):
            return  # another QuantizationAwareTraining rounds here already
        shared.update({found.tensor: self.make_for(found) for found in places})
        quantizers: dict[str, nn.Module] = {found.key: shared[found.tensor] for found in places}
        functions = {found.function for found in places}
        functional.watch(module, functional.FunctionalQuantizers(functions, calls, quantizers))

    def _place_attention(self, layer: nn.MultiheadAttention) -> None:
        for name in ("query_input", "key_input", "value_input", "query", "key", "value"):
            layer.add_module(f"{name}_quantizer", self.make())
        if isinstance(layer.out_proj, QuantizedLayer):
            quantizer = layer.context_quantizer = self.make()
            layer.out_proj.input_range = (quantizer,)
        layer.add_module("probabilities_quantizer", self.make(is_probability=True))

    def _hook(self, module: nn.Module, kind: str) -> None:
        if kind == "input":
            module.register_forward_pre_hook(layers.round_input, with_kwargs=True)
        else:
            module.register_forward_hook(layers.round_output)


def _has_forward(module: nn.Module) -> bool:
    forward = getattr(type(module), "forward", None)
    owner = getattr(forward, "__qualname__", "")
    return owner not in ("LightningModule.forward", "_forward_unimplemented")


def _stay(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: its presence keeps `nn.TransformerEncoderLayer` from reading the weights itself."""


_stay.follows_module = True  # type: ignore[attr-defined]


def _avoid_fused_paths(module: nn.Module, chosen: dict[str, nn.Module]) -> None:
    ours = {id(layer) for layer in chosen.values()}
    for child in module.modules():
        if not any(id(layer) in ours for layer in child.modules()):
            continue
        if isinstance(child, nn.TransformerEncoderLayer):
            child.self_attn.register_forward_pre_hook(_stay)
        if isinstance(child, nn.TransformerEncoder) and child.use_nested_tensor:
            child.use_nested_tensor = False
            child.__dict__["_had_nested_tensor"] = True


def _name_quantizers(module: nn.Module, insertion: Insertion) -> None:
    others = {id(q) for other in insertions(module) for q in other.quantizers.values()}
    weights: dict[int, tuple[str, nn.Parameter]] = {}
    for name, layer in insertion.layers.items():
        if isinstance(layer, QuantizedMultiheadAttention):
            for attribute, quantizer in projection_quantizers(layer):
                weights.setdefault(id(quantizer), (f"{name}.{attribute}", getattr(layer, attribute)))
        else:
            assert isinstance(layer, QuantizedLayer)
            weights.setdefault(id(layer.weight_quantizer), (f"{name}.weight", cast(nn.Parameter, layer.weight)))
    for name, child in module.named_modules():
        name = clean_name(name)
        if id(child) in others:
            continue
        if isinstance(child, WeightQuantizer):
            weight_name, weight = weights[id(child)]
            insertion.weights[name] = (child, weight)
            insertion.weight_names[name] = weight_name
        elif isinstance(child, ActivationQuantizer):
            insertion.observers[name] = child
        if isinstance(child, (PerUse, functional.FunctionalQuantizers)):
            insertion.counters.append(child)
