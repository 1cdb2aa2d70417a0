"""The benchmark of one model: load, compare with the peer, and only then time both in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from espalier.bench.agreement import Agreement, compare
from espalier.bench.feeds import Feeds, input_limits, make_feeds, read_feeds
from espalier.bench.timing import Timing, interleaved
from espalier.doctor import machine
from espalier.errors import EspalierError, InputError, UnsupportedModelError
from espalier.loading import LoadSettings
from espalier.ort import OrtProgram
from espalier.session import Session

ESPALIER = "espalier"
RAGGED = "espalier, ragged"
PEERS = ("onnxruntime",)


@dataclass(frozen=True)
class Candidate:
    """The figures of one runtime. Times are milliseconds per batch; padding does not count as tokens.

    ``tokens_per_s`` is None for what has no tokens, as images.
    """

    name: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    samples_per_s: float
    tokens_per_s: float | None

    @classmethod
    def of(cls, name: str, timing: Timing, feeds: Feeds) -> Candidate:
        """From a timing of runs over ``feeds``; throughput is that of the median run."""
        return cls(
            name,
            timing.p50 * 1e3,
            timing.p90 * 1e3,
            timing.p99 * 1e3,
            feeds.samples / timing.p50,
            None if feeds.tokens is None else feeds.tokens / timing.p50,
        )


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark. ``candidates`` is empty when the outputs disagree: wrong answers are not timed.

    ``notes``: what a reader of the figures should know besides.
    """

    model: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    agreement: tuple[Agreement, ...]
    candidates: tuple[Candidate, ...]
    report: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether every output compared is within its tolerance."""
        return all(item.ok for item in self.agreement)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer the best way to run here is; None without a peer."""
        ours = [item.p50_ms for item in self.candidates if item.name not in PEERS]
        peers = [item.p50_ms for item in self.candidates if item.name in PEERS]
        return min(peers) / min(ours) if ours and peers else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        agreement = [{**asdict(item), "error": _finite(item.error), "ok": item.ok} for item in self.agreement]
        return {
            "model": self.model,
            "settings": self.settings,
            "machine": self.machine,
            "agrees": self.agrees,
            "agreement": agreement,
            "candidates": [asdict(item) for item in self.candidates],
            "ratio": self.ratio,
            "report": self.report,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure. ``inputs`` is an ``.npz`` file to use instead of made-up inputs of ``batch`` and ``seq``.

    ``tolerance`` is the session's own for None; ``load`` says where and how to run.
    """

    against: str | None = None
    batch: int = 1
    seq: int = 128
    ragged: bool = False
    rounds: int = 20
    warmup: int = 3
    seed: int = 0
    tolerance: float | None = None
    inputs: Path | None = None
    load: LoadSettings = field(default_factory=LoadSettings)


def benchmark(
    model: Path,
    settings: Settings,
    *,
    on_stage: Callable[[str], None] | None = None,
    on_round: Callable[[int], None] | None = None,
) -> BenchmarkResult:
    """Measure ``model`` here and, with ``settings.against``, beside that peer on the same inputs and threads.

    ``on_stage`` is told what happens next, ``on_round`` how many rounds are done. Raises what loading raises,
    InputError for an unknown peer, and UnsupportedModelError when the peer has no way to run this model.
    """
    if settings.against is not None and settings.against not in PEERS:
        raise InputError(f"unknown peer {settings.against!r}; known: {', '.join(PEERS)}")
    stage = on_stage or (lambda _: None)
    stage("loading")
    session = settings.load.open(model)
    tolerance = session.tolerance if settings.tolerance is None else settings.tolerance
    feeds = _feeds(model, session, settings)
    names = [info.name for info in session.get_outputs()]
    with _peer(model, settings, session.threads) as peer:
        stage("comparing outputs")
        ours = session.run(None, feeds.padded)
        runs: dict[str, Callable[[], object]] = {ESPALIER: lambda: session.run(None, feeds.padded)}
        agreement: list[Agreement] = []
        notes: tuple[str, ...] = ()
        if peer is not None:
            theirs, notes = peer.answers(feeds.padded)
            agreement += compare(names, theirs, ours, mask=feeds.mask, tolerance=tolerance)
            runs[settings.against or ""] = partial(peer.open().run, None, feeds.padded)
        if settings.ragged:
            sequences = feeds.sequences()
            agreement += _compare_ragged(names, ours, session.run_ragged(None, sequences), feeds, tolerance)
            runs[RAGGED] = lambda: session.run_ragged(None, sequences)
        timings: Mapping[str, Timing] = {}
        if all(item.ok for item in agreement):
            stage("timing")
            timings = interleaved(runs, rounds=settings.rounds, warmup=settings.warmup, on_round=on_round)
    return BenchmarkResult(
        model=model.name or str(model),
        settings=_settings(settings, session, feeds, tolerance),
        machine=machine(session.accelerator),
        agreement=tuple(agreement),
        candidates=tuple(Candidate.of(name, timing, feeds) for name, timing in timings.items()),
        report={**session.report().to_dict(), "model": model.name or str(model)},
        notes=notes,
    )


def _feeds(model: Path, session: Session, settings: Settings) -> Feeds:
    inputs = session.get_inputs()
    if settings.inputs is not None:
        return read_feeds(settings.inputs, inputs)
    limits = input_limits(model)
    return make_feeds(
        inputs, limits, batch=settings.batch, seq=settings.seq, ragged=settings.ragged, seed=settings.seed
    )


def _compare_ragged(
    names: list[str], padded: list[Any], ragged: list[list[np.ndarray]], feeds: Feeds, tolerance: float
) -> list[Agreement]:
    """The ragged outputs against the padded ones, with the padding cut off those."""
    found: list[Agreement] = []
    for name, whole, parts in zip(names, padded, ragged, strict=True):
        rows = [whole[row][: len(part)] if part.ndim else whole[row] for row, part in enumerate(parts)]
        found += compare(
            [f"{name} (ragged)"],
            [np.concatenate([np.ravel(row) for row in rows])],
            [np.concatenate([np.ravel(part) for part in parts])],
            tolerance=tolerance,
        )
    return found


@dataclass(frozen=True)
class _Peer:
    """ONNX Runtime on the same model."""

    model: Path
    threads: int

    def open(self) -> OrtProgram:
        """As commonly run: with its defaults."""
        return OrtProgram(self.model, threads=self.threads)

    def answers(self, feeds: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
        """What the model says by the rules of ONNX, which the default breaks for integers on some processors.

        The default's answers, and a note, where ONNX Runtime cannot run the model otherwise.
        """
        try:
            return OrtProgram(self.model, threads=self.threads, exact=True).run(None, feeds), ()
        except EspalierError as error:
            note = (
                "compared with ONNX Runtime's default answers, which are wrong where 16-bit sums saturate on x86 "
                f"processors without VNNI, because its exact mode cannot run this model: {error}"
            )
            return self.open().run(None, feeds), (note,)


@contextmanager
def _peer(model: Path, settings: Settings, threads: int) -> Iterator[_Peer | None]:
    if settings.against is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as folder:
        yield _Peer(as_onnx(model, Path(folder)), threads)


def as_onnx(model: Path, folder: Path) -> Path:
    """``model`` itself when it is an ONNX file, else the same network written as one in ``folder``."""
    from espalier._session.source import identify

    kind = identify(model).kind
    if kind == "onnx":
        return model
    from espalier.onnx.writer import write

    if kind == "hf":
        from espalier import hf

        return write(hf.read(model), folder / "model.onnx")
    from espalier import compiler
    from espalier.passes.partition import NativeSegment

    steps = compiler.read_plan(model).steps
    if len(steps) != 1 or not isinstance(steps[0], NativeSegment):
        raise UnsupportedModelError(
            f"{model} is a plan of {len(steps)} steps, which cannot be written as one ONNX file for the peer; "
            "benchmark the model that the plan was compiled from"
        )
    return write(steps[0].graph, folder / "model.onnx")


def _settings(settings: Settings, session: Session, feeds: Feeds, tolerance: float) -> dict[str, Any]:
    measuring, calibration = asdict(settings), settings.load.calibration
    loading = measuring.pop("load")
    return {
        **measuring,
        **loading,
        "inputs": None if settings.inputs is None else settings.inputs.name,
        "calibration": None if calibration is None else Path(calibration).name,
        "tolerance": tolerance,
        "threads": session.threads,
        "samples": feeds.samples,
        "tokens": feeds.tokens,
        "shapes": {name: list(array.shape) for name, array in feeds.padded.items()},
        "caches": "warm",
    }


def _finite(value: float) -> float | None:
    # JSON has no infinity.
    return value if np.isfinite(value) else None
