"""Sentence embeddings: one vector per text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from espalier.data import Feature
from espalier.pipelines.base import Pipeline, Prepared, unsuitable


class Embeddings(Pipeline):
    """``run`` gives float32 ``[width]`` of length one per feature: the model's own pooling, else the tokens' mean."""

    default_max_length: ClassVar[int] = 128

    @staticmethod
    def choose(outputs: Mapping[str, int]) -> list[str]:
        pooled = [name for name, rank in outputs.items() if rank == 2]
        tokens = [name for name, rank in outputs.items() if rank == 3]
        for names in ([n for n in pooled if "embedding" in n], [n for n in tokens if "hidden" in n], pooled, tokens):
            if names:
                return names[:1]
        raise unsuitable("embedding", "an output [batch, width] or [batch, tokens, width]", outputs)

    @staticmethod
    def result(outputs: Sequence[np.ndarray]) -> np.ndarray:
        vector = outputs[0] if outputs[0].ndim == 1 else outputs[0].mean(axis=0)
        return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[texts, width]``."""
        prepared = self.prepare(texts)
        return prepared.finish(self.run(prepared.features))

    def prepare(self, texts: Sequence[str]) -> Prepared[np.ndarray]:
        """:meth:`embed` in two parts."""
        features = [Feature(ids, types, {}) for ids, types in self.tokens.encode(texts)]
        return Prepared(features, lambda vectors: np.stack(vectors) if vectors else np.zeros((0, 0), np.float32))
