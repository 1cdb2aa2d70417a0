"""Checkpoints: written whole or not at all, and the one before stays until the next is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from espalier.errors import CheckpointError
from espalier.files import replacing

VERSION = 1
_NAME = re.compile(r"step-(\d{8})\.pt")


def path_of(folder: Path, step: int) -> Path:
    """The file of the checkpoint after ``step`` optimiser steps."""
    return folder / f"step-{step:08d}.pt"


def find_latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, None when there is none."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, default=None)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` (nested dicts and lists of tensors and plain values), then remove older checkpoints.

    Raises CheckpointError when the disc is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = path_of(folder, step)
    before = find_latest(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disc as a RuntimeError of its own.
        kept = f"the last one is {before}" if before else "there is no earlier one"
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {_reason(error)}; {kept}. Make room or choose another folder, then "
            "continue with --resume"
        ) from error
    for old in folder.glob("step-*.pt"):
        if _NAME.fullmatch(old.name) and old != target:
            old.unlink(missing_ok=True)
    return target


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, onto the CPU. Raises CheckpointError when it is missing, corrupt or of another version."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a corrupt file
        raise CheckpointError(f"{path}: not a checkpoint that can be read: {_reason(error)}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        got = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: expected a checkpoint of version {VERSION}, got {got}; start the run again")
    return state


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
    # A full disc in the middle of torch's archive shows only as a mismatch of positions.
    return f"{text} (is the disc full?)" if "PytorchStreamWriter" in text or "unexpected pos" in text else text
