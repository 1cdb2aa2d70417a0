"""Writing files: never over an input, and whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import InputError
from espalier.files import replacing


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is an input, lies in an input folder, or is a folder. Raises InputError."""
    if output.is_dir():
        raise InputError(f"{output} is a folder; give the name of a file to write")
    for given in inputs:
        if _same(output, given):
            raise InputError(f"{output} is an input of this command; write to another file")
        if given.is_dir() and output.resolve().is_relative_to(given.resolve()):
            raise InputError(f"{output} lies in the model folder {given}, which stays as it is; write somewhere else")
    if not output.parent.is_dir():
        raise InputError(f"the folder {output.parent} does not exist; make it first")


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except FileNotFoundError:
        return a.resolve() == b.resolve()


def write_arrays(output: Path, arrays: Mapping[str, Any]) -> None:
    """Save arrays by name, as :func:`numpy.savez` does. Raises InputError for values that are not plain arrays."""
    import numpy as np

    plain = {name: np.asarray(value) for name, value in arrays.items()}
    for name, array in plain.items():
        if array.dtype.hasobject:
            raise InputError(f"output {name!r} is not a numeric tensor ({array.dtype}), so it cannot be saved as .npz")
    # An open file keeps the name as it is; with a path, savez would append .npz.
    with replacing(output) as temporary, temporary.open("wb") as file:
        # The names are data: one called "file" must not become savez's own argument.
        _save(file, plain)


def _save(file: Any, arrays: Mapping[str, Any]) -> None:
    import zipfile

    import numpy as np

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_json(output: Path, value: Any) -> None:
    """Save ``value`` as indented JSON."""
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8")


def size_of(model: Path) -> int:
    """Bytes of a model: a file, or the files directly in a folder; external data of an ONNX file is not counted."""
    if model.is_dir():
        return sum(file.stat().st_size for file in model.iterdir() if file.suffix in (".safetensors", ".json")) or 1
    return model.stat().st_size or 1
