"""What `espalier cluster` says of machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from espalier.cluster import balance, nodes, settings


def test_status_knows_the_machine_it_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy names its own machine's engine by loopback; folders of clusters that are gone are not asked."""
    members = [{"NodeID": f"id{i}", "NodeManagerAddress": f"10.0.0.{i}"} for i in (1, 2)]
    for node in ("gone", "id2"):
        (tmp_path / node).mkdir()
        (tmp_path / node / settings.SOCKET).touch()
    said = {"version": "1", "models": []}

    async def survey(socket: Path, token: str | None) -> list[tuple[balance.Server, dict[str, Any]]]:
        assert (socket.parent.name, token) == ("id2", "secret")
        return [
            (balance.Server("b", f"r{i}", host, 1, i, True), said) for i, host in enumerate(("10.0.0.1", "127.0.0.1"))
        ]

    monkeypatch.setattr(settings, "HAPROXY", tmp_path)
    monkeypatch.setattr(nodes, "members", lambda _: members)
    monkeypatch.setattr(balance, "survey", survey)
    found = nodes.status("10.0.0.1:6379", "secret")
    assert [(node["address"], node["weight"], node["status"]) for node in found["nodes"]] == [
        ("10.0.0.1", 0, said),
        ("10.0.0.2", 1, said),
    ]
    assert found["warnings"] == []
