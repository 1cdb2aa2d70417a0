"""How to load a model as one value, and the options of the command line that make it."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import click
import pytest

import espalier
from espalier._cpu import usable_cores
from espalier.cli.app import main
from espalier.errors import InputError, InputTypeError
from espalier.loading import LoadSettings


def test_the_settings_are_what_load_takes() -> None:
    taken = {name: p.default for name, p in inspect.signature(espalier.load).parameters.items() if name != "model"}
    assert {field.name: field.default for field in fields(LoadSettings)} == taken


def test_opening_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("espalier.session.load", lambda model, **options: seen.update(options, model=model))
    given = {"threads": 3, "tune": False, "device": "torch-cpu", "precision": "fp8", "calibration": "scales.json"}
    LoadSettings(**given).open("model")  # type: ignore[arg-type]
    assert seen == {**given, "model": "model"}


def test_threads() -> None:
    assert LoadSettings().thread_count == usable_cores()
    assert LoadSettings(threads=3).thread_count == 3


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"threads": 0}, InputError, "at least 1; got 0"),
        ({"threads": True}, InputTypeError, "whole number or None; got True"),
        ({"threads": "2"}, InputTypeError, "whole number or None; got '2'"),
        ({"device": "gpu"}, InputError, "unknown device 'gpu'"),
        ({"precision": "bf16"}, InputError, "'bf16' needs a GPU"),
        ({"calibration": "scales.json"}, InputError, "pass device='cuda', or leave it out"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LoadSettings(**given)


def test_every_command_says_the_same_of_an_option() -> None:
    ours = {"--threads", "--no-tune", "--device", "--precision", "--calibration"}
    # What these mean there is another thing: PyTorch's threads, and where scales are learnt.
    others = {
        ("compress", "--threads"),
        ("compress", "--device"),
        ("compress", "--precision"),
        ("calibrate", "--device"),
    }
    said: dict[str, set[str | None]] = {}
    commands = [("", main)]
    while commands:
        name, command = commands.pop()
        if isinstance(command, click.Group):
            commands += [(f"{name} {inner}".strip(), command.commands[inner]) for inner in command.commands]
        for option in command.params:
            known = ours & set(option.opts)
            if isinstance(option, click.Option) and known and (name, *known) not in others:
                said.setdefault(known.pop(), set()).add(option.help)
    assert {option: len(texts) for option, texts in said.items()} == dict.fromkeys(ours, 1)
