"""Checkpoints: whole or not at all, and the last good one survives every failure."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.compression import checkpoint
from espalier.errors import CheckpointError


def test_the_newest_replaces_the_others(tmp_path: Path) -> None:
    for step in (5, 10):
        checkpoint.save(tmp_path / "c", step, {"step": step, "weight": torch.arange(3)})
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000010.pt"]
    found = checkpoint.find_latest(tmp_path / "c")
    assert found is not None
    state = checkpoint.load(found)
    assert state["step"] == 10
    assert state["weight"].tolist() == [0, 1, 2]
    assert checkpoint.find_latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disc_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    first = checkpoint.save(tmp_path, 5, {"step": 5})

    def fail(state: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"step-00000010.*(No space left|is the disc full).*step-00000005\.pt"):
        checkpoint.save(tmp_path, 10, {"step": 10})
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [first.name]
    assert checkpoint.load(first)["step"] == 5


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
        checkpoint.load(path)
    torch.save({"version": 99}, path)
    with pytest.raises(CheckpointError, match="expected a checkpoint of version 1, got 99"):
        checkpoint.load(path)
