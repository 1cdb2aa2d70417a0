"""Lowering: a native graph becomes a list of instructions over packed tokens.

On the way linear layers take their activation along, the three that feed an attention become one, LayerNorm takes the
sum it reads, and sums of embeddings become one lookup. Which layers run in FP8 is decided before
(:mod:`espalier.gpu.calibration`); here every value learns in which forms its readers want it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from espalier.compiler.plumbing import Output, Plumbing, bias_function, host_function, masks_of, stores_of
from espalier.errors import GraphError, UnsupportedModelError
from espalier.gpu import instructions as ops
from espalier.gpu.form import Form
from espalier.gpu.kernels.eager import ACTIVATIONS
from espalier.ir.graph import Graph, Node

_ALIGNMENT = 16
"""FP8 products want both extents of a weight in multiples of this."""


@dataclass
class LayerSpec:
    """Linear layers that become one product: nodes in the order of their rows.

    ``x_scale``: the scale of its e4m3 activations, None where it runs in the compute type. ``suits_fp8``: whether it
    could run in FP8.
    """

    nodes: list[Node]
    x: str
    x_scale: float | None = None
    suits_fp8: bool = False

    @property
    def name(self) -> str:
        """Its key among the weights."""
        return self.nodes[0].outputs[0]


@dataclass
class Lowered:
    """The result. ``layers`` by name; ``tables``: constants that instructions name, ``embeddings`` those of lookups.

    ``limits``: what each index input must stay below.
    """

    instructions: list[ops.Instruction] = field(default_factory=list)
    layers: dict[str, LayerSpec] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    embeddings: set[str] = field(default_factory=set)
    limits: list[int] = field(default_factory=list)
    plumbing: Plumbing = field(default_factory=Plumbing)


def lower(graph: Graph, *, dtype: torch.dtype, scales: Mapping[str, float], exact_padding: bool) -> Lowered:
    """Lower ``graph`` to the compute type ``dtype``, with FP8 in the linear layers that ``scales`` names.

    ``scales`` has, by :func:`label` of a layer, the scale of its activations. Raises UnsupportedModelError for what the
    executor cannot run, GraphError for malformed graphs.
    """
    return _Lowering(graph, dtype, scales, exact_padding).run()


def label(node: Node) -> str:
    """What a node is called in reports and calibrations."""
    return node.name or node.outputs[0]


class _Lowering:
    def __init__(self, graph: Graph, dtype: torch.dtype, scales: Mapping[str, float], exact_padding: bool) -> None:
        self.graph = graph
        self.dtype = dtype
        self.scales = scales
        self.result = Lowered(plumbing=masks_of(graph, exact_padding=exact_padding))
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self.stores = stores_of(graph, self.producers)
        self.terms: dict[str, tuple[tuple[str, str], ...]] = {}
        self.taken: set[str] = set()
        self.indices: dict[str, int] = {}
        self.biases: dict[str, int] = {}
        self.domains: dict[str, str] = {}
        self.merged: set[str] = set()

    def run(self) -> Lowered:
        for name in self.graph.inputs:
            self._load(name)
        for node in self.graph.nodes:
            self._find_terms(node)
        for node in self.graph.nodes:
            if node.outputs[0] not in self.taken:
                self._lower(node)
        self._check_outputs()
        self._choose_forms()
        self._find_last_reads()
        return self.result

    def _lower(self, node: Node) -> None:
        if node.op in ("Positions", "PositionsFromIds", "RelativeBias"):
            return  # computed on the host: see _index and _bias
        if node.outputs[0] in self.terms:
            self._embed(node)
        elif node.op in ("Add", "Sub", "Mul", "Div"):
            self._arithmetic(node)
        else:
            rule = getattr(self, f"_lower_{node.op.lower()}", None)
            if rule is None:
                raise UnsupportedModelError(f"the GPU executor has no operation {node.op} (node {node.name!r})")
            rule(node)

    # ---- values ------------------------------------------------------------------------------------------------------

    def _add(self, instruction: ops.Instruction, domain: str) -> None:
        self.result.instructions.append(instruction)
        self._define(instruction.out, domain)

    def _define(self, name: str, domain: str) -> None:
        """A value exists now: store the outputs that are made of it."""
        self.domains[name] = domain
        for store in self.stores.get(name, []):
            width = self._width(name) if store.width is None else store.width
            number = len(self.result.plumbing.outputs)
            output = Output(store.output, number, domain, width, store.squeeze, store.dtype)
            self.result.plumbing.outputs.append(output)
            self.result.instructions.append(
                ops.Store(
                    out=f"{store.output} (output)",
                    label=store.output,
                    x=name,
                    number=number,
                    first=store.first,
                    width=width,
                )
            )

    def _value(self, name: str) -> str:
        if name not in self.domains:
            raise UnsupportedModelError(f"the GPU executor cannot read {name!r}: no tensor of tokens or sequences")
        return name

    def _domain(self, node: Node, names: list[str]) -> str:
        """The one domain of the operands."""
        domains = {self.domains[name] for name in names}
        if len(domains) > 1:
            raise UnsupportedModelError(f"{node.op} {node.name!r} mixes tokens and whole sequences")
        return domains.pop()

    def _width(self, name: str) -> int:
        width = (self.graph.types[name].shape or ("?",))[-1]
        if not isinstance(width, int):
            raise UnsupportedModelError(f"{name!r} has an unknown number of features")
        return width

    def _table(self, name: str) -> str:
        self.result.tables.add(name)
        return name

    def _operand(self, node: Node, number: int) -> str:
        return node.inputs[number] if len(node.inputs) > number else ""

    def _sole_reader(self, name: str) -> Node | None:
        """The one node that reads ``name`` when nothing else does, outputs included."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.stores else None

    def _load(self, name: str) -> None:
        kind = self.graph.types[name]
        rank = len(kind.shape or ())
        read = any(
            name in node.inputs[: 3 if node.op == "Attention" else None] for node in self.consumers.get(name, [])
        )
        if kind.dtype != "float32" or rank not in (2, 3) or not read:
            return
        domain = "token" if rank == 3 else "sequence"
        floats = self.result.plumbing.floats
        self._add(ops.Load(out=name, label=name, number=len(floats)), domain)
        floats.append((name, domain))

    # ---- embeddings, positions, biases -------------------------------------------------------------------------------

    def _find_terms(self, node: Node) -> None:
        """Note sums of embeddings: ``terms`` are (table, ids), and the parts of a sum are taken by it."""
        out = node.outputs[0]
        if node.op == "Embedding":
            self.terms[out] = ((node.inputs[0], node.inputs[1]),)
        elif node.op == "Add" and node.inputs[0] != node.inputs[1]:
            parts = [name for name in node.inputs if name in self.terms and self._sole_reader(name) is node]
            if len(parts) == 2:
                self.terms[out] = self.terms[parts[0]] + self.terms[parts[1]]
                self.taken.update(parts)

    def _embed(self, node: Node) -> None:
        out = node.outputs[0]
        tables = tuple((self._table(table), self._index(ids, table)) for table, ids in self.terms[out])
        self.result.embeddings.update(table for table, _ in tables)
        self._add(ops.Embed(out=out, label=label(node), tables=tables), "token")

    def _index(self, name: str, table: str) -> int:
        rows = int(self.graph.constants[table].shape[0])
        if name not in self.indices:
            self.indices[name] = len(self.result.limits)
            self.result.limits.append(rows)
            self.result.plumbing.indices.append(host_function(self.graph, self.producers, name))
        number = self.indices[name]
        self.result.limits[number] = min(self.result.limits[number], rows)
        return number

    def _bias(self, name: str) -> int:
        if name not in self.biases:
            self.biases[name] = len(self.result.plumbing.biases)
            self.result.plumbing.biases.append(bias_function(self.graph, self.producers, name, lambda same: same))
        return self.biases[name]

    # ---- linear layers -----------------------------------------------------------------------------------------------

    def _lower_linear(self, node: Node) -> None:
        out = node.outputs[0]
        if out in self.merged:
            return
        group = self._attention_group(node)
        if len(group) > 1:
            self._merge(group)
            return
        reader = self._sole_reader(out)
        activation = ""
        if reader is not None and reader.op == "Activation" and reader.attrs["kind"] in ACTIVATIONS:
            activation, out = reader.attrs["kind"], reader.outputs[0]
            self.taken.add(out)
        spec = self._layer([node])
        self._add(
            ops.Gemm(out=out, label=label(node), x=spec.x, weight=spec.name, activation=activation),
            self.domains[spec.x],
        )

    _lower_qlinear = _lower_linear

    def _layer(self, nodes: list[Node]) -> LayerSpec:
        first, x = nodes[0], self._value(nodes[0].inputs[0])
        extents = self.graph.constants[first.inputs[1]].shape
        suits = first.op == "Linear" and self.domains[x] == "token" and not any(n % _ALIGNMENT for n in extents)
        scale = self.scales.get(label(first))
        if scale is not None and not suits:
            raise UnsupportedModelError(
                f"{label(first)!r} cannot run in FP8: that takes a float layer over tokens, its extents multiples of "
                f"{_ALIGNMENT}; got {first.op} of {list(extents)}. Take it out of the calibration"
            )
        spec = LayerSpec(nodes, x, scale, suits)
        self.result.layers[spec.name] = spec
        return spec

    def _attention_group(self, node: Node) -> list[Node]:
        """The linear layers of ``node``'s input that only the same attention reads, ``node`` among them."""
        reader = self._sole_reader(node.outputs[0])
        if node.op != "Linear" or reader is None or reader.op != "Attention":
            return [node]
        makers = [self.producers.get(name) for name in dict.fromkeys(reader.inputs[:3])]
        return [
            maker
            for maker in makers
            if maker is not None
            and maker.op == "Linear"
            and maker.inputs[0] == node.inputs[0]
            and self._sole_reader(maker.outputs[0]) is reader
            and (label(maker) in self.scales) == (label(node) in self.scales)
        ]

    def _merge(self, group: list[Node]) -> None:
        spec = self._layer(group)
        name, domain = f"{spec.name} (merged)", self.domains[spec.x]
        labels = " + ".join(label(node) for node in group)
        self.result.instructions.append(ops.Gemm(out=name, label=labels, x=spec.x, weight=spec.name))
        self.domains[name] = domain
        first = 0
        for node in group:
            out = node.outputs[0]
            stop = first + int(self.graph.constants[node.inputs[1]].shape[0])
            self.merged.add(out)
            self._add(ops.SliceFeatures(out=out, label=label(node), x=name, start=first, stop=stop), domain)
            first = stop

    # ---- other operations --------------------------------------------------------------------------------------------

    def _lower_activation(self, node: Node) -> None:
        if node.attrs["kind"] not in ACTIVATIONS:
            raise UnsupportedModelError(f"the GPU executor has no activation {node.attrs['kind']!r}")
        x = self._value(node.inputs[0])
        self._add(ops.Activate(out=node.outputs[0], label=label(node), x=x, kind=node.attrs["kind"]), self.domains[x])

    def _arithmetic(self, node: Node) -> None:
        reader = self._sole_reader(node.outputs[0])
        constant = [name for name in node.inputs if name in self.graph.constants]
        if len(constant) == 2:
            raise GraphError(f"{node.op} {node.name!r} has only constant operands; fold constants first")
        if node.op == "Add" and not constant and reader is not None and reader.op == "LayerNorm":
            return  # LayerNorm takes the sum: see _lower_layernorm
        x, y = (self._table(name) if name in constant else self._value(name) for name in node.inputs)
        domain = self._domain(node, [name for name in (x, y) if name not in constant])
        self._add(ops.Arithmetic(out=node.outputs[0], label=label(node), kind=node.op, x=x, y=y), domain)

    def _lower_layernorm(self, node: Node) -> None:
        source = self.producers.get(node.inputs[0])
        x, residual = node.inputs[0], ""
        if x not in self.domains and source is not None and source.op == "Add":
            x, residual = (self._value(name) for name in source.inputs)
            self._domain(source, [x, residual])
        beta = self._operand(node, 2)
        self._add(
            ops.Norm(
                out=node.outputs[0],
                label=label(node),
                x=self._value(x),
                residual=residual,
                gamma=self._table(node.inputs[1]),
                beta=self._table(beta) if beta else "",
                epsilon=float(node.attrs["epsilon"]),
            ),
            self.domains[x],
        )

    def _lower_attention(self, node: Node) -> None:
        q, k, v = (self._value(name) for name in node.inputs[:3])
        bias = self._operand(node, 4)
        self._add(
            ops.Attend(
                out=node.outputs[0],
                label=label(node),
                q=q,
                k=k,
                v=v,
                heads=node.attrs["heads"],
                scale=float(node.attrs["scale"]),
                bias=self._bias(bias) if bias else -1,
            ),
            "token",
        )

    def _lower_selecttoken(self, node: Node) -> None:
        column = node.attrs["index"]
        self.result.plumbing.columns.append(column)
        x = self._value(node.inputs[0])
        self._add(ops.SelectToken(out=node.outputs[0], label=label(node), x=x, column=column), "sequence")

    def _lower_maskedmean(self, node: Node) -> None:
        x, epsilon = self._value(node.inputs[0]), float(node.attrs["epsilon"])
        self._add(ops.MaskedMean(out=node.outputs[0], label=label(node), x=x, epsilon=epsilon), "sequence")

    def _lower_l2normalize(self, node: Node) -> None:
        x, epsilon = self._value(node.inputs[0]), float(node.attrs["epsilon"])
        self._add(ops.L2Normalize(out=node.outputs[0], label=label(node), x=x, epsilon=epsilon), self.domains[x])

    def _lower_softmax(self, node: Node) -> None:
        x = self._value(node.inputs[0])
        self._add(ops.Softmax(out=node.outputs[0], label=label(node), x=x), self.domains[x])

    def _lower_fakequantize(self, node: Node) -> None:
        x, zero = self._value(node.inputs[0]), np.asarray(self.graph.constants[node.inputs[2]])
        self._add(
            ops.FakeQuantize(
                out=node.outputs[0],
                label=label(node),
                x=x,
                scale=float(np.asarray(self.graph.constants[node.inputs[1]])),
                zero=int(zero),
                signed=zero.dtype == np.int8,
            ),
            self.domains[x],
        )

    def _lower_slicefeatures(self, node: Node) -> None:
        out = node.outputs[0]
        if not self.consumers.get(out):
            return  # an output, stored straight from its source
        if node.attrs["squeeze"]:
            raise UnsupportedModelError(f"SliceFeatures {node.name!r}: a squeezed slice is read by another operation")
        x, start, stop = self._value(node.inputs[0]), node.attrs["start"], node.attrs["stop"]
        self._add(ops.SliceFeatures(out=out, label=label(node), x=x, start=start, stop=stop), self.domains[x])

    def _lower_cast(self, node: Node) -> None:
        if self.consumers.get(node.outputs[0]):
            raise UnsupportedModelError(f"Cast {node.name!r} stands inside the graph; it belongs at its edges")

    # ---- forms and lifetimes -----------------------------------------------------------------------------------------

    def _check_outputs(self) -> None:
        outputs = self.result.plumbing.outputs
        missing = [name for name in self.graph.outputs if name not in {o.name for o in outputs}]
        if missing:
            raise UnsupportedModelError(f"the output {missing[0]!r} does not come from an operation of the executor")
        order = {name: i for i, name in enumerate(self.graph.outputs)}
        outputs.sort(key=lambda output: order[output.name])

    def _choose_forms(self) -> None:
        """One scale per value: that of its FP8 readers, the largest where they differ; no other form if all are FP8."""
        layers, instructions = self.result.layers, self.result.instructions
        scales: dict[str, float] = {}
        for layer in layers.values():
            if layer.x_scale is not None:
                scales[layer.x] = max(layer.x_scale, scales.get(layer.x, 0.0))
        for layer in layers.values():
            if layer.x_scale is not None:
                layer.x_scale = scales[layer.x]
        wide = {
            name
            for instruction in instructions
            for name in instruction.reads
            if not (isinstance(instruction, ops.Gemm) and layers[instruction.weight].x_scale is not None)
        }
        for instruction in instructions:
            out = instruction.out
            instruction.form = Form(self.dtype, scales.get(out), keep=out in wide or out not in scales)

    def _find_last_reads(self) -> None:
        seen: set[str] = set()
        for instruction in reversed(self.result.instructions):
            instruction.last = tuple(dict.fromkeys(name for name in instruction.reads if name not in seen))
            seen.update(instruction.reads)
