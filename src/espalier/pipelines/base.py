"""What all pipelines share: a session, and ragged runs of token features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np

from espalier.data import Feature, Tokens
from espalier.errors import InputError, UnsupportedModelError
from espalier.session import Session, load

P = TypeVar("P", bound="Pipeline")
A = TypeVar("A")

_TYPES = ("token_type_ids", "segment_ids")


@dataclass(frozen=True)
class Prepared(Generic[A]):
    """Features to run, and ``finish``, which makes the answer of the task's arrays for them, one per feature.

    In two parts because a server runs the features of many callers together.
    """

    features: list[Feature]
    finish: Callable[[Sequence[np.ndarray]], A]


class Pipeline(ABC):
    """A loaded model that does one task: features in, one array per feature out. Several threads may run it at once."""

    default_max_length: ClassVar[int]

    def __init__(self, session: Session, tokens: Tokens | None) -> None:
        """``tokens`` is the model's tokenizer, None when only features will be run.

        Raises UnsupportedModelError when the model does another task.
        """
        self.session = session
        self._tokens = tokens
        names = [info.name for info in session.get_inputs()]
        self._types = next((name for name in names if name in _TYPES), None)
        self._ids = next((name for name in names if name not in _TYPES and "mask" not in name), "")
        self.outputs = self.choose({info.name: len(info.shape) for info in session.get_outputs()})

    @classmethod
    def load(
        cls: type[P],
        model: Path,
        *,
        tokenizer: Path | None = None,
        threads: int | None = None,
        tune: bool = True,
        max_length: int | None = None,
    ) -> P:
        """Open ``model`` (see :func:`espalier.load`) with the ``tokenizer.json`` of its folder, or of ``tokenizer``.

        Raises what loading a session or a tokenizer raises, and UnsupportedModelError.
        """
        folder = tokenizer or (model if model.is_dir() else model.parent)
        return cls(load(model, threads=threads, tune=tune), Tokens.read(folder, max_length or cls.default_max_length))

    @property
    def tokens(self) -> Tokens:
        """The tokenizer. Raises InputError when the pipeline has none."""
        if self._tokens is None:
            raise InputError("this pipeline was opened without a tokenizer, so it takes features, not texts")
        return self._tokens

    @staticmethod
    @abstractmethod
    def choose(outputs: Mapping[str, int]) -> list[str]:
        """The outputs the task needs of a model whose outputs have these ranks, batch axis included.

        Raises UnsupportedModelError when there are none.
        """

    @staticmethod
    @abstractmethod
    def result(outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The task's float32 array from one sequence's outputs, in the order of :meth:`choose`."""

    def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        """The task's array for every feature, run together without padding. Raises as :meth:`Session.run_ragged`."""
        found = self.session.run_ragged(self.outputs, [self.row(f) for f in features])
        return [self.result(one) for one in zip(*found, strict=True)]

    def row(self, feature: Feature) -> dict[str, np.ndarray]:
        """The feature as :meth:`Session.run_ragged` takes it."""
        if self._types is None:
            return {self._ids: feature.ids}
        return {self._ids: feature.ids, self._types: feature.types}


def unsuitable(task: str, expected: str, outputs: Mapping[str, int]) -> UnsupportedModelError:
    """What to raise when a model's outputs do not suit a task."""
    return UnsupportedModelError(
        f"{task} needs a model with {expected}; this one has the outputs {', '.join(outputs) or 'none'}: "
        "export it with the head of the task"
    )
