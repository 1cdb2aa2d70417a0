"""What compression bought: bytes on disk, and tokens per second in the engine beside the dense model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espalier.compression.export import session_inputs
from espalier.data import Feature
from espalier.errors import ModelError

_TOKENS = 8192
_ROUNDS = 7


@dataclass(frozen=True)
class Speed:
    """Medians over interleaved rounds on the same ragged sequences; tokens per second of the whole model.

    ``dense_ms`` and ``sparse_ms``: mean milliseconds per run by layer, summed over threads.
    """

    dense: float
    sparse: float
    threads: int
    tokens: int
    sequences: int
    dense_ms: dict[str, float]
    sparse_ms: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times as fast as the dense model."""
        return self.sparse / self.dense

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Sizes:
    """Bytes. ``plan`` is the compiled form, whose size goes by the nonzeros."""

    dense: int
    sparse: int
    onnx: int
    plan: int


def sample(samples: Sequence[Feature], *, seed: int) -> list[Feature]:
    """Sequences drawn at random, about 8192 tokens of them: what a speed is measured on."""
    chosen: list[Feature] = []
    total = 0
    for index in np.random.default_rng(seed).permutation(len(samples)):
        chosen.append(samples[index])
        total += len(samples[index].ids)
        if total >= _TOKENS:
            break
    return chosen


def measure_speed(dense: Path, sparse: Path, samples: Sequence[Feature], *, threads: int | None, seed: int) -> Speed:
    """Run both folders in the engine, in turn. Raises what ``espalier.load`` raises."""
    import espalier
    from espalier.bench.timing import interleaved

    chosen = sample(samples, seed=seed)
    total = sum(len(feature.ids) for feature in chosen)
    sessions = {name: espalier.load(path, threads=threads) for name, path in (("dense", dense), ("sparse", sparse))}
    runs = {}
    for name, session in sessions.items():
        known = {info.name for info in session.get_inputs()}
        # One output will do, and both compute the same: what follows the encoder is small.
        output = [session.get_outputs()[0].name]
        rows = [session_inputs(feature, known) for feature in chosen]
        runs[name] = lambda s=session, o=output, r=rows: s.run_ragged(o, r)
    timings = interleaved(runs, rounds=_ROUNDS, warmup=2)
    layers = {name: _layer_times(session) for name, session in sessions.items()}
    return Speed(
        dense=total / timings["dense"].p50,
        sparse=total / timings["sparse"].p50,
        threads=sessions["sparse"].threads,
        tokens=total,
        sequences=len(chosen),
        dense_ms=layers["dense"],
        sparse_ms=layers["sparse"],
    )


def _layer_times(session: Any) -> dict[str, float]:
    return {layer.name: layer.time_ms for layer in session.report().layers if layer.time_ms is not None}


def measure_sizes(dense: Path, sparse: Path, onnx: Path) -> Sizes:
    """Bytes of the weights in each form; 0 for a plan that cannot be made."""
    import espalier

    with tempfile.TemporaryDirectory(prefix="espalier-plan-") as folder:
        try:
            plan = espalier.compile(sparse, Path(folder) / "model.espalier", tune=False).stat().st_size
        except ModelError:
            plan = 0
    return Sizes(_weights(dense), _weights(sparse), onnx.stat().st_size, plan)


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts)
