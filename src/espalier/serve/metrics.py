"""What the server counts and times, in Prometheus's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_POWERS = tuple(2**n for n in range(15))

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class BatchMetrics:
    """Of one model's batches: sequences and tokens of each, and all tokens."""

    sequences: Any
    tokens: Any
    total: Any


class Metrics:
    """One server's metrics. Labels only hold names the server knows, never what a client sent.

    What every request counts is looked up once: finding a metric by its labels costs more than counting.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "espalier_requests", "Requests by protocol, endpoint, model and outcome.",
            ("protocol", "endpoint", "model", "code"), registry=registry,
        )  # fmt: skip
        self.refusals = Counter("espalier_refusals", "Requests refused, by reason.", ("reason",), registry=registry)
        stages = Histogram(
            "espalier_stage_seconds", "Seconds by stage: decode, queue, compute (of a batch), encode.",
            ("stage",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.decode, self.queue = stages.labels("decode"), stages.labels("queue")
        self.compute, self.encode = stages.labels("compute"), stages.labels("encode")
        self.request_seconds = Histogram(
            "espalier_request_seconds", "Seconds from the last byte of a request to its answer.",
            ("protocol", "endpoint"), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._sequences = Histogram(
            "espalier_batch_sequences", "Sequences in a batch.", ("model",), buckets=_POWERS[:11], registry=registry
        )
        self._tokens = Histogram(
            "espalier_batch_tokens", "Tokens in a batch.", ("model",), buckets=_POWERS, registry=registry
        )
        self._total = Counter("espalier_tokens", "Tokens computed.", ("model",), registry=registry)
        self.cancelled = Counter(
            "espalier_cancelled_sequences", "Sequences dropped because the client left.", registry=registry
        )
        self._queue = Gauge("espalier_queue_sequences", "Sequences that wait.", registry=registry)
        self._queue_tokens = Gauge("espalier_queue_tokens", "Tokens that wait.", registry=registry)
        self._ready = Gauge("espalier_ready", "Whether the server is ready.", registry=registry)
        self._batches: dict[str, BatchMetrics] = {}
        self._outcomes: dict[tuple[str, ...], Any] = {}

    def batches(self, model: str) -> BatchMetrics:
        """Those of the model of that name."""
        found = self._batches.get(model)
        if found is None:
            metrics = (metric.labels(model) for metric in (self._sequences, self._tokens, self._total))
            found = self._batches[model] = BatchMetrics(*metrics)
        return found

    def count_request(self, protocol: str, endpoint: str, model: str, code: str) -> None:
        """A request is over."""
        labels = (protocol, endpoint, model, code)
        counter = self._outcomes.get(labels)
        if counter is None:
            counter = self._outcomes[labels] = self._requests.labels(*labels)
        counter.inc()

    def watch(self, queue: Callable[[], float], tokens: Callable[[], float], ready: Callable[[], bool]) -> None:
        """Read these whenever the metrics are asked for."""
        self._queue.set_function(queue)
        self._queue_tokens.set_function(tokens)
        self._ready.set_function(ready)

    def text(self) -> bytes:
        """The metrics, as ``/metrics`` shows them."""
        return generate_latest(self._registry)
