"""How Ray is set up: what its defaults lack so that a machine may die under load without a lost answer."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

from espalier.errors import ConfigError, MissingDependencyError

PORT, HTTP_PORT = 6379, 8000
RESOURCE = "espalier"
"""What a machine of ours offers Ray: one, for its one engine."""
APPLICATION = "espalier"
STATE = Path(f"/tmp/espalier-{os.getuid()}")
"""What a machine keeps of its cluster, its token too: this user's alone, see :func:`state`."""
HAPROXY = STATE / "ha"
"""Ray gives every node a folder of its own in it. Short, because a socket's path has 107 bytes at most."""
SOCKET = "admin.sock"
BODY_BYTES = 1 << 20
"""Largest body in a cluster: HAProxy keeps a request's whole body until it is answered, to send it to another node."""
CONNECT_S = 1
"""HAProxy tries a machine for so long."""
CHECK_S = 0.25
"""HAProxy checks a machine as often, and takes one out that fails twice to answer within it."""
SLOWEST_S = 30
"""No legal request takes longer; what takes longer is sent to another node."""


def state() -> Path:
    """:data:`STATE`, made if it is not there. Raises ConfigError when others could read or write what is in it.

    Anybody may put a folder into ``/tmp`` before we do.
    """
    with contextlib.suppress(FileExistsError):
        STATE.mkdir(mode=0o700)
    found = STATE.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no folder"
        raise ConfigError(
            f"{STATE} holds the cluster's token, so it must be a folder of this user (uid {os.getuid()}); it is "
            f"{kind}, of uid {found.st_uid}: have it removed, then try again"
        )
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{STATE} holds the cluster's token, and other users can open it (mode {stat.S_IMODE(found.st_mode):o}, "
            f"expected 700): run chmod 700 {STATE}, and start anew with another token if somebody may have read it"
        )
    return STATE


def environment(ip: str) -> dict[str, str]:
    """The variables under which ``ray start`` runs on a node with this address.

    Raises MissingDependencyError without HAProxy, and as :func:`state`.
    """
    folder = state()
    haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if haproxy is None:
        raise MissingDependencyError(
            "a cluster needs HAProxy 2.6 or newer on every machine; run: apt-get install haproxy"
        )
    return {
        # The head comes back with what it knew.
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(folder / "gcs" / ip.replace(":", "-")),
        # A node is dead after 6 misses of half a second: later than balance.py takes what it has from it, because Ray
        # then replaces the HAProxy that could be told to.
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "500",
        "RAY_health_check_failure_threshold": "6",
        # A busy machine may take its time to start, and starts nothing ahead of need.
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_enable_worker_prestart": "0",
        # By default engines would run at nice 15, behind everything else on the machine.
        "RAY_worker_niceness": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # An engine that goes stays until every HAProxy knows; a machine's HAProxy stays while its engine is replaced.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "300",
        # Workers outlive a head that is away for ten minutes; by default they end after one.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy,
        # Inference may be repeated, so whatever a dead or silent node leaves unanswered goes to another.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": str(CONNECT_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(SLOWEST_S),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BODY_BYTES + 64 * 1024),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": f"{round(CHECK_S * 1000)}ms",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # With weights by measured speed (balance.py) this is the simulation's weighted-connections.
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "leastconn",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(HAPROXY / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(HAPROXY / SOCKET),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(HAPROXY),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(HAPROXY / "server-state"),
    }
