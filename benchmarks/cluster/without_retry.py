"""``espalier`` with an HAProxy that sends nothing again: the control arm, which must lose what a dead node had."""

from __future__ import annotations

from espalier.cli import main
from espalier.cluster import settings

_with_retry = settings.environment


def _environment(ip: str) -> dict[str, str]:
    return {**_with_retry(ip), "RAY_SERVE_HAPROXY_RETRY_ON": "none", "RAY_SERVE_HAPROXY_RETRIES": "0"}


if __name__ == "__main__":
    settings.environment = _environment
    main()
