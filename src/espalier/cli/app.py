"""The commands and their options. Each parses, calls one verb of the library, and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import espalier
from espalier.cli import files, show
from espalier.cli.cluster import cluster
from espalier.cli.compress import compress
from espalier.cli.entry import EspalierGroup, debug_option, json_option
from espalier.cli.mlperf import mlperf
from espalier.cli.options import load_options, target_options, threads_option, tune_option
from espalier.cli.serve import serve
from espalier.files import replacing

if TYPE_CHECKING:
    from espalier.loading import LoadSettings

CHECK_FAILED = 1

_MODEL = click.argument("model", type=click.Path(path_type=Path))


@click.group(cls=EspalierGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(espalier.__version__, "--version", "-V", prog_name="espalier")
@debug_option
def main() -> None:
    """Run pruned transformer encoders fast on CPUs.

    MODEL is an ONNX file, a Hugging Face folder (config.json and safetensors) or a compiled .espalier plan.
    """


@main.command(short_help="Show inputs, outputs, and what runs where and why.")
@_MODEL
@target_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def inspect(model: Path, as_json: bool, **target: Any) -> None:
    """Show a model's inputs and outputs, and what runs where, in which format, and why not natively."""
    with show.status("loading"):
        session = espalier.load(model, threads=1, tune=False, **target)
    if as_json:
        show.print_json(show.model_as_dict(model, session))
    else:
        show.print_model(model, session)


@main.command()
@_MODEL
@click.option("--inputs", type=click.Path(path_type=Path), required=True, help="An .npz file of arrays by input name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .npz file to write.")
@load_options
@debug_option
def run(model: Path, inputs: Path, output: Path, load: LoadSettings) -> None:
    """Run MODEL once on saved inputs and save its outputs."""
    from espalier.bench.feeds import read_arrays

    files.check_output(output, [model, inputs])
    feeds = read_arrays(inputs)
    with show.status("loading"):
        session = load.open(model)
    with show.status("running"):
        results = session.run(None, feeds)
    names = [info.name for info in session.get_outputs()]
    files.write_arrays(output, dict(zip(names, results, strict=True)))
    show.say(f"wrote {output}: " + ", ".join(f"{n} {list(r.shape)}" for n, r in zip(names, results, strict=True)))


@main.command(short_help="Write a plan: one file that loads at once.")
@_MODEL
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The plan to write (.espalier).")
@click.option("--exact", is_flag=True, help="Keep embedding tables in float32 instead of 16-bit integers with scales.")
@threads_option
@tune_option
@debug_option
def compile(model: Path, output: Path, exact: bool, threads: int | None, no_tune: bool) -> None:
    """Compile MODEL into a plan: one file that loads at once, its size in proportion to the nonzeros."""
    files.check_output(output, [model])
    with show.status("compiling"), replacing(output) as temporary:
        espalier.compile(model, temporary, threads=threads, tune=not no_tune, exact=exact)
    size = output.stat().st_size
    before = files.size_of(model)
    show.say(f"wrote {output}: {size / 1e6:.1f} MB, {size / before:.0%} of {model.name or model}")


@main.command()
@_MODEL
@click.option(
    "--against", type=click.Choice(["onnxruntime"]), help="Compare with this runtime, then time both in turn."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences per run.")
@click.option("--seq", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens per sequence.")
@click.option("--ragged", is_flag=True, help="Sequences of 1/4 to all of --seq tokens; also times run_ragged.")
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="Real inputs (.npz by input name) instead of made-up ones."
)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Timed runs of each.")
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="Untimed runs before.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the made-up inputs.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Relative error that still agrees.  [default: 2e-4; 0.2 in 8 bits; on a GPU 0.05 in 16]",
)
@load_options
@json_option("Write the whole result as JSON.")
@debug_option
@click.pass_context
def benchmark(context: click.Context, /, model: Path, json_to: str | None, **options: Any) -> None:
    """Time MODEL on this machine. Outputs are compared first, and wrong answers are not timed (exit code 1)."""
    from espalier.bench import Settings
    from espalier.bench import benchmark as measure

    target = None if json_to in (None, "-") else Path(str(json_to))
    if target is not None:
        files.check_output(target, [model, *([options["inputs"]] if options["inputs"] else [])])
    settings = Settings(**options)
    with show.progress(settings.rounds) as (stage, done):
        result = measure(model, settings, on_stage=stage, on_round=done)
    if target is not None:
        files.write_json(target, result.to_dict())
    if json_to == "-":
        show.print_json(result.to_dict())
    else:
        show.print_benchmark(result)
    if not result.agrees:
        context.exit(CHECK_FAILED)


@main.command(short_help="Show what is here, missing, and slow.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
@click.pass_context
def doctor(context: click.Context, /, as_json: bool) -> None:
    """Show what this machine and installation have, what is missing, and what is slow and why."""
    from espalier.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        show.print_json(diagnosis.to_dict())
    else:
        show.print_diagnosis(diagnosis)
    if diagnosis.broken:
        context.exit(CHECK_FAILED)


@main.command(short_help="Learn the scales that FP8 on a GPU needs.")
@_MODEL
@click.option(
    "--inputs", type=click.Path(path_type=Path), multiple=True, help="An .npz of arrays by input name; repeat."
)
@click.option("--texts", type=click.Path(path_type=Path), help="Or a file of texts, one a line; needs a model folder.")
@click.option("--limit", type=click.IntRange(min=1), default=512, show_default=True, help="Texts to use at most.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file of scales to write.")
@click.option(
    "--max-error", type=click.FloatRange(min=0), help="Layers that FP8 changes more stay in bf16.  [default: 0.1]"
)
@click.option("--device", default="torch-cpu", show_default=True, help="Where to compute, in float32.")
@debug_option
def calibrate(
    model: Path, inputs: tuple[Path, ...], texts: Path | None, limit: int, output: Path, **options: Any
) -> None:
    """Learn from real inputs the scales that FP8 on a GPU needs, and write them to a file that --calibration takes."""
    from espalier.bench.feeds import read_arrays, read_texts

    files.check_output(output, [model, *inputs, *([texts] if texts else [])])
    samples: list[Any] = [read_arrays(path) for path in inputs]
    if texts is not None:
        samples.append(read_texts(texts, model, limit=limit))
    with show.status("calibrating"), replacing(output) as temporary:
        espalier.calibrate(model, samples, temporary, **options)
    layers = json.loads(output.read_text(encoding="utf-8"))["layers"].values()
    kept = sum(layer["precision"] == "bf16" for layer in layers)
    show.say(f"wrote {output}: {len(layers) - kept} layers in FP8, {kept} in bf16")


main.add_command(compress)
main.add_command(mlperf)
main.add_command(serve)
main.add_command(cluster)
