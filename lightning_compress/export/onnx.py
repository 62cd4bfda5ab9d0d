"""ONNX files: float models as they are, quantized ones with integer weights and QuantizeLinear/DequantizeLinear.

torch's exporter leaves two operators of ours in its graph, `Round` for an activation and `Dequantize` for a weight.
What becomes of them decides which kernels a runtime can use: onnxruntime replaces a convolution by an integer one where
DequantizeLinear stands right before each of its inputs and QuantizeLinear right behind it.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lightning_compress.export.files import Inputs, as_inputs, named_inputs, silence, spell, write_whole
from lightning_compress.quantization.integer import integer_module

if TYPE_CHECKING:
    from onnxscript import ir

OPSET = 21
"""The first that has 4-bit integers and blocks in DequantizeLinear."""

DOMAIN = "lightning_compress"

LARGEST_FILE = 2**31 - 2**20
"""What a protobuf holds; the weights of a larger model go into a second file beside it."""

LARGEST_BIAS = 2**30
"""An int32 accumulator that starts here has as much room again for the products."""

_MANY = 32
"""So many scales of a bias are larger in the file than the product, of the input's scale and the weight's, that they
are; runtimes compute it once, when they load the file."""

# Move numbers and change none, and run on integers as well.
_MOVING = {
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
_INTEGER_KERNELS = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
# Compute each number, or each row, for itself.
_ELEMENTWISE = {"Erf", "Gelu", "Relu", "Round", "Sigmoid", "Tanh"}
_ELEMENTWISE_PAIRS = {"Add", "Div", "Mul", "Sub"}
_WEIGHT_ONLY_KERNELS = {"MatMulNBits", "MatMulBnb4"}
_FLOAT_KERNELS = {
    "Attention",
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "MatMul",
    "MultiHeadAttention",
    "NhwcFusedConv",
    "TransposeMatMul",
}


def export_onnx(
    module: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    dynamic_batch: bool = True,
) -> Path:
    """Write a model as an ONNX file; returns the path.

    The weights of quantized layers are integers in the file: int8, or int4 where they have 4 bits or fewer. Activations
    that have a range pass through QuantizeLinear and DequantizeLinear, placed so that onnxruntime finds its integer
    kernels. Batch norms are folded.

    Args:
        module: A module, quantized or not; it is left as it is.
        example_inputs: What its forward is called with: a tuple of arguments, a dict of keywords, or one tensor.
        path: The file. It is written whole or not at all.
        metadata: Words for the file's ``metadata_props``.
        dynamic_batch: Whether dimension 0 of the inputs may have any size.

    Raises:
        ImportError: Without the packages of ``pip install 'lightning_compress[export]'``.
        RuntimeError: If torch's exporter cannot follow the forward.
        ValueError: If the batch is to be dynamic and the inputs share none.
    """
    _require("onnx", "onnxscript")
    copied = integer_module(module, "onnx").cpu()
    arguments = named_inputs(copied, as_inputs(example_inputs), dynamic_batch, "batch")
    with silence():
        try:
            with torch.no_grad():
                program: Any = torch.onnx.export(
                    copied,
                    **arguments,
                    dynamo=True,
                    verbose=False,
                    opset_version=OPSET,
                    custom_translation_table=_translations(),
                )
        except Exception as error:
            raise RuntimeError(
                f"torch's ONNX exporter cannot follow {type(module).__name__} ({spell(error)})."
            ) from error
        model = program.model
        _Lowering(model).run()
        _strip(model, dict(metadata or {}))
        return _save(model, path)


def integer_kernels(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return which kernels onnxruntime runs a file's convolutions and matrix products on, in its optimized graph.

    Returns:
        ``integer``, ``weight_only`` (integer weights, float activations) and ``float``: how many there are;
        ``float_nodes``: ``"name (operator)"`` of each float one.

    Raises:
        ImportError: Without the packages of ``pip install 'lightning_compress[export]'``.
    """
    _require("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        options.log_severity_level = 3  # it warns that an optimized graph is for this machine alone
        onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    found = [(node.name or node.output[0], node.op_type) for node in _all_nodes(graph)]
    return {
        "integer": sum(kind in _INTEGER_KERNELS for _, kind in found),
        "weight_only": sum(kind in _WEIGHT_ONLY_KERNELS for _, kind in found),
        "float": sum(kind in _FLOAT_KERNELS for _, kind in found),
        "float_nodes": [f"{name} ({kind})" for name, kind in found if kind in _FLOAT_KERNELS],
    }


def _all_nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _all_nodes(inner)


def _require(*names: str) -> None:
    import importlib

    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"ONNX files need the package {name}: pip install 'lightning_compress[export]'"
            ) from error


# --- our two operators ------------------------------------------------------------------------------------------------


def _translations() -> dict[Any, Any]:
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    def declare(name: str, inputs: dict[str, str], attributes: dict[str, Any]) -> Op:
        parameter, kinds = OpSchema.FormalParameter, OpSchema.AttrType
        schema = OpSchema(
            name,
            DOMAIN,
            1,
            inputs=[parameter(key, f"tensor({kind})") for key, kind in inputs.items()],
            outputs=[parameter("y", "tensor(float)")],
            attributes=[
                OpSchema.Attribute(key, kinds.FLOAT if kind is float else kinds.INT) for key, kind in attributes.items()
            ],
        )
        return Op(Opset(DOMAIN, 1), name, schema)

    round_ = declare("Round", {"x": "float"}, {"scale": float, "zero_point": int, "qmin": int, "qmax": int})
    dequantize = declare(
        "Dequantize",
        {"integers": "int8", "scale": "float", "zero_point": "int8"},
        {"bits": int, "axis": int, "block": int},
    )

    def translate_round(x: Any, scale: float, zero_point: int, qmin: int, qmax: int) -> Any:
        return round_(x, scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)

    def translate_dequantize(integers: Any, scale: Any, zero_point: Any, bits: int, axis: int, block: int) -> Any:
        return dequantize(integers, scale, zero_point, bits=bits, axis=axis, block=block)

    return {
        torch.ops.lightning_compress.round_activation.default: translate_round,
        torch.ops.lightning_compress.dequantize_weight.default: translate_dequantize,
    }


# --- the graph --------------------------------------------------------------------------------------------------------


class _Lowering:
    """Turns `Round` and `Dequantize` into QuantizeLinear and DequantizeLinear where runtimes look for them."""

    def __init__(self, model: ir.Model) -> None:
        from onnxscript import ir

        self.ir: Any = ir
        self.graph = model.graph
        self.constants: dict[Any, ir.Value] = {}
        self.rows: dict[Any, tuple[ir.Value, ir.Value]] = {}
        """Tensors, the matrices of their rows, and the form that makes the tensors of the matrices."""
        values = (*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs))
        self.names = {value.name for value in values} | {node.name for node in model.graph}

    def run(self) -> None:
        if not any(node.domain == DOMAIN for node in self.graph):
            return
        self._pool()
        self._split_constants()
        self._join_biases()
        self._stay_flat()
        self._remove_unused()
        self._merge_rounds()
        for node in self._nodes("Round"):
            self._hoist(node)
        for node in self._nodes("Round"):
            self._lower_round(node)
        for node in self._nodes("Dequantize"):
            self._lower_weight(node)
        self._fold_factors()
        self._separate_clips()
        self._join_reshapes()
        self._compare_positions()
        self._remove_unused()
        self.graph.sort()

    # --- tools

    def _nodes(self, kind: str) -> list[ir.Node]:
        domain = DOMAIN if kind in ("Round", "Dequantize") else ""
        return [node for node in self.graph if node.op_type == kind and node.domain == domain]

    def _attribute(self, node: ir.Node, name: str, default: Any = None) -> Any:
        attribute = node.attributes.get(name)
        return default if attribute is None else attribute.value

    def _constant(self, array: Any, name: str) -> ir.Value:
        """Return an initializer; equal ones are one."""
        key = (array.tobytes(), array.shape, str(array.dtype))
        if key not in self.constants:
            name = self._unique(name)
            tensor = self.ir.Tensor(array, name=name)
            value = self.ir.Value(name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape)
            value.const_value = tensor
            self.graph.initializers[name] = value
            self.constants[key] = value
        return self.constants[key]

    def _unique(self, name: str) -> str:
        number, stem = 1, name
        while name in self.names:
            number += 1
            name = f"{stem}_{number}"
        self.names.add(name)
        return name

    def _insert(
        self, where: ir.Node, kind: str, inputs: list[Any], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Insert a node before another one; returns its result."""
        name = self._unique(name)
        values = self.ir.convenience.convert_attributes(attributes)
        node = self.ir.Node(domain, kind, inputs, values, num_outputs=1, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(where, node)
        return node.outputs[0]

    def _replace(self, old: ir.Value, new: ir.Value, users: Iterable[tuple[Any, int]] | None = None) -> None:
        """Let users (all of them, and the graph's outputs) read another value."""
        for user, index in tuple(old.uses()) if users is None else tuple(users):
            user.replace_input_with(index, new)
        if users is None:
            for index, output in enumerate(self.graph.outputs):
                if output is old:
                    new.name, old.name = old.name, f"{old.name}_"
                    new.type, new.shape = old.type, old.shape
                    self.graph.outputs[index] = new

    def _is_output(self, value: ir.Value) -> bool:
        return any(output is value for output in self.graph.outputs)

    @staticmethod
    def _array(value: ir.Value | None) -> Any:
        return None if value is None or value.const_value is None else value.const_value.numpy()

    def _remove_unused(self) -> None:
        for node in reversed(list(self.graph)):
            if not any(tuple(output.uses()) or self._is_output(output) for output in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not tuple(value.uses()) and not self._is_output(value):
                del self.graph.initializers[name]

    # --- layers

    def _split_constants(self) -> None:
        """Split a constant, such as the bias of an attention's three projections, into constants."""
        for node in self._nodes("Split"):
            array, parts = self._array(node.inputs[0]), len(node.outputs)
            axis = self._attribute(node, "axis", 0)
            if array is not None and len(node.inputs) == 1 and array.shape[axis] % parts == 0:
                for output, part in zip(node.outputs, np.split(array, parts, axis), strict=True):
                    self._replace(output, self._constant(part, str(output.name)))

    def _join_biases(self) -> None:
        """Let a product of rounded rows and its bias be a Gemm, whose integer kernel adds the bias and rounds too."""
        matrices: dict[Any, ir.Value] = {}
        for product in self._nodes("MatMul"):
            source, transposed = product.inputs
            turn, users = transposed.producer(), tuple(product.outputs[0].uses())  # type: ignore[union-attr]
            weight = turn.inputs[0].producer() if turn is not None and turn.op_type == "Transpose" else None  # type: ignore[union-attr]
            if weight is None or weight.op_type != "Dequantize" or self._attribute(weight, "block"):
                continue
            if len(users) != 1 or users[0][0].op_type != "Add" or not self._is_rounded(source):
                continue
            add, index = users[0]
            bias, shape = add.inputs[1 - index], add.outputs[0].shape
            values = self._array(bias)
            sizes = [size if isinstance(size, int) else -1 for size in shape or ()]
            if values is None or values.ndim != 1 or not sizes or sizes.count(-1) > 1 or sizes[-1] != len(values):
                continue
            if source not in matrices:
                form = self._constant(np.array([-1, weight.inputs[0].shape[1]]), "matrix")  # type: ignore[union-attr, index]
                matrices[source] = self._insert(product, "Reshape", [source, form], f"{source.name}_matrix")  # type: ignore[union-attr]
            inputs = [matrices[source], weight.outputs[0], bias]
            rows = self._insert(product, "Gemm", inputs, f"{add.outputs[0].name}_matrix", transB=1)
            form = self._constant(np.array(sizes), "shape")
            self._replace(add.outputs[0], self._shaped(add, rows, form))

    def _shaped(self, where: ir.Node, rows: ir.Value, form: ir.Value) -> ir.Value:
        """Return a matrix in the form of a node's result."""
        old = where.outputs[0]
        new = self._insert(where, "Reshape", [rows, form], f"{old.name}_shaped")
        new.type, new.shape = old.type, old.shape
        self.rows[new] = rows, form
        return new

    def _stay_flat(self) -> None:
        """Compute on matrices what stands between products of rows: sums, norms and activations need no other form."""
        done: set[Any] = set()
        while pending := [value for value in self.rows if value not in done]:
            done.update(pending)
            for value in pending:
                for user in dict.fromkeys(user for user, _ in value.uses()):
                    self._flatten(user, value)

    def _flatten(self, user: ir.Node, value: ir.Value) -> None:
        """Let a reader of a reshaped matrix compute on the matrix, if it can."""
        (rows, form), kind = self.rows[value], user.op_type
        width = int(self._array(form)[-1])
        if kind == "Reshape":
            is_matrix = user.inputs[0] is value and np.array_equal(self._array(user.inputs[1]), [-1, width])
            if is_matrix and user is not rows.producer():
                self._replace(user.outputs[0], rows)
                self.graph.remove(user, safe=True)
            return
        if kind in _ELEMENTWISE:
            inputs: list[Any] = [rows]
        elif kind == "LayerNormalization" and user.inputs[0] is value and len(user.outputs) == 1:
            if self._attribute(user, "axis", -1) not in (-1, len(self._array(form)) - 1):
                return
            inputs = [rows, *user.inputs[1:]]
        elif kind in _ELEMENTWISE_PAIRS and not user.domain:
            inputs = [self._as_rows(user, each, value) for each in user.inputs]
            if any(each is None for each in inputs):
                return
        else:
            return
        attributes = {name: attribute.value for name, attribute in user.attributes.items()}
        result = self._insert(user, kind, inputs, f"{user.outputs[0].name}_rows", domain=user.domain, **attributes)
        self._replace(user.outputs[0], self._shaped(user, result, form))
        self.graph.remove(user, safe=True)

    def _as_rows(self, where: ir.Node, other: Any, value: ir.Value) -> ir.Value | None:
        """Return an operand beside a reshaped matrix (or that itself) as it has to be beside the matrix."""
        form = self.rows[value][1]
        width = int(self._array(form)[-1])
        if other in self.rows and other.shape == value.shape:
            return self.rows[other][0]
        array = self._array(other)
        if array is not None:
            return other if array.ndim < 2 and array.size in (1, width) else None
        shape = other.shape
        if shape is None or shape != value.shape or any(getattr(size, "value", size) is None for size in shape):
            return None
        matrix = self._constant(np.array([-1, width]), "matrix")
        rows = self._insert(where, "Reshape", [other, matrix], f"{other.name}_matrix")
        self.rows[other] = rows, form
        return rows

    def _is_rounded(self, value: ir.Value | None) -> bool:
        """Whether a tensor is rounded, or a rounded one that has been moved."""
        node = None if value is None else value.producer()
        while node is not None and node.op_type in _MOVING | {"Relu"}:
            node = node.inputs[0].producer()  # type: ignore[union-attr]
        return node is not None and node.op_type == "Round"

    def _fold_factors(self) -> None:
        """Let the scale of an integer input stand for a constant that a product is multiplied with."""
        for node in self._nodes("Mul"):
            for index in (0, 1):
                factor, product = self._array(node.inputs[1 - index]), node.inputs[index].producer()  # type: ignore[union-attr]
                if factor is None or factor.size != 1 or product is None or product.op_type != "MatMul":
                    continue
                source = product.inputs[0].producer()  # type: ignore[union-attr]
                is_sole = len(tuple(product.outputs[0].uses())) == 1 and not self._is_output(product.outputs[0])
                if not is_sole or source is None or source.op_type != "DequantizeLinear" or factor.item() <= 0:
                    continue
                scale = self._array(source.inputs[1])
                if scale.ndim or len(tuple(source.outputs[0].uses())) > 1:
                    continue
                name = f"{source.inputs[1].name}_multiplied"  # type: ignore[union-attr]
                source.replace_input_with(1, self._constant(np.asarray(scale * factor.item(), np.float32), name))
                self._replace(node.outputs[0], product.outputs[0])
                break

    def _separate_clips(self) -> None:
        """Spell the clipping of a product's floats so that runtimes do not join the two on a float kernel."""
        for node in [*self._nodes("Relu"), *self._nodes("Clip")]:
            product = node.inputs[0].producer()  # type: ignore[union-attr]
            if product is None or product.op_type not in ("Gemm", "MatMul") or not self._reads_integers(product):
                continue
            value: Any = node.inputs[0]
            bounds = [self._constant(np.array(0.0, np.float32), "zero")] if node.op_type == "Relu" else node.inputs[1:]
            for kind, bound in zip(("Max", "Min"), bounds, strict=False):
                if bound is not None:
                    value = self._insert(node, kind, [value, bound], f"{node.outputs[0].name}_{kind.lower()}")
            self._replace(node.outputs[0], value)

    def _compare_positions(self) -> None:
        """Let runtimes compute the masks of what lies ahead: tokens squared, their entries would fill a file."""
        for value in list(self.graph.initializers.values()):
            array, users = self._array(value), tuple(value.uses())
            if array is None or array.dtype != np.bool_ or array.ndim != 2 or array.size < _MANY**2 or not users:
                continue
            if np.array_equal(array, np.triu(np.ones_like(array), 1)):
                columns, rows = (np.arange(length, dtype=np.int32) for length in (array.shape[1], array.shape[0]))
                inputs = [self._constant(columns, "columns"), self._constant(rows[:, None], "rows")]
                self._replace(value, self._insert(users[0][0], "Greater", inputs, "ahead"))

    def _join_reshapes(self) -> None:
        for node in self._nodes("Reshape"):
            first, form = node.inputs[0].producer(), self._array(node.inputs[1])  # type: ignore[union-attr]
            if first is not None and first.op_type == "Reshape" and form is not None and np.all(form != 0):
                node.replace_input_with(0, first.inputs[0])

    # --- activations

    def _pool(self) -> None:
        """Runtimes know the mean over height and width by the name of global pooling only."""
        for node in self._nodes("ReduceMean"):
            value, axes = node.inputs[0], self._array(node.inputs[1]) if len(node.inputs) > 1 else None
            if value is None or value.shape is None or axes is None or not self._attribute(node, "keepdims", 1):
                continue
            rank = len(value.shape)
            if rank > 2 and sorted(int(axis) % rank for axis in axes) == list(range(2, rank)):
                self._replace(node.outputs[0], self._insert(node, "GlobalAveragePool", [value], f"{node.name}_pool"))

    def _merge_rounds(self) -> None:
        """One tensor that is rounded in the same way for several readers is rounded once."""
        seen: dict[Any, ir.Value] = {}
        for node in self._nodes("Round"):
            key = (id(node.inputs[0]), *(self._attribute(node, name) for name in ("scale", "zero_point", "qmax")))
            if key in seen:
                self._replace(node.outputs[0], seen[key])
            else:
                seen[key] = node.outputs[0]

    def _hoist(self, node: ir.Node) -> None:
        """Round before numbers are moved, where they are made; leave out a ReLU that the rounding does as well."""
        while True:
            source = node.inputs[0]
            producer = None if source is None else source.producer()
            if producer is None or self._is_output(source) or len(tuple(source.uses())) > 1:  # type: ignore[arg-type, union-attr]
                return
            if producer.op_type == "Relu" and self._attribute(node, "zero_point") == self._attribute(node, "qmin"):
                node.replace_input_with(0, producer.inputs[0])
                self.graph.remove(producer, safe=True)
                continue
            is_moving = producer.op_type in _MOVING - {"Gather", "Split"} and len(producer.outputs) == 1
            origin = producer.inputs[0]
            if not is_moving or origin is None or (origin.producer() is None and origin not in self.graph.inputs):
                return
            if len(tuple(origin.uses())) > 1 or self._is_output(origin):
                return
            # origin → producer → node becomes origin → node → producer.
            result = node.outputs[0]
            attributes = list(node.attributes.values())
            rounded = self.ir.Node(DOMAIN, "Round", [origin], attributes, num_outputs=1, name=node.name)
            rounded.outputs[0].name = self._unique(f"{result.name}_early")
            self.graph.insert_before(producer, rounded)
            producer.replace_input_with(0, rounded.outputs[0])
            self._replace(result, producer.outputs[0])
            self.graph.remove(node, safe=True)
            node = rounded

    def _lower_round(self, node: ir.Node) -> None:
        source, result = node.inputs[0], node.outputs[0]
        zero, qmin, qmax = (int(self._attribute(node, name)) for name in ("zero_point", "qmin", "qmax"))
        scale = self._constant(np.array(self._attribute(node, "scale"), np.float32), f"{result.name}_scale")
        zero_point = self._constant(np.array(zero, np.uint8), f"zero_point_{zero}")
        integers = self._insert(node, "QuantizeLinear", [source, scale, zero_point], f"{result.name}_q")
        if (qmin, qmax) != (0, 255):
            # As integers: a Clip of floats would stand between a layer and its QuantizeLinear.
            bounds = [self._constant(np.array(q, np.uint8), f"integer_{q}") for q in (qmin, qmax)]
            integers = self._insert(node, "Clip", [integers, *bounds], f"{result.name}_clip")
        self._spread(integers, result, tuple(result.uses()), scale, zero_point, zero == qmin, qmax)

    def _spread(
        self,
        integers: ir.Value,
        result: ir.Value,
        users: Iterable[tuple[Any, int]],
        scale: ir.Value,
        zero_point: ir.Value,
        is_positive: bool,
        highest: int,
    ) -> None:
        """Let what only moves numbers move integers, and dequantize right before the rest."""
        others = []
        for user, index in users:
            if user.op_type == "Relu":
                output = user.outputs[0]
                passed = integers
                if not is_positive:
                    passed = self._insert(user, "Clip", [integers, zero_point], f"{output.name}_relu")
                self._spread(passed, output, tuple(output.uses()), scale, zero_point, True, highest)
            elif self._moves_integers(user, index, zero_point):
                user.replace_input_with(0, integers)
                for output in user.outputs:
                    readers = tuple(output.uses())
                    self._spread(output, output, readers, scale, zero_point, is_positive, highest)
            else:
                others.append((user, index))
        is_output = self._is_output(result)
        if others or is_output:
            producer = integers.producer()
            assert producer is not None
            node = self.ir.Node("", "DequantizeLinear", [integers, scale, zero_point], num_outputs=1)
            node.outputs[0].name = self._unique(f"{integers.name}_dq")
            node.name = node.outputs[0].name
            node.meta["highest"] = highest
            self.graph.insert_after(producer, node)
            self._replace(result, node.outputs[0], others)
            if is_output:
                for index, output in enumerate(self.graph.outputs):
                    if output is result:
                        node.outputs[0].name, result.name = result.name, f"{result.name}_q"
                        node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
                        self.graph.outputs[index] = node.outputs[0]

    def _moves_integers(self, node: ir.Node, index: int, zero_point: ir.Value) -> bool:
        if index != 0 or node.domain:
            return False
        if node.op_type == "Pad":
            value = self._array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
            if self._attribute(node, "mode", "constant") == "constant":
                if value is None or np.any(value != 0) or len(node.inputs) < 3:
                    return False
                node.replace_input_with(2, zero_point)  # what stands for 0
            return True
        return node.op_type in _MOVING and (len(node.outputs) == 1 or node.op_type == "Split")

    # --- weights

    def _lower_weight(self, node: ir.Node) -> None:
        integers, scale, zero_point = (self._array(value) for value in node.inputs)
        bits, axis, block = (int(self._attribute(node, name)) for name in ("bits", "axis", "block"))
        name = str(node.inputs[0].name).removesuffix(".weight_quantizer.integers").removesuffix(".integers")  # type: ignore[union-attr]
        name = name.removesuffix("_quantizer") + ".weight"
        weight = _Weight(self, name, integers, scale, zero_point, bits, axis, block)
        result = node.outputs[0]
        users = tuple(result.uses())
        is_tied = len(users) > 1
        rest = []
        for user, index in users:
            # With blocks onnxruntime has a kernel for float inputs alone; before others its form is kept, since the
            # kernel that it would choose for them knows no blocks and fails.
            is_fit = not block or not self._reads_integers(user)
            if user.op_type == "Transpose" and integers.ndim == 2 and is_fit:
                self._replace(user.outputs[0], weight.dequantized(user, is_transposed=True, is_tied=is_tied))
            elif user.op_type == "Gather" and index == 0 and self._attribute(user, "axis", 0) == 0:
                self._replace(user.outputs[0], weight.gathered(user))
            elif user.op_type == "Gemm" and index == 1 and block and is_fit:
                self._split_gemm(user, weight, is_tied)
            elif user.op_type in ("Conv", "Gemm") and index == 1 and not block:
                self._lower_layer(user, weight)
            else:
                rest.append((user, index))
        if rest or self._is_output(result):
            self._replace(result, weight.dequantized(node))

    def _lower_layer(self, node: ir.Node, weight: _Weight) -> None:
        """Give a layer that reads integers a bias in units of their products, to which an integer kernel adds them."""
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        bias = self._array(node.inputs[2]) if len(node.inputs) > 2 else None
        if source is None or source.op_type != "DequantizeLinear" or bias is None or bias.dtype != np.float32:
            node.replace_input_with(1, weight.dequantized(node))
            return
        step = float(self._array(source.inputs[1]))
        weight = weight.refined(bias.astype(np.float64) / step, source.meta["highest"])
        node.replace_input_with(1, weight.dequantized(node))
        unit = (step * weight.scale.astype(np.float64)).astype(np.float32)
        integers = np.round(bias / unit.astype(np.float64)).clip(-LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
        name = f"{weight.name.removesuffix('.weight')}.bias"
        scale = (
            self._constant(unit, f"{name}_scale")
            if unit.size < _MANY
            else self._insert(
                node, "Mul", [self._constant(weight.scale, f"{weight.name}_scale"), source.inputs[1]], f"{name}_scale"
            )
        )
        axis: dict[str, Any] = {"axis": 0} if unit.ndim else {}
        inputs = [self._constant(integers, name), scale]
        node.replace_input_with(2, self._insert(node, "DequantizeLinear", inputs, f"{name}_dq", **axis))

    def _reads_integers(self, node: ir.Node) -> bool:
        """Whether a product, or the one behind a transposition, has a rounded input beside the weight."""
        readers = [reader for reader, _ in node.outputs[0].uses()] if node.op_type == "Transpose" else [node]
        sources = [reader.inputs[0].producer() for reader in readers if reader.inputs[0] is not None]
        return any(source is not None and source.op_type == "DequantizeLinear" for source in sources)

    def _split_gemm(self, node: ir.Node, weight: _Weight, is_tied: bool) -> None:
        """Products with blocks have kernels as MatMul alone."""
        is_transposed = bool(self._attribute(node, "transB", 0))
        product = self._insert(
            node,
            "MatMul",
            [node.inputs[0], weight.dequantized(node, is_transposed=is_transposed, is_tied=is_tied)],
            f"{node.outputs[0].name}_product",
        )
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            # MatMul and Add would be joined to a Gemm, which has no kernel for blocks.
            bias = self._array(node.inputs[2])
            kind = "Add" if bias is None else "Sub"
            bias = node.inputs[2] if bias is None else self._constant(-bias, f"{node.inputs[2].name}_negative")
            product = self._insert(node, kind, [product, bias], f"{node.outputs[0].name}_sum")
        self._replace(node.outputs[0], product)


@dataclass
class _Weight:
    """A weight's integers, in the forms that its readers take it in; they share what is in the file."""

    lowering: _Lowering
    name: str
    integers: Any
    scale: Any
    zero_point: Any
    bits: int
    axis: int
    block: int
    factor: int = 1
    """What the integers are multiplied with before they are used."""
    casts: dict[Any, ir.Value] = field(default_factory=dict)

    def refined(self, bias: Any, highest: int) -> _Weight:
        """Return the weight with scales that suit a bias, given in units of the input's scale.

        Args:
            bias: The bias.
            highest: The largest integer of the input.
        """
        integers, scale = self.integers, self.scale
        # The bias is rounded to multiples of the scale: the smaller, the better. But processors without VNNI add two
        # products in 16 bits, where those of small weights fit and shall go on to fit.
        largest = max(int(np.abs(x.astype(np.int32)).max(initial=1)) for x in (integers, self.zero_point))
        factor = max(min(127, 32767 // (2 * highest)) // largest, 1)
        least = np.abs(bias) / LARGEST_BIAS * factor
        if scale.ndim == 0:
            least = least.max(initial=0.0)
        if np.any(scale < least):
            # The bias would overflow; weights as small as these are nothing beside it.
            new = np.maximum(scale, least).astype(np.float32)
            shape = [1] * integers.ndim
            if new.ndim:
                shape[self.axis] = -1
            zero_point = self.zero_point.astype(np.int32).reshape(shape)
            ratio = (scale.astype(np.float64) / new).reshape(shape)
            integers = (np.round((integers - zero_point) * ratio) + zero_point).astype(np.int8)
            scale = new
        return replace(self, integers=integers, scale=scale, factor=factor)._multiplied()

    def _multiplied(self) -> _Weight:
        scale = np.asarray(self.scale / np.float32(self.factor), np.float32)
        zero_point = np.asarray(self.zero_point * self.factor, np.int8)
        if self.bits <= 4:  # stored as they are
            return replace(self, scale=scale, zero_point=zero_point)
        return replace(
            self,
            integers=np.asarray(self.integers * self.factor, np.int8),
            scale=scale,
            zero_point=zero_point,
            factor=1,
        )

    def _stored(self, where: ir.Node, array: Any, as_int8: bool, suffix: str = "") -> ir.Value:
        """Return the integers, as 4-bit ones where they fit."""
        low, name = self.lowering, self.name + suffix
        if self.bits > 4:
            return low._constant(array, name)
        value = low._constant(_as_int4(array), name)
        key = (value.name, self.factor)
        if not as_int8:
            return value
        # Kernels of layers know int8 only; runtimes do this once, when they load the file.
        if key not in self.casts:
            if self.factor > 1:
                value = low._insert(where, "Cast", [value], f"{name}_int32", to=_INT32)
                factor = low._constant(np.array(self.factor, np.int32), f"factor_{self.factor}")
                value = low._insert(where, "Mul", [value, factor], f"{name}_multiplied")
            self.casts[key] = low._insert(where, "Cast", [value], f"{name}_int8", to=_INT8)
        return self.casts[key]

    def dequantized(self, where: ir.Node, is_transposed: bool = False, is_tied: bool = False) -> ir.Value:
        """Return the weight, or, for a matrix, its transpose."""
        low, axis, block = self.lowering, self.axis, self.block
        as_int8 = not block or (is_tied and is_transposed)
        scale, zero_point = self.scale, self.zero_point
        if is_transposed and not is_tied:
            integers = self._stored(where, np.ascontiguousarray(self.integers.T), as_int8, "_transposed")
        else:
            integers = self._stored(where, self.integers, as_int8)
            if is_transposed:
                integers = low._insert(where, "Transpose", [integers], f"{self.name}_transposed", perm=[1, 0])
        if is_transposed:
            axis = 1 - axis
            if block:
                scale, zero_point = np.ascontiguousarray(scale.T), np.ascontiguousarray(zero_point.T)
        if self.bits <= 4 and not as_int8:
            zero_point = _as_int4(zero_point)
        inputs = [
            integers,
            low._constant(scale, f"{self.name}_scale"),
            low._constant(zero_point, f"{self.name}_zero_point"),
        ]
        attributes: dict[str, Any] = (
            {} if not scale.ndim else {"axis": axis, **({"block_size": block} if block else {})}
        )
        suffix = "_transposed_dq" if is_transposed else "_dq"
        return low._insert(where, "DequantizeLinear", inputs, self.name + suffix, **attributes)

    def gathered(self, where: ir.Node) -> ir.Value:
        """Return the rows that a Gather picks: picked as integers, dequantized then."""
        low, ids = self.lowering, where.inputs[1]
        rows = low._insert(
            where, "Gather", [self._stored(where, self.integers, True), ids], f"{self.name}_rows", axis=0
        )
        scale, zero_point = self.scale, self.zero_point
        if not scale.ndim:
            inputs = [low._constant(scale, f"{self.name}_scale"), low._constant(zero_point, f"{self.name}_zero_point")]
            return low._insert(where, "DequantizeLinear", [rows, *inputs], f"{self.name}_rows_dq")
        # Each row has its own scales: they are picked too, and are blocks of the result.
        block = self.block or self.integers.shape[1]
        inputs = []
        for array, suffix in ((scale, "_scale"), (zero_point, "_zero_point")):
            array = array.reshape(len(array), -1)
            constant = low._constant(array, self.name + suffix)
            inputs.append(low._insert(where, "Gather", [constant, ids], f"{self.name}_rows{suffix}", axis=0))
        return low._insert(
            where, "DequantizeLinear", [rows, *inputs], f"{self.name}_rows_dq", axis=-1, block_size=block
        )


_INT8, _INT32 = 3, 6  # as in onnx.TensorProto


def _as_int4(array: Any) -> Any:
    import ml_dtypes

    return array.astype(ml_dtypes.int4)


# --- the file ---------------------------------------------------------------------------------------------------------


def _strip(model: ir.Model, metadata: dict[str, str]) -> None:
    """Leave out what the exporter notes for developers: on a small model it is larger than the weights."""
    graph = model.graph
    model.metadata_props.clear()
    model.metadata_props.update({str(key): str(value) for key, value in metadata.items()})
    model.doc_string = model.graph.doc_string = None
    model.producer_name, model.producer_version = DOMAIN, None
    model.opset_imports.pop(DOMAIN, None)
    graph.metadata_props.clear()
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
            if id(value) not in kept:
                value.type = value.shape = None  # runtimes infer them
    _shorten(graph)
    for number, value in enumerate(graph.outputs):
        name = "output" if len(graph.outputs) == 1 else f"output_{number}"
        taken = {each.name for node in graph for each in node.outputs}
        if name not in taken | set(graph.initializers) and value.producer() is not None:
            value.name = name


def _shorten(graph: ir.Graph) -> None:
    """Number what lies between inputs, parameters and outputs: a name stands in the file for each of its readers."""
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    taken = {value.name for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None}
    names = (name for name in map("v{}".format, itertools.count()) if name not in taken)
    for node in graph:
        if node.op_type not in _FLOAT_KERNELS:
            node.name = None
        for value in node.outputs:
            if id(value) not in kept:
                value.name = next(names)
    for name, value in list(graph.initializers.items()):
        if id(value) not in kept and not name.endswith((".weight", ".bias")):
            del graph.initializers[name]
            value.name = next(names)
            graph.initializers[value.name] = value


def _save(model: ir.Model, path: str | os.PathLike[str]) -> Path:
    from onnxscript import ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)

    def write(file: Path) -> None:
        if size < LARGEST_FILE:
            ir.save(model, file)
        else:
            ir.save(model, file, external_data=f"{Path(path).name}.data")

    return write_whole(path, write)
