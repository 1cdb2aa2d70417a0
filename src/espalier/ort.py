"""The ONNX Runtime executor: what the native engine cannot run, and whole models that hold nothing native."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from espalier.errors import (
    EspalierError,
    InputError,
    InputNameError,
    InputShapeError,
    InputTypeError,
    MissingDependencyError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)

_FATAL_ONLY = 4


class OrtProgram:
    """One ONNX model in ONNX Runtime on the CPU. Several threads may call :meth:`run` at once."""

    def __init__(self, model: Path | bytes, *, threads: int, shared: bool = False, exact: bool = False) -> None:
        """Open ``model`` (a file, or serialised ONNX bytes).

        ``shared`` says that native segments run beside it: its threads then sleep between runs and leave the
        cores to the engine. ``exact`` sums products of bytes as ONNX says: by default they saturate on x86
        processors without VNNI, which is a little faster there and can be far off; files in which a scale per channel
        comes without zero points fail then. Raises ModelNotFoundError, ModelFormatError or UnsupportedModelError.
        """
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        if shared:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = model if isinstance(model, bytes) else str(model)
        try:
            self.session = runtime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except _failures() as error:
            raise _load_error(error, model) from error

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any], run_options: Any = None) -> list[Any]:
        """As ``onnxruntime.InferenceSession.run``; its failures come out as Espalier's."""
        try:
            outputs: list[Any] = self.session.run(output_names, feeds, run_options)
        except _failures() as error:
            raise _run_error(error) from error
        return outputs


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"this model needs ONNX Runtime, which cannot be imported ({error}); run: pip install onnxruntime"
        ) from error
    return onnxruntime


@lru_cache(maxsize=1)
def _failures() -> tuple[type[BaseException], ...]:
    """Everything ONNX Runtime's binding raises: its own classes share no base, and pybind11 adds Python's."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [
        value
        for value in vars(state).values()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == state.__name__
    ]
    return (*own, RuntimeError, ValueError, TypeError, OverflowError, MemoryError, UnicodeError)


def first_line(error: BaseException) -> str:
    """The first line of ONNX Runtime's message, without its ``[ONNXRuntimeError] : 2 : NAME :`` prefix."""
    text = str(error).strip()
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return text.splitlines()[0].strip() if text else type(error).__name__


def _load_error(error: BaseException, model: Path | bytes) -> EspalierError:
    where = "the model" if isinstance(model, bytes) else str(model)
    kind, line = type(error).__name__, first_line(error)
    low = line.lower()
    if kind in ("NoSuchFile", "NotFound") or "external data path does not exist" in low or "no such file" in low:
        return ModelNotFoundError(f"{where}: a file is missing: {line}; put it beside the model, or export it again")
    if kind == "NotImplemented" or "not a registered" in low or "unsupported model ir" in low or "opset" in low:
        return UnsupportedModelError(
            f"{where}: ONNX Runtime has no implementation for it: {line}; export it to another operator set"
        )
    if kind in ("RuntimeException", "EPFail", "RuntimeError", "MemoryError"):
        return UnsupportedModelError(f"{where}: ONNX Runtime cannot prepare it: {line}")
    return ModelFormatError(f"{where}: not a valid ONNX model: {line}; export or download it again")


def _run_error(error: BaseException) -> EspalierError:
    kind, line = type(error).__name__, first_line(error)
    low = line.lower()
    if kind == "NotImplemented":
        return UnsupportedModelError(f"ONNX Runtime cannot run this model: {line}")
    if "invalid feed input name" in low or "required inputs" in low or "invalid output name" in low:
        return InputNameError(f"ONNX Runtime refused the names: {line}; see get_inputs() and get_outputs()")
    if "data type" in low:
        return InputTypeError(f"ONNX Runtime refused an input's type: {line}; see get_inputs()")
    if "invalid rank" in low or "invalid dimensions" in low:
        return InputShapeError(f"ONNX Runtime refused an input's shape: {line}; see get_inputs()")
    return InputError(f"ONNX Runtime could not run the model on this input: {line}")
