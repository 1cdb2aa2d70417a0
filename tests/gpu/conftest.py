"""Triton's interpreter, with what it does otherwise than a GPU put right."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import torch
    from triton.runtime import interpreter

    _TYPES = {
        "fp8e4nv": torch.float8_e4m3fn,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }

    def _convert_float(array: np.ndarray, source: Any, target: Any, _rounding: Any) -> np.ndarray:
        """From one float type to another, to the nearest, as GPUs do.

        Triton 3.6's own loses the carry of a mantissa that rounds up past its end, truncates bf16, and knows no NaN.
        """
        bits = np.frombuffer(array.tobytes(), f"u{source.primitive_bitwidth // 8}")
        values = torch.from_numpy(bits.copy()).view(_TYPES[source.name]).double().to(_TYPES[target.name])
        return values.view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy().reshape(array.shape)

    def _create_dot(_builder: Any, a: Any, b: Any, total: Any, _precision: Any, _imprecise: Any) -> Any:
        """In float32. Triton 3.6 multiplies the bit patterns of bf16."""
        x, y = (_convert_float(m.data, m.dtype.scalar, interpreter.tl.float32, None).view(np.float32) for m in (a, b))
        return interpreter.TensorHandle(x @ y + total.data, total.dtype.scalar)

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        """With scalars as loop bounds: those are arrays of one element, which NumPy 2.4 no longer takes for numbers."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._patch_lang_tensor = _patch_lang_tensor
