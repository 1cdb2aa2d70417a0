"""The native engine of Espalier."""

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

import espalier.errors

Pair = tuple[int, int]
Window = tuple[Pair, Pair, Pair, Pair, Pair, Pair]
"""Rows and columns of: the input, the output, the kernel, strides, dilations, padding before. Known to type checkers alone."""

class NativeError(espalier.errors.EngineError):
    pass

def current_isa() -> str:
    """Widest usable instruction set, capped by ESPALIER_MAX_ISA."""

def arch_flags() -> list[str]:
    """What this processor and operating system offer."""

def built_isas() -> list[str]: ...
def select_isa(flags: Sequence[str], cap: str = "") -> str:
    """The instruction set that made-up flags would select."""

def panel_shape(isa: str) -> tuple[int, int]:
    """(lanes, groups per panel)"""

class SparseMatrix:
    @staticmethod
    def from_parts(
        rows: int,
        columns: int,
        starts: NDArray[numpy.uint32],
        indices: NDArray[numpy.uint16],
        values: NDArray[numpy.float32],
    ) -> SparseMatrix: ...
    @staticmethod
    def decode(
        rows: int,
        columns: int,
        counts: NDArray[numpy.uint32],
        gaps: NDArray[numpy.uint8],
        low: NDArray[numpy.uint16],
        middle: NDArray[numpy.uint8],
        top: NDArray[numpy.uint8],
    ) -> SparseMatrix: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nonzeros(self) -> int: ...
    @property
    def blocks4x1(self) -> int: ...
    @property
    def starts(self) -> NDArray[Any]: ...
    @property
    def indices(self) -> NDArray[Any]: ...
    @property
    def values(self) -> NDArray[Any]: ...
    def candidates(self, isa: str) -> list[tuple[str, int, float]]:
        """(format, chunk, estimated cycles for a full panel), cheapest first."""

def compress(dense: NDArray[numpy.float32]) -> SparseMatrix:
    """The nonzeros of a float32 matrix with any strides."""

class Weight:
    def __init__(self, matrix: SparseMatrix, format: str, chunk: int, isa: str) -> None: ...
    @property
    def bytes(self) -> int: ...
    def time(self, isa: str) -> float:
        """Best seconds for one full panel, one thread."""

class Matrix8:
    def __init__(self, values: NDArray[numpy.int16], scales: NDArray[numpy.float32]) -> None:
        """An integer weight: values less their zero points, [M, K] within [-255, 255], and a scale per row, [M]."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nonzeros(self) -> int: ...
    @property
    def blocks1x4(self) -> int: ...
    def candidates(self, isa: str) -> list[tuple[str, float]]:
        """(format, estimated cycles for a full panel), cheapest first."""

class Weight8:
    def __init__(self, matrix: Matrix8, format: str, isa: str) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def nonzeros(self) -> int: ...
    def time(self, isa: str) -> float:
        """Best seconds for one full panel, one thread."""

class Program:
    def __init__(self, isa: str, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def panel_width(self) -> int: ...
    def add_embed(self, name: str, tables: Sequence[tuple[Any, NDArray[numpy.float32] | None, int]]) -> int: ...
    def add_load(self, name: str, features: int, lanes: int, float_input: int, planes: bool = False) -> int:
        """lanes: those of each sequence, 0 for one per token."""

    def add_linear(
        self,
        name: str,
        x: int,
        weight: Weight,
        bias: NDArray[numpy.float32] | None,
        residual: int = -1,
        act: str = "identity",
        window: Window | None = None,
        align: int = 1,
    ) -> int:
        """Takes the weight over. With a window (see `Window` in csrc/engine/program.h), a convolution."""

    def add_quantize(self, name: str, x: int, scale: float | None = None, zero: float | None = None) -> int:
        """8 bit integers (q - zero) * scale: one scale and zero (in 0..255) for all tokens, or by default one of each per token, from its own features."""

    def add_dequantize(self, name: str, x: int) -> int:
        """The floats that a quantised value stands for."""

    def add_add8(self, name: str, a: int, b: int, relu: bool, scale: float, zero: float) -> int:
        """The sum of two quantised values, not negative with relu, quantised with this scale and zero."""

    def add_linear8(
        self,
        name: str,
        x: int,
        weight: Weight8,
        bias: NDArray[numpy.float32] | None,
        residual: int = -1,
        act: str = "identity",
        out_scale: float | None = None,
        out_zero: float | None = None,
        window: Window | None = None,
    ) -> int:
        """x is a quantised value; so is the result, with out_scale and out_zero. Takes the weight over."""

    def add_layer_norm(
        self, name: str, x: int, gamma: NDArray[numpy.float32], beta: NDArray[numpy.float32] | None, epsilon: float
    ) -> int: ...
    def add_unary(self, name: str, x: int, op: str) -> int: ...
    def add_binary(self, name: str, op: str, a: int, b: int) -> int: ...
    def add_binary_constant(self, name: str, op: str, a: int, b: NDArray[numpy.float32]) -> int: ...
    def add_concat(self, name: str, parts: Sequence[int]) -> int: ...
    def add_spread(self, name: str, x: int, lanes: int) -> int:
        """One value per sequence in each of its lanes."""

    def add_max_pool(self, name: str, x: int, window: Window) -> int: ...
    def add_mean_pool(self, name: str, x: int, window: Window, count_edges: bool) -> int: ...
    def add_softmax(self, name: str, x: int) -> int: ...
    def add_l2_normalize(self, name: str, x: int, epsilon: float) -> int: ...
    def add_attention(
        self,
        name: str,
        qkv: tuple[int, int, int],
        first_features: tuple[int, int, int],
        heads: int,
        head_size: int,
        value_size: int,
        scale: float,
        bias_input: int = -1,
    ) -> int: ...
    def add_select(self, name: str, x: int, column: int) -> int: ...
    def add_mean(self, name: str, x: int, epsilon: float) -> int: ...
    def add_store(self, name: str, x: int, first: int, width: int, planes: bool = False) -> int: ...
    def finish(self) -> None: ...
    def run(
        self,
        lengths: NDArray[numpy.int32],
        rows: NDArray[numpy.int32],
        starts: NDArray[numpy.int32],
        widths: NDArray[numpy.int32],
        indices: Sequence[NDArray[numpy.int32]],
        floats: Sequence[NDArray[numpy.float32]],
        biases: Sequence[NDArray[numpy.float32]],
        key_bias: NDArray[numpy.float32] | None,
        token_weights: NDArray[numpy.float32] | None,
        outputs: Sequence[NDArray[numpy.float32]],
    ) -> None: ...
    def profile(self) -> list[tuple[str, float, int]]:
        """(name, seconds over all threads, runs) per operation."""

    def reset_profile(self) -> None: ...
