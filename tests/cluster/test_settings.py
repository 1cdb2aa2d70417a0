"""Where a machine keeps what it knows of its cluster. Ray is not needed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from espalier.cluster import nodes, settings
from espalier.errors import ConfigError

LONGEST = 107
"""Bytes of a socket's path on Linux."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the state would lie."""
    monkeypatch.setattr(settings, "STATE", tmp_path / "espalier-1")
    return tmp_path / "espalier-1"


def test_the_folder_is_this_users_alone(place: Path) -> None:
    before = os.umask(0)
    try:
        assert settings.state() == place
        nodes._write_token("0123456789abcdef")
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / "token").stat().st_mode) == 0o600
    assert settings.state() == place


def test_a_folder_that_others_can_read_is_refused(place: Path) -> None:
    place.mkdir()
    place.chmod(0o755)
    with pytest.raises(ConfigError, match=r"mode 755, expected 700.*chmod 700"):
        settings.state()


def test_a_folder_of_somebody_else_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.state()
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(ConfigError, match=rf"a folder, of uid {own}: have it removed"):
        settings.state()
    with pytest.raises(ConfigError, match="have it removed"):
        nodes._new_token()


def test_a_link_to_a_folder_is_none(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="it is no folder, of uid"):
        settings.state()


def test_sockets_fit_whoever_the_user_is() -> None:
    assert str(os.getuid()) in settings.STATE.name
    own = settings.HAPROXY / ("f" * 56) / settings.SOCKET  # Ray's names of nodes
    bound = f"{own}.4194304.tmp"  # under which HAProxy makes it, with the largest number of a process
    assert len(bound) + len(str(2**32 - 2)) - len(str(os.getuid())) <= LONGEST
