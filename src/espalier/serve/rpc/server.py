"""The Open Inference Protocol over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

import espalier
from espalier.errors import ConfigError, InputError, UnauthenticatedError
from espalier.serve import status
from espalier.serve.http.v2 import check_parameters, index_of, metadata_of, run_parameters
from espalier.serve.rpc import codec
from espalier.serve.rpc.messages import SERVICE, methods
from espalier.serve.service import Service

_MARGIN = 64 * 1024  # of a message, beside its tensors
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")
_OPEN = frozenset({"ServerLive", "ServerReady"})
_WORK = frozenset({"ModelInfer", "RepositoryModelLoad", "RepositoryModelUnload"})

Answer = Callable[[Any, Any], Awaitable[Any]]


class RpcServer:
    """A gRPC server in the running event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._server: Any = None

    async def start(self) -> int:
        """Listen, and return the port. Raises ConfigError when it cannot be had."""
        config = self._service.config
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.body_bytes + _MARGIN),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", config.head_bytes),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        )
        self._server.add_generic_rpc_handlers((_handlers(self._service),))
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.grpc_port}"
        try:
            if config.tls is None:
                port: int = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials())
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address} for gRPC: {error}") from error
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Close; requests under way get a second."""
        await self._server.stop(1.0)

    def _credentials(self) -> Any:
        tls = self._service.config.tls
        if tls is None:
            raise ConfigError("there is no certificate")
        authority = tls.client_ca.read_bytes() if tls.client_ca else None
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def _handlers(service: Service) -> Any:
    protocol = _Protocol(service)
    table = {}
    for name, (request, response) in methods().items():
        answer = getattr(protocol, _WORDS.sub("_", name).lower())
        # Requests are parsed inside the call, where what is no message becomes an INVALID_ARGUMENT.
        call = _Call(service, name, request, functools.partial(answer, make=response))
        table[name] = grpc.unary_unary_rpc_method_handler(call.respond, None, response.SerializeToString)
    return grpc.method_handlers_generic_handler(SERVICE, table)


class _Call:
    """What every method does around its own work, as ``http.endpoint`` does for HTTP."""

    def __init__(self, service: Service, name: str, request: Any, answer: Answer) -> None:
        self._service = service
        self._name = name
        self._request = request
        self._answer = answer
        self._seconds = service.metrics.request_seconds.labels("grpc", name)
        token = service.config.token
        self._expected = None if token is None or name in _OPEN else f"Bearer {token}"

    async def respond(self, data: bytes, context: Any) -> Any:
        """Answer a request, whatever happens."""
        start = time.perf_counter()
        response, error, code = None, None, "OK"
        try:
            self._authorise(context)
            with self._service.in_flight() if self._name in _WORK else contextlib.nullcontext():
                response = await self._answer(self._parsed(data), context)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as caught:  # noqa: BLE001 - a bug in one request must not be the end of the server
            error, code = caught, status.status_of(caught).grpc
        finally:
            self._seconds.observe(time.perf_counter() - start)
            self._service.metrics.count_request("grpc", self._name, "", code)
        if error is not None:
            await self._fail(error, code, context)
        return response

    async def _fail(self, error: Exception, code: str, context: Any) -> None:
        reason = status.status_of(error).refusal
        if reason:
            self._service.metrics.refusals.labels(reason).inc()
        wait = status.retry_after(error)
        trailing = () if wait is None else (("retry-after", str(wait)),)
        await context.abort(grpc.StatusCode[code], status.explain(error), trailing)

    def _authorise(self, context: Any) -> None:
        if self._expected is None:
            return
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not hmac.compare_digest(str(given).encode(), self._expected.encode()):
            raise UnauthenticatedError("send the server's token in the metadata: authorization: Bearer TOKEN")

    def _parsed(self, data: bytes) -> Any:
        try:
            return self._request.FromString(data)
        except DecodeError as error:
            raise InputError(f"the message is not a {self._request.DESCRIPTOR.name}: {error}") from error


class _Protocol:
    """The methods: each gets a request, the call's context and the class of its response."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def server_live(self, request: Any, context: Any, make: Any) -> Any:
        return make(live=True)

    async def server_ready(self, request: Any, context: Any, make: Any) -> Any:
        return make(ready=self._service.ready)

    async def model_ready(self, request: Any, context: Any, make: Any) -> Any:
        self._service.models.get(request.name, request.version)
        return make(ready=self._service.ready)

    async def server_metadata(self, request: Any, context: Any, make: Any) -> Any:
        return make(name="espalier", version=espalier.__version__, extensions=self._service.extensions)

    async def model_metadata(self, request: Any, context: Any, make: Any) -> Any:
        found = metadata_of(self._service.models.get(request.name, request.version))
        response = make(name=found.name, versions=found.versions, platform=found.platform)
        for tensors, side in ((found.inputs, response.inputs), (found.outputs, response.outputs)):
            for tensor in tensors:
                side.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return response

    async def model_infer(self, request: Any, context: Any, make: Any) -> Any:
        start = time.perf_counter()
        service = self._service
        model = service.models.get(request.model_name, request.model_version)
        feeds = codec.read_inputs(request)
        for output in request.outputs:
            check_parameters("output", output.name, output.parameters)
        priority, timeout = run_parameters(codec.parameters_of(request.parameters))
        limits = [limit for limit in (timeout, context.time_remaining()) if limit is not None]
        options = service.options(priority, min(limits, default=None))
        service.metrics.decode.observe(time.perf_counter() - start)
        names = [output.name for output in request.outputs] or None
        found = await service.dispatcher.infer(model, feeds, names, options)
        start = time.perf_counter()
        response = codec.write_response(make, model, request.id, found)
        service.metrics.encode.observe(time.perf_counter() - start)
        return response

    async def repository_index(self, request: Any, context: Any, make: Any) -> Any:
        response = make()
        for entry in index_of(self._service):
            if entry.state == "READY" or not request.ready:
                response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return response

    async def repository_model_load(self, request: Any, context: Any, make: Any) -> Any:
        await self._service.load(request.model_name)
        return make()

    async def repository_model_unload(self, request: Any, context: Any, make: Any) -> Any:
        await self._service.unload(request.model_name)
        return make()
