"""Between the protocol's messages and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.errors import InputNameError, InputShapeError, InputTypeError
from espalier.serve import tensors
from espalier.serve.http.v2 import MAX_TENSORS, check_parameters
from espalier.serve.models import Model

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def read_inputs(request: Any) -> dict[str, np.ndarray]:
    """The inputs of a ModelInferRequest by name. Raises InputError and its like."""
    if len(request.inputs) > MAX_TENSORS or len(request.outputs) > MAX_TENSORS:
        raise InputShapeError(f"a request has at most {MAX_TENSORS} inputs and {MAX_TENSORS} outputs")
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputShapeError(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; give every input's, in order"
        )
    feeds: dict[str, np.ndarray] = {}
    for place, tensor in enumerate(request.inputs):
        name, shape = tensor.name, list(tensor.shape)
        if name in feeds:
            raise InputNameError(f"input {name!r} is given twice")
        check_parameters("input", name, tensor.parameters)
        if not raw:
            feeds[name] = _typed(name, tensor.datatype, shape, tensor.contents)
        elif tensor.HasField("contents"):
            raise InputShapeError(f"input {name!r} has contents beside raw_input_contents; give one of them")
        else:
            feeds[name] = tensors.from_bytes(name, tensor.datatype, shape, raw[place])
    return feeds


def _typed(name: str, datatype: str, shape: list[int], contents: Any) -> np.ndarray:
    if datatype == "FP16":
        raise InputTypeError(f"input {name!r}: FP16 can only be sent in raw_input_contents")
    kind = _CONTENTS.get(datatype, "")
    filled = [field.name for field, _ in contents.ListFields()]
    if kind and filled and filled != [kind]:
        raise InputTypeError(f"input {name!r}: {datatype} belongs into {kind}; got {', '.join(filled)}")
    values = getattr(contents, kind) if kind else []
    if datatype == "BYTES":
        return tensors.strings(name, values, shape)
    return tensors.from_values(name, datatype, shape, list(values))


def write_response(make: Any, model: Model, request_id: str, found: Mapping[str, np.ndarray]) -> Any:
    """A ModelInferResponse, whose class is ``make``, with raw contents."""
    response = make(model_name=model.name, model_version=model.version, id=request_id)
    for name, array in found.items():
        response.outputs.add(name=name, datatype=tensors.datatype_of_dtype(array.dtype), shape=array.shape)
        response.raw_output_contents.append(tensors.to_bytes(array))
    return response


def parameters_of(parameters: Any) -> dict[str, Any]:
    """Parameters as plain values."""
    kinds = {name: (value, value.WhichOneof("parameter_choice")) for name, value in parameters.items()}
    return {name: getattr(value, kind) for name, (value, kind) in kinds.items() if kind}
