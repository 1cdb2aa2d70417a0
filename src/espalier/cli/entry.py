"""How failures leave the process: one clean message and an exit code, or a traceback with ``--debug``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from espalier.errors import EspalierError

BAD_INPUT = 2
INTERRUPTED = 130  # as a shell reports SIGINT
READER_GONE = 141  # and SIGPIPE

_DEBUG = "espalier.debug"

F = TypeVar("F")


def _remember(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_DEBUG] = True


def debug_option(command: F) -> F:
    """``--debug``, accepted before and after the command's name."""
    decorate: Any = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_remember, help="Show tracebacks of failures."
    )
    decorated: F = decorate(command)
    return decorated


def json_option(description: str) -> Callable[[F], F]:
    """``--json [FILE]``, as ``json_to``: None, a file's name, or ``-`` for standard output."""
    decorate: Any = click.option(
        "--json",
        "json_to",
        is_flag=False,
        flag_value="-",
        metavar="[FILE]",
        help=f"{description}  [stdout without FILE]",
    )

    def option(command: F) -> F:
        decorated: F = decorate(command)
        return decorated

    return option


class EspalierGroup(click.Group):
    """A group whose commands turn Espalier's exceptions and operating system errors into messages."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command. Ends with exit code 2 on an error that is not a bug."""
        try:
            return super().invoke(context)
        except BrokenPipeError:
            # The reader went away. Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(READER_GONE)
        except KeyboardInterrupt:
            click.echo("espalier: interrupted", err=True)
            context.exit(INTERRUPTED)
        except (EspalierError, OSError) as error:
            if context.meta.get(_DEBUG):
                raise
            text = str(error) if isinstance(error, EspalierError) else _os_error(error)
            click.echo(f"espalier: {text}", err=True)
            context.exit(BAD_INPUT)


def _os_error(error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason
