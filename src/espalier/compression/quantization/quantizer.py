"""Quantising a model in place: calibrate, round, and choose for every layer how, or whether at all.

Layers are taken in the order of the calculation, each with the inputs that the quantised ones before it really give.
Those that read one tensor (query, key, value) share one decision, so that it is quantised once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression import structured, walk
from espalier.compression.calibration import Batches, Loss, feed
from espalier.compression.config import Config, Quantization
from espalier.compression.layers import find_linear
from espalier.compression.quantization.linear import (
    HIGH,
    LOW,
    STATIC,
    TOKEN,
    QuantizedLinear,
    round_static,
    round_tokens,
)
from espalier.compression.quantization.ranges import Inputs, parameters, range_of
from espalier.compression.quantization.smooth import pairs_of, smooth
from espalier.compression.second_order import dampen, inverse_factor, round_columns
from espalier.errors import ConfigError, DataError, UnsupportedModelError

FLOAT = "float"
_NEARLY = 10.0
"""How many times the error of dynamic inputs static ones may have, which cost less time."""
_JUDGED = 8
"""Batches after those of the calibration on which a whole model is compared with the float one."""

Answers = Callable[[nn.Module, Any], Tensor]
"""What a model says about a batch, ``[examples, values]``."""


@dataclass(frozen=True)
class LayerQuantization:
    """How a layer computes: ``static``, ``token`` or ``float``, and ``why``.

    Errors are shares of the squared norm of the layer's outputs on calibration data: of plain rounding with ``static``
    inputs and with inputs per ``token``, and of the layer as it is now. ``harm``: share of the variance of the model's
    outputs that is lost when only this layer, with those that share its input, is quantised; None where it was not
    measured. ``saturated``: share of the inputs seen that static 8 bits cut off.
    """

    name: str
    shape: tuple[int, int]
    activations: str
    why: str
    error_static: float | None = None
    error_token: float | None = None
    error: float | None = None
    saturated: float | None = None
    harm: float | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """``fidelity``: share of the variance of the float model's outputs that the quantised one's explain, on batches of
    the training data that calibration did not see; before any training as a quantised model."""

    fidelity: float | None
    target: float
    layers: tuple[LayerQuantization, ...]
    notes: tuple[str, ...] = ()

    def count(self, activations: str) -> int:
        """How many layers compute in this way."""
        return sum(layer.activations == activations for layer in self.layers)

    def __str__(self) -> str:
        kinds = [f"{self.count(kind)} {what}" for kind, what in _KINDS.items() if self.count(kind)]
        told = "" if self.fidelity is None else f"; {self.fidelity:.2%} of the outputs' variance explained"
        return f"int8: {', '.join(kinds)}{told}"


_KINDS = {STATIC: "static", TOKEN: "dynamic", FLOAT: "kept float"}


@dataclass(frozen=True)
class _Layer:
    """A layer's weight before and after rounding, and the errors of its outputs by how its inputs are quantised:
    ``plain`` with the weight rounded to the nearest, ``errors`` as it was rounded."""

    weight: Tensor
    rounded: Tensor
    plain: dict[str, float]
    errors: dict[str, float]


@dataclass
class _Shared:
    """Layers that read one tensor. ``options``: ways to quantise them, the current one first and FLOAT last.

    ``scale`` and ``zero`` of static inputs cut off the share ``saturated``. ``harm`` is known for options measured.
    """

    layers: dict[str, _Layer]
    options: list[str]
    why: str
    scale: Tensor
    zero: Tensor
    saturated: float
    harm: dict[str, float] = field(default_factory=dict)

    def row(self, name: str) -> LayerQuantization:
        """What the report says about a layer."""
        layer, option = self.layers[name], self.options[0]
        outputs, inputs = layer.weight.shape
        return LayerQuantization(
            name,
            (outputs, inputs),
            option,
            self.why,
            error_static=layer.plain[STATIC],
            error_token=layer.plain[TOKEN],
            error=layer.errors.get(option, 0.0),
            saturated=self.saturated if option == STATIC else None,
            harm=self.harm.get(option),
        )


class Quantizer:
    """Quantises the linear layers of ``model``'s encoder, all but those that ``keep_float`` names.

    ``report`` is None until it is done. Raises ConfigError when nothing is left to quantise or an expression of
    ``keep_float`` finds nothing.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        if config.quantization is None:
            raise ConfigError("config.quantization is not set; give Quantization()")
        self.model = model
        self.config = config
        self.settings: Quantization = config.quantization
        self.report: QuantizationReport | None = None
        found = find_linear(model, config.include, ())
        for expression in self.settings.keep_float:
            if not any(re.search(expression, name) for name in found):
                raise ConfigError(
                    f"keep_float: {expression!r} matches none of the {len(found)} layers to quantise, such as "
                    f"{next(iter(found))!r}"
                )
        self.kept = [name for name in found if any(re.search(e, name) for e in self.settings.keep_float)]
        self._names = [name for name in found if name not in self.kept]
        if not self._names:
            raise ConfigError("keep_float keeps all layers float, so there is nothing to quantise")
        self._notes: list[str] = []

    @property
    def done(self) -> bool:
        """Whether the model is quantised."""
        return self.report is not None

    @property
    def begins(self) -> float:
        """The share of the training after which the model is quantised."""
        return 1 - self.settings.finetune

    def quantize(self, batches: Batches, loss: Loss, answers: Answers) -> QuantizationReport:
        """Quantise the model, in evaluation mode and in place.

        Raises DataError without batches, TrainingError for inputs or weights that are no finite numbers.
        """
        count = self.config.calibration.batches
        seen = list(islice(batches(), count + _JUDGED))
        if not seen:
            raise DataError("there is no calibration batch; give at least one")
        if len(seen) <= count:
            self._notes.append("too few batches to keep some apart: the model was judged on those of the calibration")
        calibration, judged = seen[:count], seen[count:] or seen[-_JUDGED:]
        with torch.no_grad():
            wanted = [answers(self.model, batch) for batch in judged]
        layers = self._layers()
        if self.settings.smooth:
            self._smooth(layers, calibration, loss)
        shared = [
            self._stage(stage, layers, len(calibration))
            for stage in walk.in_turn(self.model, self._stack(), layers, lambda: calibration, loss)
        ]

        def lost() -> float:
            with torch.no_grad():
                return _unexplained(wanted, [answers(self.model, batch) for batch in judged])

        fidelity = 1 - self._choose(shared, layers, lost)
        rows = {name: group.row(name) for group in shared for name in group.layers}
        rows |= {name: self._kept_row(name) for name in self.kept}
        self._finish(layers, rows)
        ordered = tuple(rows[name] for name in find_linear(self.model, self.config.include, ()) if name in rows)
        self.report = QuantizationReport(fidelity, self.settings.accuracy_target, ordered, tuple(self._notes))
        return self.report

    def follow(self) -> None:
        """After an optimiser's step: let the scales of weights follow where weights have outgrown them."""
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear):
                module.follow()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep besides the model's weights and buffers."""
        return {"report": None if self.report is None else asdict(self.report)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of :meth:`state_dict`. The model's own state must be loaded afterwards."""
        saved = state["report"]
        if saved is None:
            return
        rows = tuple(LayerQuantization(**{**row, "shape": tuple(row["shape"])}) for row in saved["layers"])
        self.report = QuantizationReport(**{**saved, "layers": rows, "notes": tuple(saved["notes"])})
        modules = dict(self.model.named_modules())
        for row in rows:
            module = modules[row.name]
            if row.activations != FLOAT and isinstance(module, nn.Linear):
                QuantizedLinear.convert(module, row.activations)

    # --- layers -------------------------------------------------------------------------------------------------------

    def _layers(self) -> dict[str, nn.Linear]:
        """The layers to quantise that are still part of the calculation."""
        modules = dict(self.model.named_modules())
        stack = self._stack()
        skipped = [] if stack is None else [i for i, layer in enumerate(stack[1]) if structured.is_skipped(layer)]
        gone = tuple(f"{stack[0]}.{index}." for index in skipped) if stack is not None else ()
        found = {name: modules[name] for name in self._names if not name.startswith(gone or ("\0",))}
        return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}

    def _stack(self) -> tuple[str, nn.ModuleList] | None:
        try:
            stack = structured.Stack.of(self.model)
        except UnsupportedModelError:
            return None
        return stack.name, stack.layers

    def _smooth(self, layers: Mapping[str, nn.Linear], batches: Iterable[Any], loss: Loss) -> None:
        pairs, notes = pairs_of(self.model, layers)
        self._notes += notes
        largest: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            most = x.abs().amax(0)
            largest[name] = torch.maximum(largest[name], most) if name in largest else most

        if pairs:
            feed(self.model, {pair.name: pair.reader for pair in pairs}, batches, loss, see)
        for pair in pairs:
            smooth(pair, largest[pair.name], self.settings.smooth)

    def _stage(self, stage: walk.Stage, layers: Mapping[str, nn.Linear], batches: int) -> _Shared:
        """Quantise the layers that get one tensor, in the first of the ways that are open to them."""
        first = layers[stage.names[0]]
        inputs = Inputs(first.in_features, batches)
        gptq = self.settings.rounding == "gptq"
        hessian = torch.zeros(first.in_features, first.in_features, device=first.weight.device)

        def see(name: str, x: Tensor) -> None:
            inputs.see(x)
            if gptq:
                hessian.addmm_(x.T, x)

        feed(stage.model, {stage.names[0]: first}, stage.batches(), stage.loss, see)
        scale, zero = parameters(*range_of(self.settings.range, inputs, self.settings.percentile))
        sample = inputs.sample
        rounded_inputs = {STATIC: round_static(sample, scale, zero), TOKEN: round_tokens(sample)}
        factor = None
        if gptq:
            what = f"the Hessian of the inputs of {stage.names[0]!r}"
            factor = inverse_factor(dampen(hessian / inputs.tokens, self.config.calibration.dampening), what)
        modules = {name: QuantizedLinear.convert(layers[name], TOKEN) for name in stage.names}
        found: dict[str, _Layer] = {}
        for name, module in modules.items():
            weight = module.weight.detach().clone()

            def errors(module: QuantizedLinear = module, weight: Tensor = weight) -> dict[str, float]:
                rounded = module.rounded_weight().detach()
                return {kind: _output_error(sample, weight, x, rounded) for kind, x in rounded_inputs.items()}

            plain = errors()
            if factor is not None:
                self._round(module, factor)
            found[name] = _Layer(weight, module.weight.detach().clone(), plain, errors() if gptq else plain)
        options = self._options({kind: sum(layer.plain[kind] for layer in found.values()) for kind in rounded_inputs})
        why = self._why(options[0], first=True)
        shared = _Shared(found, options, why, scale, zero, _outside(sample, scale, zero))
        _use(shared, modules, options[0])
        return shared

    def _round(self, module: QuantizedLinear, factor: Tensor) -> None:
        mask, block = module.weight != 0, self.config.calibration.block
        steps = round_columns(module.weight.detach(), factor, mask, module.weight_scale, HIGH, block)
        with torch.no_grad():
            module.weight.copy_(steps.float() * module.weight_scale)

    # --- choices ------------------------------------------------------------------------------------------------------

    def _options(self, errors: Mapping[str, float]) -> list[str]:
        """Ways to quantise a layer, the preferred one first and FLOAT last. ``errors``: of STATIC and TOKEN."""
        if self.settings.activations == "static":
            return [STATIC, FLOAT]
        dynamic = errors[STATIC] > _NEARLY * errors[TOKEN]
        if self.settings.activations == "dynamic" or dynamic:
            return [TOKEN, FLOAT]
        return [STATIC, TOKEN, FLOAT] if errors[TOKEN] < errors[STATIC] else [STATIC, FLOAT]

    def _why(self, option: str, *, first: bool) -> str:
        if option == FLOAT:
            return f"else less than {self.settings.accuracy_target:.2%} of the outputs' variance is explained"
        if self.settings.activations != "auto":
            return "asked for"
        if not first:
            return f"static, less than {self.settings.accuracy_target:.2%} of the outputs' variance was explained"
        return "nearly as exact as dynamic" if option == STATIC else f"static has more than {_NEARLY:g} times the error"

    def _choose(self, shared: list[_Shared], layers: Mapping[str, nn.Linear], lost: Callable[[], float]) -> float:
        """Move the inputs that do most harm to their next option until the target is met. Returns the share lost."""
        now = lost()
        allowed = 1 - self.settings.accuracy_target
        if self.settings.finetune or not self.settings.accuracy_target or now <= allowed:
            return now
        for group in shared:
            self._measure(group, shared, layers, lost)
        while now > allowed:
            worst = max(shared, key=lambda group: group.harm[group.options[0]])
            if worst.options == [FLOAT]:
                break
            worst.options.pop(0)
            worst.why = self._why(worst.options[0], first=False)
            self._measure(worst, shared, layers, lost)
            for group in shared:
                _use(group, layers, group.options[0])
            now = lost()
        return now

    def _measure(
        self, group: _Shared, shared: list[_Shared], layers: Mapping[str, nn.Linear], lost: Callable[[], float]
    ) -> None:
        """The harm of a group's current option, with all others float."""
        for other in shared:
            _use(other, layers, group.options[0] if other is group else FLOAT)
        group.harm[group.options[0]] = lost() if group.options[0] != FLOAT else 0.0

    def _kept_row(self, name: str) -> LayerQuantization:
        module = self.model.get_submodule(name)
        weight: Any = module.weight
        return LayerQuantization(name, tuple(weight.shape), FLOAT, "kept by keep_float")

    def _finish(self, layers: Mapping[str, nn.Linear], rows: Mapping[str, LayerQuantization]) -> None:
        """Make layers that stay float plain ones again."""
        for name, module in layers.items():
            if rows[name].activations == FLOAT and isinstance(module, QuantizedLinear):
                module.revert()
        kept = sum(rows[name].activations == FLOAT for name in layers)
        if kept == len(layers):
            self._notes.append("no layer is quantised: the accuracy target leaves none")


def _use(group: _Shared, layers: Mapping[str, nn.Linear], option: str) -> None:
    """Let the layers of a group compute in one of its ways."""
    for name, layer in group.layers.items():
        module = layers[name]
        if not isinstance(module, QuantizedLinear):
            continue
        with torch.no_grad():
            module.weight.copy_(layer.weight if option == FLOAT else layer.rounded)
        module.active = option != FLOAT
        if option == STATIC:
            module.set_input(group.scale, group.zero)
        else:
            module.input_scale = module.input_zero_point = None


def _output_error(x: Tensor, weight: Tensor, rounded: Tensor, rounded_weight: Tensor) -> float:
    """The squared error of a layer's outputs over their squared norm."""
    y = x @ weight.float().T
    error = float(((rounded @ rounded_weight.T - y) ** 2).sum())
    return error / (float((y**2).sum()) or 1.0)


def _outside(x: Tensor, scale: Tensor, zero: Tensor) -> float:
    """The share of values that the range of a scale and zero point does not hold."""
    steps = torch.round(x / scale) + zero
    return float(((steps < LOW) | (steps > HIGH)).float().mean())


def _unexplained(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The share of the variance of ``wanted`` that ``got`` does not explain; 1 for answers that are no numbers."""
    want, have = torch.cat(wanted).double(), torch.cat(got).double()
    whole = float(((want - want.mean(0)) ** 2).sum())
    error = float(((have - want) ** 2).sum())
    return min(1.0, error / whole) if whole > 0 and error == error else float(error != 0)
