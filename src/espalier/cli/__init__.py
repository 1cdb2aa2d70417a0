"""The command ``espalier``.

Exit codes: 0 when all is well, 1 when a check failed (outputs disagree, an installation is broken), 2 when the
command cannot be carried out (bad usage, bad input, a file that cannot be written), 130 when interrupted.
"""

from __future__ import annotations

from espalier.cli.app import main

__all__ = ["main"]
