"""What the server counts and times, in Prometheus's form."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_POWERS = tuple(2**n for n in range(15))

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's metrics. Labels only hold names the server knows, never what a client sent."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "espalier_requests", "Requests by protocol, endpoint, model and outcome.",
            ("protocol", "endpoint", "model", "code"), registry=registry,
        )  # fmt: skip
        self.refusals = Counter("espalier_refusals", "Requests refused, by reason.", ("reason",), registry=registry)
        self.stage_seconds = Histogram(
            "espalier_stage_seconds", "Seconds by stage: decode, queue, compute (of a batch), encode.",
            ("stage",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "espalier_request_seconds", "Seconds from the last byte of a request to its answer.",
            ("protocol", "endpoint"), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_sequences = Histogram(
            "espalier_batch_sequences", "Sequences in a batch.", ("model",), buckets=_POWERS[:11], registry=registry
        )
        self.batch_tokens = Histogram(
            "espalier_batch_tokens", "Tokens in a batch.", ("model",), buckets=_POWERS, registry=registry
        )
        self.tokens = Counter("espalier_tokens", "Tokens computed.", ("model",), registry=registry)
        self.cancelled = Counter(
            "espalier_cancelled_sequences", "Sequences dropped because the client left.", registry=registry
        )
        self._queue = Gauge("espalier_queue_sequences", "Sequences that wait.", registry=registry)
        self._queue_tokens = Gauge("espalier_queue_tokens", "Tokens that wait.", registry=registry)
        self._ready = Gauge("espalier_ready", "Whether the server is ready.", registry=registry)

    def watch(self, queue: Callable[[], float], tokens: Callable[[], float], ready: Callable[[], bool]) -> None:
        """Read these whenever the metrics are asked for."""
        self._queue.set_function(queue)
        self._queue_tokens.set_function(tokens)
        self._ready.set_function(ready)

    def text(self) -> bytes:
        """The metrics, as ``/metrics`` shows them."""
        return generate_latest(self._registry)
