"""What layers get and what the loss makes of it: inputs and gradients of single samples, by hooks on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.convolution import input_rows, output_rows
from espalier.errors import DataError, TrainingError

Batches = Callable[[], Iterable[Any]]
Loss = Callable[[nn.Module, Any], Tensor]

_CHUNK = 1 << 26
"""Numbers of single gradients that are held at a time."""


@dataclass
class Call:
    """One call of an encoder layer. ``padding``: bool ``[sequences, tokens]``, True for tokens, where it is known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    padding: Tensor | None

    def run(self, layer: nn.Module) -> Tensor:
        """The layer's output."""
        output = layer(*self.args, **self.kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


class _Enough(Exception):  # noqa: N818 -- no error: the rest of a forward pass is not needed
    """Every layer that was asked for has been reached."""


def feed(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    loss: Loss,
    see: Callable[[str, Tensor], None],
) -> None:
    """Call ``see(name, inputs [tokens, features])`` for every call of every layer. Padding is left out where it is
    known.

    The forward pass stops after the last of the layers. Raises DataError without a batch, TrainingError for inputs that
    are no numbers and for layers that no batch reaches.
    """
    calls: list[str] = []
    last: str | None = None
    recorded: list[Tensor] = []
    with padding_of(model) as masks, _hooks() as hooks, torch.no_grad():

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                calls.append(name)
                see(name, _tokens(input_rows(module, inputs[0]), recorded or masks))
                if name == last:
                    raise _Enough

            return hook

        for name, module in layers.items():
            hooks.append(module.register_forward_pre_hook(before(name)))
        for batch in batches:
            # A recorded call knows its padding; the mask that a single layer gets has another form.
            recorded[:] = [batch.padding] if isinstance(batch, Call) and batch.padding is not None else []
            with suppress(_Enough):
                loss(model, batch)
            if last is None and len(calls) == len(set(calls)) == len(layers):
                last = calls[-1]  # every layer is called once: nothing after this one matters
    _reached(layers, calls)


def stages(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Iterable[Any], loss: Loss
) -> list[dict[str, nn.Linear]]:
    """The layers in the order of their calls; those that get the very same tensor (query, key, value) together."""
    found: list[dict[str, nn.Linear]] = []
    last: list[Tensor] = []
    with _hooks() as hooks, torch.no_grad():

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                if any(name in stage for stage in found):
                    return
                if not (last and last[0] is inputs[0]):
                    found.append({})
                    last[:] = [inputs[0]]
                found[-1][name] = layers[name]

            return hook

        for name, module in layers.items():
            hooks.append(module.register_forward_pre_hook(before(name)))
        for batch in islice(batches, 1):
            loss(model, batch)
    _reached(layers, [name for stage in found for name in stage])
    return found


def sample_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    loss: Loss,
    see: Callable[[str, Tensor], None],
) -> int:
    """Call ``see(name, gradients [samples, outputs, inputs])`` with the weight's gradient for every sample. Returns
    how many.

    A sample is an entry along the first extent of a layer's input, over which the loss is taken to be a mean. One
    backward pass to the layers' outputs serves a whole batch, since a weight's gradient is ``sum(dy x^T)`` over a
    sample's tokens. A layer called several times makes a sample of each call.

    Raises DataError without a batch, TrainingError when a gradient is missing or no number.
    """
    count = 0
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    frozen = [p for m in layers.values() for p in (m.weight,) if not p.requires_grad]
    with padding_of(model) as masks, _hooks() as hooks, torch.enable_grad():

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                calls.append((name, module, inputs[0].detach(), output))

            return hook

        for name, module in layers.items():
            hooks.append(module.register_forward_hook(after(name)))
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            for batch in batches:
                calls.clear()
                value = loss(model, batch)
                if not calls or not value.requires_grad:
                    raise TrainingError("the loss does not depend on any layer to prune; check what the loss computes")
                grads = torch.autograd.grad(value, [out for *_, out in calls], allow_unused=True)
                for (name, layer, x, _), grad in zip(calls, grads, strict=True):
                    if grad is None:
                        raise TrainingError(f"the loss does not use the layer {name!r}; exclude it from pruning")
                    _each_sample(name, input_rows(layer, x), output_rows(layer, grad), masks, see)
                count += len(calls[0][2])
        finally:
            calls.clear()
            for parameter in frozen:
                parameter.requires_grad_(False)
    if not count:
        raise DataError("there is no calibration batch; give at least one")
    return count


def _reached(layers: Mapping[str, nn.Linear], calls: Iterable[str]) -> None:
    seen = set(calls)
    if not seen:
        raise DataError("there is no calibration batch, or none reached a layer to prune; give at least one batch")
    if missing := [name for name in layers if name not in seen]:
        raise TrainingError(
            f"the loss does not use the layer {missing[0]!r} ({len(missing)} such layers); exclude it from pruning"
        )


def _each_sample(name: str, x: Tensor, grad: Tensor, masks: list[Tensor], see: Callable[[str, Tensor], None]) -> None:
    samples, features, outputs = len(x), x.shape[-1], grad.shape[-1]
    x, grad = x.reshape(samples, -1, features).float(), grad.reshape(samples, -1, outputs).float() * samples
    # Of the factors and not of their products, which are ten times as many numbers.
    if not bool(torch.isfinite(grad).all() and torch.isfinite(x).all()):
        raise TrainingError(f"a gradient of the layer {name!r} is not a finite number; check the loss and the data")
    step = max(1, _CHUNK // (features * outputs))
    for begin in range(0, samples, step):
        see(name, grad[begin : begin + step].transpose(1, 2) @ x[begin : begin + step])


def _tokens(x: Tensor, masks: list[Tensor]) -> Tensor:
    """``[tokens, features]`` in float32, without padding if a mask of the same extents is known."""
    if masks and x.ndim == 3 and masks[0].shape == x.shape[:2]:
        x = x[masks[0]]
    x = x.reshape(-1, x.shape[-1]).float()
    # The sum is no number when any part is not, and takes no memory; a sum that overflows proves nothing.
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise TrainingError("a layer's input is not a finite number; check the model and the calibration data")
    return x


@contextmanager
def padding_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """The attention mask of the forward pass in progress, as bool ``[sequences, tokens]``, if the model got one."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        found[:] = [mask != 0] if isinstance(mask, Tensor) and mask.ndim == 2 else []

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, and afterwards in the mode it was in."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
