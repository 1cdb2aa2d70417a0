"""A client of stand-ins: sequences of known sums, answers that are checked, and who gave them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
from load import Http
from standin import INPUT, MODEL, OUTPUT

WRONG = -1
"""The status of an answer that is not the request's."""
_SIZE = 3 * 8  # of an answer's values, behind the head of the body


class Client:
    """Sends sequences of so many tokens each, in turn, to a cluster at ``hosts``."""

    def __init__(self, hosts: Sequence[str], port: int, tokens: Sequence[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        samples = [rng.integers(1, 1000, (1, count)) for count in tokens]
        self._sums = [int(ids.sum()) for ids in samples]
        self._http = Http(port, MODEL, [{INPUT: ids} for ids in samples], OUTPUT, hosts)
        self.busy: dict[int, float] = {}
        """Seconds that each machine has worked, by its latest answer."""

    async def send(self, number: int) -> int:
        """Send a sequence; returns the status of the answer. Raises OSError, EOFError."""
        status, body = await self._http.ask(number)
        if status != 200:
            return status
        total, machine, busy = np.frombuffer(body[-_SIZE:]).tolist()
        if total != self._sums[number % len(self._sums)]:
            return WRONG
        self.busy[int(machine)] = max(busy, self.busy.get(int(machine), 0.0))
        return status

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()
