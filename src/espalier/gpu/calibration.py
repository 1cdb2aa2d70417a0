"""Learning FP8 scales from data: the range of every linear layer's input, and what FP8 then costs in accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from espalier.errors import DataError, UnsupportedModelError
from espalier.gpu.form import FP8_MAX, quantize
from espalier.gpu.instructions import Observer
from espalier.gpu.lower import LayerSpec, label
from espalier.gpu.scales import Calibration, LayerScale, combined
from espalier.gpu.weights import Dense, Fp8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from espalier.gpu.program import GpuProgram

MAX_ERROR = 0.1
"""Layers whose results FP8 changes by more than this, relative and root mean square, stay in bf16.

Rounding both operands to 3 bits of mantissa gives 0.03 to 0.04 where values are spread as usual.
"""


@dataclass
class _Layer:
    """What is known of one product: rows seen, the largest input, squares of its results and of their errors."""

    spec: LayerSpec
    weight: Dense
    largest: float = 0.0
    rows: int = 0
    squares: float = 0.0
    errors: float = 0.0

    @property
    def scale(self) -> float:
        return self.largest / FP8_MAX or 1.0

    def widen(self, x: torch.Tensor) -> None:
        # Not max(): it drops a NaN.
        found = float(x.abs().max())
        self.largest = found if found > self.largest or math.isnan(found) else self.largest
        self.rows += len(x)

    def compare(self, x: torch.Tensor) -> None:
        exact = self.weight.product(x, add_bias=False)
        rounded = Fp8.of(self.weight.values, None, self.scale, exact.dtype).product(quantize(x, self.scale))
        self.squares += float(exact.double().square().sum())
        self.errors += float((rounded - exact).double().square().sum())


def learn(programs: Sequence[GpuProgram], run: Callable[[], None], *, max_error: float = MAX_ERROR) -> Calibration:
    """Scales for the linear layers of ``programs``, which compute in fp32.

    ``run()`` runs the data through them; it is called twice. Raises UnsupportedModelError when there is no layer that
    FP8 suits or a layer reads what is not finite, DataError when ``run`` ran nothing.
    """
    layers = [_layers(program) for program in programs]
    if not any(layers):
        raise UnsupportedModelError(
            "this model has no linear layer over tokens whose extents are multiples of 16, so nothing can run in FP8"
        )
    with _observed(programs, [_each(found, _Layer.widen) for found in layers]):
        run()
    with _observed(programs, [_each(found, _Layer.compare) for found in layers]):
        run()
    tokens = max(layer.rows for found in layers for layer in found.values())
    if not tokens:
        raise DataError("there is nothing to calibrate on; give a few hundred real sequences")
    scales: dict[str, LayerScale] = {}
    for layer in (layer for found in layers for layer in found.values()):
        error = math.sqrt(layer.errors / layer.squares) if layer.squares else 0.0
        for node in layer.spec.nodes:
            if not math.isfinite(layer.largest):
                raise UnsupportedModelError(f"layer {label(node)!r} reads infinity or NaN on the calibration data")
            scales[label(node)] = LayerScale(layer.scale, error, "fp8" if error <= max_error else "bf16")
    return Calibration(combined(program.fingerprint for program in programs), scales, tokens)


def _layers(program: GpuProgram) -> dict[str, _Layer]:
    found: dict[str, _Layer] = {}
    for name, spec in program.specs.items():
        weight = program.weights[name]
        if spec.suits_fp8 and isinstance(weight, Dense):
            found[name] = _Layer(spec, weight)
    return found


def _each(layers: dict[str, _Layer], act: Callable[[_Layer, torch.Tensor], None]) -> Observer:
    def observer(name: str, x: torch.Tensor) -> None:
        if name in layers:
            act(layers[name], x)

    return observer


@contextmanager
def _observed(programs: Sequence[GpuProgram], observers: Sequence[Observer]) -> Iterator[None]:
    for program, observer in zip(programs, observers, strict=True):
        program.observer = observer
    try:
        yield
    finally:
        for program in programs:
            program.observer = None
