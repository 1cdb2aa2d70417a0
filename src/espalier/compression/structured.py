"""Heads, neurons and whole layers of Hugging Face encoders: what belongs together, and models that are physically
smaller.

What a Hugging Face folder can say decides how far a model shrinks:

- neurons: one ``intermediate_size`` for all layers, so every layer keeps as many as the one that keeps most; what else
  was
  pruned stays as zeros, which the engine skips.
- layers: ``num_hidden_layers``.
- heads: the size of a head is ``hidden_size / num_attention_heads``, so fewer heads of the same size cannot be said.
  Pruned heads stay as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.calibration import Loss
from espalier.compression.groups import Groups
from espalier.compression.layers import Layer
from espalier.compression.quantization.linear import QuantizedLinear
from espalier.errors import ConfigError, DataError, UnsupportedModelError
from espalier.hf.encoders import FAMILIES, Family


@dataclass(frozen=True)
class Stack:
    """The encoder layers of a model: ``layers``, called ``name``; ``family`` and ``config`` of a known architecture."""

    name: str
    layers: nn.ModuleList
    family: Family | None
    config: Any

    @staticmethod
    def of(model: nn.Module) -> Stack:
        """Raises UnsupportedModelError when the model has no list of layers."""
        config = getattr(model, "config", None)
        family = FAMILIES.get(str(getattr(config, "model_type", "")))
        lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        if family is not None:
            lists = [(n, m) for n, m in lists if n == family.layer or n.endswith(f".{family.layer}")]
        if not lists:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no stack of layers; structured patterns need a Hugging Face encoder "
                "or, for 'layers', an nn.ModuleList"
            )
        name, layers = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
        return Stack(name, layers, family, config)

    def part(self, index: int, path: str) -> tuple[str, nn.Linear]:
        """A linear layer of an encoder layer, with its full name."""
        module = self.layers[index].get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise UnsupportedModelError(f"{self.name}.{index}.{path} is {type(module).__name__}, expected a Linear")
        return f"{self.name}.{index}.{path}", module

    def names(self) -> Family:
        """The family. Raises UnsupportedModelError for a model of none."""
        if self.family is None:
            raise UnsupportedModelError(
                "heads and neurons can be pruned in models of the families "
                f"{', '.join(FAMILIES)}; choose another pattern for this one"
            )
        return self.family

    def setting(self, key: str) -> str:
        """What the family calls a setting."""
        return self.family.keys.get(key, key) if self.family else key


def structured_layers(model: nn.Module, pattern: str, linear: dict[str, nn.Linear]) -> list[Layer]:
    """For each encoder layer the matrix whose input columns are heads or neurons, followed by those that feed it.

    ``linear`` are the layers that may be pruned; an encoder layer counts only with all of its parts.
    """
    stack = Stack.of(model)
    names = stack.names().names
    feeders: tuple[str, ...]
    masks: dict[str, Tensor] = {}
    found = []
    for index in range(len(stack.layers)):
        if pattern == "heads":
            main, feeders = names.mix, (names.query, names.key, names.value)
        else:
            main, feeders = names.down, (names.up,)
        name, module = stack.part(index, main)
        followers = dict(stack.part(index, path) for path in feeders)
        if name not in linear or any(follower not in linear for follower in followers):
            continue
        columns = 1
        if pattern == "heads":
            heads = int(getattr(stack.config, stack.setting("num_attention_heads")))
            columns = module.in_features // heads
        groups = Groups(pattern=pattern, rows=module.out_features, columns=columns)
        found.append(Layer(name, module, groups, masks, followers))
        for part, linear_part in ((name, module), *followers.items()):
            masks[part] = torch.ones_like(linear_part.weight, dtype=torch.bool)
    if not found:
        raise ConfigError(
            f"no encoder layer has all of its {pattern} among the layers to prune; check include and exclude"
        )
    return found


# --- dropping layers --------------------------------------------------------------------------------------------------


@dataclass
class Influence:
    """How much a layer changes its input, the mean of ``|f(x) - x|^2 / |x|^2`` over tokens; 0 for a skipped layer.

    ``as_tuple``: the layer returns its output as the first of a tuple, as some families do.
    """

    change: float = 0.0
    tokens: int = 0
    as_tuple: bool = False


def influence(model: nn.Module, stack: Stack, batches: Iterable[Any], loss: Loss) -> list[Influence]:
    """What each layer does to its input in the calibration batches. Raises DataError when none reaches a layer."""
    found = [Influence() for _ in stack.layers]

    def hook(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        here = found[index]
        here.as_tuple = isinstance(output, tuple)
        x = _input(args, kwargs)
        y = output[0] if here.as_tuple else output
        change = ((y - x).double() ** 2).sum(-1) / (x.double() ** 2).sum(-1).clamp(min=1e-12)
        here.tokens += change.numel()
        here.change += (float(change.sum()) - here.change * change.numel()) / here.tokens

    handles = [
        layer.register_forward_hook(partial(hook, index), with_kwargs=True) for index, layer in enumerate(stack.layers)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(here.tokens for here in found):
        raise DataError("there is no calibration batch, or none reached the encoder layers; give at least one")
    return found


def skip(layer: nn.Module, *, as_tuple: bool) -> None:
    """Let a layer hand its input on. Its weights stay where they are, so that checkpoints keep their form."""
    layer.forward = partial(_hand_on, as_tuple)


def is_skipped(layer: nn.Module) -> bool:
    """Whether :func:`skip` was called for a layer."""
    return isinstance(layer.forward, partial) and layer.forward.func is _hand_on


def skipped(stack: Stack) -> list[tuple[int, bool]]:
    """The skipped layers, by place, and whether each returns a tuple."""
    forwards = [(index, layer.forward) for index, layer in enumerate(stack.layers)]
    return [(index, bool(f.args[0])) for index, f in forwards if isinstance(f, partial) and f.func is _hand_on]


def _hand_on(as_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    x = _input(args, kwargs)
    return (x,) if as_tuple else x


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


# --- shrinking --------------------------------------------------------------------------------------------------------


def shrink(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Take pruned neurons and layers out of ``model``, in place, and correct its configuration; returns the model.

    ``masks`` (bool ``[outputs, inputs]`` by the names of the linear layers, True for what stays) is brought up to
    date: cut with the weights, and renamed where layers have moved up. What a Hugging Face configuration cannot say
    stays, as zeros (see above); what comes out computes the same. Raises UnsupportedModelError for a model of an
    unknown family.
    """
    stack = Stack.of(model)
    _drop_skipped(stack, masks)
    if stack.family is not None:
        _cut_neurons(stack, masks)
    return model


def _drop_skipped(stack: Stack, masks: dict[str, Tensor]) -> None:
    kept = [index for index, layer in enumerate(stack.layers) if not is_skipped(layer)]
    if len(kept) == len(stack.layers):
        return
    renamed: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if not name.startswith(f"{stack.name}."):
            renamed[name] = mask
            continue
        index, _, rest = name[len(stack.name) + 1 :].partition(".")
        if int(index) in kept:
            renamed[f"{stack.name}.{kept.index(int(index))}.{rest}"] = mask
    masks.clear()
    masks.update(renamed)
    layers = [stack.layers[index] for index in kept]
    for place in reversed(range(len(stack.layers))):
        del stack.layers[place]
    stack.layers.extend(layers)
    if stack.config is not None:
        setattr(stack.config, stack.setting("num_hidden_layers"), len(layers))


def _cut_neurons(stack: Stack, masks: dict[str, Tensor]) -> None:
    names = stack.names().names
    pairs = []
    for index in range(len(stack.layers)):
        (up_name, up), (down_name, down) = stack.part(index, names.up), stack.part(index, names.down)
        alive = torch.ones(up.out_features, dtype=torch.bool)
        if up_name in masks and down_name in masks:
            alive = masks[up_name].any(1).cpu() & masks[down_name].any(0).cpu()
        pairs.append((up_name, up, down_name, down, alive))
    size = max(int(alive.sum()) for *_, alive in pairs)
    if not size or size == len(pairs[0][-1]):
        return
    for up_name, up, down_name, down, alive in pairs:
        # All that live, then dead ones up to the common size; in their old order.
        keep = (~alive).to(torch.int8).argsort(stable=True)[:size].sort().values
        _cut(up, keep, 0)
        _cut(down, keep, 1)
        if up_name in masks:
            masks[up_name] = masks[up_name][keep.to(masks[up_name].device)]
        if down_name in masks:
            masks[down_name] = masks[down_name][:, keep.to(masks[down_name].device)]
    setattr(stack.config, stack.setting("intermediate_size"), size)


def _cut(module: nn.Linear, keep: Tensor, axis: int) -> None:
    """Keep some outputs (axis 0) or inputs (axis 1) of a linear layer."""
    keep = keep.to(module.weight.device)
    weight = module.weight
    module.weight = nn.Parameter(weight.detach().index_select(axis, keep).clone(), weight.requires_grad)
    if axis == 1:
        module.in_features = len(keep)
        return
    module.out_features = len(keep)
    if isinstance(module, QuantizedLinear):
        module.weight_scale = module.weight_scale[keep]
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[keep].clone(), module.bias.requires_grad)
