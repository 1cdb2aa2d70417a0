"""A native segment compiled for the engine."""

from __future__ import annotations

import numpy as np

from espalier.compiler.formats import Tuner
from espalier.compiler.lower import Lowering
from espalier.compiler.packed import OpTime, PackedBatch, PackedProgram, token_input
from espalier.compiler.weights import Layer
from espalier.ir.graph import Graph


class NativeProgram(PackedProgram):
    """A native graph, compiled for this machine's CPU. Safe to call from several threads at once.

    ``exact_padding``: compute padding tokens too, as ONNX Runtime does, for graphs whose padding something reads.
    """

    where = "native"

    def __init__(self, graph: Graph, *, threads: int, tune: bool = True, exact_padding: bool = False) -> None:
        from espalier import _native

        self.isa = _native.current_isa()
        self._program = _native.Program(self.isa, threads)
        tuner = Tuner(self.isa, tune=tune)
        lowering = Lowering(graph, self._program, tuner, threads=threads, exact_padding=exact_padding)
        lowering.run()
        tuner.save()
        self._plumbing = lowering.plumbing
        self._layers = tuple(lowering.layers)
        self._tokens_from = token_input(graph, self._plumbing)

    def profile(self) -> list[OpTime]:
        """Time by operation, averaged over the runs so far."""
        rows = self._program.profile()
        total = sum(seconds for _, seconds, _ in rows) or 1.0
        return [OpTime(name, seconds / max(1, calls), seconds / total) for name, seconds, calls in rows]

    def reset_profile(self) -> None:
        """Forget the times so far."""
        self._program.reset_profile()

    def layers(self) -> tuple[Layer, ...]:
        """Every weight: its format, shape and zeros."""
        return self._layers

    def _launch(self, batch: PackedBatch) -> list[np.ndarray]:
        sequences = len(batch.lengths)
        outputs: list[np.ndarray] = [np.empty(0)] * len(self._plumbing.outputs)
        for output in self._plumbing.outputs:
            outputs[output.number] = np.empty(output.extents(batch.tokens, sequences), np.float32)
        self._program.run(
            batch.lengths,
            np.arange(sequences, dtype=np.int32),
            batch.starts,
            batch.widths,
            batch.indices,
            batch.floats,
            batch.biases,
            batch.key_bias,
            batch.token_weights,
            outputs,
        )
        return outputs
