"""What kind of model something is, by its content and not by its suffix."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from espalier.errors import InputTypeError, ModelFormatError, ModelNotFoundError, UnsupportedModelError
from espalier.hf.safetensors import MAX_HEADER

Kind = Literal["onnx", "hf", "plan"]

PLAN_MARK = "espalier"
"""The key in a plan's safetensors ``__metadata__`` that tells it from other safetensors files."""


@dataclass(frozen=True)
class Source:
    """A model: its kind and the file, folder or bytes it is in."""

    kind: Kind
    model: Path | bytes

    @property
    def name(self) -> str:
        return "the model" if isinstance(self.model, bytes) else str(self.model)


def identify(model: Any) -> Source:
    """Tell what ``model`` is: a path (file or folder), serialised ONNX bytes, or an ``onnx.ModelProto``.

    Raises ModelNotFoundError, ModelFormatError, UnsupportedModelError (a message over 2 GiB) or InputTypeError.
    """
    if isinstance(model, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(model))
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        return _from_path(Path(os.fsdecode(path)))
    if hasattr(model, "SerializeToString") and hasattr(model, "graph"):
        try:
            return Source("onnx", model.SerializeToString())
        except ValueError as error:
            raise UnsupportedModelError(
                f"the ModelProto cannot be serialised ({error}); models over 2 GiB need external data: save it with "
                "onnx.save(model, path, save_as_external_data=True) and load that path"
            ) from error
    raise InputTypeError(
        f"model must be a path, serialised ONNX bytes or an onnx.ModelProto; got {type(model).__name__}"
    )


def _from_bytes(data: bytes) -> Source:
    if not data:
        raise ModelFormatError("the model is empty: expected serialised ONNX bytes, got 0 bytes")
    if _safetensors_header(data[:9], len(data)):
        raise ModelFormatError(
            "the bytes are a safetensors file; expected serialised ONNX: save them to a file and load its path"
        )
    return Source("onnx", data)


def _from_path(path: Path) -> Source:
    try:
        if path.is_dir():
            return _from_folder(path)
        if not path.is_file():
            if os.path.lexists(path):
                raise ModelFormatError(f"{path} is neither a file nor a folder; expected a model")
            raise ModelNotFoundError(
                f"{path} does not exist; expected an .onnx file, a Hugging Face folder or an .espalier plan"
            )
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
            header = _safetensors_header(head, size)
            metadata = _metadata(file.read(header - 1), path) if header else {}
    except ValueError as error:
        # An embedded null byte, for one. ModelFormatError is a ValueError too and is already what is wanted.
        if isinstance(error, ModelFormatError):
            raise
        raise ModelNotFoundError(f"{str(path)!r} is not a usable path: {error}") from error
    except PermissionError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if size == 0:
        raise ModelFormatError(f"{path} is empty; download or export it again")
    if not header:
        return Source("onnx", path)
    if any(key == PLAN_MARK or key.startswith(PLAN_MARK + ".") for key in metadata):
        return Source("plan", path)
    raise ModelFormatError(
        f"{path} holds safetensors weights but no model; give the folder it is in, with its config.json"
    )


def _from_folder(path: Path) -> Source:
    onnx_files = sorted(path.glob("*.onnx"))
    if (path / "config.json").is_file():
        weights = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
        if weights or not onnx_files:
            return Source("hf", path)
    if len(onnx_files) == 1:
        return Source("onnx", onnx_files[0])
    if onnx_files:
        names = ", ".join(file.name for file in onnx_files)
        raise ModelFormatError(f"{path} holds several models ({names}); give the path of one of them")
    raise ModelFormatError(f"{path} is not a model folder: expected config.json with *.safetensors, or one .onnx file")


def _safetensors_header(head: bytes, size: int) -> int:
    """Length in bytes of the JSON header when this begins like a safetensors file, else 0.

    An ONNX file begins with a protobuf tag and could only be mistaken for one with "{" in the ninth byte and a
    length that fits; the header is then JSON or the file is neither.
    """
    if len(head) < 9 or head[8:9] != b"{":
        return 0
    length = int.from_bytes(head[:8], "little")
    return length if 2 <= length <= min(size - 8, MAX_HEADER) else 0


def _metadata(rest: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(b"{" + rest)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} begins like a safetensors file but its header is not JSON: {error}") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return metadata if isinstance(metadata, dict) else {}
