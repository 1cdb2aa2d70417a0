"""Checkpoints in the convention of compressed-tensors, 8 bit: which linear layers are quantised, and how.

``quantization_config`` in config.json has groups of modules with the arguments of their weights and inputs. A layer of
the format ``int-quantized`` stores ``weight`` int8 ``[outputs, inputs]``, ``weight_scale`` ``[outputs, 1]`` or ``[1]``,
``weight_zero_point`` where weights are not symmetric and, for static inputs, ``input_scale`` ``[1]`` and
``input_zero_point`` int8 ``[1]``. See https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espalier.errors import ModelFormatError, UnsupportedModelError
from espalier.hf.config import Config

METHOD = "compressed-tensors"
FORMAT = "int-quantized"
LINEAR = "Linear"
"""The class of modules that a target may name instead of single ones."""
REGEX = "re:"

_FORMATS = (FORMAT, "naive-quantized", None)
_WEIGHTS = {"num_bits": (8,), "type": ("int", None), "strategy": ("channel", "tensor"), "dynamic": (False, None)}
_STATIC = {"num_bits": (8,), "type": ("int", None), "strategy": ("tensor", None), "dynamic": (False, None)}
_DYNAMIC = {"num_bits": (8,), "type": ("int", None), "strategy": ("token", "tensor"), "dynamic": (True,)}


@dataclass(frozen=True)
class Group:
    """Modules with one scheme: ``targets`` are names, classes, expressions after "re:"; ``activations``: QLinear's."""

    targets: tuple[str, ...]
    activations: str


@dataclass(frozen=True)
class Quantization:
    """What ``quantization_config`` says; without groups nothing is quantised."""

    groups: tuple[Group, ...] = ()
    ignored: tuple[str, ...] = ()

    def activations(self, name: str) -> str | None:
        """``static`` or ``token`` for a linear layer that is quantised, None for one that is not.

        A group that names the layer comes before one that names its class.
        """
        if any(_names(target, name) or target == LINEAR for target in self.ignored):
            return None
        for group in self.groups:
            if any(_names(target, name) for target in group.targets):
                return group.activations
        return next((group.activations for group in self.groups if LINEAR in group.targets), None)


def read_quantization(config: Config) -> Quantization:
    """The quantisation of a checkpoint.

    Dynamic inputs count as quantised token by token, with a zero point, which is never coarser than what they say.
    Raises UnsupportedModelError for another method, format or number of bits, ModelFormatError for a broken table.
    """
    found = config.get("quantization_config")
    if not found:
        return Quantization()
    table = _table(config, found, "quantization_config")
    _expect(config, table, "quantization_config", {"quant_method": (METHOD,), "format": _FORMATS})
    _expect(config, table, "quantization_config", {"quantization_status": ("compressed", None)})
    _absent(config, table, "quantization_config", "kv_cache_scheme")
    sparsity = table.get("sparsity_config")
    if sparsity:
        _expect(config, _table(config, sparsity, "sparsity_config"), "sparsity_config", {"format": ("dense",)})
    groups = _table(config, table.get("config_groups"), "config_groups")
    return Quantization(
        tuple(_group(config, _table(config, group, name), name) for name, group in groups.items()),
        _targets(config, table.get("ignore") or [], "ignore"),
    )


def _group(config: Config, group: Mapping[str, Any], name: str) -> Group:
    _expect(config, group, name, {"format": _FORMATS})
    _absent(config, group, name, "output_activations")
    _expect(config, _table(config, group.get("weights"), f"{name}.weights"), f"{name}.weights", _WEIGHTS)
    where = f"{name}.input_activations"
    inputs = _table(config, group.get("input_activations"), where)
    dynamic = bool(inputs.get("dynamic"))
    _expect(config, inputs, where, _DYNAMIC if dynamic else _STATIC)
    return Group(_targets(config, group.get("targets"), f"{name}.targets"), "token" if dynamic else "static")


def _names(target: str, name: str) -> bool:
    if target.startswith(REGEX):
        return re.match(target[len(REGEX) :], name) is not None
    return target == name


def _targets(config: Config, found: object, where: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(target, str) for target in found):
        raise ModelFormatError(f"{config.path}: {where} must be a list of names of modules, got {str(found)[:80]}")
    for target in found:
        if target.startswith(REGEX):
            try:
                re.compile(target[len(REGEX) :])
            except re.error as error:
                raise ModelFormatError(
                    f"{config.path}: {where}: {target!r} is no regular expression: {error}"
                ) from error
    return tuple(found)


def _table(config: Config, found: object, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise UnsupportedModelError(
            f"{config.path}: the checkpoint is quantised, and {where} must be a table, got {str(found)[:80]}; what can "
            f"be read are 8 bit weights and inputs in the convention of {METHOD}"
        )
    return found


def _expect(config: Config, table: Mapping[str, Any], where: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        got = table.get(key)
        if not any(got == value and type(got) is type(value) for value in values):
            known = " or ".join(repr(value) for value in values if value is not None)
            raise UnsupportedModelError(
                f"{config.path}: the checkpoint is quantised with {where}.{key} {repr(got)[:80]}, expected {known}; "
                "save it with 8 bit weights and inputs, or in float"
            )


def _absent(config: Config, table: Mapping[str, Any], where: str, key: str) -> None:
    if table.get(key):
        raise UnsupportedModelError(f"{config.path}: {where}.{key} is set, which cannot be read here; leave it out")
