"""Lowering: a native graph becomes an engine program.

The engine works on packed tokens, so what the graph says about batches (masks, positions, biases) is separated here
into its :class:`Plumbing`, which :mod:`espalier.compiler.packed` follows at every run. Epilogues are fused on the way:
the sum of embeddings, a linear layer with its activation or its residual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.compiler.formats import Tuner
from espalier.compiler.plumbing import HostFunction, Output, bias_function, host_function, masks_of, stores_of
from espalier.compiler.values import Linear, Rounded, Shown, Static, Sum, Value
from espalier.compiler.weights import Layer, Weights
from espalier.errors import GraphError, InputShapeError, UnsupportedModelError
from espalier.ir.graph import Graph, Node
from espalier.ir.images import Window
from espalier.ir.ops import BIAS_OPERAND
from espalier.ir.stored import ScaledTable

if TYPE_CHECKING:
    from espalier._native import Program, SparseMatrix

ENGINE_ACTIVATIONS = frozenset(
    {"abs", "elu", "erf", "exp", "gelu", "gelu_tanh", "neg", "quick_gelu", "reciprocal", "relu", "sigmoid", "silu"}
    | {"softplus", "sqrt", "tanh"}
)
_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Max": "max", "Min": "min"}


class Lowering:
    """One graph, one program. ``run()`` fills :attr:`program`, :attr:`plumbing` and :attr:`layers`."""

    def __init__(self, graph: Graph, program: Program, tuner: Tuner, *, threads: int, exact_padding: bool) -> None:
        self.graph = graph
        self.program = program
        self.tuner = tuner
        self.threads = threads
        self.plumbing = masks_of(graph, exact_padding=exact_padding)
        self.layers: list[Layer] = []
        self._consumers = graph.consumers()
        self._values: dict[str, Value | Sum | Linear | Rounded] = {}
        self._shown: dict[str, Shown] = {}
        self._index_inputs: dict[str, int] = {}
        self._bias_inputs: dict[str, int] = {}
        self._producers = graph.producers()
        self._quantized: dict[tuple[str, Static | None], Value] = {}
        self._weights = Weights(graph, tuner, threads=threads)
        self._features: dict[int, int] = {}
        self._stores = stores_of(graph, self._producers)

    def run(self) -> None:
        """Raises UnsupportedModelError when the engine has no way to run the graph, GraphError when it is malformed."""
        for name in self.graph.inputs:
            kind = self.graph.types[name]
            if kind.dtype == "float32" and kind.shape is not None and len(kind.shape) in (2, 3) and self._is_data(name):
                self._load(name, 0 if len(kind.shape) == 3 else 1, kind.shape[-1])
        for node in self.graph.nodes:
            rule = getattr(self, f"_lower_{node.op.lower()}", None)
            if node.op in _BINARY:
                self._lower_binary(node)
            elif rule is not None:
                rule(node)
            else:
                raise UnsupportedModelError(f"the engine has no operation {node.op} (node {node.name!r})")
        missing = [name for name in self.graph.outputs if name not in {o.name for o in self.plumbing.outputs}]
        if missing:
            raise UnsupportedModelError(f"the output {missing[0]!r} does not come from an operation of the engine")
        order = {name: i for i, name in enumerate(self.graph.outputs)}
        self.plumbing.outputs.sort(key=lambda output: order[output.name])
        self.program.finish()

    # ---- values ------------------------------------------------------------------------------------------------------

    def _is_data(self, name: str) -> bool:
        """Whether some node reads ``name`` as activations and not as an attention bias."""
        return any(
            name in node.inputs[: 3 if node.op == "Attention" else None] for node in self._consumers.get(name, [])
        )

    def _define(self, name: str, value: Value) -> None:
        self._values[name] = value
        for store in self._stores.get(name, []):
            width = value.width if store.width is None else store.width
            planes = store.grid is not None
            number = self.program.add_store(store.output, value.id, value.first + store.first, width, planes)
            domain = ("token", "sequence", "image")[2 if planes else min(value.lanes, 2)]
            self.plumbing.outputs.append(
                Output(store.output, number, domain, width, store.squeeze, store.dtype, value.lanes, store.grid)
            )

    def _value(self, name: str) -> Value:
        """The engine value of ``name``, emitting what was put off."""
        value = self._values.get(name)
        if value is None:
            raise UnsupportedModelError(f"the engine cannot read {name!r}: it is not a tensor of tokens or sequences")
        if isinstance(value, Sum):
            value = self._emit_sum(name, value)
        elif isinstance(value, Linear):
            value = self._emit_linear(value, name)
        elif isinstance(value, Rounded):
            value = self._floats_of(value.integers, value.label)
            self._define(name, value)
        return value

    def _whole(self, name: str) -> Value:
        """The value of ``name`` as an engine value of its own."""
        value = self._value(name)
        if value.whole:
            return value
        return self._select_features(name, value)

    def _select_features(self, name: str, value: Value) -> Value:
        """A slice of features that something other than attention or an output reads: a 0/1 matrix picks it out."""
        from espalier import _native

        total = self._features[value.id]
        rows = np.arange(value.width + 1, dtype=np.uint32)
        indices = np.arange(value.first, value.first + value.width, dtype=np.uint16)
        matrix = _native.SparseMatrix.from_parts(value.width, total, rows, indices, np.ones(value.width, np.float32))
        weight = _native.Weight(matrix, "unstructured", self._chunk(matrix), self.tuner.isa)
        id_ = self.program.add_linear(f"{name}/slice", value.id, weight, None)
        picked = Value(id_, value.lanes, 0, value.width, True)
        self._values[name] = picked
        return picked

    def _chunk(self, matrix: SparseMatrix) -> int:
        return next(chunk for name, chunk, _ in matrix.candidates(self.tuner.isa) if name == "unstructured")

    def _new(self, id_: int, lanes: int, width: int) -> Value:
        self._features[id_] = width
        return Value(id_, lanes, 0, width, True)

    def _load(self, name: str, lanes: int, features: Any, image: str = "") -> None:
        """A float input; with ``image`` the planes of that input become ``name``."""
        if not isinstance(features, int):
            raise UnsupportedModelError(f"the input {image or name!r} has an unknown number of features")
        number = len(self.plumbing.floats)
        domain = "image" if image else ("token", "sequence")[lanes]
        self.plumbing.floats.append((image or name, domain))
        id_ = self.program.add_load(image or name, features, lanes, number, bool(image))
        self._define(name, self._new(id_, lanes, features))

    def _constant(self, name: str) -> np.ndarray | None:
        return self.graph.constants.get(name)

    def _optional_vector(self, node: Node, operand: int, width: int) -> np.ndarray | None:
        """As ``_vector``, None for an operand that is absent."""
        name = node.inputs[operand] if len(node.inputs) > operand else ""
        return self._vector(name, width) if name else None

    def _vector(self, name: str, width: int) -> np.ndarray:
        """A constant as one float32 per feature."""
        array = np.asarray(self.graph.constants[name], np.float32).reshape(-1)
        return np.ascontiguousarray(np.broadcast_to(array, (width,)))

    # ---- indices and biases -----------------------------------------------------------------------------------------

    def _lower_positions(self, node: Node) -> None:
        pass  # computed from the batch: see _index_function

    _lower_positionsfromids = _lower_positions
    _lower_relativebias = _lower_positions

    def _index_input(self, name: str) -> int:
        if name not in self._index_inputs:
            self._index_inputs[name] = len(self.plumbing.indices)
            self.plumbing.indices.append(host_function(self.graph, self._producers, name))
        return self._index_inputs[name]

    def _bias_input(self, name: str) -> int:
        if name not in self._bias_inputs:
            self._bias_inputs[name] = len(self.plumbing.biases)
            spare = self.program.panel_width
            self.plumbing.biases.append(
                bias_function(self.graph, self._producers, name, lambda function: _key_major(function, spare))
            )
        return self._bias_inputs[name]

    # ---- operations --------------------------------------------------------------------------------------------------

    def _lower_embedding(self, node: Node) -> None:
        table, ids = node.inputs
        constant: Any = self.graph.constants[table]  # an array, or the stored form of one
        number = self._index_input(ids)
        if isinstance(constant, ScaledTable):
            entry: tuple[Any, np.ndarray | None, int] = (
                np.require(constant.integers, np.int16, ["C", "A"]),
                np.ascontiguousarray(constant.scales),
                number,
            )
        else:
            array = np.asarray(constant)
            entry = (np.require(array, np.float32, ["C", "A"]), None, number)
        self._values[node.outputs[0]] = Sum([entry], int(constant.shape[1]))
        self._settle(node.outputs[0])

    def _settle(self, name: str) -> None:
        """Emit now what only an Add could still absorb, unless an Add is its one reader."""
        readers = self._consumers.get(name, [])
        if len(readers) == 1 and readers[0].op == "Add" and name not in self._stores:
            return
        self._value(name)

    def _emit_sum(self, name: str, pending: Sum) -> Value:
        value = self._new(self.program.add_embed(name, pending.tables), 0, pending.width)
        self._define(name, value)
        return value

    def _lower_linear(self, node: Node) -> None:
        readers = self._consumers.get(node.outputs[0], [])
        if len(readers) == 1 and readers[0].op in ("Activation", "Add") and node.outputs[0] not in self._stores:
            self._values[node.outputs[0]] = Linear(node)  # fused with its reader
            return
        self._emit_linear(Linear(node), node.outputs[0])

    _lower_qlinear = _lower_linear

    def _emit_linear(self, linear: Linear, result: str, act: str = "identity") -> Value:
        from espalier import _native

        node = linear.node
        choice, layer = self._weights.take(node)
        self.layers.append(layer)
        rows = layer.shape[0]
        shown = self._shown.get(node.inputs[0])
        source = shown.source if shown else node.inputs[0]
        static, window = self._static(node), shown.window.pairs if shown else None
        weight, operands = choice.weight, (linear.residual, act)
        bias = self._optional_vector(node, BIAS_OPERAND[node.op], rows)
        if isinstance(weight, _native.Weight8):
            # What windows show is rounded window by window, unless all have the same scale.
            x = self._whole(source) if shown and static is None else self._quantize(source, static)
            after = self._rounding_after(result)
            scale, zero = after or (None, None)
            id_ = self.program.add_linear8(layer.name, x.id, weight, bias, *operands, scale, zero, window)
            lanes = shown.window.pixels if shown else x.lanes
            if after:
                value = self._quantized[result, after] = Value(id_, lanes, 0, rows, True)
                return value
        else:
            x = self._rounded(node, source) if node.op == "QLinear" else self._whole(source)
            align = shown.align if shown else 1
            id_ = self.program.add_linear(layer.name, x.id, weight, bias, *operands, window, align)
            lanes = shown.window.pixels if shown else x.lanes
        value = self._new(id_, lanes, rows)
        self._define(result, value)
        return value

    def _lanes_after(self, linear: Node) -> int:
        """Lanes per sequence of a linear layer that is put off."""
        shown = self._shown.get(linear.inputs[0])
        return shown.window.pixels if shown else next(iter(self._lanes_of(linear.inputs[0])), 0)

    # ---- 8 bit activations -------------------------------------------------------------------------------------------

    def _static(self, node: Node) -> Static | None:
        """The scale and zero point that a QLinear or FakeQuantize gives its input; None for one of each per token, and
        for a Linear.
        """
        if node.op == "Linear":
            return None
        scale, zero = node.inputs[1:3] if node.op == "FakeQuantize" else [*node.inputs, "", ""][5:7]
        if not scale:
            return None
        number = np.asarray(self.graph.constants[zero])
        return float(self.graph.constants[scale]), float(number) + (128.0 if number.dtype == np.int8 else 0.0)

    def _quantize(self, name: str, static: Static | None) -> Value:
        """The integers of a value, made once for all who read it with the same scale and zero point."""
        known = self._quantized.get((name, static))
        if known is None:
            x = self._whole(name)
            id_ = self.program.add_quantize(f"quantize:{name}", x.id, *(static or ()))
            known = self._quantized[name, static] = Value(id_, x.lanes, 0, x.width, True)
        return known

    def _rounded(self, node: Node, source: str) -> Value:
        """The input of a QLinear as its integers have it, in floats."""
        return self._floats_of(self._quantize(source, self._static(node)), self._label(node))

    def _floats_of(self, x: Value, label: str) -> Value:
        return self._new(self.program.add_dequantize(label, x.id), x.lanes, x.width)

    def _lower_fakequantize(self, node: Node) -> None:
        static = self._static(node)
        self._put_off_floats(node, self._quantize(node.inputs[0], static), static)

    def _put_off_floats(self, node: Node, integers: Value, static: Static | None) -> None:
        """The output of ``node`` is what ``integers`` stand for."""
        name = node.outputs[0]
        self._quantized[name, static] = integers
        self._values[name] = Rounded(integers, static, self._label(node))
        if name in self._stores:
            self._value(name)

    def _rounding_after(self, name: str) -> Static | None:
        """The scale and zero point of all who read ``name``, if they have the same and nobody reads it as floats."""
        readers = [
            reader
            for first in self._consumers.get(name, [])
            for reader in (self._consumers.get(first.outputs[0], []) if first.op == "Unfold" else [first])
        ]
        if name in self._stores or any(reader.op not in ("QLinear", "FakeQuantize") for reader in readers):
            return None
        found = {self._static(reader) for reader in readers}
        return found.pop() if len(found) == 1 else None

    # ---- elementwise operations --------------------------------------------------------------------------------------

    def _lower_activation(self, node: Node) -> None:
        kind = node.attrs["kind"]
        if kind not in ENGINE_ACTIVATIONS:
            raise UnsupportedModelError(f"the engine has no activation {kind!r}")
        pending = self._values.get(node.inputs[0])
        if isinstance(pending, Linear):
            self._emit_linear(pending, node.outputs[0], kind)
            return
        if self._lanes_of(node.outputs[0]):
            return  # with the sum of integers that it reads
        x = self._whole(node.inputs[0])
        self._define(
            node.outputs[0], self._new(self.program.add_unary(self._label(node), x.id, kind), x.lanes, x.width)
        )

    def _lower_binary(self, node: Node) -> None:
        a, b = node.inputs
        if a in self.graph.constants and b in self.graph.constants:
            raise GraphError(f"{node.op} {node.name!r} has only constant operands; fold constants first")
        if b in self.graph.constants:
            return self._binary_constant(node, a, b)
        if a in self.graph.constants:
            return self._constant_binary(node, a, b)
        absorbed = node.op == "Add" and a != b and self._absorb_add(node, a, b)
        if absorbed:
            return None
        x, y = self._whole(a), self._whole(b)
        if x.lanes != y.lanes:
            raise UnsupportedModelError(f"{node.op} {node.name!r} mixes tokens, pixels or whole sequences")
        id_ = self.program.add_binary(self._label(node), _BINARY[node.op], x.id, y.id)
        self._define(node.outputs[0], self._new(id_, x.lanes, x.width))
        return None

    def _absorb_add(self, node: Node, a: str, b: str) -> bool:
        return (
            self._add_sums(node, a, b)
            or self._add_rounded(node, a, b)
            or self._add_residual(node, a, b)
            or self._add_residual(node, b, a)
        )

    def _add_rounded(self, node: Node, a: str, b: str) -> bool:
        """Add integers, where the sum is rounded again: between them nobody needs floats."""
        x, y, result = self._values.get(a), self._values.get(b), node.outputs[0]
        if not (isinstance(x, Rounded) and isinstance(y, Rounded)):
            return False
        left, right, readers = x.integers, y.integers, self._consumers.get(result, [])
        if left.lanes != right.lanes or left.width != right.width:
            return False
        relu = len(readers) == 1 and readers[0].op == "Activation" and readers[0].attrs["kind"] == "relu"
        last = readers[0] if relu else node
        after = self._rounding_after(last.outputs[0])
        if after is None or result in self._stores:
            return False
        id_ = self.program.add_add8(self._label(last), left.id, right.id, relu, *after)
        self._quantized[last.outputs[0], after] = Value(id_, left.lanes, 0, left.width, True)
        return True

    def _add_sums(self, node: Node, a: str, b: str) -> bool:
        x, y = self._values.get(a), self._values.get(b)
        if not (isinstance(x, Sum) and isinstance(y, Sum) and x.width == y.width):
            return False
        self._values[node.outputs[0]] = Sum([*x.tables, *y.tables], x.width)
        self._settle(node.outputs[0])
        return True

    def _add_residual(self, node: Node, linear: str, other: str) -> bool:
        pending = self._values.get(linear)
        if not isinstance(pending, Linear) or pending.residual >= 0:
            return False
        residual = self._whole(other)
        shape = self.graph.types[linear].shape
        if shape is None or residual.lanes != self._lanes_after(pending.node) or residual.width != shape[-1]:
            return False
        fused, result = Linear(pending.node, residual.id), node.outputs[0]
        readers = self._consumers.get(result, [])
        if len(readers) == 1 and readers[0].op == "Activation" and result not in self._stores:
            self._values[result] = fused
        else:
            self._emit_linear(fused, result)
        return True

    def _binary_constant(self, node: Node, a: str, b: str) -> None:
        x = self._whole(a)
        vector = self._vector(b, x.width)
        id_ = self.program.add_binary_constant(self._label(node), _BINARY[node.op], x.id, vector)
        self._define(node.outputs[0], self._new(id_, x.lanes, x.width))

    def _constant_binary(self, node: Node, a: str, b: str) -> None:
        """``constant op x``, rewritten with the constant on the right."""
        x = self._whole(b)
        label = self._label(node)
        vector = self._vector(a, x.width)
        id_ = x.id
        if node.op == "Sub":
            id_ = self.program.add_unary(f"{label}/neg", id_, "neg")
        elif node.op == "Div":
            id_ = self.program.add_unary(f"{label}/reciprocal", id_, "reciprocal")
        operation = {"Add": "add", "Sub": "add", "Mul": "mul", "Div": "mul", "Max": "max", "Min": "min"}[node.op]
        id_ = self.program.add_binary_constant(label, operation, id_, vector)
        self._define(node.outputs[0], self._new(id_, x.lanes, x.width))

    def _lower_layernorm(self, node: Node) -> None:
        x = self._whole(node.inputs[0])
        gamma = self._vector(node.inputs[1], x.width)
        beta = self._optional_vector(node, 2, x.width)
        id_ = self.program.add_layer_norm(self._label(node), x.id, gamma, beta, float(node.attrs["epsilon"]))
        self._define(node.outputs[0], self._new(id_, x.lanes, x.width))

    def _lower_softmax(self, node: Node) -> None:
        x = self._whole(node.inputs[0])
        id_ = self.program.add_softmax(self._label(node), x.id)
        self._define(node.outputs[0], self._new(id_, x.lanes, x.width))

    def _lower_l2normalize(self, node: Node) -> None:
        x = self._whole(node.inputs[0])
        id_ = self.program.add_l2_normalize(self._label(node), x.id, float(node.attrs["epsilon"]))
        self._define(node.outputs[0], self._new(id_, x.lanes, x.width))

    def _lower_attention(self, node: Node) -> None:
        q, k, v = (self._value(name) for name in node.inputs[:3])
        if q.lanes or k.lanes or v.lanes:
            raise UnsupportedModelError(f"Attention {node.name!r} reads pixels; the engine's is one of tokens")
        heads = node.attrs["heads"]
        bias = node.inputs[4] if len(node.inputs) > 4 else ""
        id_ = self.program.add_attention(
            self._label(node),
            (q.id, k.id, v.id),
            (q.first, k.first, v.first),
            heads,
            q.width // heads,
            v.width // heads,
            float(node.attrs["scale"]),
            self._bias_input(bias) if bias else -1,
        )
        self._define(node.outputs[0], self._new(id_, 0, v.width))

    def _lower_selecttoken(self, node: Node) -> None:
        x = self._whole(node.inputs[0])
        column = node.attrs["index"]
        if x.lanes == 1:  # an image of one pixel
            self._define(node.outputs[0], x)
            return
        if x.lanes:
            raise UnsupportedModelError(f"SelectToken {node.name!r} picks a pixel; the engine picks tokens")
        self.plumbing.columns.append(column)
        id_ = self.program.add_select(self._label(node), x.id, column)
        self._define(node.outputs[0], self._new(id_, 1, x.width))

    def _lower_maskedmean(self, node: Node) -> None:
        x = self._whole(node.inputs[0])
        id_ = self.program.add_mean(self._label(node), x.id, float(node.attrs["epsilon"]))
        self._define(node.outputs[0], self._new(id_, 1, x.width))

    # ---- images ------------------------------------------------------------------------------------------------------

    def _lower_imagetotokens(self, node: Node) -> None:
        name, shape = node.inputs[0], self.graph.types[node.inputs[0]].shape
        if name not in self.graph.inputs or shape is None:
            raise UnsupportedModelError(f"ImageToTokens {node.name!r} stands inside the graph; it belongs at its edges")
        _, features, rows, columns = shape
        if not isinstance(rows, int) or not isinstance(columns, int):
            raise UnsupportedModelError(f"the image {name!r} has unknown extents")
        self._load(node.outputs[0], rows * columns, features, image=name)

    def _lower_tokenstoimage(self, node: Node) -> None:
        name = node.outputs[0]
        edge = all(reader.op == "Cast" for reader in self._consumers.get(name, []))
        if not edge or self._value(node.inputs[0]).lanes == 0:
            raise UnsupportedModelError(f"TokensToImage {node.name!r} stands inside the graph; it belongs at its edges")

    def _lower_unfold(self, node: Node) -> None:
        window, source = Window.of(node.attrs["window"]), node.inputs[0]
        self._shown[node.outputs[0]] = Shown(source, window, node.attrs["align"])
        if any(reader.op not in ("Linear", "QLinear") for reader in self._consumers.get(node.outputs[0], [])):
            raise UnsupportedModelError(f"Unfold {node.name!r} is read by something other than a linear layer")
        self._check_window(node, window, next(iter(self._lanes_of(source)), -1))

    def _lanes_of(self, name: str) -> list[int]:
        """Lanes per sequence of a value in any of its forms."""
        known = self._values.get(name)
        if isinstance(known, Value):
            return [known.lanes]
        return [value.lanes for (source, _), value in self._quantized.items() if source == name]

    def _check_window(self, node: Node, window: Window, lanes: int) -> None:
        if lanes != window.source[0] * window.source[1]:
            raise UnsupportedModelError(
                f"{node.op} {node.name!r} reads an image from tokens, which the engine keeps apart"
            )

    def _lower_maxpool(self, node: Node) -> None:
        known, window = self._values.get(node.inputs[0]), Window.of(node.attrs["window"])
        # Integers of one scale are in the order of their floats.
        rounded = known if isinstance(known, Rounded) and known.static is not None and window.always_sees else None
        x = rounded.integers if rounded else self._whole(node.inputs[0])
        self._check_window(node, window, x.lanes)
        id_ = self.program.add_max_pool(self._label(node), x.id, window.pairs)
        if rounded:
            self._put_off_floats(node, Value(id_, window.pixels, 0, x.width, True), rounded.static)
        else:
            self._define(node.outputs[0], self._new(id_, window.pixels, x.width))

    def _lower_meanpool(self, node: Node) -> None:
        x, window = self._whole(node.inputs[0]), Window.of(node.attrs["window"])
        self._check_window(node, window, x.lanes)
        id_ = self.program.add_mean_pool(self._label(node), x.id, window.pairs, node.attrs["count_edges"])
        self._define(node.outputs[0], self._new(id_, window.pixels, x.width))

    def _lower_concat(self, node: Node) -> None:
        parts = [self._whole(name) for name in node.inputs if name]
        if len({part.lanes for part in parts}) > 1:
            raise UnsupportedModelError(f"Concat {node.name!r} mixes tokens, pixels or whole sequences")
        id_ = self.program.add_concat(self._label(node), [part.id for part in parts])
        self._define(node.outputs[0], self._new(id_, parts[0].lanes, sum(part.width for part in parts)))

    def _lower_spread(self, node: Node) -> None:
        x, lanes = self._whole(node.inputs[0]), node.attrs["tokens"]
        if x.lanes != 1:
            raise UnsupportedModelError(f"Spread {node.name!r} reads something other than one row per sequence")
        id_ = self.program.add_spread(self._label(node), x.id, lanes) if lanes > 1 else x.id
        self._define(node.outputs[0], self._new(id_, lanes, x.width))

    def _lower_slicefeatures(self, node: Node) -> None:
        name = node.outputs[0]
        if not self._consumers.get(name) and name in self.graph.outputs:
            return  # stored straight from its source
        if node.attrs["squeeze"] and self._consumers.get(name):
            raise UnsupportedModelError(f"SliceFeatures {node.name!r}: a squeezed slice is read by another operation")
        x = self._value(node.inputs[0])
        width = node.attrs["stop"] - node.attrs["start"]
        self._values[name] = Value(x.id, x.lanes, x.first + node.attrs["start"], width, False)

    def _lower_cast(self, node: Node) -> None:
        name = node.outputs[0]
        if name in self.graph.outputs and not self._consumers.get(name):
            return  # the output is cast when it is handed out
        raise UnsupportedModelError(f"Cast {node.name!r} stands inside the graph; it belongs at its edges")

    def _label(self, node: Node) -> str:
        return node.name or node.outputs[0]


def _key_major(function: HostFunction, spare: int) -> HostFunction:
    """``[B|1, H|1, S|1, S]`` (queries, keys) with keys first and ``spare`` unused queries at the end."""

    def key_major(feeds: dict[str, np.ndarray], batch: int, seq: int) -> np.ndarray:
        bias = np.asarray(function(feeds, batch, seq), np.float32)
        if bias.ndim != 4 or bias.shape[2] not in (1, seq) or bias.shape[3] not in (1, seq):
            raise InputShapeError(
                f"an attention bias has shape {bias.shape}; expected [batch or 1, heads or 1, {seq}, {seq}]"
            )
        out = np.zeros((*bias.shape[:2], seq, seq + spare), np.float32)
        out[..., :seq] = bias.swapaxes(-1, -2)
        return out

    return key_major
