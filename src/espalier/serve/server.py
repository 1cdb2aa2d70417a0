"""Running a server: listeners, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

from espalier.errors import ConfigError, MissingDependencyError
from espalier.serve import collector
from espalier.serve.config import ServerConfig
from espalier.serve.service import Service

try:
    import uvicorn
    import uvloop

    from espalier.serve.http.app import create_app
    from espalier.serve.http.guard import uvicorn_options
    from espalier.serve.rpc.server import RpcServer
except ImportError as error:
    raise MissingDependencyError(
        f"serving needs packages that are not installed ({error}): pip install 'espalier[serve]'"
    ) from error

log = logging.getLogger("espalier.serve")


class Server:
    """One process that serves models. ``await run(...)`` returns after a drain."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.service = Service(config)
        self.http_port: int | None = None
        self.grpc_port: int | None = None
        self._stop: asyncio.Event | None = None

    async def run(self, models: dict[str, Path], on_ready: Callable[[Server], None] = lambda _: None) -> None:
        """Load models by name, serve until :meth:`stop` or a signal, then drain.

        ``on_ready`` is called once requests are answered. Raises what loading raises, and ConfigError for an address
        that cannot be had.
        """
        self._stop = asyncio.Event()
        _allow_many_connections()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.service.close)
            # Probes are answered while models load.
            if self.config.http_port is not None:
                await stack.enter_async_context(self._http(self.config.http_port))
            await self.service.start(models)
            if self.config.grpc_port is not None:
                rpc = RpcServer(self.service)
                self.grpc_port = await rpc.start()
                stack.push_async_callback(rpc.stop)
            with _signals(self.stop):
                on_ready(self)
                await self._stop.wait()
                log.info("draining: not ready; what is under way is answered")
                await self.service.drain()

    def stop(self) -> None:
        """Begin to drain. Call it on the event loop."""
        if self._stop is not None:
            self._stop.set()

    @contextlib.asynccontextmanager
    async def _http(self, port: int):  # type: ignore[no-untyped-def]
        sock = _listen(self.config.host, port)
        self.http_port = sock.getsockname()[1]
        tls = self.config.tls
        server = _Uvicorn(
            uvicorn.Config(
                create_app(self.service),
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                date_header=False,
                ws="none",
                backlog=4096,
                timeout_graceful_shutdown=5,
                ssl_certfile=tls.certificate if tls else None,
                ssl_keyfile=tls.key if tls else None,
                ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
                **uvicorn_options(self.config),
            )
        )
        task = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield
        finally:
            server.should_exit = True
            await task


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the server's above, which drains first."""
        yield


def serve(config: ServerConfig, models: dict[str, Path], on_ready: Callable[[Server], None] = lambda _: None) -> None:
    """Serve models by name until SIGTERM or SIGINT, in a process for nothing else. Raises as :meth:`Server.run`."""

    def ready(server: Server) -> None:
        collector.spare()
        on_ready(server)

    try:
        uvloop.run(Server(config).run(models, ready))
    finally:
        collector.resume()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(4096)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call ``stop``; a second one ends the process as it would without us."""
    loop = asyncio.get_running_loop()
    kinds = (signal.SIGTERM, signal.SIGINT)

    def first() -> None:
        for kind in kinds:
            loop.remove_signal_handler(kind)
        stop()

    try:
        for kind in kinds:
            loop.add_signal_handler(kind, first)
    except (RuntimeError, ValueError):
        log.debug("not the main thread: signals are left alone")
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            for kind in kinds:
                loop.remove_signal_handler(kind)


def _allow_many_connections() -> None:
    """The soft limit on open files is made for interactive programs; a server takes what it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
