"""Configurations: what they refuse, and that files and dicts give them back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.compression.config import Config, Recovery, Schedule, Training
from espalier.errors import ConfigError


def test_a_dict_gives_the_configuration_back() -> None:
    config = Config(
        sparsity=0.8,
        pattern="2:4",
        score="obert",
        schedule=Schedule(kind="gradual", steps=4),
        training=Training(minutes=3),
        exclude=("layer.0",),
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_files_give_the_configuration_back(tmp_path: Path) -> None:
    config = Config(sparsity=0.5, recovery=Recovery(hidden=2))
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps(config.to_dict()))
    as_toml = tmp_path / "run.toml"
    as_toml.write_text("sparsity = 0.5\n[recovery]\nhidden = 2\n")
    assert Config.from_file(as_json) == config == Config.from_file(as_toml)


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    value = Config.from_dict({"training": {"epochs": 3}}).training.epochs
    assert isinstance(value, float)
    assert value == 3.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sparsty": 0.5}, "did you mean 'sparsity'"),
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"sparsity": 0.5, "speedup": 2.0}, "not both"),
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": 80}, "write 0.8"),
        ({"sparsity": "half"}, "must be of type float or None"),
        ({"sparsity": float("nan")}, "finite"),
        ({"seed": True}, "must be of type int"),
        ({"speedup": 0.5}, "at least 1"),
        ({"score": "sparsegtp"}, "did you mean 'sparsegpt'"),
        ({"allocation": "even"}, "uniform, global, cost"),
        ({"pattern": "4*1"}, "pattern must be one of"),
        ({"pattern": "4:2"}, "must be the smaller"),
        ({"pattern": "0x1"}, "pattern must be one of"),
        ({"exclude": ["("]}, "not a regular expression"),
        ({"exclude": "layer"}, "must be of type"),
        ({"schedule": {"kind": "gradual", "start": 0.5, "end": 0.5}}, "must be after start"),
        ({"schedule": 3}, "must be of type Schedule"),
        ({"training": {"precision": "float16"}}, "auto, float32, bfloat16"),
        ({"training": {"learning_rate": 0}}, "above 0"),
        ({"recovery": {"temperature": 0}}, "at least 0.001"),
        ({"calibration": {"dampening": -1}}, "at least 0"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_expected(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("*", r"\*").replace("(", r"\(")):
        Config.from_dict(values)


def test_errors_of_files_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "run.toml"
    broken.write_text("sparsity = ")
    unknown = tmp_path / "other.json"
    unknown.write_text('{"nothing": 1}')
    for path in (broken, unknown, tmp_path / "missing.toml", tmp_path / "run.yaml"):
        with pytest.raises(ConfigError, match=path.name):
            Config.from_file(path)


def test_configurations_need_no_pytorch() -> None:
    code = "import sys, espalier.compression.config; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
