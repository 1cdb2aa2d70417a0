"""One server, whatever the protocol: its configuration, models, scheduler, metrics and state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import espalier
from espalier._session.report import FOREIGN
from espalier.errors import ForbiddenError, SchedulerClosedError, UnknownModelError
from espalier.serve.config import ServerConfig
from espalier.serve.dispatch import Dispatcher, Options
from espalier.serve.metrics import Metrics
from espalier.serve.models import Model, Models

EXTENSIONS = ["binary_tensor_data", "model_repository"]


class Service:
    """What the protocols share. ``ready`` is false before the models are loaded and from the start of a drain."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.models = Models(config.load, folder=config.load_from, batch_tokens=config.limits.tokens)
        self.dispatcher = Dispatcher(config.limits, self.metrics, lanes=config.load.lanes)
        self.started = time.time()
        self.ready = False
        self._accepting = True
        self._in_flight = 0
        # One thread: tokenizers are switched over while they work, and have threads of their own.
        self._texts = ThreadPoolExecutor(1, "espalier-texts")
        self.metrics.watch(lambda: self.dispatcher.waiting, lambda: self.dispatcher.waiting_tokens, lambda: self.ready)

    @property
    def extensions(self) -> list[str]:
        """The protocol's extensions that this server has."""
        return EXTENSIONS if self.config.load_from is not None else EXTENSIONS[:1]

    async def start(self, models: dict[str, Path]) -> None:
        """Load the models and become ready. Raises what loading raises, and ConfigError for models that do not go."""
        self.config.check_models(models)
        self.dispatcher.start()
        for name, path in models.items():
            await self._load(name, path)
        self.ready = True

    async def load(self, name: str) -> Model:
        """Load a model of the folder, for a client. Raises ForbiddenError, UnknownModelError and what loading does."""
        self._check_loading()
        path = self.models.available().get(name)
        if path is None:
            raise UnknownModelError(f"there is no model {name[:128]!r} in the folder that this server may load from")
        return await self._load(name, path)

    async def unload(self, name: str) -> None:
        """Unload a model, for a client. Raises ForbiddenError or UnknownModelError."""
        self._check_loading()
        self.dispatcher.forget(self.models.unload(name))

    async def with_texts(self, function: Any, *arguments: Any) -> Any:
        """Run something that tokenises away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, function, *arguments)

    def options(self, priority: int = 0, timeout: float | None = None) -> Options:
        """How to run a request: with the server's own timeout unless a shorter one is wanted."""
        most = self.config.timeout
        return Options(priority, most if timeout is None else min(timeout, most))

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Around a request that is being answered. Raises SchedulerClosedError when no more are."""
        if not self._accepting:
            raise SchedulerClosedError("this server is shutting down; send the request elsewhere, or again in a moment")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def drain(self) -> None:
        """Stop: not ready at once, no more work after a while, and what is under way is answered."""
        self.ready = False
        await asyncio.sleep(self.config.drain_delay)
        self._accepting = False
        end = time.monotonic() + self.config.drain_timeout
        while self._in_flight and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """End the threads."""
        await self.dispatcher.close()
        self._texts.shutdown(wait=False)

    def describe(self) -> dict[str, Any]:
        """What the status page shows."""
        return {
            "version": espalier.__version__,
            "ready": self.ready,
            "uptime_s": round(time.time() - self.started, 1),
            "waiting": self.dispatcher.waiting,
            "waiting_tokens": self.dispatcher.waiting_tokens,
            "in_flight": self._in_flight,
            "models": [self._describe(model) for model in self.models],
        }

    def _describe(self, model: Model) -> dict[str, Any]:
        layers = [layer for layer in model.session.report().layers if layer.op]
        return {
            "name": model.name,
            "version": model.version,
            "task": model.task,
            "threads": model.session.threads,
            "tokens_per_s": self.dispatcher.tokens_per_second(model),
            "layers": sum(layer.count for layer in layers),
            "native_layers": sum(layer.count for layer in layers if layer.where != FOREIGN),
        }

    async def _load(self, name: str, path: Path) -> Model:
        before = next((model for model in self.models if model.name == name), None)
        model = await asyncio.to_thread(self.models.load, name, path)
        await self.dispatcher.learn(model)
        if before is not None:
            self.dispatcher.forget(before)
        return model

    def _check_loading(self) -> None:
        if self.config.load_from is None:
            raise ForbiddenError("this server does not load or unload models; start it with --load-from FOLDER")
