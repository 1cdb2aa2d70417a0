"""What serving costs on one machine: goodput beside the engine's own, added latency, behaviour at twice the capacity.

python benchmarks/serve/local.py MODEL DATA -o benchmarks/serve/results/NAME.json

MODEL is a folder with its tokenizer, DATA is a file of SQuAD v1.1. The client runs on the same cores as the server and
is part of what is measured. Stages that are in the file already are not repeated; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine
from load import Grpc, Http, closed_loop, open_loop

import espalier
from espalier.data import Tokens, read_squad
from espalier.data.question_answering import cut_pieces
from espalier.scheduler import Limits

HTTP, GRPC, MODEL = 18180, 18181, "model"
TOKENS = Limits().tokens


def read_samples(model: Path, data: Path, count: int) -> list[dict[str, np.ndarray]]:
    """SQuAD's pieces as padded batches of one: int64 ``[1, tokens]`` each."""
    pieces = list(cut_pieces(Tokens.read(model, 384), read_squad(data)[: 2 * count]))
    rng = np.random.default_rng(0)
    chosen = [pieces[i].feature for i in rng.permutation(len(pieces))[:count]]
    return [
        {
            "input_ids": f.ids.astype(np.int64)[None],
            "attention_mask": np.ones((1, len(f.ids)), np.int64),
            "token_type_ids": f.types.astype(np.int64)[None],
        }
        for f in chosen
    ]


class Bench:
    """The stages, and the file they are kept in."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seconds = arguments.seconds
        self.model = arguments.model
        self.out = arguments.output
        self.samples = read_samples(arguments.model, arguments.data, 512)
        self.session = espalier.load(arguments.model, tune=False)
        self.output = next(i.name for i in self.session.get_outputs() if len(i.shape) == 2)
        self.found: dict[str, Any] = {}
        if self.out.exists() and not arguments.fresh:
            self.found = json.loads(self.out.read_text())
        self.found.setdefault("stages", {})

    def stage(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run a stage that is not there yet, and keep it."""
        if name in self.found["stages"]:
            return
        busy = machine.busy()
        self.found["stages"][name] = {**run(), "busy_before": busy}
        self.found.update(machine=machine.describe(), versions=machine.versions(), commit=machine.commit())
        self.found.update(model=self.model.name, seconds=self.seconds, samples=len(self.samples))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")
        print(name, json.dumps(self.found["stages"][name]))

    def engine(self) -> dict[str, Any]:
        """The engine's own: ragged batches of the scheduler's budget, and single sequences."""
        rows = [{name: array[0] for name, array in feeds.items()} for feeds in self.samples]
        batches, batch, tokens = [], [], 0
        for row in rows:
            if tokens + len(row["input_ids"]) > TOKENS:
                batches.append(batch)
                batch, tokens = [], 0
            batch.append(row)
            tokens += len(row["input_ids"])
        count, start = 0, time.perf_counter()
        while time.perf_counter() < start + self.seconds:
            for batch in batches:
                self.session.run_ragged([self.output], batch)
                count += len(batch)
        rate = count / (time.perf_counter() - start)
        times = []
        for feeds in self.samples[:64]:
            begin = time.perf_counter()
            self.session.run([self.output], feeds)
            times.append(time.perf_counter() - begin)
        return {"per_s": rate, "single_ms": float(np.median(times) * 1e3)}

    def goodput(self, client: type[Http] | type[Grpc]) -> dict[str, Any]:
        """Answers per second with as many under way as the engine answers in half a second: none is refused."""
        concurrency = max(8, min(256, int(self.found["stages"]["engine"]["per_s"] / 2)))

        async def run() -> dict[str, Any]:
            connected = self._connect(client)
            await closed_loop(connected.send, concurrency, 1.0)
            tally, seconds = await closed_loop(connected.send, concurrency, self.seconds)
            await connected.close()
            return tally.summary(seconds)

        found = asyncio.run(run())
        return {**found, "of_engine": found["per_s"] / self.found["stages"]["engine"]["per_s"]}

    def added_latency(self, client: type[Http] | type[Grpc]) -> dict[str, Any]:
        """One at a time, in turn with the session itself on the same samples."""

        async def run() -> list[float]:
            connected = self._connect(client)
            added = []
            for number in range(128):
                begin = time.perf_counter()
                await connected.send(number)
                middle = time.perf_counter()
                self.session.run([self.output], self.samples[number])
                added.append((middle - begin) - (time.perf_counter() - middle))
            await connected.close()
            return added

        values = np.percentile(np.array(asyncio.run(run())) * 1e3, (25, 50, 75)).round(3).tolist()
        return dict(zip(("p25_ms", "p50_ms", "p75_ms"), values, strict=True))

    def overload(self) -> dict[str, Any]:
        """Twice the capacity for a while, then one at a time: goodput, refusals, memory, and how soon it recovers."""
        peak = self.found["stages"]["http-binary"]["per_s"]
        before = _memory(self._server.pid)

        async def run() -> dict[str, Any]:
            connected = self._connect(Http)
            tally, seconds = await open_loop(connected.send, 2 * peak, self.seconds)
            end = time.perf_counter()
            calm = 2 * self.found["stages"]["engine"]["single_ms"] / 1e3 + 0.005
            while True:
                begin = time.perf_counter()
                status = await connected.send(0)
                if status == 200 and time.perf_counter() - begin < calm:
                    break
                if time.perf_counter() - end > 30:
                    break
            await connected.close()
            return {**tally.summary(seconds), "recovered_s": time.perf_counter() - end}

        found = asyncio.run(run())
        return {**found, "of_peak": found["per_s"] / peak, "memory_mib": [before, _memory(self._server.pid)]}

    def _connect(self, client: type[Http] | type[Grpc]) -> Any:
        port = HTTP if client is Http else GRPC
        return client(port, MODEL, self.samples, self.output)

    def __enter__(self) -> Bench:
        command = [sys.executable, "-m", "espalier", "serve", f"{MODEL}={self.model}", "--no-tune"]
        self._server = subprocess.Popen([*command, "--http", str(HTTP), "--grpc", str(GRPC)], stdout=subprocess.PIPE)
        if self._server.stdout is None or not self._server.stdout.readline():
            raise SystemExit("the server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        self._server.wait()


def _memory(pid: int) -> int:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    bench.stage("engine", bench.engine)
    with bench:
        bench.stage("added-http", lambda: bench.added_latency(Http))
        bench.stage("added-grpc", lambda: bench.added_latency(Grpc))
        bench.stage("http-binary", lambda: bench.goodput(Http))
        bench.stage("grpc", lambda: bench.goodput(Grpc))
        bench.stage("overload", bench.overload)


if __name__ == "__main__":
    main()
