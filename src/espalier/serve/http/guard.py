"""What stands before the application: who may ask, and connections that take too long or send too much of a head."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any, ClassVar

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from espalier.errors import ForbiddenError, UnauthenticatedError
from espalier.serve.http.problems import response_to

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no token: probes carry none, and the pages hold nothing of the models."""


GONE = "espalier.gone"
"""Key of an ASGI scope: a future that is done once the connection is lost. Cheaper for every request than a task that
waits for the message which says so."""


class Guard:
    """Refuses requests without the token, and those that a browser sends for a page of another origin."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            error: Exception = ForbiddenError("requests from pages of another origin are not answered")
        elif not self._allowed(scope["path"], headers.get(b"authorization", b"")):
            error = UnauthenticatedError("send the server's token: Authorization: Bearer TOKEN")
        else:
            await self._app(scope, receive, send)
            return
        await response_to(error)(scope, receive, send)

    def _allowed(self, path: str, given: bytes) -> bool:
        return self._expected is None or path in OPEN_PATHS or hmac.compare_digest(given, self._expected)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits it lacks: a request's head in bytes and in seconds, and idle connections.

    Make a subclass with :meth:`limited`; uvicorn takes classes.
    """

    head_bytes: ClassVar[int]
    head_timeout: ClassVar[float]

    @classmethod
    def limited(cls, head_bytes: int, head_timeout: float) -> type[GuardedProtocol]:
        """A class with these limits."""
        return type("LimitedProtocol", (cls,), {"head_bytes": head_bytes, "head_timeout": head_timeout})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connected, who must say something."""
        super().connection_made(transport)
        self._gone = self.loop.create_future()
        self._head: int | None = None  # bytes of the head so far, None between heads
        # As long as between requests: a client may connect ahead of its need.
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.timeout_keep_alive, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._stop_timer()
        if not self._gone.done():  # the loop may be at its end and have cancelled it
            self._gone.set_result(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes arrived. Those of a head are counted; what follows it is the body's, which the application counts."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._head is not None and self.parser is not None:
            self._head += len(data)
            if self._head > self.head_bytes:
                self._refuse()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self.scope[GONE] = self._gone  # type: ignore[literal-required]
        self._head = 0
        self._stop_timer()
        self._timer = self.loop.call_later(self.head_timeout, self._too_slow)

    def on_headers_complete(self) -> None:
        """A head is complete: the application gets it, unless it is too large."""
        self._head = None
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self.head_bytes:
            self._refuse()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def _refuse(self) -> None:
        text = b'{"error":"the head of the request is too large"}'
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(text), text)
        )
        self.transport.close()

    def _too_slow(self) -> None:
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def uvicorn_options(config: Any) -> dict[str, Any]:
    """The limits of a :class:`ServerConfig` as uvicorn takes them."""
    return {
        "http": GuardedProtocol.limited(config.head_bytes, config.head_timeout),
        "timeout_keep_alive": int(config.idle_timeout),
        "limit_concurrency": config.connections,
    }
