"""`espalier compress`: its options, its output and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from espalier.cli import main
from espalier.cli.compress import make_config
from espalier.errors import ConfigError, InputError

ONCE = ("--task", "embeddings", "--score", "magnitude", "--pattern", "unstructured", "--no-measure", "--threads", 1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compress", *map(str, arguments)])


def test_one_shot(encoder_folder: Path, texts_file: Path, pairs_file: Path, tmp_path: Path) -> None:
    done = run(
        encoder_folder, *ONCE, "--data", texts_file, "--eval-data", pairs_file, "--sparsity", 0.8, "-o", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    assert "80.0% of the prunable weights are zero" in done.stdout
    assert "recovered" in done.stdout
    assert "pruning to 80.0%" in done.stderr
    assert (tmp_path / "o" / "report.md").is_file()


def test_json_is_pure_and_quiet_is_quiet(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    done = run(encoder_folder, *ONCE, "--data", texts_file, "--sparsity", 0.7, "-o", tmp_path / "o", "-q", "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert json.loads(done.stdout)["task"] == "embeddings"


def test_failures_are_messages(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\xff\n")
    for arguments, words in (
        (("--data", bad, "-o", tmp_path / "o"), "bad.txt:2: expected UTF-8"),
        (("--data", texts_file, "-o", encoder_folder), "is or holds the input"),
        (("--data", texts_file, "-o", tmp_path / "o", "--pattern", "7x7"), "7x7"),
        (("--data", texts_file, "-o", tmp_path / "o", "--resume"), "no checkpoint"),
        (("--data", texts_file, "-o", tmp_path / "o", "--teacher", texts_file), "config.json"),
    ):
        done = run(encoder_folder, *ONCE, "--sparsity", 0.5, *arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def options(**given: Any) -> dict[str, Any]:
    return {"task": "embeddings", **given}


def test_options_come_before_the_recipe_and_that_before_the_task(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'sparsity = 0.9\npattern = "4x1"\n[recovery]\nhidden = 3.0\n[training]\nminutes = 5.0\nbatch_tokens = 99\n'
    )
    config = make_config(options(recipe=recipe, sparsity=0.5, steps=7))
    assert config.sparsity == 0.5
    assert config.pattern == "4x1"
    assert config.recovery.hidden == 3
    assert config.recovery.task == 0
    assert (config.training.minutes, config.training.steps, config.training.batch_tokens) == (None, 7, 99)
    fast = make_config(options(recipe=recipe, speedup=4.0))
    assert (fast.sparsity, fast.speedup) == (None, 4.0)
    dense = make_config({"task": "classification"})
    assert dense.recovery.task == 1
    assert dense.recovery.logits == 0


def test_quantisation_on_the_command_line(tmp_path: Path) -> None:
    config = make_config(options(quantize="int8", keep_float=("output", "query")))
    assert config.quantization is not None
    assert config.quantization.keep_float == ("output", "query")
    assert config.quantization.activations == "auto"
    assert config.keeps_zeros
    recipe = tmp_path / "r.toml"
    recipe.write_text('sparsity = 0.8\n[quantization]\nrange = "minmax"\n')
    both = make_config(options(recipe=recipe, activations="static")).quantization
    assert both is not None
    assert (both.range, both.activations) == ("minmax", "static")
    # Labels and the float model teach a quantised network.
    assert make_config({"task": "classification", "quantize": "int8"}).recovery.logits == 1
    with pytest.raises(InputError, match="add --quantize int8"):
        make_config(options(activations="static"))


def test_recipes_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("sparsty = 0.9\n")
    with pytest.raises(ConfigError, match="did you mean 'sparsity'"):
        make_config(options(recipe=tmp_path / "a.toml"))
    (tmp_path / "b.toml").write_text("sparsity = \n")
    with pytest.raises(ConfigError, match=r"b\.toml: not a recipe"):
        make_config(options(recipe=tmp_path / "b.toml"))
    with pytest.raises(ConfigError, match=r"c\.toml: No such file"):
        make_config(options(recipe=tmp_path / "c.toml"))
    with pytest.raises(InputError, match="two ways to say"):
        make_config(options(sparsity=0.5, speedup=4.0))


def test_committed_recipes_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "compress" / "recipes"
    recipes = sorted(folder.glob("*.toml"))
    assert recipes
    for recipe in recipes:
        task = "question-answering" if recipe.name.startswith("qa") else "embeddings"
        make_config({"task": task, "recipe": recipe})
