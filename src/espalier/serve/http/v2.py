"""The Open Inference Protocol over HTTP, with tensors in JSON or in binary.

In binary, the header ``Inference-Header-Content-Length`` gives the length of the JSON at the start of the body; the
tensors follow end to end, in order, each as long as its ``binary_data_size`` says.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from starlette.responses import Response

import espalier
from espalier.errors import InputError, InputNameError, InputShapeError, InputTypeError
from espalier.serve import schema, tensors
from espalier.serve.http.endpoint import Call
from espalier.serve.http.problems import HttpError
from espalier.serve.models import Model
from espalier.serve.service import Service

HEADER = "inference-header-content-length"
PLATFORM = "espalier"
MAX_TENSORS = 64
_KNOWN = {"input": "binary_data_size", "output": "binary_data"}
_DIGITS = re.compile(r"[0-9]{1,12}")
_NOT_READY = 503


class OpenInference:
    """The protocol's endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def live(self, call: Call) -> Response:
        """The process answers."""
        return _json({"live": True})

    async def ready(self, call: Call) -> Response:
        """Whether requests should be sent here."""
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else _NOT_READY)

    async def metadata(self, call: Call) -> Response:
        """The server's name, version and extensions."""
        return _json(schema.ServerMetadata("espalier", espalier.__version__, self._service.extensions))

    async def model_metadata(self, call: Call) -> Response:
        """A model's inputs and outputs."""
        return _json(metadata_of(self._model(call)))

    async def model_ready(self, call: Call) -> Response:
        """Whether a model is served, and the server ready."""
        model = self._model(call)
        return _json({"name": model.name, "ready": self._service.ready}, 200 if self._service.ready else _NOT_READY)

    async def infer(self, call: Call) -> Response:
        """Run a model."""
        model = self._model(call)
        request, feeds = read_request(call.body, call.request.headers.get(HEADER))
        self._service.metrics.decode.observe(time.perf_counter() - call.started)
        found = await self._service.dispatcher.infer(
            model,
            feeds,
            [output.name for output in request.outputs] or None,
            self._service.options(*run_parameters(request.parameters)),
        )
        start = time.perf_counter()
        response = write_response(model, request, found)
        self._service.metrics.encode.observe(time.perf_counter() - start)
        return response

    async def index(self, call: Call) -> Response:
        """The models served, and those that could be loaded."""
        return _json(index_of(self._service))

    async def load(self, call: Call) -> Response:
        """Load a model of the server's folder, or load it anew."""
        await self._service.load(call.request.path_params["name"])
        return _json({})

    async def unload(self, call: Call) -> Response:
        """Unload a model."""
        await self._service.unload(call.request.path_params["name"])
        return _json({})

    def _model(self, call: Call) -> Model:
        path = call.request.path_params
        model = self._service.models.get(path["name"], path.get("version", ""))
        call.model = model.name
        return model


def read_request(body: bytes, header: str | None) -> tuple[schema.InferRequest, dict[str, np.ndarray]]:
    """A request, and its inputs by name. ``header``: the value of :data:`HEADER`, None without it.

    Raises HttpError for a header that cannot be right, InputError and its like.
    """
    view = memoryview(body)
    length = len(view)
    if header is not None:
        if not _DIGITS.fullmatch(header):
            raise HttpError(400, f"{HEADER} must be a number of bytes; got {header[:32]!r}")
        length = int(header)
        if length > len(view):
            raise HttpError(400, f"{HEADER} says {length} bytes of JSON, but the body has {len(view)}")
    request = schema.decode(schema.InferRequest, view[:length])
    if len(request.inputs) > MAX_TENSORS or len(request.outputs) > MAX_TENSORS:
        raise InputShapeError(f"a request has at most {MAX_TENSORS} inputs and {MAX_TENSORS} outputs")
    for output in request.outputs:
        check_parameters("output", output.name, output.parameters)
    return request, _tensors(request.inputs, view[length:])


def _tensors(inputs: Sequence[schema.InferInput], rest: memoryview) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {}
    at = 0
    for tensor in inputs:
        check_parameters("input", tensor.name, tensor.parameters)
        size = tensor.parameters.get("binary_data_size")
        if tensor.name in feeds:
            raise InputNameError(f"input {tensor.name!r} is given twice")
        if size is None:
            feeds[tensor.name] = tensors.from_values(tensor.name, tensor.datatype, tensor.shape, tensor.data)
            continue
        if tensor.data is not None:
            raise InputError(f"input {tensor.name!r} has both data and binary_data_size; give one of them")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest) - at:
            raise InputShapeError(
                f"input {tensor.name!r}: binary_data_size is {size!r}, but {len(rest) - at} bytes are left of the body"
            )
        feeds[tensor.name] = tensors.from_bytes(tensor.name, tensor.datatype, tensor.shape, rest[at : at + size])
        at += size
    if at != len(rest):
        raise InputShapeError(
            f"{len(rest) - at} bytes of the body belong to no input; check binary_data_size and {HEADER}"
        )
    return feeds


def write_response(model: Model, request: schema.InferRequest, found: Mapping[str, np.ndarray]) -> Response:
    """The outputs, each in binary where the request asks for it."""
    default = request.parameters.get("binary_data_output") is True
    wanted = {output.name: output.parameters.get("binary_data", default) is True for output in request.outputs}
    outputs: list[schema.InferOutput] = []
    blobs: list[bytes] = []
    for name, array in found.items():
        output = schema.InferOutput(name, list(array.shape), tensors.datatype_of_dtype(array.dtype))
        if wanted.get(name, default):
            blobs.append(tensors.to_bytes(array))
            output.parameters = {"binary_data_size": len(blobs[-1])}
        else:
            output.data = tensors.to_values(array)
        outputs.append(output)
    head = schema.encode(schema.InferResponse(model.name, model.version, outputs, request.id))
    if not blobs:
        return Response(head, media_type="application/json")
    return Response(b"".join([head, *blobs]), 200, {HEADER: str(len(head))}, "application/octet-stream")


def check_parameters(kind: str, name: str, given: Iterable[str]) -> None:
    """Refuse parameters of an input or output that would change its meaning and are not understood.

    Raises InputError.
    """
    known = _KNOWN[kind]
    for key in given:
        if key != known:
            raise InputError(f"{kind} {name!r}: parameter {key!r} is not supported; known: {known}")


def run_parameters(parameters: Mapping[str, object]) -> tuple[int, float | None]:
    """``priority``, and ``timeout``: microseconds in the protocol, 0 for none; seconds here, None for none.

    Raises InputTypeError.
    """
    found = {name: parameters.get(name, 0) for name in ("priority", "timeout")}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
            raise InputTypeError(f"parameter {name!r} must be a whole number of at least 0; got {value!r}")
    priority, timeout = (int(str(value)) for value in found.values())
    return priority, timeout * 1e-6 or None


def metadata_of(model: Model) -> schema.ModelMetadata:
    """A model's description."""
    sides = [
        [
            schema.TensorMetadata(
                info.name,
                tensors.datatype_of(info),
                [extent if isinstance(extent, int) else -1 for extent in info.shape],
            )
            for info in infos
        ]
        for infos in (model.inputs, model.outputs)
    ]
    return schema.ModelMetadata(model.name, [model.version], PLATFORM, *sides)


def index_of(service: Service) -> list[schema.IndexEntry]:
    """Every model served or to be had."""
    served = [schema.IndexEntry(model.name, model.version, "READY", "") for model in service.models]
    names = {entry.name for entry in served}
    rest = [schema.IndexEntry(name, "", "UNAVAILABLE", "") for name in service.models.available() if name not in names]
    return served + rest


def _json(value: object, code: int = 200) -> Response:
    return Response(schema.encode(value), code, media_type="application/json")
