"""Espalier: prune transformer encoders, and run them on CPUs as fast as their zeros allow.

    import espalier

    session = espalier.load("model.onnx")
    (embeddings,) = session.run(None, {"input_ids": ids, "attention_mask": mask})

Everything is loaded on first use: importing the package starts no thread, sets no environment variable and
imports neither NumPy nor any machine learning framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier import errors
    from espalier.compression.compress import compress
    from espalier.session import Session, calibrate, compile, load

__version__ = "0.1.0"

__all__ = ["Session", "__version__", "calibrate", "compile", "compress", "errors", "load"]

# Where each public name lives; a name of None is the module itself.
_HOMES: dict[str, tuple[str, str | None]] = {
    "Session": ("espalier.session", "Session"),
    "calibrate": ("espalier.session", "calibrate"),
    "compile": ("espalier.session", "compile"),
    "compress": ("espalier.compression.compress", "compress"),
    "errors": ("espalier.errors", None),
    "load": ("espalier.session", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'espalier' has no attribute {name!r}; it has {', '.join(__all__)}")
    module_name, attribute = _HOMES[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
