"""Choosing among ways to compute the same thing by measurement, after checking that they do compute the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

R = TypeVar("R")

Candidates = Mapping[str, Callable[[], R]]


class Choices(Generic[R]):
    """The fastest candidate by key, measured once each. The first candidate is the reference and always works.

    ``agrees(result, reference)`` says whether a candidate is right, ``seconds(call)`` how long it takes. With ``tune``
    off the first candidate is always taken. ``failures`` are what a candidate raises that cannot do it.
    """

    def __init__(
        self,
        agrees: Callable[[R, R], bool],
        seconds: Callable[[Callable[[], R]], float],
        *,
        tune: bool,
        failures: tuple[type[Exception], ...] = (RuntimeError, ValueError),
    ) -> None:
        self._agrees = agrees
        self._failures = failures
        self._seconds = seconds
        self._tune = tune
        self.chosen: dict[Hashable, str] = {}
        self.refused: dict[tuple[Hashable, str], str] = {}
        """Candidates that could not be used, and why."""

    def run(self, key: Hashable, candidates: Candidates[R], compared: Callable[[R], R] = lambda result: result) -> R:
        """The result of the candidate chosen for ``key``; the first call measures.

        ``compared`` takes what is to be compared out of a result.
        """
        name = self.chosen.get(key)
        if name is None:
            name = self.chosen[key] = self._choose(key, candidates, compared)
        return candidates[name]()

    def _choose(self, key: Hashable, candidates: Candidates[R], compared: Callable[[R], R]) -> str:
        first, *others = candidates
        if not self._tune or not others:
            return first
        reference = compared(candidates[first]())
        best, least = first, self._seconds(candidates[first])
        for name in others:
            try:
                if not self._agrees(compared(candidates[name]()), reference):
                    self.refused[key, name] = "its result differs"
                    continue
                spent = self._seconds(candidates[name])
            except self._failures as error:  # a shape that a library, or the chip's memory, does not take
                self.refused[key, name] = f"{type(error).__name__}: {error}"
                continue
            if spent < least:
                best, least = name, spent
        return best
