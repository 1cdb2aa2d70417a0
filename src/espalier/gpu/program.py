"""A native segment compiled for a GPU, behind the same interface as the engine's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from espalier.compiler.packed import Accelerator, OpTime, PackedBatch, PackedProgram, token_input
from espalier.errors import EngineError
from espalier.gpu.batches import DeviceBatch, Layout, Shape, buckets_up_to, mixtures, places_of, shape_of, split, take
from espalier.gpu.device import CHECKING, LANES, choose_precision, find
from espalier.gpu.instructions import Instruction, Observer, SliceFeatures, State, Store
from espalier.gpu.kernels.eager import EagerKernels
from espalier.gpu.lanes import Lanes, Recent
from espalier.gpu.lower import LayerSpec, lower
from espalier.gpu.parameters import Builder, Layer
from espalier.gpu.runtime import CpuRuntime, CudaRuntime, Runtime
from espalier.gpu.scales import Calibration, fingerprint
from espalier.ir.graph import Graph

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""The compute type of each precision."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``tokens`` and ``sequences`` of one launch at most; ``lanes`` under way at once; ``graphs`` kept by each.

    More tokens are computed in several launches, sequences of like length together. A sequence of more than ``tokens``
    is launched by itself, without a graph.
    """

    tokens: int = 16384
    sequences: int = 1024
    lanes: int = LANES
    graphs: int = 256


@dataclass
class _Prepared:
    """A lane's buffers for batches of one shape, and what computes them."""

    layout: Layout
    host_in: torch.Tensor
    device_in: torch.Tensor
    state: State
    device_out: torch.Tensor
    host_out: torch.Tensor
    launch: Callable[[], None]


@dataclass
class _Lane:
    stream: Any
    pool: Any
    prepared: Recent[Shape, _Prepared]


class GpuProgram(PackedProgram):
    """A native graph on one device. Safe to call from several threads at once.

    ``device``: ``cuda``, ``cuda:N`` or ``torch-cpu``. ``precision``: see :func:`~espalier.gpu.device.choose_precision`.
    ``tune``: measure which kernel is fastest, per layer and bucket; ``attention``: name one instead of measuring.
    ``weights`` and ``tables`` are what it has on the device, by name. Raises MissingDependencyError, InputError or
    UnsupportedModelError.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        device: str = "cuda",
        precision: str | None = None,
        calibration: Calibration | None = None,
        tune: bool = True,
        exact_padding: bool = False,
        limits: Limits | None = None,
        attention: str = "auto",
    ) -> None:
        place, self.found = find(device)
        self.precision = choose_precision(precision, self.found, calibrated=calibration is not None)
        self.limits = limits or Limits()
        self.where = device
        self.accelerator = None if device == CHECKING else Accelerator(self.found.name, self.found.memory)
        self.runtime: Runtime = CpuRuntime() if device == CHECKING else CudaRuntime(place)
        self.kernels = self._choose_kernels(tune, attention)
        self.observer: Observer | None = None
        self._dtype = DTYPES[self.precision]
        scales = calibration.scales if calibration is not None else {}
        self._lowered = lower(graph, dtype=self._dtype, scales=scales, exact_padding=exact_padding)
        self._plumbing = self._lowered.plumbing
        self._tokens_from = token_input(graph, self._plumbing)
        built = Builder(graph, self._lowered, self.found, place, self._dtype)
        self.weights, self.tables, self._layers = built.weights, built.tables, built.layers
        self.fingerprint = fingerprint(graph)
        self._domains = [domain for _, domain in self._plumbing.floats]
        self._float_widths = [int(graph.types[name].shape[-1]) for name, _ in self._plumbing.floats]  # type: ignore[index]
        self._widths = {output.number: output.width for output in self._plumbing.outputs}
        self._output_domains = {output.number: output.domain for output in self._plumbing.outputs}
        self._lanes: Lanes[_Lane, list[np.ndarray]] = Lanes(self.limits.lanes, self._lane, self._enqueue)
        self._profile: list[OpTime] = []
        self.runtime.settle()  # weights were put there by another stream than those of the lanes

    def _choose_kernels(self, tune: bool, attention: str) -> EagerKernels:
        if self.where == CHECKING:
            return EagerKernels()
        from espalier.gpu.kernels.fast import FastKernels

        return FastKernels(self.found, self.runtime.seconds, tune=tune, attention=attention)

    # ---- reports -----------------------------------------------------------------------------------------------------

    @property
    def instructions(self) -> list[Instruction]:
        """What a run executes, in order."""
        return self._lowered.instructions

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """The linear layers, by the name of their product."""
        return self._lowered.layers

    def layers(self) -> tuple[Layer, ...]:
        """Every operation: the format of its weight and its zeros where it has one."""
        return tuple(
            self._layers[instruction.weight]
            if hasattr(instruction, "weight")
            else Layer(instruction.label, instruction.op)
            for instruction in self.instructions
            if not isinstance(instruction, Store | SliceFeatures)
        )

    def profile(self) -> list[OpTime]:
        """The times that :meth:`measure` found last; none before."""
        return self._profile

    def reset_profile(self) -> None:
        """Forget them."""
        self._profile = []

    def measure(self, batch: PackedBatch) -> list[OpTime]:
        """Time every operation by itself on ``batch``: what a roofline compares. Runs without a graph."""
        lane = self._lane()
        rows: list[tuple[str, float]] = []
        with torch.inference_mode(), self.runtime.on(lane.stream):
            prepared = self._prepare(shape_of(batch))
            self._stage(prepared, batch)
            for instruction in self.instructions:
                # Without dropping what it reads: an operation is repeated.
                lasting = replace(instruction, last=())
                rows.append((instruction.label, self.runtime.seconds(lambda again=lasting: again.run(prepared.state))))  # type: ignore[misc]
        total = sum(seconds for _, seconds in rows) or 1.0
        self._profile = [OpTime(name, seconds, seconds / total) for name, seconds in rows]
        return self._profile

    # ---- running -----------------------------------------------------------------------------------------------------

    def warm_up(self, lengths: Sequence[int], *, tokens: int | None = None) -> float:
        """Measure kernels and capture graphs for batches of sequences like these; nothing where there are neither.

        Otherwise the first batch of each shape pays for that. Batches are filled at random, since kernels are compared
        on them.
        """
        if not self.runtime.captures:
            return 0.0
        start = time.perf_counter()
        columns = self._plumbing.columns
        least = max((column + 1 if column >= 0 else -column for column in columns), default=1)
        most = min(self.limits.tokens, tokens or self.limits.tokens)
        generator = np.random.default_rng(0)
        for size in buckets_up_to(most):
            likely = (each for each in mixtures(lengths, size, least=least) if len(each) <= self.limits.sequences)
            batches = (self._made_up(each, generator) for each in likely)
            for batch in {shape_of(batch): batch for batch in batches}.values():
                for _ in self._lanes.run_all([batch] * self.limits.lanes):
                    pass
        return time.perf_counter() - start

    def _made_up(self, lengths: Sequence[int], generator: np.random.Generator) -> PackedBatch:
        """A batch of sequences of these lengths."""
        each = np.array(lengths, np.int32)
        tokens, longest = int(each.sum()), int(each.max())
        rows = {"token": tokens, "sequence": len(each)}
        return PackedBatch(
            each,
            np.zeros_like(each),
            each,
            longest,
            [generator.integers(0, most, tokens, np.int32) for most in self._lowered.limits],
            [
                generator.standard_normal((rows[domain], width), np.float32)
                for domain, width in zip(self._domains, self._float_widths, strict=True)
            ],
            [np.zeros((1, 1, 1, longest), np.float32) for _ in self._plumbing.biases],
            None,
            None,
        )

    def _launch(self, batch: PackedBatch) -> list[np.ndarray]:
        self._check(batch)
        parts = split(batch.lengths.tolist(), tokens=self.limits.tokens, sequences=self.limits.sequences)
        if len(parts) == 1:
            (found,) = self._lanes.run_all([batch])
            return found
        taken = [take(batch, sequences, self._domains) for sequences in parts]
        outputs = [
            np.empty((batch.tokens if self._output_domains[n] == "token" else len(batch.lengths), width), np.float32)
            for n, width in sorted(self._widths.items())
        ]
        results = self._lanes.run_all(part for part, _ in taken)
        for sequences, (_, rows), found in zip(parts, taken, results, strict=True):
            for number, array in enumerate(found):
                outputs[number][rows if self._output_domains[number] == "token" else sequences] = array
        return outputs

    def _check(self, batch: PackedBatch) -> None:
        # On a GPU an index outside its table would take the whole process's context down.
        for index, rows in zip(batch.indices, self._lowered.limits, strict=True):
            wrong = index[(index < 0) | (index >= rows)]
            if wrong.size:
                raise EngineError(f"index {wrong[0]} is outside a table of {rows} rows; check the tokenizer")
        for column in self._plumbing.columns:
            places = places_of(batch, column)
            if ((places < 0) | (places >= batch.lengths)).any():
                raise EngineError(f"column {column} is not part of every sequence; give longer sequences")

    def _lane(self) -> _Lane:
        return _Lane(self.runtime.stream(), self.runtime.pool(), Recent(self.limits.graphs))

    def _enqueue(self, lane: _Lane, batch: PackedBatch) -> Callable[[], list[np.ndarray]]:
        shape = shape_of(batch)
        with torch.inference_mode(), self.runtime.on(lane.stream):
            if self._captures(shape):
                prepared = lane.prepared.get(shape, lambda: self._capture(shape, lane, batch))
            else:
                prepared = self._prepare(shape)
            self._stage(prepared, batch)
            prepared.launch()
            prepared.host_out.copy_(prepared.device_out, non_blocking=True)
            wait = self.runtime.mark(lane.stream)

        def finish() -> list[np.ndarray]:
            wait()
            return self._read(prepared, batch)

        return finish

    def _captures(self, shape: Shape) -> bool:
        """Whether batches of this shape run by a graph: those with biases differ in more than their bucket."""
        return not self._plumbing.biases and self.observer is None and shape.tokens <= self.limits.tokens

    def _capture(self, shape: Shape, lane: _Lane, first: PackedBatch) -> _Prepared:
        """Buffers and a graph. The run before a capture computes ``first``: kernels are compared on real data."""
        prepared = self._prepare(shape)
        self._stage(prepared, first)
        prepared.launch = self.runtime.capture(prepared.launch, lane.stream, lane.pool)
        return prepared

    def _prepare(self, shape: Shape) -> _Prepared:
        """Buffers, and what computes on them one operation after another."""
        layout = Layout(
            shape,
            columns=sorted(set(self._plumbing.columns)),
            indices=len(self._plumbing.indices),
            floats=list(zip(self._domains, self._float_widths, strict=True)),
        )
        device_in = torch.zeros(layout.size, dtype=torch.int32, device=self.runtime.device)
        sizes = [self._rows(number, shape) * width for number, width in sorted(self._widths.items())]
        device_out = torch.zeros(sum(sizes), device=self.runtime.device)
        outputs = [
            part.view(-1, width)
            for part, (_, width) in zip(torch.split(device_out, sizes), sorted(self._widths.items()), strict=True)
        ]
        batch = DeviceBatch.of(layout, device_in)
        state = State(self.kernels, self.tables, self.weights, batch, outputs, self.observer)

        def work() -> None:
            for instruction in self.instructions:
                instruction.run(state)

        return _Prepared(
            layout,
            self.runtime.host_buffer(layout.size, torch.int32),
            device_in,
            state,
            device_out,
            self.runtime.host_buffer(sum(sizes), torch.float32),
            work,
        )

    def _stage(self, prepared: _Prepared, batch: PackedBatch) -> None:
        prepared.layout.fill(prepared.host_in.numpy(), batch)
        prepared.device_in.copy_(prepared.host_in, non_blocking=True)
        prepared.state.batch.biases = [
            torch.tensor(bias, dtype=torch.float32, device=self.runtime.device) for bias in batch.biases
        ]

    def _rows(self, number: int, shape: Shape) -> int:
        return shape.tokens if self._output_domains[number] == "token" else shape.sequences

    def _read(self, prepared: _Prepared, batch: PackedBatch) -> list[np.ndarray]:
        """Copies of the rows that are real."""
        host = prepared.host_out.numpy()
        found: list[np.ndarray] = []
        at = 0
        for number, width in sorted(self._widths.items()):
            real = batch.tokens if self._output_domains[number] == "token" else len(batch.lengths)
            found.append(host[at : at + real * width].reshape(real, width).copy())
            at += self._rows(number, prepared.layout.shape) * width
        return found
