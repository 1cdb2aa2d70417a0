"""The parent's side of `worker.py`: an engine in its own process, in this environment or in the peers'."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from worker import pack, unpack

WORKER = Path(__file__).resolve().with_name("worker.py")


class EngineFailedError(Exception):
    """An engine raised, or its process ended; the message is its own."""


class Remote:
    """Same methods as `worker.Engine`, each one request over the pipes. Close it, or use it in a `with`."""

    def __init__(self, python: Path | str, name: str) -> None:
        self._name = name
        self._scratch = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._log = open(Path(self._scratch.name) / "log", "w+")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [str(python), "-u", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self.import_seconds, self.version = 0.0, ""
            answer = self._ask(do="prepare", engine=name)
        except EngineFailedError:
            self.close()
            raise
        self.import_seconds, self.version = float(answer["seconds"]), str(answer["version"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        pipes = self._process.stdin, self._process.stdout
        if pipes[0] is None or pipes[1] is None:
            raise EngineFailedError(f"{self._name}: no pipes to its process")
        try:
            pipes[0].write(json.dumps(request) + "\n")
            pipes[0].flush()
            line = pipes[1].readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineFailedError(
                f"{self._name} ended with status {self._process.wait()} on {request['do']!r}: {self._last_words()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailedError(f"{self._name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().split())[-400:] or "it said nothing"

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> float:
        return float(self._ask(do="load", model=model, shape=shape, threads=threads, options=options)["seconds"])

    def set_calls(self, calls: list[list[dict[str, Any]]], ragged: bool) -> None:
        path = Path(self._scratch.name) / "calls.npz"
        np.savez(path, **pack(calls))
        self._ask(do="calls", path=str(path), ragged=ragged)

    def outputs(self) -> list[list[dict[str, Any]]]:
        path = Path(self._scratch.name) / "outputs.npz"
        self._ask(do="outputs", path=str(path))
        with np.load(path) as flat:
            return unpack(flat)

    def time(self, call: int, times: int) -> list[float]:
        return [float(s) for s in self._ask(do="run", call=call, times=times)["seconds"]]

    def peak_bytes(self) -> int:
        return int(self._ask(do="peak")["bytes"])

    def close(self) -> None:
        """End the process by closing its input, and remove its files."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._scratch.cleanup()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
