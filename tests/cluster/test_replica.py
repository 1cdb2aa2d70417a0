"""What travels to the machines of a cluster. Ray is not among what the tests install."""

from __future__ import annotations

from pathlib import Path

import pytest

from espalier.cluster import settings
from espalier.errors import EngineError

replica = pytest.importorskip("espalier.cluster.replica", reason="Ray is not installed here", exc_type=ImportError)


def test_models_survive_the_journey(tmp_path: Path) -> None:
    folder, file, there = tmp_path / "model", tmp_path / "m.onnx", tmp_path / "there"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "x").write_text("x")
    file.write_bytes(b"onnx")
    for source in (folder, file):
        place = there / source.name
        place.mkdir(parents=True)
        assert replica.unpack(replica.pack(source), place) == place / source.name
    assert (there / "model" / "model" / "inner" / "x").read_text() == "x"
    assert (there / "m.onnx" / "m.onnx").read_bytes() == b"onnx"


def test_the_store_keeps_what_is_served_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "state", lambda: tmp_path)
    plain = replica.Store.__ray_metadata__.modified_class
    plain().put("a", b"1")
    plain().put("b", b"2")
    plain().keep({"b"})
    assert plain().get("b") == b"2"  # another process finds it
    with pytest.raises(EngineError, match="serve --cluster again"):
        plain().get("a")
