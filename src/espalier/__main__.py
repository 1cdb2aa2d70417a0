"""``python -m espalier``."""

from __future__ import annotations

from espalier.cli import main

main(prog_name="espalier")
