"""Espalier beside ONNX Runtime, DeepSparse and OpenVINO: one interleaved run per row, outputs checked before timing.

    python benchmarks/engine.py                                # everything; resumes where an earlier run stopped
    python benchmarks/engine.py --quick                        # two shapes, few rounds, results thrown into the cache
    python benchmarks/engine.py --only 'unstructured-90/*' --only costs --engines onnxruntime,espalier
    python benchmarks/engine.py --list

ONNX Runtime always runs the dense float32 model, in the same process as Espalier, and quantised models as well; the
others run the row's model. DeepSparse
and OpenVINO live in their own environment (`sh benchmarks/peers.sh`) and are left out, with a message, where there is
none.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import machine
import measure
import models
import report
from cases import MINILM, Case, Squad
from measure import Timed
from remote import EngineFailedError, Remote
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from worker import Engine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "engine.json"
DATA = HERE.parent.parent / "shared" / "data" / "squad"
BASELINE = "onnxruntime"
SORTED = "onnxruntime-sorted"
SAME = "onnxruntime-int8"
"""ONNX Runtime on the row's own model, where that is a quantised one."""
EMULATED = "deepsparse-emulated"
"""DeepSparse with NM_FAST_VNNI_EMULATION, for rows of 8 bits."""
IN_PEERS = ("deepsparse", EMULATED, "openvino")
COMPILES_SHAPES = IN_PEERS
ENGINES = (BASELINE, "espalier", *IN_PEERS)
SQUAD_MODELS = ("dense", "unstructured-90", "unstructured-95", "4x1-90", "1x4-90", "1x4-90-int8", "large-1x4-95-int8")
QUICK_MODELS = ("dense", "unstructured-90", "4x1-90")
# ONNX Runtime needs half a minute for each pass over SQuAD's sample.
ROUNDS, LONG_ROUNDS, QUICK_ROUNDS = 7, 3, 2
BUSY = 0.1
"""Share of the machine taken by other work above which a row is not worth keeping: the next run measures it again."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One fresh process per figure: time from load to first answer, and peak memory while running."""

    name: str
    engine: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    plan: bool = False

    @property
    def id(self) -> str:
        return f"costs/{self.name}"


COSTS = (
    Cost(name="onnxruntime-dense", engine=BASELINE, model="dense"),
    Cost(name="espalier-untuned", engine="espalier", model="unstructured-90", options={"tune": False}),
    Cost(name="espalier-tuned", engine="espalier", model="unstructured-90"),
    Cost(name="espalier-plan", engine="espalier", model="unstructured-90", plan=True),
    Cost(name="deepsparse", engine="deepsparse", model="unstructured-90"),
    Cost(name="openvino", engine="openvino", model="unstructured-90"),
)


class Bench:
    """Engines kept loaded between rows, and the results file."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.console = console
        self.engines = [name for name in options.engines if self._present(name)]
        self._loaded: dict[str, tuple[Timed, tuple[Any, ...]]] = {}
        self._commit = machine.commit()
        self._command = f"python {shlex.join(['benchmarks/engine.py', *sys.argv[1:]])}"
        self.result = self._open()

    def _present(self, name: str) -> bool:
        if name in IN_PEERS and not self.options.peers.exists():
            self.console.print(f"[yellow]{name} is left out:[/] no {self.options.peers}; run: sh benchmarks/peers.sh")
            return False
        return True

    # --- the results file ---

    def _open(self) -> dict[str, Any]:
        """What an earlier run finished, when it was made in the same way on the same machine."""
        settings = {"seed": self.options.seed, "threads": self.options.threads, "opset": models.OPSET,
                    "squad_sample": self.options.squad, "quick": self.options.quick}  # fmt: skip
        here = machine.describe()
        path: Path = self.options.output
        if path.exists():
            earlier: dict[str, Any] = json.loads(path.read_text())
            same = earlier["settings"] == settings and earlier["machine"]["cpu"] == here["cpu"]
            if not same and not self.options.fresh:
                raise SystemExit(
                    f"{path} was made with {earlier['settings']} on {earlier['machine']['cpu']!r}; this run has "
                    f"{settings} on {here['cpu']!r}. Start over with --fresh, or write elsewhere with --output."
                )
            if same:
                earlier["versions"].update(machine.versions())
                return {**earlier, "machine": here}
        return {"machine": here, "settings": settings, "versions": machine.versions(), "rows": {}, "costs": {}}

    def save(self) -> None:
        path: Path = self.options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n")
        partial.replace(path)

    def _stamp(self) -> dict[str, Any]:
        return {
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": self._commit,
            "command": self._command,
            # Timings beside other work are worthless; this lets a reader see that there was none.
            "busy_before": machine.busy(),
        }

    # --- engines ---

    def model(self, name: str, engine: str = BASELINE) -> Path:
        if name == MINILM:
            return models.minilm_folder() if engine == "espalier" else models.build_minilm(cache=self.options.cache)
        return models.build(models.variant(name), cache=self.options.cache, seed=self.options.seed)

    def engine(self, name: str, model: str, shape: tuple[int, int], *, slot: str = "") -> Timed:
        """The engine with `model` loaded, reusing what is loaded already. `slot` keeps a second one apart."""
        key = (model, shape) if name in COMPILES_SHAPES else (model,)
        held = self._loaded.get(slot or name)
        if held and held[1] == key:
            return held[0]
        engine = held[0] if held else self._start(name)
        self._loaded[slot or name] = (engine, ())
        engine.load(str(self.model(model, name)), shape, self.options.threads, {})
        self._loaded[slot or name] = (engine, key)
        return engine

    def _start(self, name: str) -> Timed:
        if name not in IN_PEERS:
            local = Engine(name)
            local.prepare()
            return local
        remote = Remote(self.options.peers, name)
        self.result["versions"][name] = remote.version
        return remote

    def drop(self, name: str) -> None:
        """Forget an engine that failed; the next row starts another."""
        held = self._loaded.pop(name, None)
        if held and isinstance(held[0], Remote):
            held[0].close()

    def close(self) -> None:
        for name in list(self._loaded):
            self.drop(name)

    # --- rows ---

    def wanted(self, case: Case) -> list[str]:
        """Engines for this row; the sorted baseline is added where a data set is cut into batches."""
        everywhere = case.peers or self.options.all_peers
        names = [e for e in self.engines if e not in IN_PEERS or (everywhere and case.model != MINILM)]
        names = [e for e in names if e != EMULATED or "int8" in case.model]
        names += [SORTED] if case.ragged and BASELINE in names else []
        return [*names, SAME] if "int8" in case.model and BASELINE in names else names

    def finished(self, job: Case | Cost) -> bool:
        """An earlier run measured this, undisturbed, with every engine that this run has."""
        earlier = self.result["costs" if isinstance(job, Cost) else "rows"].get(
            job.name if isinstance(job, Cost) else job.id, {}
        )
        if self.options.fresh or (earlier.get("busy_before") or 0) > BUSY:
            return False
        if isinstance(job, Cost):
            return "load_s" in earlier
        entries = earlier.get("engines", {})
        return all("median_ms" in entries.get(name, {}) for name in self.wanted(job))

    def row(self, case: Case, say: Callable[[str], None]) -> bool:
        """Measure and store one row; False when an engine failed or disagreed."""
        threads = self.options.threads
        say("reference outputs")
        oracle = self._oracle()
        reference = measure.reference_outputs(case, oracle, str(self.model(case.model)), threads)
        ready: dict[str, Timed] = {}
        works: dict[str, cases.Work] = {}
        agreements: dict[str, measure.Agreement] = {}
        entries: dict[str, dict[str, Any]] = {}
        for name in self.wanted(case):
            say(f"loading and checking {name}")
            works[name] = cases.work(case, name)
            baseline = name in (BASELINE, SORTED)
            model = models.variant(case.model).dense_name if baseline and case.model != MINILM else case.model
            try:
                kind = BASELINE if baseline or name == SAME else name
                engine = self.engine(kind, model, case.extent, slot=name)
                if baseline:  # it is what the others are held to, and runs the dense model
                    engine.set_calls(works[name].calls, False)
                    engine.outputs()
                else:
                    agreements[name] = measure.check(case, works[name], engine, reference)
                    if not agreements[name].good:
                        raise ValueError(
                            f"outputs differ by {agreements[name].relative:.2e} > {agreements[name].tolerance:.0e}"
                        )
            except Exception as error:  # noqa: BLE001 - one engine's failure is a result, and must not end the others' run
                entries[name] = {"error": f"{type(error).__name__}: {error}"}
                self.console.print(f"[red]{case.id}: {name}:[/] {entries[name]['error']}")
                self.drop(name)
                continue
            ready[name] = engine
        usual = LONG_ROUNDS if len(case.feeds) > 1 else ROUNDS
        rounds = self.options.rounds or (QUICK_ROUNDS if self.options.quick else usual)
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            say(f"round {done} of {rounds}")

        stamp = self._stamp()
        if (stamp["busy_before"] or 0) > BUSY:
            self.console.print(f"[yellow]{case.id}: other work took {stamp['busy_before']:.0%} of the machine[/]")
        say("timing")
        try:
            timed = measure.interleave(ready, {n: len(works[n].calls) for n in ready}, rounds=rounds, tick=tick)
        except EngineFailedError as error:
            self.console.print(f"[red]{case.id}:[/] {error}")
            self.close()
            return False
        for name, seconds in timed.items():
            entries[name] = measure.summary(case, works[name], seconds, agreements.get(name))
        self.result["rows"][case.id] = {**self._facts(case), **stamp, "rounds": rounds, "engines": entries,
                                        "speedup": report.speedups(entries)}  # fmt: skip
        self.save()
        return all("error" not in entry for entry in entries.values())

    def _oracle(self) -> Timed:
        """ONNX Runtime on the row's own model, kept apart from the baseline, which holds the dense one."""
        held = self._loaded.get("oracle")
        if held is None:
            held = self._loaded["oracle"] = (self._start(BASELINE), ())
        return held[0]

    @staticmethod
    def _facts(case: Case) -> dict[str, Any]:
        chosen = None if case.model == MINILM else models.variant(case.model)
        return {
            "model": case.model,
            "pattern": chosen.pattern if chosen and chosen.sparsity else "dense",
            "sparsity": chosen.sparsity if chosen else 0.0,
            "quantized": chosen.quantized if chosen else "",
            "shape": case.shape,
            "batch": case.extent[0],
            "sequence": case.extent[1],
            "sequences": len(case.lengths),
            "tokens": sum(case.lengths),
        }

    # --- costs ---

    def cost(self, cost: Cost, say: Callable[[str], None]) -> bool:
        """Measure and store one engine's load time, memory and file size; False when it failed."""
        threads, python = self.options.threads, self.options.peers if cost.engine in IN_PEERS else sys.executable
        model, entry = self.model(cost.model), {"model": cost.model, **self._stamp()}
        try:
            if cost.plan:
                say("compiling")
                import espalier

                start = time.perf_counter()
                model = Path(espalier.compile(model, self.options.cache / f"{model.stem}.espalier", threads=threads))
                entry["compile_s"] = round(time.perf_counter() - start, 3)
            model.read_bytes()  # every engine finds the file in the page cache
            loads: list[tuple[float, float, float]] = []
            for number in range(1 if self.options.quick else 3):
                say(f"load to first answer, process {number + 1}")
                with self._fresh(python, cost, model, 1, threads) as (remote, load):
                    loads.append((remote.import_seconds, load, remote.time(0, 1)[0]))
            say("peak memory at 16 x 128")
            with self._fresh(python, cost, model, 16, threads) as (remote, _):
                remote.time(0, 3)
                peak = remote.peak_bytes()
                self.result["versions"].setdefault(cost.engine, remote.version)
        except Exception as error:  # noqa: BLE001 - one engine's failure is a result, and must not end the others' run
            entry["error"] = f"{type(error).__name__}: {error}"
            self.console.print(f"[red]{cost.id}:[/] {entry['error']}")
        else:
            imports, load, first = (statistics.median(column) for column in zip(*loads, strict=True))
            entry |= {
                "file_bytes": model.stat().st_size,
                "import_s": round(imports, 3),
                "load_s": round(load, 3),
                "load_to_first_answer_s": round(statistics.median(a + b for _, a, b in loads), 3),
                "first_run_s": round(first, 3),
                "peak_mib": round(peak / 2**20, 1),
            }
        self.result["costs"][cost.name] = entry
        self.save()
        return "error" not in entry

    @contextlib.contextmanager
    def _fresh(
        self, python: Path | str, cost: Cost, model: Path, batch: int, threads: int
    ) -> Iterator[tuple[Remote, float]]:
        with Remote(python, cost.engine) as remote:
            load = remote.load(str(model), (batch, 128), threads, cost.options)
            remote.set_calls([[models.feed(batch, 128, seed=self.options.seed)]], False)
            yield remote, load


def collect(options: argparse.Namespace, console: Console) -> Iterator[Case]:
    """Every case this run could measure; what lacks its data is left out with a message."""
    names = QUICK_MODELS if options.quick else tuple(v.name for v in models.VARIANTS)
    for case in cases.synthetic(list(names), seed=options.seed):
        if not options.quick or case.shape in cases.PEER_SHAPES:
            yield case
    try:
        squad = Squad.read(options.data, lambda text: console.print(f"[yellow]{text}[/]"))
    except LookupError as error:
        console.print(f"[yellow]SQuAD rows are left out:[/] {error}")
    else:
        feeds = squad.sample(options.squad, seed=options.seed)
        for name in SQUAD_MODELS:
            if not options.quick or name == "unstructured-90":
                yield Case(model=name, shape="squad", feeds=feeds, ragged=True)
    try:
        yield from cases.minilm(seed=options.seed)
    except (LookupError, ImportError) as error:
        console.print(f"[yellow]MiniLM rows are left out:[/] {error}")


def chosen(identity: str, patterns: list[str]) -> bool:
    return not patterns or any(p in identity or fnmatch.fnmatchcase(identity, p) for p in patterns)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer models, shapes and rounds; for trying things out")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="rows whose id contains or matches it"
    )
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=models.SEED)
    parser.add_argument("--rounds", type=int, help=f"rounds per row (default: {ROUNDS}; {LONG_ROUNDS} over a data set)")
    parser.add_argument(
        "--squad", type=int, metavar="N", help="features in SQuAD's sample (default: 64; 32 with --quick)"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with SQuAD's dev-v1.1*.json and vocab.txt")
    parser.add_argument("--peers", type=Path, default=machine.PEERS, help="Python of the peers' environment")
    parser.add_argument("--all-peers", action="store_true", help="the peers in their own environment at every shape")
    parser.add_argument("--cache", type=Path, default=models.CACHE, help="where models are built")
    parser.add_argument(
        "--output", type=Path, help="results (default: benchmarks/results/engine.json; --quick: the cache)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--list", action="store_true", help="print the rows' ids and stop")
    options = parser.parse_args()
    options.engines = options.engines.split(",")
    unknown = set(options.engines) - set(ENGINES)
    if unknown:
        parser.error(f"unknown engines {sorted(unknown)}; choose from {', '.join(ENGINES)}")
    options.squad = options.squad or (32 if options.quick else 64)
    options.output = options.output or (options.cache / "quick.json" if options.quick else RESULTS)
    return options


def main() -> int:
    console = Console() if sys.stdout.isatty() else Console(width=180)
    options = parse()
    every = [c for c in collect(options, console) if chosen(c.id, options.only)]
    costs = [c for c in COSTS if c.engine in options.engines and chosen(c.id, options.only)]
    if not every and not costs:
        console.print(f"[red]nothing matches {options.only}[/]; --list prints the rows there are")
        return 2
    if options.list:
        print(*[case.id for case in every], *[cost.id for cost in costs], sep="\n")
        return 0
    bench = Bench(options, console)
    costs = [c for c in costs if c.engine in bench.engines]
    rows_and_costs: list[Case | Cost] = [*every, *costs]
    jobs = [job for job in rows_and_costs if not bench.finished(job)]
    kept = len(rows_and_costs) - len(jobs)
    if kept:
        console.print(f"{kept} rows were finished by an earlier run and are kept (--fresh measures them again)")
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(jobs))
            for job in jobs:

                def say(step: str, prefix: str = job.id) -> None:
                    progress.update(task, description=f"{prefix}: {step}")

                if not (bench.row(job, say) if isinstance(job, Case) else bench.cost(job, say)):
                    failed.append(job.id)
                progress.advance(task)
    finally:
        bench.close()
    report.show(bench.result, console)
    if failed:
        console.print(f"[red]{len(failed)} of {len(jobs)} failed:[/] {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; finished rows are kept, and the same command goes on with the others")
