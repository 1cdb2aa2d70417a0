"""A stand-in for an engine: it answers after the time that its tokens take at a stated speed, by sleeping.

So two cores can host many nodes: everything around the engine is real, and the engine costs nothing. Run inside a
namespace it puts stand-ins on every machine of a cluster:

python standin.py ADDRESS SPEEDS VERSION [LIMIT=VALUE...]

SPEEDS is a folder with a file for each machine, named by its address, with its tokens per second; it may change at any
time. LIMIT is a field of the scheduler's limits.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from espalier.loading import LoadSettings
from espalier.scheduler import Limits

MODEL, INPUT, OUTPUT = "standin", "ids", "answer"
BATCH_TOKENS = 16
"""A batch costs as much as so many tokens besides its own: simulate.py's 2 ms at 8,000 tokens a second."""


class Pace:
    """When work is done that is done one after another: a batch begins when it comes, or when the one before ends.

    Whoever sleeps until then may wake late, on a busy machine; that delays the answer, and nothing after it.
    """

    def __init__(self) -> None:
        self.busy = 0.0
        self._end = 0.0
        self._lock = threading.Lock()

    def take(self, seconds: float, now: float) -> tuple[float, float]:
        """Work that comes ``now``: when it will be done, and the seconds of work done by then in all."""
        with self._lock:
            self._end = max(now, self._end) + seconds
            self.busy += seconds
            return self._end, self.busy


class TimedSession:
    """What the server needs of a :class:`espalier.Session`. Each answer is ``[sum of the ids, machine, seconds busy]``.

    ``speed``: asked for the tokens per second at every batch.
    """

    threads = 1
    device = "cpu"
    accelerator = None

    def __init__(self, machine: int, speed: Callable[[], float]) -> None:
        self._machine = machine
        self._speed = speed
        self._pace = Pace()

    def get_inputs(self) -> list[Any]:
        """Token ids."""
        return [SimpleNamespace(name=INPUT, shape=["batch", "tokens"], type="tensor(int64)")]

    def get_outputs(self) -> list[Any]:
        """The answer."""
        return [SimpleNamespace(name=OUTPUT, shape=["batch", 3], type="tensor(double)")]

    def check(self, feeds: Mapping[str, Any]) -> bool:
        """Rows are independent."""
        return True

    def run_ragged(self, names: Sequence[str], rows: Sequence[Mapping[str, np.ndarray]]) -> list[list[np.ndarray]]:
        """Answer after a while."""
        tokens = BATCH_TOKENS + sum(len(row[INPUT]) for row in rows)
        end, busy = self._pace.take(tokens / self._speed(), time.monotonic())
        time.sleep(max(0.0, end - time.monotonic()))
        return [[np.array([row[INPUT].sum(), self._machine, busy]) for row in rows]]

    def warm_up(self, *_: Any, **__: Any) -> float:
        """Nothing."""
        return 0.0

    def report(self) -> Any:
        """No layers."""
        return SimpleNamespace(layers=[])


@dataclass(frozen=True, kw_only=True)
class TimedSettings(LoadSettings):
    """Opens stand-ins, whatever the model."""

    speeds: str

    def open(self, model: Any) -> Any:
        """The stand-in of the machine that this runs on."""
        import ray

        address = ray.util.get_node_ip_address()
        path = Path(self.speeds) / address
        return TimedSession(int(address.rpartition(".")[2]) - 10, lambda: float(path.read_text()))


def main() -> None:
    address, speeds, version, *given = sys.argv[1:]
    limits = Limits(**{name: json.loads(value) for name, _, value in (text.partition("=") for text in given)})
    from espalier.cluster import settings

    os.environ.update(settings.environment("0.0.0.0"))  # Ray reads it when it is imported
    from espalier.cluster.replica import deploy

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.write_text(version)  # other contents: another model
        options = {"grpc_port": None, "insecure": True, "limits": asdict(limits)}
        deploy(address, {MODEL: model}, TimedSettings(speeds=speeds), options, host="0.0.0.0", port=settings.HTTP_PORT)


if __name__ == "__main__":
    main()
