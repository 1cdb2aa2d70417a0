"""An engine in a process of its own, driven over pipes: one JSON request per line, one JSON answer per line.

    {"do": "prepare", "engine": "deepsparse"}                    -> {"version": ..., "seconds": import time}
    {"do": "load", "model": ..., "shape": [16, 128], "threads": 2, "options": {}}  -> {"seconds": ...}
    {"do": "calls", "path": calls.npz, "ragged": false}          -> {}    what "outputs" and "run" will run
    {"do": "outputs", "path": out.npz}                           -> {}    runs every call once and stores its outputs
    {"do": "run", "call": 0, "times": 3}                         -> {"seconds": [...]}
    {"do": "peak"}                                               -> {"bytes": peak resident memory of this process}

A failure answers {"error": "Type: message"}; end of input ends the process. Between requests it sleeps in a read, so
that the engines under comparison can take turns.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np
from runners import RUNNERS, Arrays, Runner


def pack(groups: list[list[Arrays]]) -> Arrays:
    """A list of lists of named arrays as one flat mapping for `np.savez`."""
    return {
        f"{i}/{j}/{name}": a
        for i, group in enumerate(groups)
        for j, feed in enumerate(group)
        for name, a in feed.items()
    }


def unpack(flat: Any) -> list[list[Arrays]]:
    """The inverse of `pack`, reading an open `.npz`."""
    groups: dict[int, dict[int, Arrays]] = {}
    for key in flat.files:
        i, j, name = key.split("/", 2)
        groups.setdefault(int(i), {}).setdefault(int(j), {})[name] = flat[key]
    return [[group[j] for j in sorted(group)] for _, group in sorted(groups.items())]


def peak_bytes() -> int:
    """Peak resident memory. Linux's high-water mark starts at exec; ru_maxrss would include the parent's."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Engine:
    """A runner and the calls it is timed on. A call is a list: one padded feed, or the sequences of a ragged batch."""

    def __init__(self, name: str) -> None:
        self._runner: Runner = RUNNERS[name]()
        self._calls: list[list[Arrays]] = []
        self._ragged = False

    def prepare(self) -> str:
        return self._runner.prepare()

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> float:
        start = time.perf_counter()
        self._runner.load(model, shape, threads, options)
        return time.perf_counter() - start

    def set_calls(self, calls: list[list[Arrays]], ragged: bool) -> None:
        self._calls, self._ragged = calls, ragged

    def _run(self, call: int) -> list[Arrays]:
        feeds = self._calls[call]
        return self._runner.run_ragged(feeds) if self._ragged else [self._runner.run(feeds[0])]

    def outputs(self) -> list[list[Arrays]]:
        return [self._run(call) for call in range(len(self._calls))]

    def time(self, call: int, times: int) -> list[float]:
        """Seconds of each of `times` runs of one call, back to back."""
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            self._run(call)
            seconds.append(time.perf_counter() - start)
        return seconds


def answer(engines: list[Engine], request: dict[str, Any]) -> dict[str, Any]:
    what = request["do"]
    if what == "prepare":
        start = time.perf_counter()
        engines.append(Engine(request["engine"]))
        version = engines[0].prepare()
        return {"version": version, "seconds": time.perf_counter() - start}
    if what == "peak":
        return {"bytes": peak_bytes()}
    engine = engines[0]
    if what == "load":
        shape = tuple(request["shape"]) if request["shape"] else None
        return {"seconds": engine.load(request["model"], shape, request["threads"], request["options"])}
    if what == "calls":
        with np.load(request["path"]) as flat:
            engine.set_calls(unpack(flat), request["ragged"])
        return {}
    if what == "outputs":
        np.savez(request["path"], **pack(engine.outputs()))
        return {}
    if what == "run":
        return {"seconds": engine.time(request["call"], request["times"])}
    raise ValueError(f"unknown request {what!r}")


def main() -> None:
    # Engines print banners to standard output; keep the protocol's stream to ourselves.
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engines: list[Engine] = []
    for line in sys.stdin:
        try:
            result = answer(engines, json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its answer, told to the parent
            result = {"error": f"{type(error).__name__}: {error}"}
        reply.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
