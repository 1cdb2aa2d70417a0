"""What a layer costs in the engine at each sparsity, measured on this machine and remembered there.

A token's time in the engine is the sum over linear layers of the panel time of their weights, in the fastest format,
and a rest (attention, normalisation, embeddings) that does not depend on zeros. Both are measured with one thread.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.cache import MachineCache, cache_folder
from espalier.compression.groups import Groups, parse_pattern
from espalier.errors import ConfigError, EspalierError

GRID = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
"""The sparsities that are measured and that allocation chooses from."""

USUAL_LENGTHS = (128,) * 48
"""Tokens of the sequences that a model is timed on where those of its data are not known."""

_VERSION = 2
_SPARSE = 0.9
_REPEATS = 3
_MOST_MEASURED = 4


class Costs:
    """Seconds for one token. ``isa``: the instruction set, by default this machine's; ``cache``: the file of earlier
    measurements, by default in the user's cache folder."""

    def __init__(self, *, isa: str | None = None, cache: Path | None = None) -> None:
        from espalier import _native

        self.isa = isa or _native.current_isa()
        lanes, groups = _native.panel_shape(self.isa)
        self._panel = lanes * groups
        self._cache = MachineCache(cache or cache_folder() / "costs.json", _VERSION, self.isa)
        known = self._cache.known
        for name in [k for k, v in known.items() if not isinstance(v, int | float) or not v > 0]:
            del known[name]
        self._known: dict[str, float] = known

    def linear(self, shape: tuple[int, int], sparsity: float, groups: Groups) -> float:
        """A linear layer of ``shape`` (outputs, inputs) with that share of its groups gone; interpolated."""
        sparsity = min(sparsity, groups.most)
        grid = [s for s in GRID if s <= groups.most + 1e-9]
        if sparsity in grid:
            return self._linear(shape, sparsity, groups)
        upper = next((i for i, s in enumerate(grid) if s > sparsity), len(grid) - 1)
        low, high = grid[max(0, upper - 1)], grid[upper]
        times = [self._linear(shape, s, groups) for s in (low, high)]
        return float(np.interp(sparsity, [low, high], times))

    def rest(
        self, model: nn.Module, linear: Mapping[str, nn.Linear], lengths: Sequence[int] = USUAL_LENGTHS
    ) -> tuple[float, str]:
        """What a token of ``model`` takes outside of the ``linear`` layers, in sequences of those ``lengths``, and a
        note; 0 where the engine cannot run the model, which the note then says.

        From the time of the model dense and with 90 % zeros. Inside of a model a layer takes longer than by itself, by
        about the same factor at every sparsity; the rest is in the unit of :meth:`linear`, that is, over this factor.
        """
        sizes = [(m.out_features, m.in_features) for m in linear.values()]
        times, key = [], self._model_key(model, linear, lengths)
        for sparsity in (0.0, _SPARSE):
            name = f"{key} at {sparsity:g}"
            if key is None or name not in self._known:
                try:
                    self._known[name] = _time_model(model, linear, sparsity, lengths)
                except (EspalierError, AttributeError, ValueError, TypeError, OSError) as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    note = f"speed-ups are of the linear layers alone: the engine cannot run the whole model ({reason})"
                    return 0.0, note
                if key is not None:
                    self.save()
            times.append(self._known[name])
        dense, sparse = (sum(self.linear(size, s, _groups_for(size)) for size in sizes) for s in (0.0, _SPARSE))
        if dense <= sparse or times[0] <= times[1]:
            return 0.0, "speed-ups are of the linear layers alone: the model is too small for zeros to show in its time"
        factor = (times[0] - times[1]) / (dense - sparse)
        return max(0.0, times[0] / factor - dense), ""

    def save(self) -> None:
        """Write new measurements to the cache."""
        self._cache.save()

    def _linear(self, shape: tuple[int, int], sparsity: float, groups: Groups) -> float:
        rows, columns = min(groups.rows, shape[0]), min(groups.columns, shape[1])
        key = f"{shape[0]}x{shape[1]} {rows}x{columns} {groups.keep}:{groups.window} {sparsity:g}"
        if sparsity == 0:
            key = f"{shape[0]}x{shape[1]} dense"
        if key not in self._known:
            self._known[key] = self._measure(shape, sparsity, groups) / self._panel
            self.save()
        return self._known[key]

    def _measure(self, shape: tuple[int, int], sparsity: float, groups: Groups) -> float:
        """Seconds for one panel in the fastest format, with random zeros of the pattern."""
        from espalier import _native

        rng = np.random.default_rng(0)
        down, across = groups.grid(shape)
        kept = np.ones(down * across, bool)
        if groups.window:
            # Random places in every window: none loses more than the pattern allows.
            order = rng.random((down, across // groups.window, groups.window)).argsort(-1).argsort(-1)
            kept = (order >= round(sparsity * groups.window)).ravel()
        else:
            kept[rng.permutation(down * across)[: round(sparsity * down * across)]] = False
        mask = kept.reshape(down, across).repeat(groups.rows, 0).repeat(groups.columns, 1)
        dense = rng.standard_normal(shape, np.float32) * mask
        matrix = _native.compress(np.ascontiguousarray(dense, np.float32))
        best = math.inf
        for name, chunk, _ in matrix.candidates(self.isa)[:_MOST_MEASURED]:
            weight = _native.Weight(matrix, name, chunk, self.isa)
            best = min(best, weight.time(self.isa))
        return best

    def _model_key(self, model: nn.Module, linear: Mapping[str, nn.Linear], lengths: Sequence[int]) -> str | None:
        config: Any = getattr(model, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            return None
        values = config.to_dict()
        sizes = (
            *(
                "model_type",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "hidden_act",
            ),
            *("dim", "n_layers", "n_heads", "hidden_dim", "activation"),
        )
        known = " ".join(f"{name}={values[name]}" for name in sizes if name in values)
        weights = sum(m.weight.numel() for m in linear.values())
        # Linear layers take time by tokens, attention by their square.
        timed = f"{len(lengths)} sequences of {sum(lengths)} tokens, {sum(n * n for n in lengths)} pairs"
        return f"{type(model).__name__} {known} {len(linear)} layers of {weights}, {timed}"


def _groups_for(shape: tuple[int, int]) -> Groups:
    """The pattern of the sparse model that is timed."""
    return parse_pattern("unstructured" if shape[0] % 4 else "4x1")


def _time_model(model: nn.Module, linear: Mapping[str, nn.Linear], sparsity: float, lengths: Sequence[int]) -> float:
    """Seconds for one token of a copy with ``sparsity`` in the layers ``linear`` and no other zeros.

    One thread, random tokens in sequences of ``lengths``, the best of a few runs.
    """
    import espalier
    from espalier.compression.tasks.models import save_model

    if not hasattr(model, "save_pretrained"):
        raise ConfigError("it is no Hugging Face model")
    saver: Any = copy.deepcopy(model).float().cpu()
    generator = torch.Generator().manual_seed(0)
    for name, module in saver.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        module.weight.data.masked_fill_(module.weight.data == 0, 1e-3)
        if sparsity and name in linear:
            groups = _groups_for((module.out_features, module.in_features))
            scores = torch.rand(groups.grid((module.out_features, module.in_features)), generator=generator)
            module.weight.data.mul_(groups.expand(scores >= sparsity))
    vocabulary = int(saver.config.vocab_size)
    rng = np.random.default_rng(0)
    # Some families count positions from the padding id on.
    most = int(getattr(saver.config, "max_position_embeddings", max(lengths) + 2)) - 2
    sequences = [rng.integers(0, vocabulary, min(length, most)) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        save_model(saver, Path(folder))
        session = espalier.load(folder, threads=1)
        best = math.inf
        for _ in range(_REPEATS + 1):  # the first run also warms up
            start = time.perf_counter()
            session.run_ragged(None, sequences)
            best = min(best, time.perf_counter() - start)
    return best / sum(map(len, sequences))
