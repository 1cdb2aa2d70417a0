"""A machine's engine as Ray Serve runs it: one replica, all cores, the same service as that of a single server."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
import tempfile
from collections.abc import Collection
from dataclasses import replace
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
from espalier.files import replacing
from espalier.loading import LoadSettings
from espalier.scheduler import Limits
from espalier.serve import ServerConfig
from espalier.serve.http.app import create_app
from espalier.serve.service import Service

_DRAIN_S = 60
_STORE = "models"
_ON_HEAD = "node:__internal_head__"
"""A resource that Ray gives the head alone."""
_MOST_MACHINES = 1000


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

    async def __init__(self, models: dict[str, str], options: dict[str, Any]) -> None:  # type: ignore[misc]
        self._folder = tempfile.TemporaryDirectory(prefix="espalier-models-")
        load: LoadSettings = options["load"]
        if load.calibration is not None:
            load = replace(load, calibration=await self._fetch(str(load.calibration), "calibration"))
        parts = {"limits": Limits(**options["limits"]), "load": load}
        own = {**parts, "body_bytes": settings.BODY_BYTES, "timeout": settings.SLOWEST_S - 1}
        config = ServerConfig(**{**options, **own})
        self._service = Service(config)
        await self._service.start({name: await self._fetch(digest, f"model-{name}") for name, digest in models.items()})
        _Application.current = create_app(self._service)
        socket = settings.HAPROXY / ray.get_runtime_context().get_node_id() / settings.SOCKET
        self._balancing = asyncio.gather(
            balance.keep_balanced(socket, config.token), balance.keep_giving_up(socket, config.token)
        )

    async def _fetch(self, digest: str, place: str) -> Path:
        """What :func:`deploy` put into the store, in a folder of its own."""
        folder = Path(self._folder.name) / place
        folder.mkdir()
        store = ray.get_actor(_STORE, settings.APPLICATION)
        return unpack(await store.get.remote(digest), folder)

    def check_health(self) -> None:
        """Ray asks this now and then. Raises RuntimeError when the node should be replaced."""
        if not self._service.ready:
            raise RuntimeError("the service is not ready")


@ray.remote(num_cpus=0, max_restarts=-1, resources={_ON_HEAD: 0.001})
class Store:
    """Keeps packed files by their checksum on the head's disk, for machines that join later.

    It outlives the command that filled it, and a head that comes back has them.
    """

    def __init__(self) -> None:
        self._folder = settings.state() / "models"
        self._folder.mkdir(exist_ok=True)

    def put(self, digest: str, data: bytes) -> None:
        """Keep a model, or a calibration."""
        with replacing(self._folder / digest) as path:
            path.write_bytes(data)

    def get(self, digest: str) -> bytes:
        """What has this checksum. Raises EngineError when it is not there."""
        try:
            return (self._folder / digest).read_bytes()
        except FileNotFoundError as error:
            raise EngineError("the head does not have the models any more; run serve --cluster again") from error

    def keep(self, digests: Collection[str]) -> None:
        """Forget all others."""
        for path in self._folder.iterdir():
            if path.is_file() and path.name not in digests:
                path.unlink()


def deploy(
    address: str, models: dict[str, Path], load: LoadSettings, options: dict[str, Any], *, host: str, port: int
) -> int:
    """Put models on every machine of a cluster, and on those that join; returns how many there are.

    ``load``: how to load them; ``options``: the rest of every machine's ServerConfig. Models that are served already
    are replaced machine by machine. The settings' environment must be set before this module is imported: Ray reads it
    then. Raises EngineError when the cluster cannot be reached or does not get ready.
    """
    try:
        ray.init(address, namespace=settings.APPLICATION, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise EngineError(f"no cluster answers at {address}: {error}") from error
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    except (TimeoutError, ray.exceptions.RayError) as error:
        raise EngineError(f"HAProxy does not get ready on every machine: {error}; try again") from error
    store = Store.options(name=_STORE, lifetime="detached", get_if_exists=True).remote()  # type: ignore[attr-defined]
    digests = {name: _keep(store, path) for name, path in models.items()}
    wanted = set(digests.values())
    if load.calibration is not None:
        load = replace(load, calibration=_keep(store, Path(load.calibration)))
        wanted.add(str(load.calibration))
    options = {**options, "load": load}
    machines = one_per_machine(None)[0]
    try:
        serve.run(_deployment(machines).bind(digests, options), name=settings.APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise EngineError(f"the cluster does not get ready: {error}") from error
    ray.get(store.keep.remote(wanted))
    return machines


def _keep(store: Any, path: Path) -> str:
    """Put a file or folder into the store; returns the checksum by which machines ask for it."""
    data = pack(path)
    digest = hashlib.sha256(data).hexdigest()
    ray.get(store.put.remote(digest, data))
    return digest


def one_per_machine(_: Any) -> tuple[int, dict[str, Any]]:
    """Ray asks this how many replicas there should be: one for each of our machines that is up."""
    ours = (node for node in ray.nodes() if node["Alive"] and settings.RESOURCE in node["Resources"])
    return max(1, sum(1 for _ in ours)), {}


def _deployment(machines: int) -> Any:
    scaling = {
        "min_replicas": 1,
        "initial_replicas": machines,
        "max_replicas": _MOST_MACHINES,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 1.0,
        "policy": {"policy_function": f"{__name__}:{one_per_machine.__name__}"},
    }
    return serve.deployment(
        Engine,
        name="engine",
        autoscaling_config=scaling,
        max_ongoing_requests=1024,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0, "resources": {settings.RESOURCE: 1}},
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=_DRAIN_S,
    )
