"""The safetensors reader against the format's own writer, and against files made to break it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import ModelFormatError, ModelNotFoundError
from espalier.hf.safetensors import read_tensors

GOOD: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **changes}}


def test_it_reads_what_safetensors_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f16": np.array([1.5, -2, np.inf, np.nan], np.float16),
        "f64": np.array([0.1, 1e300]),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(found[name].float32(), array.astype(np.float32))
        assert found[name].shape == array.shape
    assert not found["f32"].float32().flags.owndata


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38, np.inf, np.nan], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    path = write(tmp_path / "b", {"a": {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]}}, halves.tobytes())
    found = read_tensors(path)["a"].float32()
    np.testing.assert_allclose(found[:3], values[:3], rtol=2**-8)
    np.testing.assert_array_equal(found[3:], values[3:])


def test_data_that_the_header_leaves_unaligned_is_still_right(tmp_path: Path) -> None:
    text = json.dumps(entry()).encode()
    text += b" " * (1 + -len(text) % 4)
    values = np.arange(6, dtype=np.float32)
    found = read_tensors(write(tmp_path / "a", text, values.tobytes()))["a"].float32()
    np.testing.assert_array_equal(found.ravel(), values)
    assert found.flags.aligned


BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "header longer than the file": (GOOD, {"length": 10_000}, "claims 10000 bytes"),
    "header of 2^63 bytes": (GOOD, {"length": 2**63 + 5}, "claims 9223372036854775813"),
    "truncated data": (GOOD, {"data": bytes(20)}, "need 24 bytes"),
    "data that nothing claims": (GOOD, {"data": bytes(28)}, "the file has 28"),
    "no JSON": (b"{not json}", {}, "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', {}, "not valid JSON"),
    "nested too deep": (b"[" * 100_000, {}, "not valid JSON"),
    "a list": ([], {}, "must be a JSON object"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", {}, "not valid JSON"),
    "the same name twice": (b'{"a": 1, "a": 2}', {}, "'a' stands there twice"),
    "no fields": ({"a": 3}, {}, "needs dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [6]}}, {}, "needs dtype"),
    "unknown dtype": (entry(dtype="F31"), {}, "unknown dtype 'F31'"),
    "dtype is no string": (entry(dtype=["F32"]), {}, "unknown dtype"),
    "negative extent": (entry(shape=[-2, -3]), {}, "extents >= 0"),
    "fractional extent": (entry(shape=[2.0, 3]), {}, "extents >= 0"),
    "extent true": (entry(shape=[True, 6]), {}, "extents >= 0"),
    "endless shape": (entry(shape=[1] * 40), {}, "at most 32 extents"),
    "shape that overflows": (entry(shape=[2**62, 2**62, 2**62]), {}, "needs"),
    "offsets of another size": (entry(data_offsets=[0, 20]), {}, "needs 24 bytes, its offsets hold 20"),
    "offsets the wrong way": (entry(data_offsets=[24, 0]), {}, "offsets hold -24"),
    "offsets beyond the end": (entry(data_offsets=[1000, 1024]), {}, "leaves a gap"),
    "three offsets": (entry(data_offsets=[0, 24, 24]), {}, "two numbers"),
    "a negative offset": (entry(data_offsets=[-24, 0]), {}, "two numbers"),
    "overlapping": ({**GOOD, "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}}, {}, "overlaps"),
    "a gap": ({**GOOD, "b": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}}, {"data": bytes(32)}, "gap"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    header, rest, reason = BROKEN[case]
    path = write(tmp_path / "broken.safetensors", header, **rest)
    with pytest.raises(ModelFormatError, match=reason) as caught:
        read_tensors(path)
    assert "broken.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_files_too_short_for_a_header(size: int, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(size))
    with pytest.raises(ModelFormatError):
        read_tensors(tmp_path / "short")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        read_tensors(tmp_path / "nothing")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"a": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]}})
    with pytest.raises(ModelFormatError, match="must be of a float type"):
        read_tensors(path)["a"].float32()


@given(st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any bytes changed or cut: either a ModelFormatError, or tensors that lie inside of the file."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    good = write(folder / "good", {**GOOD, "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}}, bytes(32))
    blob = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    (folder / "bad").write_bytes(blob[: data.draw(st.integers(0, len(blob)))])
    try:
        found = read_tensors(folder / "bad")
    except ModelFormatError:
        return
    for tensor in found.values():
        assert len(tensor.raw) <= 32
