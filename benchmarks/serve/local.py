"""What serving costs on one machine: goodput beside the engine's own, added latency, behaviour at twice the capacity,
among ten thousand idle connections, under wrk and h2load, and for as many minutes at 80 % of capacity as --soak says.

python benchmarks/serve/local.py MODEL DATA -o benchmarks/serve/results/NAME.json --soak 30

MODEL has its tokenizer beside it, or --tokenizer says where one is; DATA is SQuAD v1.1, a file. The client runs on the
same cores as the server and is part of what is measured; `taskset -c 0` before the command gives both one core. Stages
that are in the file already are not repeated; --fresh begins anew. The soak writes its picture beside the file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine
from load import INFER_PATH, Grpc, Http, Tally, closed_loop, open_loop
from ragged import full_batches, rate

import espalier
from espalier.data import Tokens, read_squad
from espalier.data.question_answering import cut_pieces

HTTP, GRPC, MODEL = 18180, 18181, "model"
IDLE = 10_000
ROUNDS = 5
TURN = 16
"""Requests before it is the other's turn."""
SOAK_LOAD, WARM_MINUTES = 0.8, 3
"""Of the least throughput measured; and how long memory may grow."""
WRK_SCRIPT = """
local file = io.open("{folder}/body", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Inference-Header-Content-Length"] = "{head}"
"""


def read_samples(tokenizer: Path, data: Path, count: int) -> list[dict[str, np.ndarray]]:
    """SQuAD's pieces as padded batches of one: int64 ``[1, tokens]`` each."""
    pieces = list(cut_pieces(Tokens.read(tokenizer, 384), read_squad(data)[: 2 * count]))
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
        self.samples = read_samples(arguments.tokenizer or arguments.model, arguments.data, 512)
        self.batches = full_batches({name: array[0] for name, array in feeds.items()} for feeds in self.samples)
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
        rate = self._engine_rate(self.seconds)
        times = []
        for feeds in self.samples[:64]:
            begin = time.perf_counter()
            self.session.run([self.output], feeds)
            times.append(time.perf_counter() - begin)
        return {"per_s": rate, "single_ms": float(np.median(times) * 1e3)}

    def _engine_rate(self, seconds: float) -> float:
        """Sequences per second in ragged batches, for at least so long."""
        return rate(self.session, [self.output], self.batches, seconds)

    def goodput(self, client: type[Http] | type[Grpc]) -> dict[str, Any]:
        """Answers per second with nine tenths of a second's worth under way: batches fill, and none is refused.

        In turn with the engine by itself, since the speed of a machine changes; what counts is the median ratio.
        """
        concurrency = max(8, min(512, int(0.9 * self.found["stages"]["engine"]["per_s"])))

        async def run() -> dict[str, Any]:
            connected = self._connect(client)
            await closed_loop(connected.send, concurrency, 1.0)
            whole, spent, ratios = Tally(), 0.0, []
            for _ in range(ROUNDS):
                alone = self._engine_rate(self.seconds / 2)
                tally, seconds = await closed_loop(connected.send, concurrency, self.seconds / 2)
                whole.answers += tally.answers
                spent += seconds
                ratios.append(tally.summary(seconds)["per_s"] / alone)
            await connected.close()
            return {**whole.summary(spent), "of_engine": float(np.median(ratios)), "of_engine_by_round": ratios}

        return uvloop.run(run())

    def added_latency(self, client: type[Http] | type[Grpc]) -> dict[str, Any]:
        """One at a time, in turn with the session itself on the same samples, some at a turn.

        At a turn of one, each would find the processor's caches full of the other's weights, which no server pays for.
        """

        async def run() -> list[float]:
            connected = self._connect(client)
            added = []
            for first in range(0, 128, TURN):
                numbers = range(first, first + TURN)
                served = []
                for number in numbers:
                    begin = time.perf_counter()
                    await connected.send(number)
                    served.append(time.perf_counter() - begin)
                for number, seconds in zip(numbers, served, strict=True):
                    begin = time.perf_counter()
                    self.session.run([self.output], self.samples[number])
                    added.append(seconds - (time.perf_counter() - begin))
            await connected.close()
            return added

        values = np.percentile(np.array(uvloop.run(run())) * 1e3, (25, 50, 75)).round(3).tolist()
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

        found = uvloop.run(run())
        return {**found, "of_peak": found["per_s"] / peak, "memory_mib": [before, _memory(self._server.pid)]}

    def idle(self) -> dict[str, Any]:
        """One at a time beside so many connections that say nothing, in turn with the session itself."""
        alone = self.added_latency(Http)
        before = _memory(self._server.pid)
        connections = [socket.create_connection(("127.0.0.1", HTTP)) for _ in range(IDLE)]
        try:
            time.sleep(5)  # until all are accepted
            among = self.added_latency(Http)
            after = _memory(self._server.pid)
        finally:
            for connection in connections:
                connection.close()
        return {"connections": IDLE, "added": among, "added_without": alone, "memory_mib": [before, after]}

    def wrk(self) -> dict[str, Any]:
        """The same sample over and over by wrk, and the health endpoint for what the server alone can do."""
        head, body = Http.parts(self.samples[0], self.output)
        url = f"http://127.0.0.1:{HTTP}/v2"
        with tempfile.TemporaryDirectory(prefix="espalier-wrk-") as folder:
            Path(folder, "body").write_bytes(head + body)
            script = Path(folder, "post.lua")
            script.write_text(WRK_SCRIPT.format(folder=folder, head=len(head)))
            options = ["--threads", "1", "--duration", f"{max(1, round(self.seconds))}s"]
            infer = ["--connections", "16", "--timeout", "30", "--script", str(script), f"{url}/models/{MODEL}/infer"]
            health = ["--connections", "64", f"{url}/health/ready"]
            return {"infer": _wrk(*options, *infer), "health": _wrk(*options, *health)}

    def h2load(self) -> dict[str, Any]:
        """The same sample over and over by h2load, over gRPC."""
        with tempfile.TemporaryDirectory(prefix="espalier-h2load-") as folder:
            body = Path(folder, "body")
            body.write_bytes(Grpc.encode(MODEL, self.samples[0], self.output))
            options = ["--duration", f"{self.seconds:.0f}", "--clients", "1", "--max-concurrent-streams", "16"]
            headers = ["--header", "content-type: application/grpc", "--header", "te: trailers"]
            return _h2load(*options, *headers, "--data", str(body), f"http://127.0.0.1:{GRPC}{INFER_PATH}")

    def soak(self, minutes: int) -> dict[str, Any]:
        """Poisson arrivals at a share of capacity. Each minute: answers, latency, memory; and what became of them.

        Drift compares the median p99 of the last third of the minutes with that of the third after the warm-up.
        """
        rate = SOAK_LOAD * min(self.found["stages"][name]["per_s"] for name in ("engine", "http-binary", "grpc"))

        async def run() -> list[dict[str, Any]]:
            connected = self._connect(Http)
            found = []
            for minute in range(minutes):
                tally, seconds = await open_loop(connected.send, rate, 60.0, seed=minute)
                found.append({**tally.summary(seconds), "memory_mib": _memory(self._server.pid)})
                print(f"  minute {minute + 1}: {json.dumps(found[-1])}", flush=True)
            await connected.close()
            return found

        by_minute = uvloop.run(run())
        settled = by_minute[min(WARM_MINUTES, minutes - 1) :]
        third = max(1, len(settled) // 3)
        early, late = (
            float(np.median([one["done_ms"]["p99"] for one in part])) for part in (settled[:third], settled[-third:])
        )
        plot_soak(by_minute, self.out.with_suffix(".soak.svg"))
        return {
            "minutes": minutes,
            "rate_per_s": rate,
            "failed": sum(one["failed"] for one in by_minute),
            "refused": sum(one["refused"] for one in by_minute),
            "memory_growth_mib": settled[-1]["memory_mib"] - settled[0]["memory_mib"],
            "p99_ms_early_late": [early, late],
            "by_minute": by_minute,
        }

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


def _wrk(*arguments: str) -> dict[str, float]:
    """Requests per second and how many were not answered well, by wrk's own account."""
    said = subprocess.run(["wrk", *arguments], check=True, capture_output=True, text=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if rate is None:
        raise SystemExit(f"wrk gave no rate: {said}")
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
    return {
        "per_s": float(rate[1]),
        "not_2xx": int(bad[1]) if bad else 0,
        "socket_errors": sum(map(int, errors.groups())) if errors else 0,
    }


def _h2load(*arguments: str) -> dict[str, float]:
    """Requests per second, how many failed, and bytes of message per answer: an error would have none."""
    said = subprocess.run(["h2load", *arguments], check=True, capture_output=True, text=True).stdout
    rate = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", said)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", said)
    traffic = re.search(r"\((\d+)\) data", said)
    if rate is None or counts is None or traffic is None:
        raise SystemExit(f"h2load gave no rate: {said}")
    succeeded, *bad = map(int, counts.groups())
    return {"per_s": float(rate[1]), "failed": sum(bad), "bytes_each": int(traffic[1]) / max(1, succeeded)}


def plot_soak(by_minute: Sequence[Mapping[str, Any]], path: Path) -> None:
    """p50 and p99 latency and the server's memory over the minutes, as an SVG at ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    latency, memory = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    minutes = range(1, len(by_minute) + 1)
    for name in ("p99", "p50"):
        latency.plot(minutes, [one["done_ms"][name] for one in by_minute], label=name)
    latency.set(ylabel="latency, ms", ylim=(0, None))
    latency.legend(frameon=False)
    memory.plot(minutes, [one["memory_mib"] for one in by_minute], color="tab:green")
    memory.set(xlabel="minute", ylabel="memory, MiB", ylim=(0, None))
    figure.savefig(path)


def _memory(pid: int) -> int:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--soak", type=int, default=0, metavar="MINUTES")
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
        bench.stage("idle", bench.idle)
        if shutil.which("wrk"):
            bench.stage("wrk", bench.wrk)
        if shutil.which("h2load"):
            bench.stage("h2load", bench.h2load)
        if arguments.soak:
            bench.stage("soak", lambda: bench.soak(arguments.soak))


if __name__ == "__main__":
    main()
