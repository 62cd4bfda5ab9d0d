"""Which channels, and which heads, of a model belong together. What is found here is proven in `removal.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.attention import PlainMultiheadAttention
from lightning_compress.modules import WEIGHTED, clean_name


@dataclass(frozen=True, eq=False)
class Slice:
    """The entries of one parameter that belong to the units of a group.

    Args:
        name: The qualified name of the parameter, ``"block.conv1.weight"``; among a group's `inputs` also that of a
            buffer or of an integer attribute (``"norm.running_mean"``, ``"norm.num_features"``).
        dim: The dimension along which the units lie.
        index: The positions along `dim` that belong to each unit, integers of shape ``(units, width)``.
        scored: Whether they tell how important a unit is: True for weights, False for biases and norms.
    """

    name: str
    dim: int
    index: Tensor
    scored: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels, or heads, that can only go together from all the layers that share them.

    Args:
        name: The qualified name of the layer that makes them, the first if there are several.
        units: How many channels, or heads, there are.
        outputs: What must be zero for a unit to be gone: the rows of weights, their biases, the scales and shifts of
            batch norms behind them; for heads, the columns of the output projection too.
        inputs: What reads a unit, cut at removal only.
        layers: The qualified names of the layers that make the units, or of the attention.
        blocks: The units lie in so many runs of equal length, and equally many of each must go: the queries of each
            key and value head, where several share one.
    """

    name: str
    units: int
    outputs: tuple[Slice, ...]
    inputs: tuple[Slice, ...]
    layers: tuple[str, ...] = ()
    blocks: int = 1


@dataclass
class Findings:
    """What a model's structure suggests, before anything of it is tried.

    Args:
        groups: The groups.
        refused: Layers that cannot be pruned, and why.
        doubtful: The names of groups that are likely to be refused when they are tried.
    """

    groups: list[ChannelGroup] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)


# Channels ------------------------------------------------------------------------------------------------------------

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_CONVOLUTIONS = nn.modules.conv._ConvNd
_PRODUCERS = (nn.Linear, _CONVOLUTIONS, nn.Embedding)


class _Part(NamedTuple):
    """One tensor of a layer, and the position in it of each of the layer's channels."""

    tensor: str
    dim: int
    position: Sequence[int]
    role: Literal["row", "affine", "column"]  # makes a channel, must be zero with it, or only reads it


class _Pair(NamedTuple):
    """An index at some place of the graph, and the channel of the first layer that it belongs to."""

    idx: int
    root_idx: int


def coupled_channels(model: nn.Module, forward: Callable[[nn.Module], list[Tensor]]) -> Findings:
    """Return the groups of channels that torch-pruning's dependency graph couples.

    Args:
        model: In eval mode, every parameter with a gradient. It is traced, not changed.
        forward: Runs the model and returns the tensors among its outputs.
    """
    graph = _trace(model, forward)
    layers: dict[str, _Layer] = {}
    for name, child in model.named_modules():
        if not is_computed(child) and (parts := _parts(child)) is not None:
            layers[clean_name(name)] = _Layer(clean_name(name), child, *parts)
    return _Coupling(model, graph, layers).findings()


def _trace(model: nn.Module, forward: Callable[[nn.Module], list[Tensor]]) -> Any:
    import torch_pruning  # here, and not above: it takes a while
    from torch_pruning.dependency import index_mapping

    def outputs(model: nn.Module, _: Any) -> list[Tensor]:
        return [tensor for tensor in forward(model) if tensor.grad_fn is not None]

    graph = torch_pruning.DependencyGraph().build_dependency(model, (), forward_fn=outputs, verbose=False)
    # torch-pruning 1.6 infers wrong sizes for `chunk`, and takes its outputs in the order of their use.
    splits = [node for node in graph.module2node.values() if node.type == graph.ops.OPTYPE.SPLIT]
    sizes = {node: size for node in splits if (size := _chunk_size(node)) is not None}
    if sizes:
        for node in graph.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = [None, None]
            if node.type == graph.ops.OPTYPE.CONCAT:
                node.module.concat_sizes = None
        for node, size in sizes.items():
            node.module.split_sizes = [size] * len(node.outputs)
            node.module.offsets = [size * k for k in range(len(node.outputs) + 1)]
        index_mapping.update_index_mapping(graph)
        for node, size in sizes.items():
            _map_chunks(node, size, index_mapping._SplitIndexMapping)
    return graph


def _chunk_size(node: Any) -> int | None:
    """Return the size of the equal parts into which a split divides the channels, ``None`` for any other split."""
    saved = node.grad_fn
    size, dim = getattr(saved, "_saved_split_size", None), getattr(saved, "_saved_dim", None)
    shape = getattr(saved, "_saved_self_sym_sizes", None)
    if size is None or dim is None or shape is None:
        return None
    dim = dim - 2**64 if dim >= 2**63 else dim
    dim %= len(shape)
    is_channels = dim == 1 if len(shape) != 3 else dim in (1, 2)
    return size if is_channels and shape[dim] % size == 0 else None


def _map_chunks(node: Any, size: int, mapping: Any) -> None:
    """Map each use of a chunk to the chunk that is used."""
    used = {}
    for consumer in node.outputs:
        numbers = [number for function, number in consumer.grad_fn.next_functions if function is node.grad_fn]
        used[consumer] = numbers
    forward = [(dependency.target, dependency, False) for dependency in node.dependencies]
    backward = [(user, own, True) for user in used for own in user.dependencies if own.target is node]
    for edges in (forward, backward):
        left = {consumer: list(numbers) for consumer, numbers in used.items()}
        for consumer, dependency, reverse in edges:
            if left.get(consumer):
                first = left[consumer].pop(0) * size
                dependency.index_mapping[0] = mapping(offset=[first, first + size], reverse=reverse)


@dataclass
class _Layer:
    name: str
    module: nn.Module
    inputs: list[_Part]
    outputs: list[_Part]
    # Channels of one side that must go together whatever the graph says, and inputs that go with outputs.
    tied: list[list[tuple[str, int]]] = field(default_factory=list)
    both: bool = False  # its inputs are its outputs


def _parts(module: nn.Module) -> tuple[list[_Part], list[_Part], list[list[tuple[str, int]]], bool] | None:
    """Return what a layer's input channels and output channels are in its tensors; ``None`` for an unknown layer."""
    if isinstance(module, nn.Linear):
        inputs, outputs = range(module.in_features), range(module.out_features)
        return [_Part("weight", 1, inputs, "column")], _row("weight", 0, outputs, module), [], False
    if isinstance(module, nn.Embedding):
        return [], [_Part("weight", 1, range(module.embedding_dim), "row")], [], True
    if isinstance(module, _CONVOLUTIONS):
        return _convolution_parts(module)
    if isinstance(module, _NORMS):
        size = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
        own = [_Part(name, 0, range(size), "affine") for name in ("weight", "bias") if _has(module, name)]
        own += [_Part(name, 0, range(size), "column") for name in ("running_mean", "running_var") if _has(module, name)]
        if not own:
            own = [
                _Part("num_channels" if isinstance(module, nn.GroupNorm) else "num_features", 0, range(size), "column")
            ]
        tied = []
        if isinstance(module, nn.GroupNorm):  # statistics run over each of its groups, so a whole one goes
            width = size // module.num_groups
            tied = [[("out", c) for c in range(first, first + width)] for first in range(0, size, width)]
        return [], own, tied, True
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return [], [_Part("weight", 0, range(module.num_parameters), "column")], [], True
    if isinstance(module, nn.LSTM):
        names = ["weight_ih_l0", "weight_ih_l0_reverse"]
        columns = [_Part(name, 1, range(module.input_size), "column") for name in names if _has(module, name)]
        return columns, [], [], False
    return None


def _convolution_parts(
    module: nn.modules.conv._ConvNd,
) -> tuple[list[_Part], list[_Part], list[list[tuple[str, int]]], bool]:
    ins, outs, groups = module.in_channels, module.out_channels, module.groups
    per_in, per_out = ins // groups, outs // groups
    if groups == ins == outs:  # depthwise: an input is an output
        return [], _row("weight", 0, range(outs), module), [], True
    if module.transposed:
        inputs = [_Part("weight", 0, range(ins), "column")]
        outputs = _row("weight", 1, [c % per_out for c in range(outs)], module)
    else:
        inputs = [_Part("weight", 1, [c % per_in for c in range(ins)], "column")]
        outputs = _row("weight", 0, range(outs), module)
    if groups == 1:
        return inputs, outputs, [], False
    if per_in == 1:  # a channel multiplier: an input goes with all the outputs that it makes, and the group is gone
        rows = range(outs) if not module.transposed else [c // per_out for c in range(outs)]
        outputs = _row("weight", 0, rows, module)
        tied = [[("in", g), *(("out", g * per_out + k) for k in range(per_out))] for g in range(groups)]
        return [], outputs, tied, False
    # Every group must lose equally many, so those at one place of their groups go together.
    tied = [[("in", g * per_in + k) for g in range(groups)] for k in range(per_in)]
    tied += [[("out", g * per_out + k) for g in range(groups)] for k in range(per_out)]
    return inputs, outputs, tied, False


def _row(tensor: str, dim: int, position: Sequence[int], module: nn.Module) -> list[_Part]:
    parts = [_Part(tensor, dim, position, "row")]
    if _has(module, "bias"):
        parts.append(_Part("bias", 0, range(len(position)), "affine"))
    return parts


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


class _Union:
    """Sets of things that belong together."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}

    def find(self, key: Any) -> Any:
        parent = self._parent
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def unite(self, first: Any, second: Any) -> None:
        a, b = self.find(first), self.find(second)
        if a != b:
            self._parent[b] = a

    def sets(self) -> list[list[Any]]:
        sets: dict[Any, list[Any]] = defaultdict(list)
        for key in self._parent:
            sets[self.find(key)].append(key)
        return list(sets.values())


class _Coupling:
    """Follows channels through the graph, and gathers those that meet anywhere.

    A channel is ``(layer, side, position)``, an entry of a tensor ``(None, (tensor, dim), position)``.
    """

    def __init__(self, model: nn.Module, graph: Any, layers: dict[str, _Layer]) -> None:
        self.model, self.graph, self.layers = model, graph, layers
        self.names = {id(child): clean_name(name) for name, child in model.named_modules()}
        self.tensors: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.tensors.setdefault(id(tensor), clean_name(name))
        self.union = _Union()
        self.roles: dict[tuple[str, int], str] = {}
        self.makers: dict[tuple[str, int], list[str]] = defaultdict(list)
        self.stuck: dict[str, str] = {}  # layers whose channels reach a place that has no rule, and which
        self.returned: set[str] = set()
        self.walked: set[tuple[str, int]] = set()
        self.widest = max((_channels(layer, side) for layer in layers.values() for side in ("in", "out")), default=0)

    def findings(self) -> Findings:
        found = Findings()
        roots = [node.module for node in self.graph.module2node.values() if isinstance(node.module, _PRODUCERS)]
        reached = {self.names[id(module)] for module in roots if id(module) in self.names}
        order = [name for name in self.layers if name in reached]
        for name in order:
            layer = self.layers[name]
            count = len(layer.outputs[0].position)
            if not all((name, c) in self.walked for c in range(count)):
                self._walk(name, layer.module, count)
        for layer in self.layers.values():
            self._link(layer)
        self._gather(found, order)
        return found

    def _walk(self, name: str, module: nn.Module, count: int) -> None:
        """Follow all of a layer's output channels through the graph."""
        pruner = self.graph.get_pruner_of_module(module)
        stack = [(self.graph.module2node[module], pruner.prune_out_channels, [_Pair(c, c) for c in range(count)])]
        chunks: dict[tuple[int, int], tuple[str, str, int]] = {}
        seen: set[tuple[int, bool, int, int]] = set()
        # Each place sees each channel about once. Where wrong offsets go round a cycle, there is no end to it.
        most = 8 * len(self.graph.module2node) * count + 16 * max(self.widest, count)
        while stack:
            node, handler, pairs = stack.pop()
            own = self.graph.get_pruner_of_module(node.module)
            is_input = handler == own.prune_in_channels and handler != own.prune_out_channels
            fresh = []
            for pair in pairs:
                key = (id(node), is_input, pair.idx, pair.root_idx)
                if pair.root_idx is None:
                    self.stuck[name] = f"its channels are repeated in a way that has no rule ({node.module})"
                    return
                if key not in seen:
                    seen.add(key)
                    fresh.append(pair)
            if not fresh:
                continue
            self._record(name, node, is_input, fresh, chunks)
            if len(seen) > most:
                self.stuck[name] = "its channels are split or joined in a way that has no rule"
            if name in self.stuck:
                return
            for dependency in node.dependencies:
                if dependency.is_triggered_by(handler):
                    moved = fresh
                    for mapping in dependency.index_mapping:
                        if mapping is not None:
                            moved = mapping(moved)
                    if moved:
                        stack.append((dependency.target, dependency.handler, moved))

    def _record(
        self,
        name: str,
        node: Any,
        is_input: bool,
        pairs: Iterable[Any],
        chunks: dict[tuple[int, int], tuple[str, str, int]],
    ) -> None:
        module, types = node.module, self.graph.ops.OPTYPE
        if node.type == types.OUTPUT:
            self.returned.add(name)
        elif node.type == types.SPLIT and (size := _chunk_size(node)) is not None:
            # Halves stay halves only if each loses equally many: those at one place of their halves go together.
            for pair in pairs:
                channel = (name, "out", pair.root_idx)
                self.union.unite(chunks.setdefault((id(node), pair.idx % size), channel), channel)
        elif isinstance(module, nn.Parameter):
            tensor = self.tensors[id(module)]
            owner = self.model.get_submodule(tensor.rpartition(".")[0])
            if isinstance(owner, nn.RMSNorm):
                self.stuck[name] = _statistic(owner, tensor.rpartition(".")[0])
                return
            for pair in pairs:
                if not pair.idx < module.shape[node.pruning_dim]:
                    self.stuck[name] = f"its channels meet '{tensor}' of {module.shape[node.pruning_dim]}"
                    return
                self._entry((name, "out", pair.root_idx), tensor, node.pruning_dim, pair.idx, "affine")
        elif isinstance(module, (nn.LayerNorm, nn.MultiheadAttention)):
            self.stuck[name] = _statistic(module, self.names[id(module)])
        elif id(module) in self.names and isinstance(module, nn.Module):
            other = self.names[id(module)]
            layer = self.layers.get(other)
            if layer is None:
                if is_computed(module):
                    self.stuck[name] = f"its channels reach '{other}', whose weight is computed from other parameters"
                return
            side = "in" if is_input and not layer.both else "out"
            count = _channels(layer, side)
            for pair in pairs:
                if not pair.idx < count:
                    self.stuck[name] = f"its channels do not fit those of '{other}'"
                    return
                self.union.unite((name, "out", pair.root_idx), (other, side, pair.idx))
                if side == "out":
                    self.walked.add((other, pair.idx))

    def _link(self, layer: _Layer) -> None:
        """Join a layer's channels with the entries of its tensors, which another layer may share."""
        for side, parts in (("in", layer.inputs), ("out", layer.outputs)):
            for part in parts:
                tensor = getattr(layer.module, part.tensor)
                name = self.tensors.get(id(tensor), f"{layer.name}.{part.tensor}".lstrip("."))
                if part.role == "row":
                    self.makers[name, part.dim].append(layer.name)
                for channel, position in enumerate(part.position):
                    self._entry((layer.name, side, channel), name, part.dim, position, part.role)
        for channels in layer.tied:
            for side, channel in channels[1:]:
                self.union.unite((layer.name, *channels[0]), (layer.name, side, channel))

    def _entry(self, channel: tuple[str, str, int], tensor: str, dim: int, position: int, role: str) -> None:
        self.union.unite(channel, (None, (tensor, dim), position))
        strength = ("column", "affine", "row")
        self.roles[tensor, dim] = max(self.roles.get((tensor, dim), "column"), role, key=strength.index)

    def _gather(self, found: Findings, order: Sequence[str]) -> None:
        """Make a group of all units that consist of the same pieces of the same tensors."""
        place = {name: i for i, name in enumerate(order)}
        units: dict[str, list[_Unit]] = defaultdict(list)
        for members in self.union.sets():
            unit = _Unit()
            touched = set()
            for layer, what, position in members:
                if layer is None:
                    unit.entries[what].append(position)
                elif what == "out":
                    touched.add(layer)
            makers = {maker for key in unit.entries for maker in self.makers.get(key, ())} & place.keys()
            unit.makers = sorted(makers, key=place.__getitem__)
            unit.trouble = next((self.stuck[layer] for layer in sorted(touched) if layer in self.stuck), None)
            unit.is_returned = not touched.isdisjoint(self.returned)
            for name in unit.makers:
                units[name].append(unit)
        done: set[str] = set()
        for name in order:
            if name in done or isinstance(self.layers[name].module, nn.Embedding):
                continue
            together = {name, *(maker for unit in units[name] for maker in unit.makers)}
            done |= together
            reason = _refusal(units[name])
            if reason is not None:
                found.refused.update(dict.fromkeys(together, reason))
                continue
            group = self._group(units[name])
            found.groups.append(group)
            if not group.inputs or any(unit.is_returned for unit in units[name]):
                found.doubtful.add(group.name)

    def _group(self, units: list[_Unit]) -> ChannelGroup:
        makers = units[0].makers
        first = next(key for key in units[0].entries if makers[0] in self.makers.get(key, ()))
        units = sorted(units, key=lambda unit: min(unit.entries[first]))
        outputs: list[Slice] = []
        inputs: list[Slice] = []
        for key in units[0].entries:
            index = torch.tensor([sorted(unit.entries[key]) for unit in units])
            # A row that another layer reads as a column (tied weights) must be zero too.
            role = self.roles[key]
            (inputs if role == "column" else outputs).append(Slice(*key, index, scored=role == "row"))
        return ChannelGroup(makers[0], len(units), tuple(outputs), tuple(inputs), tuple(makers))


@dataclass
class _Unit:
    """What goes with one channel: positions in tensors."""

    entries: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    makers: list[str] = field(default_factory=list)
    trouble: str | None = None
    is_returned: bool = False

    def signature(self) -> frozenset[tuple[tuple[str, int], int]]:
        return frozenset((key, len(positions)) for key, positions in self.entries.items())


def _refusal(units: Sequence[_Unit]) -> str | None:
    for unit in units:
        if unit.trouble is not None:
            return unit.trouble
    if len(units) < 2:
        width = min(len(positions) for positions in units[0].entries.values())
        return "it has one channel" if width == 1 else "all of its channels are bound together"
    if len({unit.signature() for unit in units}) > 1:
        return "its channels are not used alike: some are coupled with others, and some are not"
    return None


def _statistic(module: nn.Module, name: str) -> str:
    what = "has no rule for them" if isinstance(module, nn.MultiheadAttention) else "takes its statistics over them"
    return f"its channels reach {type(module).__name__} '{name}', which {what}"


def _channels(layer: _Layer, side: str) -> int:
    parts = layer.inputs if side == "in" else layer.outputs
    if parts:
        return len(parts[0].position)
    sides = [channel for channels in layer.tied for own, channel in channels if own == side]
    return max(sides) + 1 if sides else 0


def is_computed(module: nn.Module) -> bool:
    """Whether a layer computes its weight from other parameters (weight_norm, parametrize, prune)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)


def channel_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that have channels: linear, convolutional, recurrent ones and attention, by name."""
    attentions = [child for child in model.modules() if isinstance(child, nn.MultiheadAttention)]
    inside = {id(child) for attention in attentions for child in attention.children()}
    for name, child in model.named_modules():
        if isinstance(child, WEIGHTED) and id(child) not in inside:
            yield clean_name(name), child


# Heads ---------------------------------------------------------------------------------------------------------------

_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
_FUSED = ("qkv", "qkv_proj", "in_proj", "to_qkv", "Wqkv")
_OUTPUTS = ("o_proj", "out_proj", "out_lin", "to_out.0", "to_out", "wo", "proj", "o", "out", "dense", "c_proj")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_q_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_REPEATS = ("num_key_value_groups", "n_rep", "num_queries_per_kv")
_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "key_value_proj_dim", "d_k", "hs_head")
_WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "embed_dim", "hidden_size", "d_model", "dim", "n_embd", "q_size")
_KEY_WIDTHS = ("kv_dim", "kv_size", "key_value_dim")


@dataclass(frozen=True, eq=False)
class Attention:
    """A module that attends with several heads.

    Args:
        name: Its qualified name.
        module: The module itself.
        projections: The qualified names of its query, key and value layers, or of one for all three; none where the
            module holds their weights itself.
        output: The qualified name of the layer that joins the heads.
        heads: How many heads of queries there are.
        key_heads: How many of keys and values, each shared by ``heads / key_heads`` queries.
        size: The features of one head.
    """

    name: str
    module: nn.Module
    projections: tuple[str, ...]
    output: str
    heads: int
    key_heads: int
    size: int

    def attributes(self, heads: int, key_heads: int) -> dict[str, int]:
        """Return the values of the module's attributes with other numbers of heads."""
        pairs = (
            (_HEADS, self.heads, heads),
            (_KEY_HEADS, self.key_heads, key_heads),
            (_REPEATS, self.heads // self.key_heads, heads // key_heads),
            (_WIDTHS, self.heads * self.size, heads * self.size),
            (_KEY_WIDTHS, self.key_heads * self.size, key_heads * self.size),
        )
        return {
            name: new
            for names, old, new in pairs
            for name in names
            if type(getattr(self.module, name, None)) is int and getattr(self.module, name) == old
        }


def find_attentions(model: nn.Module) -> tuple[list[Attention], dict[str, str]]:
    """Return the attention modules, known by type or by the names of their attributes, and why others are not taken."""
    modules = {clean_name(name): child for name, child in model.named_modules()}
    found, refused = [], {}
    for name, child in modules.items():
        prefix = f"{name}." if name else ""
        if isinstance(child, nn.MultiheadAttention):
            if isinstance(child, PlainMultiheadAttention) or type(child).forward is nn.MultiheadAttention.forward:
                heads = child.num_heads
                found.append(Attention(name, child, (), f"{prefix}out_proj", heads, heads, child.head_dim))
            else:
                refused[name] = f"its class {type(child).__name__} has a `forward` of its own"
            continue
        projections = _projections(modules, prefix)
        if projections is None:
            continue
        names, rows, key_rows = projections
        outputs = [f"{prefix}{key}" for key in _OUTPUTS]
        if "." in name:
            outputs.append(f"{name.rpartition('.')[0]}.output.dense")  # as in BERT
        joined = [
            key for key in outputs if isinstance(layer := modules.get(key), nn.Linear) and layer.in_features == rows
        ]
        size, heads_ = _first(child, _SIZES), _first(child, _HEADS)
        if not joined:
            refused[name] = f"no layer that joins its heads was found among its attributes {', '.join(_OUTPUTS)}"
        elif size is None and heads_ is None:
            refused[name] = f"none of its attributes {', '.join(_HEADS)} tells how many heads it has"
        else:
            size = size or rows // (heads_ or 1)
            if not size or rows % size or key_rows % size or (rows // size) % (key_rows // size):
                refused[name] = f"its {rows} query and {key_rows} key features do not divide into heads of {size}"
            else:
                found.append(Attention(name, child, names, joined[0], rows // size, key_rows // size, size))
    return found, refused


def _projections(modules: dict[str, nn.Module], prefix: str) -> tuple[tuple[str, ...], int, int] | None:
    """Return the names of a module's query, key and value layers, and how many features queries and keys have."""
    for names in (*_PROJECTIONS, *((name,) for name in _FUSED)):
        full = tuple(f"{prefix}{name}" for name in names)
        layers = [layer for name in full if isinstance(layer := modules.get(name), nn.Linear)]
        rows = [layer.out_features for layer in layers]
        if len(rows) == 3 and rows[1] == rows[2]:
            return full, rows[0], rows[1]
        if len(rows) == len(names) == 1 and rows[0] % 3 == 0:
            return full, rows[0] // 3, rows[0] // 3
    return None


def _first(module: nn.Module, names: Sequence[str]) -> int | None:
    for name in names:
        if type(value := getattr(module, name, None)) is int and value > 0:
            return value
    return None


def heads_of(attention: Attention, tensors: dict[str, Tensor]) -> ChannelGroup | None:
    """Return the heads of an attention module as a group, ``None`` where it has a single one to lose.

    Args:
        attention: The module.
        tensors: The model's parameters by qualified name.
    """
    heads, size, name = attention.heads, attention.size, attention.name
    blocks = attention.key_heads if attention.key_heads < heads else 1
    if heads // blocks < 2:
        return None
    rows = torch.arange(heads * size).reshape(heads, size)
    thrice = torch.cat([rows, rows + heads * size, rows + 2 * heads * size], dim=1)
    prefix = f"{name}." if name else ""
    module = attention.module
    pieces: list[tuple[str, int, Tensor, bool]] = []
    if isinstance(module, nn.MultiheadAttention):
        pieces += [(f"{prefix}{part}_proj_weight", 0, rows, True) for part in "qkv"]
        pieces += [(f"{prefix}in_proj_weight", 0, thrice, True), (f"{prefix}in_proj_bias", 0, thrice, False)]
        pieces += [(f"{prefix}bias_{part}", 2, rows, False) for part in "kv"]
    elif len(attention.projections) == 1:
        pieces += [(f"{attention.projections[0]}.weight", 0, thrice, True)]
        pieces += [(f"{attention.projections[0]}.bias", 0, thrice, False)]
    else:
        for layer in attention.projections if blocks == 1 else attention.projections[:1]:
            pieces += [(f"{layer}.weight", 0, rows, True), (f"{layer}.bias", 0, rows, False)]
    pieces.append((f"{attention.output}.weight", 1, rows, True))
    outputs = [Slice(*piece) for piece in pieces if piece[0] in tensors]
    return ChannelGroup(name, heads, tuple(outputs), (), (name,), blocks)


class PrunedMultiheadAttention(PlainMultiheadAttention):
    """What becomes of ``nn.MultiheadAttention`` when heads are cut out: fewer heads of the same size.

    Parameters keep their names and the arguments of `forward` their meaning.
    """
