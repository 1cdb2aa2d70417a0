"""What everything that listens shares: which addresses are this machine's alone, and tokens."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from espalier.errors import ConfigError

TOKEN_VARIABLE = "ESPALIER_TOKEN"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None) -> str | None:
    """The token in a file, or in the environment; None where there is none. Raises ConfigError for an empty file."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    token = file.read_text(encoding="utf-8").strip()
    if not token:
        raise ConfigError(f"{file} is empty; expected a token, such as `openssl rand -hex 24` makes")
    return token
