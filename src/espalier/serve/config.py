"""What a server is told at start."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from espalier._network import is_loopback
from espalier.errors import ConfigError
from espalier.loading import LoadSettings
from espalier.scheduler import Limits

MIB = 1 << 20
_TOKEN = re.compile(r"[!-~]{16,}")


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files. With ``client_ca`` only clients with a certificate of that authority are served."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        for path in (self.certificate, self.key, self.client_ca):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path}: no such file; TLS needs a certificate and its key, both in PEM")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Addresses, safety and limits. Port 0 takes a free one, None leaves the protocol out.

    ``load``: how to load the models.
    ``token``: clients must send ``Authorization: Bearer TOKEN``; needed beyond loopback unless ``insecure``.
    ``load_from``: the folder whose models clients may load and unload by name; None forbids it. Seconds:
    ``head_timeout`` for a request's head, ``body_timeout`` for its body, ``idle_timeout`` between requests,
    ``timeout`` for an answer unless the request says less, ``drain_delay`` from not ready to no more work,
    ``drain_timeout`` for what is then being answered.

    Raises ConfigError for values that cannot be, and for an address others can reach without a token.
    """

    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    token: str | None = None
    insecure: bool = False
    tls: Tls | None = None
    load: LoadSettings = field(default_factory=LoadSettings)
    load_from: Path | None = None
    limits: Limits = field(default_factory=lambda: Limits(delay=1.0))
    body_bytes: int = 16 * MIB
    head_bytes: int = 32 * 1024
    connections: int = 16384
    timeout: float = 60.0
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    idle_timeout: float = 60.0
    drain_delay: float = 0.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.http_port is None and self.grpc_port is None:
            raise ConfigError("neither HTTP nor gRPC is to be served; give at least one of them a port")
        for port in (self.http_port, self.grpc_port):
            if port is not None and not 0 <= port < 65536:
                raise ConfigError(f"a port lies between 0 and 65535; got {port}")
        if self.http_port and self.http_port == self.grpc_port:
            raise ConfigError(f"HTTP and gRPC cannot share port {self.http_port}; give them two")
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise ConfigError("a token is 16 or more ASCII characters without spaces; try: openssl rand -hex 24")
        if not (is_loopback(self.host) or self.token or self.insecure or (self.tls and self.tls.client_ca)):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: give a token (--token-file, or "
                "ESPALIER_TOKEN), client certificates (--tls-client-ca), or --insecure if everyone may use it"
            )
        if self.load_from is not None and not self.load_from.is_dir():
            raise ConfigError(f"{self.load_from}: no such folder; expected one that holds the models to load by name")
        if self.load_from is not None and self.load.calibration is not None:
            raise ConfigError("a calibration is of one model: give --load-from or --calibration, not both")

    def check_models(self, names: Collection[str]) -> None:
        """Raise ConfigError for models that cannot be served together as this configuration wants it."""
        if len(names) > 1 and self.load.calibration is not None:
            raise ConfigError(
                f"a calibration is of one model, and there are {len(names)} ({', '.join(names)}): serve each by a "
                "server of its own"
            )
