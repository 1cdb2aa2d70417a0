"""Putting a lowered graph's constants on a device: each weight in the way that suits it, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from espalier.gpu.device import Capabilities
from espalier.gpu.lower import LayerSpec, Lowered, label
from espalier.gpu.weights import Dense, Fp8, Int8, Semistructured, Weight, is_semistructured
from espalier.ir.graph import Graph

_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SPARSE = 0.3
"""Above this share of zeros a reader may expect them to be skipped, so the report says that they are not."""


@dataclass(frozen=True)
class Layer:
    """One instruction of the program, for the report. ``type``: what it computes with; ``format``: of its weight.

    ``why``: what it does not do that one might expect.
    """

    name: str
    op: str
    type: str = ""
    format: str = ""
    sparsity: float | None = None
    why: str = ""


class Builder:
    """Weights and tables of one program. ``layers`` describes each weight, by the name of its product."""

    def __init__(self, graph: Graph, lowered: Lowered, found: Capabilities, device: torch.device, dtype: torch.dtype):
        self.graph = graph
        self.found = found
        self.device = device
        self.dtype = dtype
        self.layers: dict[str, Layer] = {}
        self.weights = {name: self._weight(spec) for name, spec in lowered.layers.items()}
        self.tables = {
            name: self._tensor(
                np.asarray(graph.constants[name]), dtype if name in lowered.embeddings else torch.float32
            )
            for name in sorted(lowered.tables)
        }

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        # A copy: constants may be read-only views of a file.
        return torch.from_numpy(np.array(array)).to(self.device, dtype)

    def _weight(self, spec: LayerSpec) -> Weight:
        if spec.nodes[0].op == "QLinear":
            return self._int8(spec)
        values = np.concatenate([np.asarray(self.graph.constants[n.inputs[1]], np.float32) for n in spec.nodes])
        bias = self._bias(spec)
        dense: Dense | Fp8
        if spec.x_scale is None:
            dense = Dense(self._tensor(values, self.dtype), bias)
        else:
            dense = Fp8.of(self._tensor(values, torch.float32), bias, spec.x_scale, self.dtype)
        zeros = 1.0 - np.count_nonzero(values) / values.size
        half = is_semistructured(values)
        weight, why = self._semistructured(dense) if half else (dense, "")
        if not half and zeros > _SPARSE:
            why = "its zeros are multiplied too: a GPU skips only 2:4"
        self._describe(spec, _TYPES[self.dtype] if isinstance(dense, Dense) else "fp8", weight.format, zeros, why)
        return weight

    def _semistructured(self, dense: Dense | Fp8) -> tuple[Weight, str]:
        if not self.found.has("2:4"):
            return dense, f"its 2:4 zeros are multiplied too: {self.found.missing['2:4']}"
        try:
            return Semistructured(dense), "as 2:4 or dense, whichever measures faster"
        except RuntimeError as error:
            return dense, f"its 2:4 zeros are multiplied too: {str(error).splitlines()[0]}"

    def _int8(self, spec: LayerSpec) -> Weight:
        node = spec.nodes[0]
        names = [*node.inputs, *[""] * (7 - len(node.inputs))]
        _, weight, scale, zero, _, x_scale, x_zero = (
            np.asarray(self.graph.constants[name]) if name in self.graph.constants else None for name in names
        )
        if weight is None or scale is None:
            raise TypeError(f"QLinear {node.name!r} was verified to have constant weights")
        rows = weight.shape[0]
        # Unsigned weights become signed ones with their zero point 128 lower: the difference is the same.
        shift = 128 if weight.dtype == np.uint8 else 0
        zeros = np.zeros(rows, np.int32) if zero is None else np.broadcast_to(zero.astype(np.int32), rows)
        centred = weight.astype(np.int32) - zeros[:, None]
        zeros_share = 1.0 - np.count_nonzero(centred) / centred.size
        self._describe(spec, "int8" if x_scale is not None else "int8 per token", Int8.format, zeros_share, "")
        return Int8(
            self._tensor((weight.astype(np.int32) - shift).astype(np.int8), torch.int8),
            self._tensor(np.broadcast_to(scale.astype(np.float32), rows), torch.float32),
            self._tensor(zeros - shift, torch.int32),
            self._bias(spec, operand=4, dtype=torch.float32),
            None if x_scale is None else float(x_scale),
            None if x_zero is None else int(x_zero),
            x_zero is not None and x_zero.dtype == np.int8,
            self.dtype,
        )

    def _bias(self, spec: LayerSpec, operand: int = 2, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        names = [node.inputs[operand] if len(node.inputs) > operand else "" for node in spec.nodes]
        if not any(names):
            return None
        parts = [
            np.asarray(self.graph.constants[name], np.float32)
            if name
            else np.zeros(self.graph.constants[node.inputs[1]].shape[0], np.float32)
            for node, name in zip(spec.nodes, names, strict=True)
        ]
        return self._tensor(np.concatenate(parts), dtype or self.dtype)

    def _describe(self, spec: LayerSpec, type_: str, form: str, zeros: float, why: str) -> None:
        name = " + ".join(label(node) for node in spec.nodes)
        self.layers[spec.name] = Layer(name, spec.nodes[0].op, type_, form, float(zeros), why)
