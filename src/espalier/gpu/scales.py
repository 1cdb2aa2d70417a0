"""The file of FP8 scales that calibration writes: which layers run in FP8, and the scales of their activations.

A JSON file, so that a layer can be set to bf16 by hand. Weights need no entry: their scales follow from the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espalier.errors import ModelFormatError, ModelNotFoundError
from espalier.files import replacing
from espalier.ir.graph import Graph

VERSION = "1"
_SAMPLE = 4096
"""Entries of each weight that the fingerprint looks at."""


@dataclass(frozen=True)
class LayerScale:
    """One linear layer. ``scale``: of its activations as e4m3. ``error``: of its results in FP8, relative, root mean
    square over the calibration data. ``precision``: ``fp8`` or ``bf16``.
    """

    scale: float
    error: float
    precision: str


@dataclass(frozen=True)
class Calibration:
    """The scales of one model, by the names of its layers. ``tokens``: how many they were learnt from."""

    fingerprint: str
    layers: dict[str, LayerScale]
    tokens: int

    @property
    def scales(self) -> dict[str, float]:
        """The scale of every layer that runs in FP8."""
        return {name: layer.scale for name, layer in self.layers.items() if layer.precision == "fp8"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        content = {
            "espalier.fp8": VERSION,
            "model": self.fingerprint,
            "tokens": self.tokens,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file. Raises ModelNotFoundError or ModelFormatError."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelNotFoundError(
                f"the calibration {path} does not exist; expected a file that `espalier calibrate` wrote"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFormatError(f"{path} is not a calibration ({error}); run `espalier calibrate` again") from error
        try:
            version = content["espalier.fp8"]
            if version != VERSION:
                raise ModelFormatError(
                    f"{path} is a calibration of version {version!r}, this release reads {VERSION}; run `espalier "
                    "calibrate` again"
                )
            layers = {str(name): _layer(entry) for name, entry in content["layers"].items()}
            return cls(str(content["model"]), layers, int(content["tokens"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ModelFormatError):
                raise
            raise ModelFormatError(
                f"{path} is not a calibration ({type(error).__name__}: {error}); run `espalier calibrate` again"
            ) from error

    def check(self, fingerprint: str) -> None:
        """Refuse another model's scales. Raises ModelFormatError."""
        if fingerprint != self.fingerprint:
            raise ModelFormatError(
                f"the calibration is of another model (fingerprint {self.fingerprint[:12]}, this one has "
                f"{fingerprint[:12]}): run `espalier calibrate` on this one"
            )


def _layer(entry: Any) -> LayerScale:
    layer = LayerScale(float(entry["scale"]), float(entry["error"]), str(entry["precision"]))
    if not (layer.scale > 0 and math.isfinite(layer.scale)):
        raise ValueError(f"a scale must be positive and finite; got {layer.scale}")
    if layer.precision not in ("fp8", "bf16"):
        raise ValueError(f"precision must be 'fp8' or 'bf16'; got {layer.precision!r}")
    return layer


def fingerprint(graph: Graph) -> str:
    """What tells a model from another and from itself trained further: its linear weights, sampled evenly."""
    digest = hashlib.sha256()
    for node in graph.nodes:
        if node.op == "Linear":
            weight = np.asarray(graph.constants[node.inputs[1]], np.float32)
            digest.update(str(weight.shape).encode())
            digest.update(np.ascontiguousarray(weight.reshape(-1)[:: max(1, weight.size // _SAMPLE)]).tobytes())
    return digest.hexdigest()


def combined(fingerprints: Iterable[str]) -> str:
    """That of a model of several parts."""
    return "-".join(fingerprints)
