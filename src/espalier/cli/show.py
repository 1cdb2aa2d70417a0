"""Printing: results on stdout, progress on stderr and only when a person watches it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from espalier.bench import BenchmarkResult
    from espalier.doctor import Diagnosis
    from espalier.session import Session


def say(text: str) -> None:
    """A line on standard output."""
    click.echo(text)


def print_json(value: Any) -> None:
    """JSON and nothing else on standard output."""
    click.echo(json.dumps(value, indent=2, default=str, allow_nan=False))


class _Stdout(Console):
    """Rich ends the process with code 1 when the reader goes away, which here would mean a failed check."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command's entry."""
        raise BrokenPipeError


def _stdout() -> Console:
    console = _Stdout(highlight=False)
    if not console.is_terminal:
        # Tables in a file or a pipe are as wide as their contents, not as a terminal that is not there.
        console = _Stdout(highlight=False, width=160)
    return console


def print_table(table: Table) -> None:
    """A table on standard output."""
    _stdout().print(table)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner while something takes long; nothing unless stderr is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


@contextmanager
def progress(rounds: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar over timed rounds: yields what to call at each stage and after each round."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield (lambda _: None), (lambda _: None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=rounds)
        yield (lambda text: bar.update(task, description=text)), (lambda done: bar.update(task, completed=done))


def model_as_dict(model: Path, session: Session) -> dict[str, Any]:
    """What `inspect` says, as plain values."""
    ends = {
        side: [{"name": info.name, "type": info.type, "shape": list(info.shape)} for info in infos]
        for side, infos in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }
    from espalier._session.source import identify

    return {"model": str(model), "kind": identify(model).kind, **ends, "report": session.report().to_dict()}


def print_model(model: Path, session: Session) -> None:
    """What `inspect` says, as tables."""
    from espalier._session.report import FOREIGN
    from espalier._session.source import identify

    kind = {"onnx": "ONNX file", "hf": "Hugging Face folder", "plan": "compiled plan"}[identify(model).kind]
    say(f"{model}: {kind}")
    for side, infos in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for info in infos:
            shape = ", ".join("?" if dim is None else str(dim) for dim in info.shape)
            say(f"  {side:7}{info.name}  {info.type}  [{shape}]")
    layers = [layer for layer in session.report().layers if layer.op]
    native = sum(layer.count for layer in layers if layer.where != FOREIGN)
    say(f"  {native} of {sum(layer.count for layer in layers)} layers run natively\n")
    _print_layers(session.report().to_dict(), times=False)


def _print_layers(report: dict[str, Any], *, times: bool) -> None:
    layers = [layer for step in report["steps"] for layer in step["layers"]]
    table = Table(title="layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("op")
    table.add_column("runs in")
    table.add_column("type")
    table.add_column("format")
    table.add_column("zeros", justify="right")
    if times:
        table.add_column("ms", justify="right")
        table.add_column("share", justify="right")
    remarks = any(layer["why"] for layer in layers)
    if remarks:
        table.add_column("remark", overflow="fold")
    total = sum(layer["time_ms"] or 0.0 for layer in layers)
    for layer in layers:
        name = layer["name"] if layer["count"] == 1 else f"{layer['name']} (x{layer['count']})".strip()
        zeros = "" if layer["sparsity"] is None else f"{layer['sparsity']:.1%}"
        row = [name, layer["op"], layer["where"], layer["type"], layer["format"], zeros]
        if times:
            spent = layer["time_ms"]
            row += ["", ""] if spent is None else [f"{spent:.3f}", f"{spent / total:.1%}" if total else ""]
        if remarks:
            row.append(layer["why"])
        table.add_row(*map(escape, row))
    _stdout().print(table)


def print_benchmark(result: BenchmarkResult) -> None:
    """A benchmark: agreement, the figures, and the time by layer."""
    settings, machine = result.settings, result.machine
    samples, tokens = settings["samples"], settings["tokens"]
    batch = f"batch of {samples}" + ("" if tokens is None else f", {tokens} tokens")
    say(
        f"{result.model}: {batch}, {settings['threads']} threads, {machine['cpu']} ({machine['isa'] or 'no engine'})"
        + "".join(f", {accelerator['name']}" for accelerator in machine["accelerators"])
    )
    for item in result.agreement:
        say(f"  {'ok  ' if item.ok else 'FAIL'} {item}")
    for note in result.notes:
        say(f"  note: {note}")
    if not result.agrees:
        click.echo("espalier: the outputs disagree, so nothing was timed", err=True)
        return
    table = Table(
        title=f"{settings['rounds']} rounds, in turn, after {settings['warmup']} to warm up", title_justify="left"
    )
    table.add_column("")
    for heading in ("p50 ms", "p90 ms", "p99 ms", "samples/s", *([] if tokens is None else ["tokens/s"])):
        table.add_column(heading, justify="right")
    for row in result.candidates:
        times = (f"{value:.2f}" for value in (row.p50_ms, row.p90_ms, row.p99_ms))
        rates = [f"{row.samples_per_s:.1f}"]
        if row.tokens_per_s is not None:
            rates.append(f"{row.tokens_per_s:.0f}")
        table.add_row(row.name, *times, *rates)
    _stdout().print(table)
    if result.ratio is not None:
        say(f"{result.ratio:.2f} times as fast as {settings['against']} (median)")
    _print_layers(result.report, times=True)


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """What `doctor` says, as lines."""
    cpu, limits, engine = diagnosis.cpu, diagnosis.limits, diagnosis.engine
    caches = ", ".join(
        f"L{cache.level}{cache.kind[0].lower() if cache.kind != 'Unified' else ''} {_bytes(cache.size)}"
        + (f" shared by {cache.shared_by}" if cache.shared_by > 1 else "")
        for cache in cpu.caches
    )
    cores = "" if cpu.physical is None else f", {cpu.physical} physical cores"
    quota = "none" if limits.quota is None else f"{limits.quota:g} cores"
    offered = ", ".join(engine.detected) or "nothing special"
    rows = [
        ("python", f"{diagnosis.python} on {diagnosis.system}"),
        ("cpu", f"{cpu.model}, {cpu.architecture}, {cpu.logical} CPUs{cores}"),
        ("flags", " ".join(cpu.flags) or "none known"),
        ("caches", caches or "unknown"),
        ("limits", f"affinity {limits.affinity} CPUs, cgroup quota {quota}: sessions use {limits.usable} threads"),
        ("engine", f"{engine.isa} kernels (this CPU offers {offered})" if engine.available else engine.problem),
    ]
    for name, text in rows:
        say(f"{name:10}{text}")
    say("installed " + ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items()))
    for extra in diagnosis.extras:
        lacking = f"missing {', '.join(extra.missing)}: pip install 'espalier[{extra.name}]'"
        say(f"{'extra':10}{extra.name}: {lacking if extra.missing else 'complete'}")
    for finding in diagnosis.findings:
        say(f"{finding.kind:10}{finding.what}; {finding.remedy}")
    if not diagnosis.findings:
        say("nothing is broken or slow here")


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
