"""``espalier mlperf node``: a node from the command line."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from espalier._network import is_loopback, read_token
from espalier.data import Feature
from espalier.errors import ConfigError
from espalier.loading import LoadSettings
from espalier.mlperf.benchmarks import find
from espalier.mlperf.engines import EngineSettings, Espalier
from espalier.mlperf.library import LIBRARIES
from espalier.mlperf.network.node import Node
from espalier.scheduler import Limits
from espalier.session import TYPICAL_LENGTHS


def serve_node(
    model: Path, *, benchmark: str, host: str, port: int, token_file: Path | None, insecure: bool,
    latency_ms: float | None, name: str | None, load: LoadSettings, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Load ``model``, say where the node listens, and answer until SIGTERM or SIGINT.

    Raises ConfigError for an address others can reach without a token, and what loading raises.
    """
    token = read_token(token_file)
    if not (is_loopback(host) or token or insecure):
        raise ConfigError(
            f"--host {host} can be reached from other machines: give a token (--token-file, or ESPALIER_TOKEN), or "
            "--insecure if everyone may use it"
        )
    library = LIBRARIES[find(benchmark).library]
    settings = EngineSettings(load=load, padding="none", batch=1, max_length=library.max_length)
    engine = Espalier(model, library.pipeline, settings)
    lengths = [length for length in TYPICAL_LENGTHS if length <= library.max_length]
    engine.warm_up([Feature(np.ones(n, np.int32), np.zeros(n, np.int8), {}) for n in lengths])
    limits = Limits(waiting=None, latency=None if latency_ms is None else latency_ms / 1e3)
    own = name or socket.gethostname()
    (machine,) = engine.machines
    node = Node(engine, name=own, host=host, port=port, limits=limits, token=token, machine=machine, lanes=load.lanes)
    stop = threading.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: stop.set())
    say(f"node {own} listens on {host}:{node.port}")
    stop.wait()
    node.close()
