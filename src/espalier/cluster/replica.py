"""A machine's engine as Ray Serve runs it: one replica, all cores, the same service as that of a single server."""

from __future__ import annotations

import asyncio
import io
import signal
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from espalier.errors import EngineError, MissingDependencyError

try:
    import ray
    from ray import serve
except ImportError as error:
    raise MissingDependencyError(
        f"a cluster needs Ray, which cannot be imported ({error}): pip install 'espalier[cluster]'"
    ) from error

from espalier.cluster import balance, settings
from espalier.scheduler import Limits
from espalier.serve import ServerConfig
from espalier.serve.http.app import create_app
from espalier.serve.service import Service

_DRAIN_S = 60
_LOOK_S = 2.0


def pack(path: Path) -> bytes:
    """A model's file or folder as bytes, so that every machine gets it from the cluster."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(path.resolve(), path.resolve().name)
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> Path:
    """The model again, in ``folder``."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
    (path,) = folder.iterdir()
    return path


class _Application:
    """The ASGI application of the replica in this process; it is there once the replica is."""

    current: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        await type(self).current(scope, receive, send)


@serve.ingress(_Application())
class Engine:
    """Loads the models and answers until it is told to go."""

    async def __init__(self, models: dict[str, Any], options: dict[str, Any]) -> None:  # type: ignore[misc]
        limits = Limits(**options["limits"])
        own = {"limits": limits, "body_bytes": settings.BODY_BYTES, "timeout": settings.SLOWEST_S - 1}
        config = ServerConfig(**{**options, **own})
        self._service = Service(config)
        self._folder = tempfile.TemporaryDirectory(prefix="espalier-models-")
        paths = {}
        for name, reference in models.items():
            place = Path(self._folder.name) / name
            place.mkdir()
            paths[name] = unpack(await reference, place)
        await self._service.start(paths)
        _Application.current = create_app(self._service)
        socket = settings.HAPROXY / ray.get_runtime_context().get_node_id() / settings.SOCKET
        self._balancing = asyncio.create_task(balance.keep_balanced(socket, config.token))

    def check_health(self) -> None:
        """Ray asks this now and then. Raises RuntimeError when the node should be replaced."""
        if not self._service.ready:
            raise RuntimeError("the service is not ready")


def keep(
    address: str, models: dict[str, Path], options: dict[str, Any], *, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Put models on every machine of a cluster, and on those that join, until SIGTERM or SIGINT.

    The cluster goes on serving without this process; only machines that join, or come back, get no models then. Models
    that are served already are replaced machine by machine. Raises EngineError when the cluster cannot be reached.
    """
    try:
        ray.init(address, namespace=settings.APPLICATION, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise EngineError(f"no cluster answers at {address}: {error}") from error
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    references = {name: ray.put(pack(path)) for name, path in models.items()}
    stop = threading.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: stop.set())
    known = 0
    while not stop.is_set():
        count = _machines()
        if count and count != known:
            serve.run(_deployment(count).bind(references, options), name=settings.APPLICATION, route_prefix="/")
            say(f"{', '.join(models)} on {count} machines: http://{host}:{port} on each of them")
            known = count
        stop.wait(_LOOK_S)


def _machines() -> int:
    """Machines that are up and ours."""
    return sum(bool(node["Alive"]) and settings.RESOURCE in node["Resources"] for node in ray.nodes())


def _deployment(machines: int) -> Any:
    return serve.deployment(
        Engine,
        name="engine",
        num_replicas=machines,
        max_ongoing_requests=1024,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0, "resources": {settings.RESOURCE: 1}},
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=_DRAIN_S,
    )
