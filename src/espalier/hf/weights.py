"""The tensors of a model folder, checked one by one against what the architecture needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from espalier.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from espalier.hf.config import inside, read_object
from espalier.hf.safetensors import Array, StoredTensor, read_tensors

_MARK = "embeddings.word_embeddings.weight"


class Weights:
    """Tensors by the name the architecture gives them, each handed out once its shape is checked.

    Checkpoints from TensorFlow call the parameters of LayerNorm gamma and beta; here they are weight and bias.
    """

    def __init__(self, source: Path, tensors: dict[str, StoredTensor]) -> None:
        self.source = source
        self._tensors: dict[str, StoredTensor] = {}
        self._taken: set[str] = set()
        for stored, tensor in tensors.items():
            name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", stored))
            if name in self._tensors:
                raise ModelFormatError(f"{source}: {stored!r} and {self._tensors[name].name!r} are the same parameter")
            self._tensors[name] = tensor

    @staticmethod
    def read(folder: Path, convert_with: str = "AutoModel") -> Weights:
        """Map ``model.safetensors``, or the shards of ``model.safetensors.index.json``.

        ``convert_with`` is the transformers class that could convert a pickled checkpoint, for the message.

        Raises ModelNotFoundError when there are no weights, UnsupportedModelError when they are only pickled,
        ModelFormatError when they are corrupt.
        """
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            return Weights(single, read_tensors(single))
        if index.is_file():
            return Weights(index, _read_shards(folder, index))
        pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).is_file()]
        if pickled:
            raise UnsupportedModelError(
                f"{folder} holds its weights only as {pickled[0]}, which is a Python pickle and can run any code; "
                "expected model.safetensors. Convert it where you trust it: "
                f'python -c "from transformers import {convert_with} as M; '
                f"M.from_pretrained({str(folder)!r}).save_pretrained('converted', safe_serialization=True)\""
            )
        raise ModelNotFoundError(f"{folder}: no weights; expected model.safetensors or model.safetensors.index.json")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def any_under(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._tensors)

    def prefix(self) -> str:
        """What stands before the names of the encoder's parameters ("bert.", "model.", "" ...)."""
        found = [name[: -len(_MARK)] for name in self._tensors if name == _MARK or name.endswith("." + _MARK)]
        if len(found) != 1:
            got = ", ".join(f"{prefix}{_MARK}" for prefix in found) or _some(self._tensors)
            raise ModelFormatError(f"{self.source}: expected one tensor named [prefix.]{_MARK}, got {got}")
        return found[0]

    def take(self, name: str, shape: tuple[int, ...]) -> tuple[str, Array]:
        """The stored name and the float32 values of a tensor, checked to have ``shape``.

        Raises ModelFormatError when it is missing, or of another shape or a wrong element type.
        """
        tensor = self._checked(name, shape)
        return tensor.name, tensor.float32()

    def take_integers(self, name: str, shape: tuple[int, ...]) -> tuple[str, Array]:
        """The same for a tensor of int8 or uint8."""
        tensor = self._checked(name, shape)
        return tensor.name, tensor.bytes()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, whatever it is; ``()`` when it is missing, which taking it will say."""
        tensor = self._tensors.get(name)
        return () if tensor is None else tensor.shape

    def _checked(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFormatError(
                f"{self.source}: tensor {name!r} of shape {list(shape)} is missing; there are {_some(self._tensors)}. "
                "Check that config.json (architectures, sizes) belongs to these weights"
            )
        if tensor.shape != shape:
            raise ModelFormatError(
                f"{self.source}: tensor {name!r} must have shape {list(shape)}, got {list(tensor.shape)}. "
                "Check that config.json (sizes, labels) belongs to these weights"
            )
        self._taken.add(name)
        return tensor

    def finish(self, ignored: Iterable[str]) -> None:
        """Raise ModelFormatError when a tensor was not taken and none of the patterns ``ignored`` matches its name."""
        known = re.compile("|".join(ignored))
        unexpected = [name for name in self._tensors if name not in self._taken and not known.search(name)]
        if unexpected:
            raise ModelFormatError(
                f"{self.source}: unexpected tensors {_some(unexpected)}; the architecture named in config.json has no "
                "such parameters. Check that config.json (architectures, num_hidden_layers) belongs to these weights"
            )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return (", ".join(map(repr, listed[:3])) or "none") + more


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelFormatError(f"{index}: expected a weight_map of tensor names to files, got {str(places)[:80]}")
    shards: dict[str, dict[str, StoredTensor]] = {}
    found: dict[str, StoredTensor] = {}
    for name, place in places.items():
        path = inside(folder, place, index)
        if place not in shards:
            shards[place] = read_tensors(path)
        if name not in shards[place]:
            raise ModelFormatError(f"{path}: tensor {name!r} is missing; {index.name} says that it is there")
        found[name] = shards[place][name]
    return found
