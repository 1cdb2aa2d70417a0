"""``espalier cluster``: machines that answer as one, on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from espalier._network import read_token
from espalier.cli import show
from espalier.cli.entry import debug_option

_PATH = click.Path(path_type=Path)
_ADDRESS = click.argument("address")


@click.group(short_help="Let several machines answer as one, on Ray.")
@debug_option
def cluster() -> None:
    """Let several machines answer as one.

    On the first machine: espalier cluster start. On each other one: espalier cluster join ADDRESS. Then, on any of
    them: espalier serve MODEL... --cluster ADDRESS. All machines need HAProxy and espalier[cluster].
    """


@cluster.command()
@click.option("--host", required=True, help="This machine's address in the cluster's own network.")
@click.option("--port", type=click.IntRange(1024, 65535), default=6379, show_default=True)
@debug_option
def start(host: str, port: int) -> None:
    """Make this machine the head of a new cluster."""
    from espalier.cluster import nodes, settings

    with show.status("starting Ray"):
        address = nodes.start(host, port)
    show.say(f"the cluster is at {address}; on the other machines, with the token in {settings.STATE / 'token'}:")
    show.say(f"  espalier cluster join {address} --token-file FILE")


@cluster.command()
@_ADDRESS
@click.option("--host", help="This machine's address.  [default: the one that reaches the head]")
@click.option("--token-file", type=_PATH, help="The cluster's token.  [default: the one this machine has]")
@debug_option
def join(address: str, host: str | None, token_file: Path | None) -> None:
    """Add this machine to the cluster at ADDRESS."""
    from espalier.cluster import nodes

    with show.status("joining"):
        nodes.join(address, host, None if token_file is None else read_token(token_file))
    show.say(f"joined {address}")


@cluster.command()
@_ADDRESS
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def status(address: str, as_json: bool) -> None:
    """Show the machines: their speeds, queues and versions, and what is odd about them."""
    from espalier.cluster import nodes

    found = nodes.status(address, read_token(None))
    if as_json:
        show.print_json(found)
    else:
        _print(found)


@cluster.command()
@_ADDRESS
@click.argument("node")
@click.option("--seconds", type=click.IntRange(min=1), default=60, show_default=True, help="For what it still has.")
@debug_option
def drain(address: str, node: str, seconds: int) -> None:
    """Let NODE (its address) finish what it has, and send nothing new there."""
    from espalier.cluster import nodes

    nodes.drain(address, node, seconds)
    show.say(f"{node} drains; stop it there with: espalier cluster stop")


@cluster.command()
@debug_option
def stop() -> None:
    """Take this machine out of its cluster; on the head, end the cluster."""
    from espalier.cluster import nodes

    nodes.leave()
    show.say("stopped")


def _print(found: dict[str, Any]) -> None:
    table = Table()
    for heading in ("node", "state", "version", "models", "tokens/s", "waiting", "weight"):
        table.add_column(heading)
    for node in found["nodes"]:
        said = node.get("status") or {}
        models = said.get("models", [])
        state = "no engine" if not said else "ready" if said["ready"] else "not ready"
        speeds = ", ".join(f"{model['tokens_per_s']:.0f}" for model in models if model["tokens_per_s"])
        names = ", ".join(f"{model['name']} ({model['version']})" for model in models)
        waiting = str(said.get("waiting", ""))
        table.add_row(
            node["address"], state, said.get("version", ""), names, speeds, waiting, str(node.get("weight", ""))
        )
    show.print_table(table)
    for warning in found["warnings"]:
        click.echo(f"espalier: {warning}", err=True)
