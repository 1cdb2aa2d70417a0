"""What a compression run does, as frozen settings. Nothing here imports PyTorch.

    Config(sparsity=0.8, pattern="4x1", score="obert", training=Training(minutes=30))

Every class checks its values when it is made and raises ConfigError. The same fields make up a TOML or JSON file, with
a table for each part.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from espalier.compression.allocation import ALLOCATIONS
from espalier.compression.groups import PATTERNS, parse_pattern
from espalier.compression.schedules import SCHEDULES, prunings
from espalier.compression.scores import SCORES
from espalier.errors import ConfigError

PRECISIONS = ("auto", "float32", "bfloat16")
SCHEMES = ("int8",)
ACTIVATIONS = ("auto", "static", "dynamic")
RANGES = ("minmax", "percentile", "mse", "entropy")
ROUNDINGS = ("nearest", "gptq")


class _Checked:
    """Checks types against the annotations, then values by :meth:`_check`."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            value = _fit(getattr(self, item.name), hints[item.name], f"{type(self).__name__}.{item.name}")
            object.__setattr__(self, item.name, value)
        self._check()

    def _check(self) -> None: ...

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings of a (nested) dict; what it leaves out keeps its default.

        Raises ConfigError for a field that does not exist, naming the nearest one, and for a value it cannot have.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} expects a table of settings, got {type(values).__name__}: {values!r}")
        hints = get_type_hints(cls)
        known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        given: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"{cls.__name__} has no field {name!r}; {hint}It has {', '.join(known)}")
            part = next((o for o in _options(hints[name]) if isinstance(o, type) and issubclass(o, _Checked)), None)
            given[name] = part.from_dict(value) if part is not None and isinstance(value, Mapping) else value
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Schedule(_Checked):
    """When how much is pruned. ``start`` and ``end`` are shares of the training, ``first`` a share of the target.

    ``oneshot``: all at once at ``start``. ``gradual``: ``steps`` prunings from ``start`` to ``end``, the first one to
    ``first`` of the target, the others along a cubic curve that flattens; with ``rewind`` the learning rate starts anew
    after each. ``constant``: nothing; zeros that are there already stay zero.
    """

    kind: str = "oneshot"
    steps: int = 8
    first: float = 0.7
    start: float = 0.0
    end: float = 0.6
    rewind: bool = True

    def _check(self) -> None:
        _one_of("Schedule.kind", self.kind, SCHEDULES)
        _within("Schedule.steps", self.steps, 1, 10_000)
        _within("Schedule.first", self.first, 0, 1)
        _within("Schedule.start", self.start, 0, 1)
        _within("Schedule.end", self.end, 0, 1)
        if self.kind == "gradual" and self.steps > 1 and not self.start < self.end:
            raise ConfigError(f"Schedule.end must be after start {self.start}, got {self.end}")


@dataclass(frozen=True, kw_only=True)
class Recovery(_Checked):
    """Weights of the losses that heal a pruned model; 0 leaves one out.

    ``task``: the labels. The others compare with the dense model: ``logits`` (at ``temperature``), ``hidden`` states,
    sentence ``embeddings`` and ``attention``. What a task does not have does not count.
    """

    task: float = 0.0
    logits: float = 1.0
    hidden: float = 1.0
    embeddings: float = 1.0
    attention: float = 0.0
    temperature: float = 2.0

    def _check(self) -> None:
        for name in ("task", "logits", "hidden", "embeddings", "attention"):
            _within(f"Recovery.{name}", getattr(self, name), 0, math.inf)
        _within("Recovery.temperature", self.temperature, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class Training(_Checked):
    """How long and how to train. The first limit of ``epochs``, ``steps`` and ``minutes`` ends it; without any,
    there is none.

    ``warmup``: share of the training (of each part of it, with rewinds) in which the rate grows. ``batch_tokens``:
    tokens in a batch, padding counted. ``max_length``: tokens in a sequence; None for what suits the task.
    ``checkpoint_every``: steps; 0 writes only at the end.
    """

    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    batch_tokens: int = 2048
    max_length: int | None = None
    precision: str = "auto"
    freeze_embeddings: bool = True
    checkpoint_every: int = 500

    def _check(self) -> None:
        for name in ("epochs", "steps", "minutes"):
            if (value := getattr(self, name)) is not None:
                _within(f"Training.{name}", value, 0, math.inf)
        _within("Training.learning_rate", self.learning_rate, 0, 10, open_below=True)
        _within("Training.weight_decay", self.weight_decay, 0, 10)
        _within("Training.warmup", self.warmup, 0, 0.9)
        _within("Training.batch_tokens", self.batch_tokens, 1, math.inf)
        if self.max_length is not None:
            _within("Training.max_length", self.max_length, 4, math.inf)
        _one_of("Training.precision", self.precision, PRECISIONS)
        _within("Training.checkpoint_every", self.checkpoint_every, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Calibration(_Checked):
    """What scores learn from data, and the numerics of second-order ones.

    ``batches``: how many batches of the training data a score sees. ``dampening``: added to the diagonal of a Hessian
    or Fisher matrix, as a share of its mean; 0 adds nothing, and then a singular matrix is an error. ``block``: columns
    pruned between two updates of all later ones, and ``step``: share of the groups left that goes between two fits of
    all others, 1 for a single fit in the end (both SparseGPT). ``fisher_block``: weights whose second derivatives oBERT
    keeps together. ``sequential``: SparseGPT prunes a layer after those it gets its inputs from, with the inputs it
    will really get, at the price of one pass over the calibration data for each set of layers.
    """

    batches: int = 32
    dampening: float = 0.01
    block: int = 64
    step: float = 0.3
    fisher_block: int = 32
    sequential: bool = True

    def _check(self) -> None:
        _within("Calibration.batches", self.batches, 1, math.inf)
        _within("Calibration.dampening", self.dampening, 0, 1e6)
        _within("Calibration.block", self.block, 1, math.inf)
        _within("Calibration.step", self.step, 0.01, 1)
        _within("Calibration.fisher_block", self.fisher_block, 1, 4096)


@dataclass(frozen=True, kw_only=True)
class Quantization(_Checked):
    """Linear layers in 8 bit integers: weights with a scale for every output, and zero points of 0, so that zeros stay.

    ``activations``: ``static`` (one range for a layer's inputs, from calibration), ``dynamic`` (every token its own),
    or ``auto``: static where that is nearly as exact. ``range``: how a static range follows from the inputs seen:
    ``minmax``, ``percentile`` (of the values, ``percentile``), ``mse``, ``entropy``. ``smooth``: strength 0 to 1 of
    SmoothQuant, which moves the size of single features from inputs into weights where that is exact; 0 leaves it out.
    ``rounding`` of weights: to the ``nearest``, or ``gptq``, where later columns make up for the error of earlier ones.

    ``finetune``: share of the training, its last part, in which the network is trained as a quantised one, with its
    zeros frozen; 0 quantises when training is over. ``keep_float``: regular expressions searched in the names of linear
    layers. ``accuracy_target``: share of the variance of the float model's outputs that the quantised model's must
    explain; layers become dynamic, then float, those first that do most harm, until they do. It is for a network that
    is not trained any more: with ``finetune`` above 0, and with a target of 0, all layers stay quantised.
    """

    scheme: str = "int8"
    activations: str = "auto"
    range: str = "mse"
    percentile: float = 99.99
    smooth: float = 0.0
    rounding: str = "nearest"
    finetune: float = 0.0
    keep_float: tuple[str, ...] = ()
    accuracy_target: float = 0.99

    def _check(self) -> None:
        _one_of("Quantization.scheme", self.scheme, SCHEMES)
        _one_of("Quantization.activations", self.activations, ACTIVATIONS)
        _one_of("Quantization.range", self.range, RANGES)
        _within("Quantization.percentile", self.percentile, 50, 100, open_below=True)
        _within("Quantization.smooth", self.smooth, 0, 1)
        _one_of("Quantization.rounding", self.rounding, ROUNDINGS)
        _within("Quantization.finetune", self.finetune, 0, 1)
        _expressions("Quantization.keep_float", self.keep_float)
        _within("Quantization.accuracy_target", self.accuracy_target, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Config(_Checked):
    """One run. ``sparsity`` (share of zeros in the prunable weights) or ``speedup`` (over dense, in the engine), or
    neither to train without pruning. With ``quantization`` the result computes in integers; zeros that are there stay,
    and with neither a sparsity nor a length of training the model is quantised as it is.

    ``pattern``: what becomes zero together: ``unstructured``, ``4x1`` or any ``RxC`` (outputs by inputs), ``N:M`` (N
    kept of M inputs), ``heads``, ``neurons``, ``layers``. ``score``: which of them go. ``allocation``: how the target
    is spread over layers: ``uniform``, ``global`` (one threshold), ``cost`` (by the engine's measured time).
    ``include`` and ``exclude``: regular expressions searched in the names of linear layers. ``threads``: of PyTorch;
    None for its own choice. Raises ConfigError.
    """

    sparsity: float | None = None
    speedup: float | None = None
    pattern: str = "4x1"
    score: str = "sparsegpt"
    allocation: str = "uniform"
    schedule: Schedule = field(default_factory=Schedule)
    recovery: Recovery = field(default_factory=Recovery)
    training: Training = field(default_factory=Training)
    calibration: Calibration = field(default_factory=Calibration)
    quantization: Quantization | None = None
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    threads: int | None = None

    def _check(self) -> None:
        if self.sparsity is not None and self.speedup is not None:
            raise ConfigError(
                f"give sparsity or speedup, not both; got sparsity {self.sparsity} and speedup {self.speedup}"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"Config.sparsity must be at least 0 and below 1, the share of zeros, got {self.sparsity}"
                + (f"; for {self.sparsity:g} % write {self.sparsity / 100:g}" if 1 < self.sparsity < 100 else "")
            )
        if self.speedup is not None:
            _within("Config.speedup", self.speedup, 1, 1000)
        parse_pattern(self.pattern)
        _one_of("Config.score", self.score, SCORES)
        _one_of("Config.allocation", self.allocation, ALLOCATIONS)
        _within("Config.seed", self.seed, 0, 2**63 - 1)
        for name in ("include", "exclude"):
            _expressions(f"Config.{name}", getattr(self, name))
        if self.threads is not None:
            _within("Config.threads", self.threads, 1, 4096)
        if self.quantization is not None:
            self._check_quantization(self.quantization)

    def _check_quantization(self, quantization: Quantization) -> None:
        if self.speedup is not None:
            raise ConfigError(
                "a speedup is reckoned with the times of float layers, so it does not go with quantization; give a "
                "sparsity"
            )
        last = max((when for when, _ in prunings(self.schedule)), default=0.0) if self.sparsity else 0.0
        if quantization.finetune > 1 - last + 1e-9:
            raise ConfigError(
                f"Quantization.finetune {quantization.finetune:g} begins before the last pruning, when {last:g} of the "
                f"training is done; expected at most {1 - last:g}, or an earlier end of the schedule"
            )

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that are zero at the start stay so and no others are pruned."""
        asked = bool(self.sparsity) or self.speedup is not None
        return self.schedule.kind == "constant" or (self.quantization is not None and not asked)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Settings from a ``.toml`` or ``.json`` file. Raises ConfigError, which names the file."""
        path = Path(path)
        if path.suffix not in (".toml", ".json"):
            raise ConfigError(f"{path}: expected a configuration in a .toml or .json file")
        try:
            text = path.read_bytes().decode()
            values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values; ``from_dict`` makes an equal configuration of it."""
        values = asdict(self)
        if self.quantization is not None:
            values["quantization"]["keep_float"] = list(self.quantization.keep_float)
        return values | {"include": list(self.include), "exclude": list(self.exclude)}


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fit(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotated type: an int where a float is meant becomes one, a list becomes a tuple."""
    options = _options(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number, got {value}")
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (bool, str) and isinstance(value, option):
            return value
        if is_dataclass(option) and isinstance(option, type) and isinstance(value, option):
            return value
        if get_origin(option) is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
    expected = " or ".join("None" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{name} must be of type {expected}, got {value!r} ({type(value).__name__})")


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")


def _expressions(name: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{name}: {pattern!r} is not a regular expression: {error}; to match a dot write \\."
            ) from error


def _within(name: str, value: float, low: float, high: float, *, open_below: bool = False) -> None:
    if not (low < value if open_below else low <= value) or value > high:
        bounds = f"above {low:g}" if open_below else f"at least {low:g}"
        raise ConfigError(
            f"{name} must be {bounds}" + ("" if high == math.inf else f", at most {high:g}") + f", got {value}"
        )


__all__ = [
    "PATTERNS",
    "Calibration",
    "Config",
    "Quantization",
    "Recovery",
    "Schedule",
    "Training",
]
