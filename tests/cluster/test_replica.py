"""What travels to the machines of a cluster. Ray is not among what the tests install."""

from __future__ import annotations

from pathlib import Path

import pytest

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
