"""What every endpoint does around its own work: read the body, time, count, notice a client that leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from espalier.errors import EspalierError
from espalier.serve import status
from espalier.serve.http.body import read_body
from espalier.serve.http.guard import GONE
from espalier.serve.http.problems import HttpError, code_of, response_to

if TYPE_CHECKING:
    from espalier.serve.service import Service

_CLIENT_LEFT = 499  # what nginx calls it; nobody is there to read it


@dataclass
class Call:
    """One request: its body is there. ``model`` is for the metrics, set once it is known to be served."""

    request: Request
    body: bytes
    model: str = ""
    started: float = field(default_factory=time.perf_counter)


Handler = Callable[[Call], Awaitable[Response]]


class Endpoint:
    """A handler with everything around it: an ASGI application, without what Starlette wraps around functions."""

    def __init__(self, service: Service, name: str, handler: Handler, *, openai: bool = False) -> None:
        self._service = service
        self._name = name
        self._handler = handler
        self._openai = openai
        self._seconds = service.metrics.request_seconds.labels("http", name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        response = await self._respond(Request(scope, receive))
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        """Answer a request, whatever happens."""
        config = self._service.config
        call = Call(request, b"")
        try:
            call.body = await read_body(request, config.body_bytes, config.body_timeout)
            call.started = time.perf_counter()
            response = await self._answer(call)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        except (HttpError, EspalierError) as error:
            response = self._failed(error)
        except Exception as error:  # noqa: BLE001 - a bug in one request must not be the end of the server
            response = self._failed(error)
        self._seconds.observe(time.perf_counter() - call.started)
        self._service.metrics.count_request("http", self._name, call.model, str(response.status_code))
        return response

    async def _answer(self, call: Call) -> Response:
        if call.request.method != "POST":
            return await self._handler(call)
        with self._service.in_flight():
            return await self._unless_left(call)

    async def _unless_left(self, call: Call) -> Response:
        """Run the handler; stop it when the client goes away. Raises ClientDisconnect."""
        gone, task = call.request.scope.get(GONE), asyncio.current_task()
        if gone is None or task is None:
            return await self._handler(call)  # not by our protocol: nobody says
        if gone.done():
            raise ClientDisconnect
        working = True

        def stop(_: object) -> None:
            if working:
                task.cancel()

        gone.add_done_callback(stop)
        try:
            return await self._handler(call)
        except asyncio.CancelledError:
            if not gone.done():
                raise
            task.uncancel()
            raise ClientDisconnect from None
        finally:
            working = False
            gone.remove_done_callback(stop)

    def _failed(self, error: Exception) -> Response:
        reason = status.status_of(error).refusal or ("too-large" if code_of(error) == 413 else "")
        if reason:
            self._service.metrics.refusals.labels(reason).inc()
        return response_to(error, openai=self._openai)
