"""``espalier compress``: prune a model folder and train it until it is as good again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from espalier.cli import files, show
from espalier.cli.entry import INTERRUPTED, debug_option, json_option
from espalier.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from espalier.compression.config import Config
    from espalier.compression.progress import Monitor

TASKS = ("embeddings", "question-answering", "classification", "tokens")
_PATH = click.Path(path_type=Path)

_TRAINING = (
    "epochs",
    "steps",
    "minutes",
    "learning_rate",
    "batch_tokens",
    "max_length",
    "precision",
    "checkpoint_every",
)
"""The options that are fields of ``Training``."""


@click.command(short_help="Prune a model folder and train it until it is as good again.")
@click.argument("model", type=_PATH)
@click.option("--task", type=click.Choice(TASKS), required=True, help="What the model is for.")
@click.option(
    "--data", type=_PATH, multiple=True, required=True, help="A file or dataset to train on; repeat for more."
)
@click.option("-o", "--output", type=_PATH, required=True, help="The folder to make, or of the run to resume.")
@click.option("--sparsity", type=click.FloatRange(0, 1, max_open=True), help="Share of weights to zero; 0 fine-tunes.")
@click.option("--speedup", type=click.FloatRange(min=1, min_open=True), help="Or: times as fast as dense, here.")
@click.option("--pattern", help="unstructured, 4x1, 1x4, RxC, N:M, heads, neurons or layers.")
@click.option("--score", help="magnitude, wanda, sparsegpt, obert or movement.")
@click.option("--allocation", help="uniform, global or cost: how layers share the zeros.")
@click.option("--quantize", type=click.Choice(["int8"]), help="Compute in 8 bit integers, keeping the zeros.")
@click.option("--activations", type=click.Choice(["auto", "static", "dynamic"]), help="How inputs are quantised.")
@click.option("--keep-float", multiple=True, metavar="REGEX", help="Layers that are not quantised; repeat for more.")
@click.option("--recipe", type=_PATH, help="A TOML or JSON file of settings; options given here come first.")
@click.option("--teacher", type=_PATH, help="The folder to learn from.  [default: MODEL as it is]")
@click.option("--eval-data", type=_PATH, help="Held-out data for the figures in the report.")
@click.option("--eval-limit", type=click.IntRange(min=1), help="Evaluate on so many questions only.")
@click.option("--guessed-starts", type=_PATH, help="SQuAD: JSON list of answers whose place is a guess, to leave out.")
@click.option("--text", "text", multiple=True, help="Column of texts, by name, or by place from 0 without a header.")
@click.option("--label", help="Column of labels or scores, likewise.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Train so long at most.")
@click.option("--epochs", type=click.FloatRange(min=0), help="Train over the data so many times at most.")
@click.option("--steps", type=click.IntRange(min=0), help="Train so many optimiser steps at most.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="The highest learning rate.")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens per step and process.")
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of a sequence at most.")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of activations in training.")
@click.option("--checkpoint-every", type=click.IntRange(min=0), help="Steps between checkpoints.")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to run on.  [default: PyTorch's choice]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the output folder.")
@click.option("--no-measure", is_flag=True, help="Do not time the result beside the dense model.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@json_option("Write the whole report as JSON.")
@debug_option
@click.pass_context
def compress(context: click.Context, /, model: Path, output: Path, json_to: str | None, **options: Any) -> None:
    """Prune or quantise MODEL, a Hugging Face folder, and train it until it is as good again.

    Writes a folder with the compressed model, the same as model.onnx, and a report, all verified. Without --minutes,
    --epochs or --steps nothing is trained, only pruned and quantised. Ctrl-C writes a checkpoint; the same command with
    --resume goes on from it.
    """
    try:
        from espalier.compression.compress import Data, compress
        from espalier.compression.tasks import Columns
        from espalier.compression.trainer import TrainingInterrupted
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "espalier":
            raise
        raise MissingDependencyError(
            f"compression needs the package {error.name}, which is not installed: pip install 'espalier[compress]'"
        ) from error
    # Under a launcher of several processes, one speaks for all.
    leader = os.environ.get("RANK", "0") == "0"
    target = None if json_to in (None, "-") or not leader else Path(str(json_to))
    if target is not None:
        files.check_output(target, [model, *options["data"]])
    config = make_config(options)
    data = Data(
        training=options["data"],
        evaluation=options["eval_data"],
        columns=Columns(text=options["text"], label=options["label"] or ""),
        guessed=options["guessed_starts"],
        limit=options["eval_limit"],
    )
    try:
        report = compress(
            model,
            config,
            task=options["task"],
            data=data,
            output=output,
            teacher=options["teacher"],
            resume=options["resume"],
            measure=not options["no_measure"],
            monitor=_monitor(options["quiet"]),
        )
    except TrainingInterrupted as stopped:
        hint = "; the same command with --resume goes on from there" if stopped.checkpoint else ""
        click.echo(f"espalier: {stopped}{hint}", err=True)
        context.exit(INTERRUPTED)
    if not leader:
        return
    if target is not None:
        files.write_json(target, report.to_dict())
    if json_to == "-":
        show.print_json(report.to_dict())
    elif not options["quiet"]:
        for line in report.summary():
            show.say(line)
        show.say(f"wrote {output}: the model, model.onnx, report.md")


def _monitor(quiet: bool) -> Monitor:
    from espalier.compression.progress import Monitor, monitor

    return Monitor() if quiet else monitor()


def make_config(options: Mapping[str, Any]) -> Config:
    """The configuration: what suits the task, then the recipe, then the options that were given.

    Raises ConfigError or InputError.
    """
    from espalier.compression.config import Config
    from espalier.compression.defaults import defaults, merged, read_recipe

    recipe = read_recipe(options["recipe"]) if options.get("recipe") is not None else {}
    given: dict[str, Any] = {
        name: options[name]
        for name in ("sparsity", "speedup", "pattern", "score", "allocation", "seed", "threads")
        if options.get(name) is not None
    }
    training = {name: options[name] for name in _TRAINING if options.get(name) is not None}
    if training:
        given["training"] = training
    quantization = _quantization(options, recipe)
    if quantization:
        given["quantization"] = quantization
    if "sparsity" in given and "speedup" in given:
        raise InputError("--sparsity and --speedup are two ways to say how much to prune; give one of them")
    if {"sparsity", "speedup"} & given.keys():
        # One on the command line replaces either in the recipe.
        recipe = {name: value for name, value in recipe.items() if name not in ("sparsity", "speedup")}
    if {"epochs", "steps", "minutes"} & training.keys():
        limits = ("epochs", "steps", "minutes")
        kept = {name: value for name, value in recipe.get("training", {}).items() if name not in limits}
        recipe = {**recipe, "training": kept}
    wanted = merged(recipe, given)
    sparse = any(wanted.get(name) for name in ("sparsity", "speedup", "quantization"))
    return Config.from_dict(merged(defaults(options["task"], sparse=sparse), wanted))


def _quantization(options: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are fields of ``Quantization``."""
    fields = {"scheme": options.get("quantize"), "activations": options.get("activations")}
    fields |= {"keep_float": options.get("keep_float") or None}
    given = {name: value for name, value in fields.items() if value is not None}
    if given and "scheme" not in given and not recipe.get("quantization"):
        raise InputError("--activations and --keep-float are about quantised layers; add --quantize int8")
    return given
