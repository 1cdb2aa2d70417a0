"""A quantised model as a checkpoint in the convention of compressed-tensors; ``espalier.hf.quantization`` reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.quantization.linear import STATIC, TOKEN, quantized_layers
from espalier.hf.quantization import FORMAT, METHOD

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INPUTS = {
    STATIC: {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    TOKEN: {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True},
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What is stored, on the CPU: weights of quantised layers as int8, all other floats as float32."""
    found = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    found = {name: t.to(torch.float32) if t.is_floating_point() else t for name, t in found.items()}
    return found | {f"{name}.weight": layer.integers().cpu() for name, layer in quantized_layers(model).items()}


def settings_of(model: nn.Module) -> dict[str, Any] | None:
    """``quantization_config`` for config.json; None for a model without quantised layers."""
    layers = quantized_layers(model)
    if not layers:
        return None
    groups: dict[str, Any] = {}
    for kind, inputs in _INPUTS.items():
        names = [name for name, layer in layers.items() if layer.activations == kind]
        if names:
            groups[f"group_{len(groups)}"] = {
                "targets": names,
                "weights": dict(_WEIGHTS),
                "input_activations": dict(inputs),
                "output_activations": None,
            }
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in layers],
        "kv_cache_scheme": None,
    }
