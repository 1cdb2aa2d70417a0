"""The walk: one abstract value per ONNX value, native nodes emitted as they become known.

Every ONNX node is kept beside the native ones until the end; what nothing needs is then pruned. So a value that is
lifted only halfway costs nothing but is never lost, and a foreign node always finds its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from espalier.ir.graph import Graph, Node, TensorType, node_reads
from espalier.passes.evaluate import EvaluationError, attributes
from espalier.passes.lifting.axes import Axes, shape_of
from espalier.passes.lifting.probe import Prober
from espalier.passes.lifting.values import (
    BF,
    BS,
    BSF,
    Constant,
    Extents,
    Masked,
    Opaque,
    Quantized,
    Recognised,
    Rounding,
    Row,
    Scores,
    Tensor,
    Value,
    View,
)
from espalier.passes.symbolic import ONE, Expr

FLOATS = frozenset({"float16", "float32"})
INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})

MOVES = frozenset(
    {"Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
"""Operators that only move or choose elements, which integers take as well as what they stand for."""

CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "QLinearConv"})
"""With one of these in it, a graph's inputs of four axes are images."""

_SHAPED_LIKE_INPUT = frozenset(
    {"Abs", "Cast", "DequantizeLinear", "Dropout", "Identity", "IsNaN", "Neg", "Not", "QuantizeLinear", "Sqrt"}
)

Result = Value | Sequence[Value | None] | None
Rule = Callable[["Lifter", Node, dict[str, Any], list[Value | None]], Result]

RULES: dict[tuple[str, str], Rule] = {}
"""Transfer functions by (domain, operator)."""


def rule(*ops: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register a transfer function. It returns what is known of each output, None for nothing."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[domain, op] = function
        return function

    return register


class SameExtentError(Exception):
    """Two symbols turned out to name one extent; the walk starts again with one name."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"{old} = {new}")
        self.old, self.new = old, new


class Lifter:
    """State of one walk over ``graph``, which is left as it was; :meth:`run` returns the lifted graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.opset = graph.opsets.get("", 1)
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self.values: dict[str, Value] = {}
        self.recognised: dict[str, Recognised] = {}
        self.rounded: dict[str, Rounding] = {}
        """How native tensors that hold rounded values came to them."""
        self.tried: set[str] = set()
        self.tried_rows: set[str] = set()
        self.nodes: list[Node] = []
        self.out = Graph(
            graph.name,
            list(graph.inputs),
            list(graph.outputs),
            [],
            dict(graph.constants),
            dict(graph.types),
            dict(graph.opsets),
        )
        self.made: dict[Any, Tensor] = {}
        self.derived: dict[Any, str] = {}
        self.attrs: dict[int, dict[str, Any]] = {}
        self.images: dict[str, str] = {}
        """Native values that hold an image as ONNX has it, by the ONNX value's name."""
        self.equal: dict[str, str] = {}
        self.prober = Prober(self)

    # --- what is known -------------------------------------------------------------------------------------

    def get(self, name: str) -> Value | None:
        """What is known of a value; None for an absent input."""
        if not name:
            return None
        found = self.values.get(name)
        if found is None:
            array = self.graph.constants.get(name)
            found = self.values[name] = Opaque(self.declared(name)) if array is None else Constant(name, array)
        return found

    def declared(self, name: str) -> list[Expr] | None:
        """The extents that the ONNX graph states for a value."""
        kind = self.graph.types.get(name)
        return None if kind is None or kind.shape is None else [Expr.of(d) for d in kind.shape]

    def shape(self, name: str) -> list[Expr] | None:
        """Symbolic shape of a value, None if even the rank is unknown."""
        value = self.get(name)
        if isinstance(value, Quantized):
            value = value.x
        if isinstance(value, View | Scores | Masked):
            return shape_of(value.axes)
        if isinstance(value, Constant | Extents):
            return [Expr.of(d) for d in value.array.shape]
        if isinstance(value, Row):
            return value.shape
        if isinstance(value, Opaque) and value.shape is not None:
            return value.shape
        return self.declared(name)

    def dtype(self, name: str) -> str:
        kind = self.graph.types.get(name) or self.out.types.get(name)
        return "unknown" if kind is None else kind.dtype

    def attributes(self, node: Node) -> dict[str, Any]:
        known = self.attrs.get(id(node))
        if known is None:
            known = self.attrs[id(node)] = attributes(node)
        return known

    def ints(self, value: Value | None) -> list[int] | None:
        """The entries of a small integer tensor when all are known numbers."""
        if isinstance(value, Constant) and value.array.dtype.name in INTEGERS and value.array.size <= 64:
            return [int(n) for n in value.array.ravel()]
        if isinstance(value, Extents):
            numbers = [entry.number if isinstance(entry, Expr) else None for entry in value.array.ravel()]
            return None if any(n is None for n in numbers) else [n for n in numbers if n is not None]
        return None

    def exprs(self, value: Value | None) -> list[Expr] | None:
        """The entries of a small integer tensor as expressions."""
        if isinstance(value, Extents):
            entries = list(value.array.ravel())
            return entries if all(isinstance(e, Expr) for e in entries) else None
        numbers = self.ints(value)
        return None if numbers is None else [Expr.of(n) for n in numbers]

    def same_extents(self, mask: str, base: Tensor) -> None:
        """Note that an input is used as the mask of a tensor, so that its extents are that tensor's."""
        for dim, size in zip(self.graph.types[mask].shape or (), (base.batch, base.tokens), strict=False):
            names = size.symbols()
            if isinstance(dim, str) and len(names) == 1 and size == Expr.of(next(iter(names))):
                self.equal[dim] = next(iter(names))

    # --- making native nodes ---------------------------------------------------------------------------------

    def constant(self, stem: str, array: np.ndarray) -> str:
        """Name of a float32 or integer constant added to the lifted graph."""
        return self.out.add_constant(stem, array)

    def float32(self, value: Constant, stem: str = "", turn: Callable[[np.ndarray], np.ndarray] | None = None) -> str:
        """Name of a float constant as float32, after ``turn`` (which should make a view); cached per ``stem``."""
        key = (value.name, stem)
        if key not in self.derived:
            array = value.array.astype(np.float32, copy=False)
            if turn is not None:
                array = turn(array)
            same = array is value.array and value.name in self.out.constants
            self.derived[key] = value.name if same else self.constant(value.name + stem, array)
        return self.derived[key]

    def derive(self, key: tuple[Any, ...], stem: str, make: Callable[[], Any]) -> str:
        """Name of the constant that ``make`` gives (an array or a StoredMatrix), added once per ``key``."""
        if key not in self.derived:
            self.derived[key] = self.constant(stem, make())
        return self.derived[key]

    def known(self, stem: str, value: Value) -> str:
        """A name for a value that the ONNX graph has none for."""
        name = self.out.fresh(stem)
        self.out.types[name] = TensorType("float32", None)
        self.values[name] = value
        return name

    def emit(
        self,
        op: str,
        inputs: list[str],
        attrs: dict[str, Any],
        tensor: Tensor,
        *,
        axes: Axes | None = None,
        name: str = "",
        integer: bool = False,
        why: str = "",
    ) -> View:
        """Add a native node; ``tensor`` gives the layout and extents of its result.

        ``name`` is the ONNX value that it computes: taken as the result's name when the two have the same layout.
        ``why`` is a remark for the report.
        """
        key = (op, tuple(inputs), tuple(sorted((k, repr(v)) for k, v in attrs.items())))
        view_axes = tensor.axes() if axes is None else axes
        known = self.made.get(key)
        if known is None:
            ours = view_axes == tensor.axes() and name and self.dtype(name) == ("int64" if integer else "float32")
            label = name if ours else self.out.fresh((name or op) + ".native")
            known = Tensor(label, tensor.layout, tensor.batch, tensor.tokens, tensor.features, integer)
            extents: dict[str, Expr | int] = {"1": 1, "B": tensor.batch, "S": tensor.tokens}
            extents["F"] = extents["H"] = tensor.features
            dims = [Expr.of(extents[letter]) for letter in tensor.layout]
            self.out.types[label] = TensorType("int64" if integer else "float32", tuple(_dim(d) for d in dims))
            self.nodes.append(Node(op, inputs, [label], attrs, name=name or label, why=why))
            self.made[key] = known
            if op in ("MaxPool", "SelectToken", "SliceFeatures") and inputs[0] in self.rounded:
                self.rounded[label] = self.rounded[inputs[0]]._replace(source=label)
        return View(known, view_axes)

    def emit_image(self, inputs: list[str], attrs: dict[str, Any], shape: list[Expr], name: str) -> str:
        """Add the native node that gives an image as ONNX has it, and return its output's name."""
        label = name if self.dtype(name) != "float16" else self.out.fresh(f"{name}.image")
        self.out.types[label] = TensorType("float32", tuple(_dim(size) for size in shape))
        self.nodes.append(Node("TokensToImage", inputs, [label], attrs, name=name))
        return label

    def solid(self, view: View) -> Tensor:
        """The native tensor behind a view with its scale applied."""
        if view.scale == 1.0:
            return view.base
        factor = self.scalar(view.scale)
        return self.emit("Mul", [view.base.name, factor], {}, view.base, name="").base

    def scalar(self, value: float) -> str:
        return self.derive(("scalar", float(np.float32(value))), "scalar", lambda: np.asarray(value, np.float32))

    def foreign(self, op: str, inputs: list[str], stem: str, dtype: str, shape: tuple[Any, ...], **attrs: Any) -> str:
        """Add an ONNX node (for what feeds a native node but is not native) and return its output's name."""
        import onnx

        name = self.out.fresh(stem)
        self.out.types[name] = TensorType(dtype, shape)
        proto = onnx.helper.make_node(op, inputs, [name], name=name, **attrs)
        self.nodes.append(
            Node(op, list(inputs), [name], domain="", name=name, proto=proto, why="computes an attention mask or bias")
        )
        return name

    # --- the walk ----------------------------------------------------------------------------------------------

    def run(self) -> Graph:
        """The lifted graph. Raises SameExtentError when the walk has to start again."""
        from espalier.passes.lifting import images, regions

        for name in self.graph.inputs:
            self.values[name] = self._input(name)
        for node in self.graph.nodes:
            if node.is_native:
                self.nodes.append(node)
                continue
            results = self._transfer(node)
            for name, value in zip(node.outputs, results, strict=False):
                if name:
                    self.values[name] = value = self._final(name, value)
                if isinstance(value, View) and not value.plain():
                    native = images.exported(self, name, value)
                    if native:
                        self.images[name] = native
            if not all(self._replaces(name) for name in node.outputs if name):
                self.nodes.append(node)
                if not node.why:
                    reasons = (v.why for v in results if isinstance(v, Opaque) and v.why)
                    node.why = next(reasons, "what reads its result is not native")
            for name in node.outputs:
                value_ = self.values.get(name)
                if isinstance(value_, View) and not value_.base.integer:
                    regions.elementwise(self, name, value_)
        return self._finish()

    def _final(self, name: str, value: Value) -> Value:
        """A graph output with its pending scale applied."""
        if name not in self.graph.outputs or not isinstance(value, View) or value.scale == 1.0:
            return value
        if value.base.integer or value.axes != value.base.axes():
            return value
        factor = self.scalar(value.scale)
        return self.emit("Mul", [value.base.name, factor], {}, replace(value.base, name=""), name=name)

    def _input(self, name: str) -> Value:
        shape = self.declared(name)
        dtype = self.dtype(name)
        if shape is not None and len(shape) == 2 and (dtype in INTEGERS or dtype == "bool"):
            tensor = Tensor(name, BS, shape[0], shape[1], 1, True)
            return View(tensor, tensor.axes())
        if shape is not None and dtype in FLOATS and len(shape) in (2, 3):
            features = shape[-1].number
            if features is not None and features > 0:
                layout = BSF if len(shape) == 3 else BF
                tensor = Tensor(name, layout, shape[0], shape[1] if len(shape) == 3 else ONE, features)
                if dtype != "float32":
                    return self.emit("Cast", [name], {"dtype": "float32"}, tensor, name=f"{name}.float32")
                return View(tensor, tensor.axes())
        opaque = Opaque(shape)
        if any(node.op in CONVOLUTIONS for node in self.graph.nodes):
            from espalier.passes.lifting import images

            return images.image(self, opaque, name) or opaque
        return opaque

    def _transfer(self, node: Node) -> list[Value]:
        attrs = self.attributes(node)
        inputs = [self.get(name) for name in node.inputs]
        function = RULES.get((node.domain, node.op))
        found: Result = None
        why = f"the engine has no {node.domain + '.' if node.domain else ''}{node.op}"
        recognised = self.recognised.get(node.outputs[0]) if node.outputs else None
        if recognised is not None:
            from espalier.passes.lifting import regions

            found = regions.apply(self, node.outputs[0], recognised)
        if found is None and function is not None:
            try:
                found = self._apply(function, node, attrs, inputs)
                why = f"this use of {node.op} is not one of the engine's"
            except EvaluationError as error:
                why = str(error)
        results: list[Value | None]
        if found is None:
            results = []
        elif isinstance(found, Value):
            results = [found]
        else:
            results = list(found)
        results += [None] * (len(node.outputs) - len(results))
        return [
            Opaque(self._guess(node, name), why) if v is None else v
            for name, v in zip(node.outputs, results, strict=False)
        ]

    def _apply(self, function: Rule, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
        data = inputs[0] if inputs else None
        if not isinstance(data, Quantized) or node.op not in MOVES:
            return function(self, node, attrs, inputs)
        moved = function(self, node, attrs, [data.x, *inputs[1:]])
        parts = [moved] if moved is None or isinstance(moved, Value) else moved
        return [None if part is None else replace(data, x=part) for part in parts]

    def _guess(self, node: Node, output: str) -> list[Expr] | None:
        """Shape of an opaque result: as its first input's for elementwise operators, else as declared."""
        if node.op in _SHAPED_LIKE_INPUT and node.domain == "":
            return self.shape(node.inputs[0])
        return self.declared(output)

    def _replaces(self, name: str) -> bool:
        """Whether a native tensor holds exactly this ONNX value, up to its float type."""
        if name in self.images:
            return True
        value = self.values.get(name)
        if not isinstance(value, View) or not value.plain():
            return False
        if value.base.integer:
            return self.dtype(name) == self.out.types[value.base.name].dtype
        return self.dtype(name) in FLOATS or self.dtype(name) == "unknown"

    # --- putting it together -----------------------------------------------------------------------------------

    def _finish(self) -> Graph:
        out = self.out
        live = self._live()
        done: set[str] = set()
        final: list[Node] = []
        for node in self.nodes:
            if not any(o in live for o in node.outputs):
                continue
            if not node.is_native:
                node = self._rewired(node, final, done)
            final.append(node)
        renamed: dict[str, str] = {}
        for name in out.outputs:
            self._provide(name, final, done, renamed)
        for node in final:
            if node.is_native:
                node.inputs = [renamed.get(n, n) for n in node.inputs]
                node.outputs = [renamed.get(n, n) for n in node.outputs]
            elif any(n in renamed for n in node.inputs):
                _set_inputs(node, [renamed.get(n, n) for n in node.inputs])
        for name in out.inputs:
            kind = out.types[name]
            if kind.shape is not None:
                out.types[name] = TensorType(
                    kind.dtype, tuple(self.equal.get(d, d) if isinstance(d, str) else d for d in kind.shape)
                )
        out.nodes = final
        out.prune()
        return out

    def source(self, name: str) -> str:
        """The native tensor that replaces an ONNX value; the value itself where none does, as for an input."""
        if name in self.graph.inputs:
            return name
        if name in self.images:
            return self.images[name]
        value = self.values.get(name)
        return value.base.name if isinstance(value, View) and self._replaces(name) else name

    def _live(self) -> set[str]:
        live = {self.source(n) for n in self.out.outputs} | set(self.out.outputs)
        for node in reversed(self.nodes):
            if any(o in live for o in node.outputs):
                reads = node.inputs if node.is_native else [self.source(n) for n in node_reads(node) if n]
                live.update(n for n in reads if n)
        return live

    def _rewired(self, node: Node, final: list[Node], done: set[str]) -> Node:
        """The foreign node reading native tensors instead of the values that they replace."""
        inputs = []
        for name in node.inputs:
            native = self.source(name) if name else name
            if native != name and self.dtype(name) not in (self.out.types[native].dtype, "unknown"):
                self._alias(native, name, final, done)
                native = name
            inputs.append(native)
        for name in node_reads(node):
            if name and name not in node.inputs and self.source(name) != name:
                self._alias(self.source(name), name, final, done)
        if inputs == node.inputs:
            return node
        copy = Node(node.op, inputs, list(node.outputs), dict(node.attrs), node.domain, node.name, node.proto, node.why)
        _set_inputs(copy, inputs)
        return copy

    def _provide(self, name: str, final: list[Node], done: set[str], renamed: dict[str, str]) -> None:
        """Make a graph output carry its own name."""
        native = self.source(name)
        if native == name or name in done:
            return
        free = native not in self.out.inputs and native not in renamed and native not in self.out.outputs
        if free and self.dtype(name) in (self.out.types[native].dtype, "unknown"):
            renamed[native] = name
            self.out.types[name] = self.out.types[native]
        else:
            self._alias(native, name, final, done)

    def _alias(self, native: str, name: str, final: list[Node], done: set[str]) -> None:
        if name in done:
            return
        done.add(name)
        dtype = self.dtype(name)
        dtype = dtype if dtype != "unknown" else self.out.types[native].dtype
        self.out.types[name] = TensorType(dtype, self.out.types[native].shape)
        final.append(Node("Cast", [native], [name], {"dtype": dtype}, name=name))


def _set_inputs(node: Node, inputs: list[str]) -> None:
    node.inputs = inputs
    if node.proto is not None:
        import onnx

        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        del proto.input[:]
        proto.input.extend(inputs)
        node.proto = proto


def _dim(size: Expr) -> int | str:
    number = size.number
    if number is not None:
        return number
    return repr(size)
