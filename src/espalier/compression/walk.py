"""Pruning in the order of the calculation: every layer with the inputs that the pruned layers before it really give.

In a stack of encoder layers each hands its output to the next. Their inputs are recorded once; then every layer is run
by itself, as often as its parts need it, instead of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.calibration import Call, Loss, padding_of, stages


@dataclass(frozen=True)
class Stage:
    """Linear layers that get the same input, by name, and how to make them get it: ``loss(model, batch)``."""

    names: list[str]
    model: nn.Module
    batches: Callable[[], Iterable[Any]]
    loss: Loss


def in_turn(
    model: nn.Module,
    stack: tuple[str, nn.ModuleList] | None,
    linear: Mapping[str, nn.Linear],
    batches: Callable[[], Iterable[Any]],
    loss: Loss,
) -> Iterator[Stage]:
    """The stages in the order of the calculation; a stage must be pruned before the next one is asked for.

    ``stack``: the encoder layers and their name, where the model has them. Where they do not hand their outputs on in
    order, and for what lies outside of them, the whole model is run. Raises what :func:`stages` raises.
    """
    left = dict(linear)
    calls = record(model, stack[1], batches(), loss) if stack is not None else None
    if stack is not None and calls is not None:
        name, layers = stack
        recorded = calls
        for index, layer in enumerate(layers):
            inside = {n: m for n, m in linear.items() if n.startswith(f"{name}.{index}.")}
            if inside:
                for stage in stages(layer, inside, recorded, _run):
                    yield Stage(list(stage), layer, lambda: recorded, _run)
            left = {n: m for n, m in left.items() if n not in inside}
            with torch.no_grad():
                for call in recorded:
                    call.args = (call.run(layer), *call.args[1:])
    if left:
        for stage in stages(model, left, batches(), loss):
            yield Stage(list(stage), model, batches, loss)


def record(model: nn.Module, layers: nn.ModuleList, batches: Iterable[Any], loss: Loss) -> list[Call] | None:
    """The calls of the first of ``layers``; None when the others do not get the one's output and all else the same."""
    calls: list[Call] = []
    output: list[Any] = []
    broken: list[int] = []

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index == 0:
                if args and isinstance(args[0], Tensor):
                    calls.append(Call(args, dict(kwargs), masks[0] if masks else None))
                else:
                    broken.append(index)
                return
            same = bool(calls and args and output) and args[0] is output[0] and len(args) == len(calls[-1].args)
            if same:
                first = calls[-1]
                same = all(a is b for a, b in zip(args[1:], first.args[1:], strict=True))
                same = same and kwargs.keys() == first.kwargs.keys()
                same = same and all(value is first.kwargs[key] for key, value in kwargs.items())
            if not same:
                broken.append(index)

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        output[:] = [result[0] if isinstance(result, tuple) else result]

    handles: list[Any] = []
    with padding_of(model) as masks, torch.no_grad():
        try:
            for index, layer in enumerate(layers):
                handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
                handles.append(layer.register_forward_hook(after))
            for batch in batches:
                loss(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return None if broken or not calls else calls


def _run(layer: nn.Module, call: Call) -> Tensor:
    return call.run(layer)
