"""The engine by itself on sequences of different lengths: what servers and the MLPerf harness are measured against."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence

import numpy as np

from espalier import Session
from espalier.scheduler import Limits

Row = dict[str, np.ndarray]
"""One sequence as ``Session.run_ragged`` takes it, `input_ids` among its inputs."""


def full_batches(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows in their order, in batches of the scheduler's budget of tokens, without the last, which is not full."""
    batches: list[list[Row]] = [[]]
    tokens = 0
    for row in rows:
        if tokens + len(row["input_ids"]) > Limits().tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += len(row["input_ids"])
    return batches[:-1]


def rate(session: Session, outputs: list[str], batches: Sequence[list[Row]], seconds: float) -> float:
    """Sequences per second, for at least so long, over and over from the first batch."""
    count, start = 0, time.perf_counter()
    for batch in itertools.cycle(batches):
        session.run_ragged(outputs, batch)
        count += len(batch)
        if (spent := time.perf_counter() - start) >= seconds:
            return count / spent
    raise SystemExit("there are too few samples for a batch")
