"""Pruning a model in place: which groups of which layers go, and what keeps them gone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compression import structured, walk
from espalier.compression.allocation import cheapest, global_counts
from espalier.compression.calibration import Batches, Loss, evaluating
from espalier.compression.config import Config
from espalier.compression.convolution import Convolution
from espalier.compression.costs import GRID, USUAL_LENGTHS, Costs
from espalier.compression.groups import STRUCTURED, Groups, parse_pattern
from espalier.compression.layers import Layer, find_linear
from espalier.compression.scores import score_class
from espalier.errors import ConfigError, UnsupportedModelError

AS_GIVEN = "as given"
"""The pattern of zeros that were there before."""
_MOST = 0.99
"""The most that a layer loses where it is not told how much; an empty layer is dead."""
_CLOSE = 1e-4


@dataclass(frozen=True)
class LayerPrune:
    """What pruning did to a layer.

    ``error_before`` and ``error_after``: what zeroing alone and what zeroing with the update of the other weights
    costs, as shares of the report's ``unit``; None for a layer that only followed another one. ``speedup``: expected
    of this layer in the engine, None where costs were not asked for. ``pattern``: of the zeros made here.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    error_before: float | None = None
    error_after: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class PruneReport:
    """One pruning. ``target`` and ``sparsity``: shares of zeros, wanted and reached; ``speedup``: expected, if
    known."""

    target: float
    sparsity: float
    score: str
    unit: str
    seconds: float
    speedup: float | None = None
    layers: list[LayerPrune] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Pruner:
    """``layers``: the linear layers that count, by name; ``masks``: bool ``[outputs, inputs]``, True for what stays.

    ``lengths``: tokens of the sequences that a speed-up is reckoned on, since attention weighs more in long ones.

    Raises ConfigError for a pattern that does not divide a layer or a sparsity that it does not allow, and
    UnsupportedModelError for a structured pattern on a model without the structure.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        costs: Costs | None = None,
        lengths: Sequence[int] = USUAL_LENGTHS,
    ) -> None:
        self.model = model
        self.config = config
        self.masks: dict[str, Tensor] = {}
        self._score = score_class(config.score)(config.calibration)
        self._stack: structured.Stack | None = None
        self._report: dict[str, LayerPrune] = {}
        self._costs = costs
        self._lengths = lengths
        self._rest: tuple[float, str] | None = None
        self._target: float | None = None
        linear = find_linear(model, config.include, config.exclude)
        groups = parse_pattern(config.pattern)
        if any(isinstance(module, Convolution) for module in linear.values()):
            _check_convolutions(config)
        if config.pattern == "layers":
            self._stack = structured.Stack.of(model)
            linear = {n: m for n, m in linear.items() if n.startswith(f"{self._stack.name}.")}
        if config.pattern in ("heads", "neurons"):
            units = structured.structured_layers(model, config.pattern, linear)
            self.masks = units[0].masks
            linear = {n: m for n, m in linear.items() if n in self.masks}
        else:
            units = [Layer(name, module, groups, self.masks) for name, module in linear.items()]
        self.layers: dict[str, nn.Linear] = linear
        self._units = {unit.name: unit for unit in units}
        for name, module in linear.items():
            weight = module.weight.detach()
            self.masks[name] = weight != 0 if config.keeps_zeros else torch.ones_like(weight, dtype=torch.bool)
        self._check()

    # --- pruning ------------------------------------------------------------------------------------------------------

    @property
    def target(self) -> float:
        """The sparsity to reach. For a speed-up, that of a model equally sparse everywhere which is as fast."""
        if self._target is None:
            if self.config.speedup is not None:
                self._target = self._sparsity_for(self._dense_seconds() / self.config.speedup)
            else:
                self._target = self.config.sparsity or 0.0
        return self._target

    def prune(self, sparsity: float, batches: Batches, loss: Loss) -> PruneReport:
        """Remove groups until ``sparsity`` is reached; what is gone stays gone.

        ``batches()`` gives calibration batches, the same on every call, that ``loss(model, batch)`` understands. With
        allocation ``cost``, ``sparsity`` stands for the time of a model that sparse everywhere. Raises ConfigError for
        a sparsity that cannot be had, TrainingError when a score cannot be computed, DataError without batches.
        """
        if not 0 <= sparsity < 1:
            raise ConfigError(f"sparsity must be at least 0 and below 1, got {sparsity}")
        start = time.monotonic()
        self._score.notes = []
        with evaluating(self.model):
            if self._stack is not None:
                errors = self._prune_layers(sparsity, batches, loss)
            else:
                errors = self._prune_groups(sparsity, batches, loss)
        self._score.forget()
        costed = self._costs is not None
        self._report = {name: self._describe(name, errors.get(name), costed) for name in self.layers}
        notes = [*self._score.notes, *([self._rest[1]] if self._rest and self._rest[1] else [])]
        return PruneReport(
            target=sparsity,
            sparsity=self.sparsity(),
            score=self.config.score,
            unit=self._score.unit if self._stack is None else "squared norm of the layer's inputs",
            seconds=time.monotonic() - start,
            speedup=self._dense_seconds() / self._seconds_now() if costed else None,
            layers=self.layer_report(),
            notes=notes,
        )

    def enforce(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make pruned weights zero again; with ``optimizer``, its moments of them too."""
        with torch.no_grad():
            for name, module in self.layers.items():
                mask = self.masks[name]
                if mask.device != module.weight.device:
                    mask = self.masks[name] = mask.to(module.weight.device)
                module.weight.mul_(mask)
                if optimizer is None:
                    continue
                for value in optimizer.state.get(module.weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.mul_(mask)

    def observe(self) -> None:
        """Show the score a training step's gradients: after the backward pass, before the optimiser's step."""
        self._score.observe(self._units)

    def shrink(self) -> nn.Module:
        """Take pruned neurons and layers out of the model; see :func:`espalier.compression.structured.shrink`."""
        if self.config.pattern in STRUCTURED:
            structured.shrink(self.model, self.masks)
            modules = dict(self.model.named_modules())
            self.layers = {n: m for n in self.masks if isinstance(m := modules.get(n), nn.Linear)}
            self._units = {}
            self._report = {name: self._describe(name, None, False) for name in self.layers}
        return self.model

    # --- what is ------------------------------------------------------------------------------------------------------

    def sparsity(self) -> float:
        """The share of zeros that the masks hold, over all layers that count."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / total if total else 0.0

    def layer_report(self) -> list[LayerPrune]:
        """The state of every layer, with the errors of the last pruning; zeros it came with have no pattern."""
        return [
            self._report.get(name) or replace(self._describe(name, None, False), pattern=AS_GIVEN)
            for name in self.layers
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep besides the model's weights."""
        return {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "score": self._score.state_dict(),
            "report": [asdict(row) for row in self._report.values()],
            "skipped": structured.skipped(self._stack) if self._stack else [],
            "target": self._target,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of :meth:`state_dict`. Raises ValueError when it is of another model."""
        masks = state["masks"]
        if {n: tuple(m.shape) for n, m in masks.items()} != {n: tuple(m.shape) for n, m in self.masks.items()}:
            raise ValueError("the masks are of other layers")
        for name, module in self.layers.items():
            self.masks[name] = masks[name].to(module.weight.device, torch.bool)
        self._score.load_state_dict(state["score"])
        rows = [LayerPrune(**{**row, "shape": tuple(row["shape"])}) for row in state["report"]]
        self._report = {row.name: row for row in rows}
        self._target = state["target"]
        if self._stack is not None:
            for index, as_tuple in state["skipped"]:
                structured.skip(self._stack.layers[index], as_tuple=as_tuple)
        self.enforce()

    # --- groups of weights --------------------------------------------------------------------------------------------

    def _prune_groups(self, sparsity: float, batches: Batches, loss: Loss) -> dict[str, tuple[float, float]]:
        score, units = self._score, self._units
        in_turn = score.sequential and self.config.calibration.sequential
        if score.needs_data and not (in_turn and self.config.allocation == "uniform"):
            score.collect(self.model, units, self._draw(batches), loss)
        counts = self._counts(sparsity)
        errors: dict[str, tuple[float, float]] = {}
        if not in_turn:
            for name, unit in units.items():
                if counts[name] > int((~unit.kept).sum()):
                    errors[name] = score.prune(unit, counts[name])
            return errors
        linear = {name: unit.module for name, unit in units.items()}
        for stage in walk.in_turn(self.model, self._chain(), linear, lambda: self._draw(batches), loss):
            todo = {n: units[n] for n in stage.names if counts[n] > int((~units[n].kept).sum())}
            if todo:
                score.collect(stage.model, todo, stage.batches(), stage.loss)
                errors |= {name: score.prune(unit, counts[name]) for name, unit in todo.items()}
        return errors

    def _chain(self) -> tuple[str, nn.ModuleList] | None:
        try:
            stack = structured.Stack.of(self.model)
        except UnsupportedModelError:
            return None
        return stack.name, stack.layers

    def _counts(self, sparsity: float) -> dict[str, int]:
        """How many groups of each layer are to be gone."""
        gone = {name: int((~unit.kept).sum()) for name, unit in self._units.items()}
        if self.config.allocation == "uniform":
            wanted = {name: unit.groups.count(sparsity, unit.shape) for name, unit in self._units.items()}
        elif self.config.allocation == "global":
            wanted = self._global(sparsity)
        else:
            wanted = self._by_cost(self._seconds_at(sparsity), sparsity, gone)
        return {name: max(count, gone[name]) for name, count in wanted.items()}

    def _global(self, sparsity: float) -> dict[str, int]:
        scores = {}
        for name, unit in self._units.items():
            added = self._score.increments(unit)
            scores[name] = np.concatenate([np.full(unit.kept.numel() - len(added), -np.inf), added])
        sizes = {name: self._weights_per_group(unit) for name, unit in self._units.items()}
        total = sum(score.size * sizes[name] for name, score in scores.items())

        def counts(at: float) -> dict[str, int]:
            limits = {n: unit.groups.count(max(_MOST, at), unit.shape) for n, unit in self._units.items()}
            most = sum(limits[n] * sizes[n] for n in limits)
            return global_counts(scores, sizes, min(round(at * total), most), limits)

        if self.config.speedup is None:
            return counts(sparsity)
        # One threshold makes other layers sparse than the same share everywhere does; find the one that is as fast.
        budget, low, high = self._seconds_at(sparsity), 0.0, _MOST
        while high - low > _CLOSE:
            middle = (low + high) / 2
            low, high = (middle, high) if self._seconds_of(counts(middle)) > budget else (low, middle)
        return counts(high)

    def _by_cost(self, budget: float, sparsity: float, gone: Mapping[str, int]) -> dict[str, int]:
        choices: dict[str, list[int]] = {}
        losses, costs = [], []
        for name, unit in self._units.items():
            grid = {unit.groups.count(min(at, unit.groups.most), unit.shape) for at in (*GRID, sparsity)}
            choices[name] = sorted({max(count, gone[name]) for count in grid})
            found = self._score.losses(unit, choices[name])
            losses.append(
                [0.0 if count == gone[name] else loss for count, loss in zip(choices[name], found, strict=True)]
            )
            costs.append([self._unit_seconds(unit, count) for count in choices[name]])
        picks = cheapest(losses, costs, budget - self._rest_seconds())
        return {name: choices[name][pick] for name, pick in zip(choices, picks, strict=True)}

    # --- whole layers -------------------------------------------------------------------------------------------------

    def _prune_layers(self, sparsity: float, batches: Batches, loss: Loss) -> dict[str, tuple[float, float]]:
        """Skip layers one by one, each time the one that changes its input least with the others gone."""
        stack = self._stack
        if stack is None:
            return {}
        wanted = round(sparsity * len(stack.layers))
        errors: dict[str, tuple[float, float]] = {}
        while sum(map(structured.is_skipped, stack.layers)) < wanted:
            found = structured.influence(self.model, stack, self._draw(batches), loss)
            left = [i for i, layer in enumerate(stack.layers) if not structured.is_skipped(layer)]
            least = min(left, key=lambda i: found[i].change)
            structured.skip(stack.layers[least], as_tuple=found[least].as_tuple)
            for name, module in self.layers.items():
                if name.startswith(f"{stack.name}.{least}."):
                    self.masks[name] = torch.zeros_like(module.weight, dtype=torch.bool)
                    errors[name] = (found[least].change, found[least].change)
        self.enforce()
        return errors

    # --- costs --------------------------------------------------------------------------------------------------------

    def _priced(self) -> Costs:
        if self._costs is None:
            self._costs = Costs()
        return self._costs

    def _rest_seconds(self) -> float:
        if self._rest is None:
            self._rest = self._priced().rest(self.model, self.layers, self._lengths)
        return self._rest[0]

    def _unit_seconds(self, unit: Layer, count: int) -> float:
        """Seconds a token for a layer and its followers with ``count`` groups gone."""
        costs, share = self._priced(), count / (unit.kept.numel() or 1)
        outputs, inputs = unit.shape
        if self.config.pattern == "neurons":
            # Dense and smaller; measured for a few sizes, since every new one would have to be.
            dense = Groups(pattern="unstructured")
            sizes = [max(1, round(inputs * (1 - gone))) for gone in GRID]
            times = [
                costs.linear((outputs, size), 0.0, dense)
                + sum(costs.linear((size, m.in_features), 0.0, dense) for m in unit.followers.values())
                for size in sizes
            ]
            return float(np.interp(share, GRID, times))
        seconds = costs.linear(unit.shape, share, unit.groups)
        for module in unit.followers.values():
            rows = Groups(pattern="rows", rows=unit.groups.columns, columns=module.in_features)
            seconds += costs.linear((module.out_features, module.in_features), share, rows)
        return seconds

    def _seconds_of(self, counts: Mapping[str, int]) -> float:
        return self._rest_seconds() + sum(self._unit_seconds(self._units[name], counts[name]) for name in self._units)

    def _seconds_at(self, sparsity: float) -> float:
        if self._stack is not None:
            return self._dense_seconds() * (1 - round(sparsity * len(self._stack.layers)) / len(self._stack.layers))
        return self._seconds_of({n: unit.groups.count(sparsity, unit.shape) for n, unit in self._units.items()})

    def _seconds_now(self) -> float:
        if self._stack is not None:
            skipped = sum(map(structured.is_skipped, self._stack.layers))
            return self._dense_seconds() * (1 - skipped / len(self._stack.layers))
        return self._seconds_of({name: int((~unit.kept).sum()) for name, unit in self._units.items()})

    def _dense_seconds(self) -> float:
        return self._seconds_of(dict.fromkeys(self._units, 0))

    def _sparsity_for(self, budget: float) -> float:
        """The lowest sparsity, the same everywhere, at which a token takes at most ``budget`` seconds."""
        most = min(min(unit.groups.most for unit in self._units.values()), _MOST)
        if self._stack is not None:
            most = 1 - 1 / len(self._stack.layers)
        if self._seconds_at(most) > budget:
            best = self._dense_seconds() / self._seconds_at(most)
            raise ConfigError(
                f"a speed-up of {self.config.speedup:g} cannot be reached with the pattern {self.config.pattern}: even "
                f"at {most:.0%} zeros the engine gains {best:.2f}; ask for less, or prune more of the layers"
            )
        low, high = 0.0, most
        while high - low > _CLOSE:
            middle = (low + high) / 2
            low, high = (middle, high) if self._seconds_at(middle) > budget else (low, middle)
        return high

    # --- small things -------------------------------------------------------------------------------------------------

    def _draw(self, batches: Batches) -> Iterable[Any]:
        return islice(iter(batches()), self.config.calibration.batches)

    def _weights_per_group(self, unit: Layer) -> int:
        feeding = sum(unit.groups.columns * module.in_features for module in unit.followers.values())
        return unit.groups.size + feeding

    def _describe(self, name: str, errors: tuple[float, float] | None, costed: bool) -> LayerPrune:
        mask, module = self.masks[name], self.layers[name]
        speedup = None
        unit = self._units.get(name)
        if costed and unit is not None and self._stack is None:
            speedup = self._unit_seconds(unit, 0) / self._unit_seconds(unit, int((~unit.kept).sum()))
        if errors is None and name in self._report:
            errors_of = self._report[name].error_before, self._report[name].error_after
        else:
            errors_of = errors or (None, None)
        return LayerPrune(
            name,
            (module.out_features, module.in_features),
            self.config.pattern,
            1 - int(mask.sum()) / mask.numel(),
            *errors_of,
            speedup,
        )

    def _check(self) -> None:
        """That the pattern divides every layer, and that the target can be reached and takes something away."""
        config = self.config
        for unit in self._units.values():
            unit.groups.check(unit.name, unit.divided)
        if config.pattern == "layers" and config.score not in ("wanda", "sparsegpt"):
            raise ConfigError(
                f"the pattern 'layers' ranks layers by how much they change their inputs; it goes with the scores "
                f"'wanda' and 'sparsegpt', not {config.score!r}"
            )
        if not config.sparsity:
            return
        most = min(unit.groups.most for unit in self._units.values())
        if config.sparsity > most + 1e-9:
            raise ConfigError(
                f"pattern {config.pattern} allows at most {most:.4g} zeros, got sparsity {config.sparsity}"
            )
        if self._stack is not None:
            count, what = round(config.sparsity * len(self._stack.layers)), f"{len(self._stack.layers)} layers"
            most_layers = len(self._stack.layers) - 1
            if count > most_layers:
                raise ConfigError(f"sparsity {config.sparsity} would drop all of the {what}; keep at least one")
        else:
            count = max(unit.groups.count(config.sparsity, unit.shape) for unit in self._units.values())
            what = f"groups of the pattern {config.pattern}"
        if not count:
            raise ConfigError(f"sparsity {config.sparsity} takes away none of the {what}; ask for more")


def _check_convolutions(config: Config) -> None:
    """Raises ConfigError for what needs the costs of convolutions."""
    if config.speedup is not None or config.allocation == "cost":
        raise ConfigError(
            "the time of convolutions is not known to the cost model; give a sparsity and the allocation 'uniform' or "
            "'global', or exclude them"
        )
