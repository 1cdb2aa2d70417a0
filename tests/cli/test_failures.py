"""Bad input ends with exit code 2, one message and nothing overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from espalier.cli import files
from espalier.errors import InputError, ModelNotFoundError
from espalier.files import replacing

Run = Callable[..., Result]


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(("espalier: ", "Usage: "))
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("command", ["inspect", "benchmark"])
def test_a_model_that_is_not_there(run: Run, command: str) -> None:
    refused(run(command, "nothing.onnx"), "nothing.onnx does not exist")


def test_a_model_that_is_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
    refused(run("inspect", "bad.onnx"), "bad.onnx")


def test_debug_shows_the_traceback(run: Run) -> None:
    for arguments in (["--debug", "inspect", "nothing.onnx"], ["inspect", "nothing.onnx", "--debug"]):
        assert isinstance(run(*arguments).exception, ModelNotFoundError)


def test_usage_errors(run: Run, model: Path) -> None:
    refused(run("inspect"), "MODEL")
    refused(run("benchmark", model, "--against", "nobody"), "nobody")
    refused(run("benchmark", model, "--batch", 0), "--batch")


def test_wrong_inputs_are_named(run: Run, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", input_id=np.ones((1, 4), np.int64), attention_mask=np.ones((1, 4), np.int64))
    refused(run("run", model, "--inputs", "wrong.npz", "-o", "out.npz"), "input_id", "did you mean 'input_ids'")
    assert not (tmp_path / "out.npz").exists()


def test_an_id_beyond_the_vocabulary(run: Run, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=np.full((1, 4), 40), attention_mask=np.ones((1, 4), np.int64))
    refused(run("run", model, "--inputs", "in.npz", "-o", "out.npz"), "0 to 39")


def test_outputs_never_replace_inputs(run: Run, model: Path, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "link.npz").symlink_to(inputs)
    os.link(inputs, tmp_path / "hard.npz")
    before, model_before = inputs.read_bytes(), model.read_bytes()
    for output in (inputs, "link.npz", "hard.npz", model, tmp_path / "." / "in.npz"):
        refused(run("run", model, "--inputs", inputs, "-o", output), "is an input of this command")
    refused(run("compile", model, "-o", model), "is an input")
    refused(run("benchmark", model, "--json", model), "is an input")
    assert inputs.read_bytes() == before
    assert model.read_bytes() == model_before


def test_outputs_stay_out_of_model_folders(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="model folder"):
        files.check_output(tmp_path / "model" / "new.espalier", [tmp_path / "model"])


def test_places_that_are_no_files(run: Run, model: Path, inputs: Path, tmp_path: Path) -> None:
    refused(run("run", model, "--inputs", inputs, "-o", tmp_path), "is a folder")
    refused(run("run", model, "--inputs", inputs, "-o", "no/where.npz"), "does not exist")


def test_a_failure_leaves_the_old_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_replacement_is_on_the_disc_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    with replacing(tmp_path / "out") as target:
        target.write_text("new")
    assert done == ["fsync", "replace"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_arrays_keep_their_names_and_the_file_its_own(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3), "arr_0": np.zeros(()), "layer/norm:0": np.ones((2, 2), np.float16)}
    files.write_arrays(tmp_path / "plain", arrays)
    with np.load(tmp_path / "plain") as got:
        assert set(got.files) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[name], array)
            assert got[name].dtype == array.dtype


def test_a_reader_that_leaves_is_no_error(model: Path) -> None:
    command = f'"{sys.executable}" -m espalier inspect "{model}" | head -c 1; echo "${{PIPESTATUS[0]}}" >&2'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Error" not in done.stderr
    assert done.stderr.strip() in ("0", "141")
