"""The weights of a graph's linear layers on their way from constants to the engine's formats."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.compiler.formats import (
    Candidate,
    Choice,
    Tuner,
    float_candidates,
    integer_candidates,
    weight_key,
)
from espalier.compiler.matrices import SparseConstant
from espalier.errors import UnsupportedModelError
from espalier.ir.graph import Graph, Node

_FLOATS_BELOW = 0.5
"""With blocks of 1x4 less full than this, an integer weight may be faster by its single nonzeros as floats."""
_LARGEST = 255
"""Of an activation, as 8 bit integers have it in the engine."""

_TYPES = {"static": "int8", "token": "int8 per token"}
"""The type of a layer by the ``activations`` of QLinear."""

_Operands = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One weight of the program, for the report.

    ``type``: ``float32``, ``int8`` (with one scale for all activations) or ``int8 per token``. A layer of integers may
    be in a format of floats all the same, where that is faster: it computes with the same integers.
    """

    name: str
    op: str
    type: str
    format: str
    chunk: int
    measured: bool
    shape: tuple[int, int]
    nonzeros: int
    bytes: int
    why: str = ""

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1.0 - self.nonzeros / max(1, self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class _Prepared:
    """A weight in forms that depend on no format yet."""

    key: str
    shape: tuple[int, int]
    nonzeros: int
    candidates: list[Candidate]


class Weights:
    """Chooses and packs the weights of the nodes of ``graph``, one at a time, as :meth:`take` asks for them."""

    def __init__(self, graph: Graph, tuner: Tuner, *, threads: int) -> None:
        """Weights are prepared several at a time: the engine lets go of the interpreter meanwhile."""
        self._constants: dict[str, Any] = graph.constants
        self._tuner = tuner
        needed = [_operands(node) for node in graph.nodes if node.op in ("Linear", "QLinear")]
        self._unused = {operands: needed.count(operands) for operands in needed}
        windows = {name for node in graph.nodes if node.op == "Unfold" for name in node.outputs}
        self._only_integers = {
            _operands(node)
            for node in graph.nodes
            if node.attrs.get("activations") == "token" and node.inputs[0] in windows
        }
        """What windows read are floats until each window is rounded, which only integer layers do."""
        with ThreadPoolExecutor(max(1, threads)) as pool:
            self._prepared = dict(zip(self._unused, pool.map(self._prepare, self._unused), strict=True))

    def take(self, node: Node) -> tuple[Choice, Layer]:
        """The packed weight of a Linear or QLinear node."""
        operands = _operands(node)
        prepared = self._prepared[operands]
        choice = self._tuner.choose(prepared.key, prepared.candidates)
        self._unused[operands] -= 1
        if not self._unused[operands]:
            del self._prepared[operands]  # the packed form replaces it
        kind = _TYPES.get(node.attrs.get("activations", ""), "float32")
        layer = Layer(
            node.name or node.inputs[1],
            node.op,
            kind,
            choice.format,
            choice.chunk,
            choice.measured,
            prepared.shape,
            prepared.nonzeros,
            choice.weight.bytes,
        )
        return choice, layer

    def _prepare(self, operands: _Operands) -> _Prepared:
        if len(operands) == 1:
            return self._floats(self._constants[operands[0]])
        values, scales = _integers_of(*(self._constants[name] if name else None for name in operands))
        return self._integers(values, scales, alone=operands in self._only_integers)

    def _floats(self, constant: Any, kind: str = "") -> _Prepared:
        from espalier import _native

        if isinstance(constant, SparseConstant):
            matrix = constant.matrix()
        else:
            array = np.asarray(constant)
            if array.dtype != np.float32 or not array.flags.aligned:
                array = array.astype(np.float32)
            matrix = _native.compress(array)
        shape = (matrix.rows, matrix.columns)
        key = weight_key(kind, *shape, matrix.nonzeros, matrix.blocks4x1)
        return _Prepared(key, shape, matrix.nonzeros, float_candidates(matrix, self._tuner.isa))

    def _integers(self, values: np.ndarray, scales: np.ndarray, *, alone: bool) -> _Prepared:
        from espalier import _native

        if _may_overflow(values):
            if alone:
                raise UnsupportedModelError("a convolution's sums may exceed 32 bits, and its activations are rounded")
            return self._floats(_dense(values, scales))
        matrix = _native.Matrix8(values, scales)
        candidates = integer_candidates(matrix, self._tuner.isa)
        if not alone and matrix.nonzeros < _FLOATS_BELOW * 4 * matrix.blocks1x4:
            floats = self._floats(_dense(values, scales))
            candidates = sorted([*candidates, *floats.candidates], key=lambda candidate: candidate.cycles)
        shape = (matrix.rows, matrix.columns)
        key = weight_key("int8 ", *shape, matrix.nonzeros, matrix.blocks1x4)
        return _Prepared(key, shape, matrix.nonzeros, candidates)


def _operands(node: Node) -> _Operands:
    """The constants that a node's weight consists of: of a QLinear weight, scale and zero point ("" for none)."""
    if node.op == "Linear":
        return (node.inputs[1],)
    return (node.inputs[1], node.inputs[2], node.inputs[3] if len(node.inputs) > 3 else "")


def _integers_of(weight: Any, scale: Any, zero: Any) -> tuple[np.ndarray, np.ndarray]:
    """A QLinear's weight less its zero points, int16 ``[M, K]``, and a scale for each of its rows, float32 ``[M]``."""
    values = np.ascontiguousarray(weight, np.int16)
    if zero is not None:
        values = values - np.asarray(zero, np.int16).reshape(-1, 1)
    return values, np.ascontiguousarray(np.broadcast_to(np.asarray(scale, np.float32).reshape(-1), len(values)))


def _dense(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    dense: np.ndarray = values.astype(np.float32) * scales[:, None]
    return dense


def _may_overflow(values: np.ndarray) -> bool:
    """Whether a row's sum over the largest activations may exceed 32 bits; float32 then does the layer."""
    heaviest = int(np.abs(values).sum(axis=1, dtype=np.int64).max(initial=0))
    return heaviest * _LARGEST > np.iinfo(np.int32).max
