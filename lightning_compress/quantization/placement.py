"""Where an integer runtime needs rounded activations: found in a symbolic trace of the forward (torch.fx).

Between two rounded tensors a runtime can replace a convolution, a matrix product, a residual addition, a concatenation
or a pooling by its integer kernel. What only moves numbers (reshape, max-pooling, ReLU) needs nothing of its own.
Scores that a softmax reads stay float, since masks of −inf are added to them; residual streams that end in a norm, too.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.quantization.functional import ATTENTION, function_name, unwatch
from lightning_compress.quantization.layers import QUANTIZED

# Move numbers and change none, or only cut them off at 0.
_MOVING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
)
_MOVING = {
    "flatten",
    "reshape",
    "view",
    "permute",
    "transpose",
    "swapaxes",
    "movedim",
    "getitem",
    "chunk",
    "split",
    "unbind",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "expand",
    "repeat",
    "clone",
    "detach",
    "pad",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "unflatten",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "pixel_shuffle",
    "pixel_unshuffle",
    "t",
    "T",
    "mT",
}
_AVERAGING_MODULES = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)
_AVERAGING = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean"}
_JOINING = {"add", "sub", "mul", "cat", "concat", "concatenate", "stack"}
_MATRIX = {"matmul", "bmm", "baddbmm"}
_CLIPPING_MODULES = (nn.ReLU6, nn.Hardtanh)
_QUANTIZED = set(QUANTIZED.values())
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# What turns a tensor into plain numbers.
_NUMBERS = {"size", "dim", "numel", "len", "shape", "ndim", "dtype", "device"}


@dataclass(frozen=True)
class Place:
    """Where one tensor is rounded.

    Args:
        kind: ``"input"`` or ``"output"`` of a module, or ``"functional"``: the result of a function that a module's
            forward calls.
        module: The module's name, relative to the module that was traced.
        use: Which use of the module, counted from 0 (of all calls in one forward pass).
        tensor: A number that two places share if they see the same tensor.
        function: The function's name, for a functional place; `use` counts the runs of the module's forward then.
        index: Which call it is among those of the watched functions in one run of the module's forward.
        is_rectified: Whether a ReLU and nothing else comes next.
        is_probability: Whether the numbers lie in [0, 1].
        part: ``"probabilities"`` for those within an attention that is a function; else the result is rounded.
    """

    kind: str
    module: str
    use: int
    tensor: int
    function: str = ""
    index: int = 0
    is_rectified: bool = False
    is_probability: bool = False
    part: str = ""

    @property
    def key(self) -> str:
        """The name of its quantizer among those of the functions that a module's forward calls."""
        return f"{self.use}_{self.index}" + (f"_{self.part}" if self.part else "")


@dataclass
class Placement:
    """What a trace tells.

    Args:
        places: Where tensors are rounded.
        folded: The name of the batch norm that a layer can be folded into, by the layer's name.
        layers: The names of the layers to quantize that the trace has seen.
        inputs: The tensor of the place that a layer reads, by the layer's name, if it is used once.
        uses: How often each module is used.
        callees: The modules that a module's forward calls.
        calls: How many calls of watched functions a module's forward makes, for each of its runs.
    """

    places: list[Place] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)
    inputs: dict[str, int] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    callees: dict[str, set[str]] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A call of a function that a forward makes on tensors.

    Args:
        caller: The name of the module whose forward makes it.
        run: Which run of that forward, counted from 0.
        function: The function's name.
        node: Its node, or ``None`` where it works on constants.
    """

    caller: str
    run: int
    function: str
    node: fx.Node | None


class _Tracer(fx.Tracer):
    """Notes every call of a function on tensors, and in which module's forward it is made."""

    proxy_buffer_attributes = True

    def __init__(self, is_target: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_target = is_target
        self.calls: list[Call] = []
        self.runs: Counter[str] = Counter({"": 1})
        self.callees: dict[str, set[str]] = {}

    def note(self, function: str, node: fx.Node | None) -> None:
        caller = self.scope.module_path
        self.calls.append(Call(caller, self.runs[caller] - 1, function, node))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["caller"] = self.scope.module_path
        node.meta["is_number"] = _is_number(node)
        if (name := name_of(node)) and not node.meta["is_number"]:
            self.note(name, node)
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        self.runs[name] += 1
        self.callees.setdefault(self.scope.module_path, set()).add(name)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.is_target(m) or type(m) in _QUANTIZED or not any(True for _ in m.children()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


class _Constants(TorchFunctionMode):
    """Shows a tracer the calls on tensors that are no symbols."""

    def __init__(self, tracer: _Tracer) -> None:
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not isinstance(output, fx.Proxy):
            self.tracer.note(function_name(func), None)
        return output


def _is_number(node: fx.Node) -> bool:
    """Whether a node stands for a size, or for what is computed from sizes, and not for a tensor."""
    if not name_of(node):
        return False
    if name_of(node) in _NUMBERS:
        return True
    inputs = node.all_input_nodes
    is_torch = getattr(node.target, "__module__", "") != "_operator"  # torch.zeros(x.size(0)) is a tensor
    return bool(inputs) and not is_torch and all(each.meta["is_number"] for each in inputs)


def name_of(node: fx.Node) -> str:
    """Return the name of the function that a node calls, and nothing for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(node.args[1]) if node.target is getattr else function_name(node.target)


def _is_entry(node: fx.Node) -> bool:
    """Whether a node takes an entry, such as ``values``, out of a tuple: no function of tensors is called then."""
    return node.target is getattr and not inspect.isdatadescriptor(getattr(Tensor, name_of(node), None))


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Put everything back afterwards: a forward may leave symbols on the modules."""
    kept = [(child, dict(vars(child))) for child in module.modules()]
    containers = [
        (container, dict(container))
        for _, attributes in kept
        for container in (attributes[name] for name in ("_parameters", "_buffers", "_modules"))
    ]
    try:
        yield
    finally:
        for child, attributes in kept:
            vars(child).clear()
            vars(child).update(attributes)
        for container, entries in containers:
            container.clear()
            container.update(entries)


def trace(module: nn.Module, is_target: Callable[[nn.Module], bool]) -> _Tracer:
    """Return a tracer with the graph of a module's forward; arguments with a default keep it.

    Raises:
        ValueError: If the forward takes another way in evaluation than in training.
        Exception: Whatever the forward raises on symbols.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    found = []
    for is_training in (True, False):
        tracer = _Tracer(is_target)
        with _untouched(module), _Constants(tracer), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for child in module.modules():
                child.training = is_training
                child._forward_hooks, child._forward_pre_hooks = OrderedDict(), OrderedDict()  # not for symbols
                unwatch(child)
            tracer.trace(module, concrete_args=defaults or None)
            found.append(tracer)
    train, evaluation = ([(n.op, str(n.target), n.meta["caller"]) for n in tracer.graph.nodes] for tracer in found)
    if train != evaluation:
        raise ValueError("its forward takes another way in evaluation than in training")
    return found[0]


class Traces:
    """Traces modules, each once.

    Args:
        is_target: Whether a layer's weight may be quantized: its own forward is not looked into.
    """

    def __init__(self, is_target: Callable[[nn.Module], bool]) -> None:
        self.is_target = is_target
        self._known: dict[int, _Tracer | Exception] = {}

    def of(self, module: nn.Module) -> _Tracer:
        """Return the trace of a module.

        Raises:
            Exception: Whatever tracing raises; the module cannot be traced then.
        """
        if id(module) not in self._known:
            try:
                self._known[id(module)] = trace(module, self.is_target)
            except Exception as error:  # whatever a forward may raise on symbols
                self._known[id(module)] = error
        found = self._known[id(module)]
        if isinstance(found, Exception):
            raise found
        return found


def parameters_read(module: nn.Module, tracer: _Tracer) -> set[int]:
    """Return the parameters, by identity, that forwards read themselves, such as a weight that is used a second time.

    Args:
        module: The module.
        tracer: Its trace.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {id(parameters[str(node.target)]) for node in tracer.graph.nodes if str(node.target) in parameters}


def place(module: nn.Module, tracer: _Tracer, is_target: Callable[[nn.Module], bool]) -> Placement:
    """Return where the activations of a module are rounded, so that its layers find integers.

    Args:
        module: The module.
        tracer: Its trace.
        is_target: Whether a layer's weight is quantized.
    """
    return _Planner(module, tracer, is_target).plan()


class _Planner:
    def __init__(self, module: nn.Module, tracer: _Tracer, is_target: Callable[[nn.Module], bool]) -> None:
        self.calls, self.is_target = tracer.calls, is_target
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.nodes = list(tracer.graph.nodes)
        self._reaches: dict[fx.Node, bool] = {}
        self.result = Placement(callees=tracer.callees)
        self.use: dict[fx.Node, int] = {}
        names: dict[int, str] = {}
        for node in self.nodes:
            if node.op == "call_module":
                # One module under two names is one module.
                name = names.setdefault(id(self.modules[str(node.target)]), str(node.target))
                self.use[node] = self.result.uses[name]
                self.result.uses[name] += 1
                node.meta["name"] = name

    # --- what a node is -----------------------------------------------------------------------------------------------

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_layer(self, node: fx.Node) -> bool:
        module = self.module_of(node)
        return module is not None and not isinstance(module, nn.MultiheadAttention) and self.is_target(module)

    def is_plain(self, module: nn.Module) -> bool:
        """Whether a module is known to return one tensor."""
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            return False
        return type(module) in _QUANTIZED or not any(True for _ in module.children())

    def is_relu(self, node: fx.Node) -> bool:
        return isinstance(self.module_of(node), nn.ReLU) or name_of(node) == "relu"

    def is_moving(self, node: fx.Node) -> bool:
        module = self.module_of(node)
        if module is not None:
            return isinstance(module, (*_MOVING_MODULES, nn.ReLU))
        return name_of(node) in _MOVING or self.is_relu(node)

    def is_arithmetic(self, node: fx.Node) -> bool:
        if isinstance(self.module_of(node), _AVERAGING_MODULES) or name_of(node) in _AVERAGING:
            return True
        name = name_of(node)
        if name not in _JOINING:
            return False
        return len(node.all_input_nodes) > 1

    def reaches(self, node: fx.Node) -> bool:
        """Whether what a node returns is read, however it is moved, added or pooled, by a layer or a matrix product."""
        if node not in self._reaches:
            self._reaches[node] = False
            self._reaches[node] = any(
                self.reads(user, node) or (self.is_moving(user) and self.reaches(user)) for user in node.users
            )
        return self._reaches[node]

    def reads(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a runtime can compute a node with integers of another."""
        if name_of(node) == ATTENTION:  # and with a float mask
            return source in (*node.args[:3], *(node.kwargs.get(name) for name in ("query", "key", "value")))
        return self.is_integer(node)

    def is_integer(self, node: fx.Node) -> bool:
        """Whether a runtime can compute a node with integers."""
        if self.is_layer(node):
            return not isinstance(self.module_of(node), nn.Embedding)  # that reads indices
        if name_of(node) in _MATRIX or name_of(node) == ATTENTION:
            return True
        return self.is_arithmetic(node) and self.reaches(node)

    def readers(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Return the integer nodes that read a tensor, each with the argument that it comes by."""
        found = []
        for user in node.users:
            if self.reads(user, node):
                found.append((user, node))
            elif self.is_moving(user):
                found += self.readers(user)
        return found

    # --- the plan -----------------------------------------------------------------------------------------------------

    def plan(self) -> Placement:
        ends = self._fold()
        functional: dict[fx.Node, Place] = {}
        for number, node in enumerate(self.nodes):
            module = self.module_of(node)
            if self.is_layer(node):
                self.result.layers.add(node.meta["name"])
            if node.op == "output" or self.is_moving(node) or node in ends:
                continue  # a layer that is folded into a batch norm is rounded behind it
            readers = self.readers(node)
            sole = next(iter(node.users)) if len(node.users) == 1 else None
            if not readers and not (self._is_convolution(node, ends) and not self._is_returned(node)):
                continue
            if sole is not None and isinstance(self.module_of(sole), _CLIPPING_MODULES):
                continue
            for reader, _ in readers:
                if self.is_layer(reader) and self.result.uses[reader.meta["name"]] == 1:
                    self.result.inputs[reader.meta["name"]] = number
            found = Place(
                "functional" if module is None else "output",
                node.meta.get("name", node.meta["caller"]),
                self.use.get(node, 0),
                number,
                name_of(node),
                is_rectified=sole is not None and self.is_relu(sole),
                is_probability=isinstance(module, nn.Softmax) or name_of(node) == "softmax",
            )
            if module is not None and self.is_plain(module):
                self.result.places.append(found)
            elif name_of(node) and not _is_entry(node):
                functional[node] = found
            else:
                self._at_readers(readers, number)
        self._add_functional(functional)
        return self.result

    def _fold(self) -> dict[fx.Node, fx.Node]:
        """Find the layers that are followed by a batch norm, each being the other's only use."""
        found = {}
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        for node in self.nodes:
            users = list(node.users)
            if not self.is_layer(node) or len(users) != 1 or isinstance(self.module_of(node), nn.Embedding):
                continue
            norm = self.module_of(users[0])
            if not isinstance(norm, norms) or norm.running_mean is None:
                continue
            layer, name = node.meta["name"], users[0].meta["name"]
            if self.result.uses[layer] == 1 == self.result.uses[name]:
                self.result.folded[layer] = name
                found[node] = users[0]
        return found

    def _is_convolution(self, node: fx.Node, ends: dict[fx.Node, fx.Node]) -> bool:
        if node in ends.values():
            node = next(layer for layer, norm in ends.items() if norm is node)
        return self.is_layer(node) and isinstance(self.module_of(node), _CONVOLUTIONS)

    def _is_returned(self, node: fx.Node) -> bool:
        """Whether a tensor only leaves the module."""
        return all(user.op == "output" or (self.is_moving(user) and self._is_returned(user)) for user in node.users)

    def _at_readers(self, readers: list[tuple[fx.Node, fx.Node]], number: int) -> None:
        """Round a tensor, that no module of its own returns, where modules read it."""
        for reader, _ in readers:
            if reader.op == "call_module":
                self.result.places.append(Place("input", reader.meta["name"], self.use[reader], number))

    def _add_functional(self, functional: dict[fx.Node, Place]) -> None:
        watched = {(place.module, place.function) for place in functional.values()}
        watched |= {(call.caller, ATTENTION) for call in self.calls if call.function == ATTENTION}
        for call in self.calls:
            runs = self.result.calls.setdefault(call.caller, [])
            runs += [0] * (call.run + 1 - len(runs))
            if (call.caller, call.function) not in watched:
                continue
            where: dict[str, Any] = {"use": call.run, "index": runs[call.run]}
            if call.node in functional:
                self.result.places.append(replace(functional[call.node], **where))
            if call.function == ATTENTION and call.node is not None:
                number = len(self.nodes) + self.nodes.index(call.node)  # a tensor that has no node
                probabilities = Place("functional", call.caller, tensor=number, function=ATTENTION, **where)
                self.result.places.append(replace(probabilities, part="probabilities", is_probability=True))
            runs[call.run] += 1
