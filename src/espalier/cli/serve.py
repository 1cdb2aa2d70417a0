"""``espalier serve``: models over HTTP and gRPC."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from espalier._network import TOKEN_VARIABLE, read_token
from espalier.cli import show
from espalier.cli.entry import debug_option
from espalier.cli.options import load_options
from espalier.errors import ConfigError

if TYPE_CHECKING:
    from espalier.loading import LoadSettings
    from espalier.serve import ServerConfig
    from espalier.serve.server import Server

_PATH = click.Path(path_type=Path)
_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command(short_help="Serve models over HTTP and gRPC.")
@click.argument("models", nargs=-1, metavar="[NAME=]MODEL...")
@click.option("--cluster", metavar="ADDRESS", help="Serve on every machine of this cluster; see espalier cluster.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond loopback a token is needed.")
@click.option("--http", "http_port", type=int, default=8000, show_default=True, help="Port for HTTP; 0 takes any.")
@click.option("--grpc", "grpc_port", type=int, default=8001, show_default=True, help="Port for gRPC; 0 takes any.")
@click.option("--no-http", is_flag=True, help="Serve gRPC only.")
@click.option("--no-grpc", is_flag=True, help="Serve HTTP only.")
@click.option("--token-file", type=_PATH, help=f"Clients must send this token.  [default: ${TOKEN_VARIABLE}, if set]")
@click.option("--insecure", is_flag=True, help="Serve whoever can reach --host, without a token.")
@click.option("--tls-cert", type=_PATH, help="Certificate, PEM.")
@click.option("--tls-key", type=_PATH, help="Its key, PEM.")
@click.option("--tls-client-ca", type=_PATH, help="Serve only clients with a certificate of this authority, PEM.")
@click.option("--load-from", type=_PATH, help="Clients may load and unload the models of this folder by name.")
@click.option("--latency-ms", type=_POSITIVE, help="Most throughput with answers within this.")
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), default=16384, show_default=True, help="Of a batch, at most."
)
@click.option("--max-wait-s", type=_POSITIVE, default=1.0, show_default=True, help="Refuse work when this much waits.")
@click.option("--timeout-s", type=_POSITIVE, default=60.0, show_default=True, help="For an answer, at most.")
@click.option("--body-mib", type=click.IntRange(min=1), default=16, show_default=True, help="Of a request, at most.")
@click.option(
    "--drain-delay-s",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="At SIGTERM: not ready, but still answering, for this long.",
)
@load_options
@debug_option
def serve(models: tuple[str, ...], load: LoadSettings, **options: Any) -> None:
    """Serve models until SIGTERM: the Open Inference Protocol, OpenAI's embeddings, and tasks on texts.

    Each model is called by NAME, which is its file's or folder's unless given. The page at / shows what is served.
    """
    from espalier.scheduler import Limits
    from espalier.serve import ServerConfig, Tls
    from espalier.serve.config import MIB

    latency = options["latency_ms"]
    config = ServerConfig(
        host=options["host"],
        http_port=None if options["no_http"] else options["http_port"],
        grpc_port=None if options["no_grpc"] else options["grpc_port"],
        token=read_token(options["token_file"]),
        insecure=options["insecure"],
        tls=_tls(Tls, options["tls_cert"], options["tls_key"], options["tls_client_ca"]),
        load=load,
        load_from=options["load_from"],
        limits=Limits(
            tokens=options["batch_tokens"],
            delay=options["max_wait_s"],
            latency=None if latency is None else latency / 1e3,
        ),
        body_bytes=options["body_mib"] * MIB,
        timeout=options["timeout_s"],
        drain_delay=options["drain_delay_s"],
    )
    named = named_models(models)
    config.check_models(named)
    if options["cluster"] is not None:
        _serve_on_cluster(options["cluster"], named, config)
        return
    if not named and config.load_from is None:
        raise ConfigError("nothing to serve; give models, or a folder to load from with --load-from")
    logging.basicConfig(level=logging.INFO, format="espalier: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    from espalier.serve.server import serve as run

    run(config, named, _say)


def _serve_on_cluster(address: str, models: dict[str, Path], config: ServerConfig) -> None:
    """One machine's configuration on all of them; what only makes sense for one is refused."""
    if config.tls is not None or config.load_from is not None or config.http_port is None:
        raise ConfigError("a cluster serves HTTP without TLS and without loading by name; leave these options out")
    if not models:
        raise ConfigError("nothing to serve; give models")
    from espalier.cluster import settings

    os.environ.update(settings.environment(config.host))  # Ray reads it when it is imported
    from espalier.cluster.replica import deploy

    shared = {"grpc_port": None, "token": config.token, "limits": asdict(config.limits)}
    with show.status("deploying"):
        machines = deploy(address, models, config.load, shared, host=config.host, port=config.http_port)
    show.say(f"{', '.join(models)} on {machines} machines, each at port {config.http_port}")


def named_models(given: tuple[str, ...]) -> dict[str, Path]:
    """Models by name. Raises ConfigError when two have one name."""
    from espalier.serve.models import name_of

    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.rpartition("=")
        place = Path(path)
        name = name if equals else name_of(place)
        if name in found:
            raise ConfigError(f"two models are called {name!r}; give each a name of its own: NAME=PATH")
        found[name] = place
    return found


def _say(server: Server) -> None:
    scheme = "https" if server.config.tls else "http"
    places = []
    if server.http_port is not None:
        places.append(f"{scheme}://{server.config.host}:{server.http_port}")
    if server.grpc_port is not None:
        places.append(f"gRPC at {server.config.host}:{server.grpc_port}")
    names = ", ".join(model.name for model in server.service.models) or "no model yet"
    show.say(f"serving {names}: {' and '.join(places)}")


def _tls(kind: Any, certificate: Path | None, key: Path | None, client_ca: Path | None) -> Any:
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    return kind(certificate=certificate, key=key, client_ca=client_ca)
