"""``espalier mlperf``: run benchmarks under LoadGen, write submissions, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from espalier.cli import show
from espalier.cli.entry import debug_option
from espalier.cli.options import load_options

if TYPE_CHECKING:
    from espalier.mlperf.results import System

CHECK_FAILED = 1

_PATH = click.Path(path_type=Path)
_QUICK_S = 60.0


@click.group(short_help="Measure under MLPerf's rules, and hand out results others can believe.")
@debug_option
def mlperf() -> None:
    """Measure models under MLPerf Inference's rules, with its own load generator.

    Results are not verified by MLCommons Association.
    """


@mlperf.command(short_help="Run a benchmark's scenarios.")
@click.argument("model", type=_PATH)
@click.option("--benchmark", default="bert-99", show_default=True, help="bert-99, bert-99.9, embeddings or custom.")
@click.option("--data", type=_PATH, required=True, help="The data set, or the folder it lies in.")
@click.option("-o", "--output", "out", type=_PATH, required=True, help="The folder of results; more runs add to it.")
@click.option(
    "--scenario", default="all", show_default=True, help="Offline, SingleStream, MultiStream, Server; or all."
)
@click.option("--mode", default="performance,accuracy", show_default=True, help="And find-peak, LoadGen's own search.")
@click.option("--division", type=click.Choice(["open", "closed"]), default="open", show_default=True)
@click.option("--category", type=click.Choice(["edge", "datacenter"]), default="edge", show_default=True)
@click.option("--round", type=click.Choice(["v6.1", "v4.1"]), default="v6.1", show_default=True, help="Whose seeds.")
@click.option("--audit", default="", help="Compliance tests to run too: TEST01, TEST05.  [default: closed: TEST01]")
@click.option(
    "--engine", default="espalier", show_default=True, help="espalier, onnxruntime, openvino, deepsparse, noop."
)
@click.option("--python", type=_PATH, help="The interpreter of another environment, which has the engine.")
@click.option("--padding", type=click.Choice(["max", "longest"]), help="For engines that pad.  [default: max]")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Likewise: most per batch.")
@click.option("--tokenizer", type=_PATH, help="The folder of tokenizer.json.  [default: the model's]")
@click.option("--name", help="The system's name, a folder in the output.  [default: the engine's and the model's]")
@click.option("--note", default="", help="A remark for reports, such as: untrained.")
@click.option(
    "--quick",
    is_flag=False,
    flag_value=str(_QUICK_S),
    metavar="[SECONDS]",
    help="Short runs, which do not conform to the rules.  [60 without SECONDS]",
)
@click.option("--qps", "server_qps", type=click.FloatRange(min=0, min_open=True), help="The Server's rate; no search.")
@click.option("--latency-ms", type=click.FloatRange(min=0, min_open=True), help="The Server's bound.  [default: 130]")
@click.option("--network", multiple=True, metavar="HOST:PORT", help="A node that runs the model; several may be given.")
@click.option("--fresh", is_flag=True, help="Measure again what is finished.")
@load_options
@debug_option
@click.pass_context
def run(context: click.Context, /, model: Path, **options: Any) -> None:
    """Run MODEL under LoadGen: performance and accuracy in each scenario.

    Without --quick every performance run takes 600 seconds or more, as the rules demand. What is finished is not
    repeated: after an interruption the same command goes on. Exit code 1 when a step does not count.
    """
    from espalier.mlperf.benchmarks import scenarios
    from espalier.mlperf.run import Settings
    from espalier.mlperf.run import run as measure

    audits = _names(options.pop("audit")) or (("TEST01",) if options["division"] == "closed" else ())
    settings = Settings(
        scenarios=tuple(scenarios(options.pop("scenario"))),
        modes=_names(options.pop("mode")),
        audits=audits,
        quick=_seconds(options.pop("quick")),
        **options,
    )
    system = measure(model, settings, tell=lambda text: click.echo(f"espalier: {text}", err=True))
    _print_system(system)
    if any(not step.valid for step in system.steps.values() if step.scenario in settings.scenarios):
        context.exit(CHECK_FAILED)


@mlperf.command(short_help="Write a submission, and have it checked.")
@click.argument("results", type=_PATH)
@click.option("--submitter", required=True, help="Your organisation's name, as a folder's.")
@click.option("-o", "--output", "out", type=_PATH, required=True, help="The new folder to write.")
@click.option("--round", type=click.Choice(["v6.1", "v4.1"]), default="v6.1", show_default=True, help="Its layout.")
@click.option("--division", type=click.Choice(["open", "closed"]), help="[default: the runs']")
@click.option("--category", type=click.Choice(["edge", "datacenter"]), help="[default: the runs']")
@click.option("--system", type=_PATH, help="JSON of fields of the system's description that are known better.")
@click.option("--unmodified", is_flag=True, help="Declare: the weights are the reference model's, quantised at most.")
@click.option("--draft", is_flag=True, help="Write quick runs too, for a rehearsal.")
@click.option("--checker", type=_PATH, help="A checkout of mlcommons/inference, whose checker is run over it.")
@debug_option
@click.pass_context
def submit(context: click.Context, /, results: Path, checker: Path | None, **options: Any) -> None:
    """Write the submission of RESULTS. Exit code 1 when the official checker finds errors."""
    from espalier.mlperf import submission

    wanted = submission.Submission(**options)
    tree = submission.submit(results, wanted)
    show.say(f"wrote {tree}")
    if checker is not None:
        good, printed = submission.run_checker(checker, wanted)
        wrong = [line for line in printed.splitlines() if "ERROR" in line or "SUMMARY" in line]
        for line in wrong:
            show.say(line)
        if not good:
            context.exit(CHECK_FAILED)


@mlperf.command(short_help="HTML, Markdown and JSON of results, side by side.")
@click.argument("results", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", "out", type=_PATH, help="The folder to write to.  [default: the first of RESULTS]")
@debug_option
def report(results: tuple[Path, ...], out: Path | None) -> None:
    """Write report.html, report.md and report.json of one or more folders of RESULTS. The page opens offline."""
    from espalier.mlperf.report import report as write

    for path in write(results, out or results[0]):
        show.say(f"wrote {path}")


@mlperf.command(short_help="Be the system under test of a LoadGen on another machine.")
@click.argument("model", type=_PATH)
@click.option("--benchmark", default="bert-99", show_default=True, help="bert-99, bert-99.9, embeddings or custom.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond loopback a token is needed.")
@click.option("--port", type=click.IntRange(0, 65535), default=8010, show_default=True, help="0 takes a free one.")
@click.option("--token-file", type=_PATH, help="Clients must send this token.  [default: $ESPALIER_TOKEN, if set]")
@click.option("--insecure", is_flag=True, help="Answer whoever can reach --host, without a token.")
@click.option("--latency-ms", type=click.FloatRange(min=0, min_open=True), help="Most throughput within this.")
@click.option("--name", help="The node's name.  [default: the machine's]")
@load_options
@debug_option
def node(model: Path, **options: Any) -> None:
    """Run MODEL for `espalier mlperf run --network`, until SIGTERM.

    docs/mlperf-network.md tells what goes over the wire.
    """
    from espalier.mlperf.network.serve import serve_node

    serve_node(model, say=show.say, **options)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise click.BadParameter(f"--quick takes a number of seconds, or nothing; got {text!r}") from error


def _print_system(system: System) -> None:
    from espalier.mlperf.report import UNVERIFIED, rows

    for row in rows(system):
        show.say(f"{row.scenario:13}{row.metric:>16} {row.unit:11}{row.validity:16}{row.accuracy}")
    show.say(UNVERIFIED)
