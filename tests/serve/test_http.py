"""The Open Inference Protocol over HTTP."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import espalier
from espalier.errors import EspalierError
from espalier.serve.http.v2 import HEADER, read_request

IDS = np.array([[2, 9, 10, 3], [2, 11, 3, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
FEEDS = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)}
INFER = "/v2/models/embedder/infer"


def as_json(feeds: dict[str, np.ndarray], **more: Any) -> dict[str, Any]:
    inputs = [
        {"name": name, "shape": list(array.shape), "datatype": "INT64", "data": array.tolist()}
        for name, array in feeds.items()
    ]
    return {"inputs": inputs, **more}


def as_binary(feeds: dict[str, np.ndarray], **more: Any) -> tuple[bytes, dict[str, str]]:
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "INT64",
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in feeds.items()
    ]
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + b"".join(array.tobytes() for array in feeds.values()), {HEADER: str(len(head))}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, np.ndarray]:
    session = espalier.load(models["embedder"], threads=1, tune=False)
    names = [info.name for info in session.get_outputs()]
    return dict(zip(names, session.run(None, FEEDS), strict=True))


def works(client: Any) -> bool:
    return bool(client.post(INFER, as_json(FEEDS))[0] == 200)


def test_the_server_describes_itself(client: Any) -> None:
    assert client.get("/v2") == (
        200,
        {"name": "espalier", "version": espalier.__version__, "extensions": ["binary_tensor_data"]},
    )
    assert client.get("/v2/health/live")[0] == 200
    assert client.get("/v2/health/ready")[0] == 200


def test_a_model_describes_itself(client: Any) -> None:
    status, found = client.get("/v2/models/embedder/versions/1")
    assert status == 200
    assert found["versions"] == ["1"]
    assert found["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert client.get("/v2/models/embedder/ready")[0] == 200
    assert client.get("/v2/models/embedder/versions/2")[0] == 404


def test_json_gives_what_the_session_gives(client: Any, expected: dict[str, np.ndarray]) -> None:
    status, found = client.post(INFER, as_json(FEEDS, id="seven"))
    assert status == 200
    assert (found["model_name"], found["model_version"], found["id"]) == ("embedder", "1", "seven")
    assert [output["name"] for output in found["outputs"]] == list(expected)
    for output in found["outputs"]:
        array = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_array_equal(array, expected[output["name"]])


def test_binary_gives_what_the_session_gives(client: Any, expected: dict[str, np.ndarray]) -> None:
    body, headers = as_binary(FEEDS, parameters={"binary_data_output": True})
    status, answered, data = client.send("POST", INFER, body, headers)
    assert status == 200
    length = int(answered[HEADER])
    rest = data[length:]
    for output in json.loads(data[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        array = np.frombuffer(rest[:size], np.float32).reshape(output["shape"])
        np.testing.assert_array_equal(array, expected[output["name"]])
        rest = rest[size:]
    assert not rest


def test_outputs_may_be_chosen_each_in_its_form(client: Any, expected: dict[str, np.ndarray]) -> None:
    name = list(expected)[1]
    status, _, data = client.send(
        "POST", INFER, as_json(FEEDS, outputs=[{"name": name, "parameters": {"binary_data": True}}])
    )
    assert status == 200
    assert data.endswith(expected[name].tobytes())
    status, found = client.post(INFER, as_json(FEEDS, outputs=[{"name": name}]))
    assert [output["name"] for output in found["outputs"]] == [name]


def test_a_compressed_body_is_read(client: Any) -> None:
    body = gzip.compress(json.dumps(as_json(FEEDS)).encode())
    assert client.send("POST", INFER, body, {"content-encoding": "gzip"})[0] == 200


def test_a_model_of_any_kind_is_served(client: Any) -> None:
    inputs = [
        {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]},
        {"name": "s", "shape": [2], "datatype": "BYTES", "data": ["äh", "b"]},
    ]
    status, found = client.post("/v2/models/plain/infer", {"inputs": inputs})
    assert status == 200
    assert [output["data"] for output in found["outputs"]] == [[5, 11, 11, 25], ["äh", "b"]]


BAD = {
    "not JSON": (b"{", {}),
    "not an object": (b"[1]", {}),
    "deep": (b"[" * 100_000, {}),
    "nothing": (b"", {}),
    "no inputs": ({"inputs": []}, {}),
    "NaN in JSON": (b'{"inputs":[{"name":"input_ids","shape":[1],"datatype":"FP32","data":[NaN]}]}', {}),
    "unknown input": (as_json({"x": IDS}), {}),
    "missing input": (as_json({"attention_mask": MASK}), {}),
    "wrong rank": (as_json({**FEEDS, "input_ids": IDS[0]}), {}),
    "other extent": (as_json({**FEEDS, "input_ids": IDS[:, :2]}), {}),
    "zero size": (as_json({name: array[:, :0] for name, array in FEEDS.items()}), {}),
    "id outside": (as_json({**FEEDS, "input_ids": IDS + 1000}), {}),
    "huge shape": ({"inputs": [{"name": "input_ids", "shape": [2**40, 2**40], "datatype": "INT64", "data": [1]}]}, {}),
    "negative shape": ({"inputs": [{"name": "input_ids", "shape": [-1, 4], "datatype": "INT64", "data": [1]}]}, {}),
    "wrong datatype": ({"inputs": [{"name": "input_ids", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}, {}),
    "unknown output": (as_json(FEEDS, outputs=[{"name": "nothing"}]), {}),
    "unknown output parameter": (
        as_json(FEEDS, outputs=[{"name": "pooler_output", "parameters": {"classification": 3}}]),
        {},
    ),
    "timeout of another kind": (as_json(FEEDS, parameters={"timeout": "soon"}), {}),
    "header beyond the body": (as_binary(FEEDS)[0], {HEADER: "99999"}),
    "header too short": (as_binary(FEEDS)[0], {HEADER: "5"}),
    "header not a number": (as_binary(FEEDS)[0], {HEADER: "-1"}),
    "header huge": (as_binary(FEEDS)[0], {HEADER: "9" * 40}),
    "bytes missing": (as_binary(FEEDS)[0][:-1], as_binary(FEEDS)[1]),
    "bytes too many": (as_binary(FEEDS)[0] + b"x", as_binary(FEEDS)[1]),
    "unknown encoding": (b"{}", {"content-encoding": "br"}),
    "broken gzip": (b"xxxx", {"content-encoding": "gzip"}),
    "half a gzip": (gzip.compress(b"{}" * 100)[:-9], {"content-encoding": "gzip"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_the_next_request_answered(client: Any, name: str) -> None:
    body, headers = BAD[name]
    status, found = client.post(INFER, body, **headers)
    assert status in (400, 415)
    assert found["error"]
    assert works(client)


def test_unknown_places(client: Any) -> None:
    status, found = client.post("/v2/models/nobody/infer", as_json(FEEDS))
    assert status == 404
    assert "embedder" in found["error"]
    assert client.get("/nowhere")[0] == 404
    assert client.send("DELETE", "/v2")[0] == 405


def test_a_bomb_does_not_go_off(client: Any) -> None:
    bomb = gzip.compress(b"\0" * 30_000_000)
    status, _, _ = client.send("POST", INFER, bomb, {"content-encoding": "gzip"})
    assert status == 413
    assert works(client)


def test_a_body_too_large_is_refused(client: Any) -> None:
    status, _, _ = client.send("POST", INFER, b" " * (17 << 20))
    assert status == 413
    assert works(client)


def test_a_sequence_larger_than_a_batch_is_refused_at_once(start: Callable[..., Any], models: dict[str, Path]) -> None:
    from espalier.scheduler import Limits

    with start({"embedder": models["embedder"]}, limits=Limits(tokens=3)) as small:
        status, found = small.post(INFER, as_json(FEEDS))
        assert status == 400
        assert "exceeds the budget of 3 tokens" in found["error"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60),
    st.integers(0, 400),
    st.none() | st.integers(-5, 700).map(str) | st.text(max_size=4),
    st.integers(0, 3),
)
def test_damaged_framing_gives_a_request_or_an_error(noise: bytes, at: int, header: str | None, kind: int) -> None:
    from espalier.serve.http.problems import HttpError

    good, headers = as_binary(FEEDS)
    body = [good[:at], good + noise, good[:at] + noise + good[at:], good[:at] + noise + good[at + len(noise) :]][kind]
    try:
        request, feeds = read_request(body, headers[HEADER] if header is None else header)
    except (EspalierError, HttpError):
        return
    assert len(feeds) == len(request.inputs)


def test_models_are_loaded_only_when_allowed(client: Any, start: Callable[..., Any], models: dict[str, Path]) -> None:
    assert client.post("/v2/repository/models/embedder/load", {})[0] == 403
    assert client.post("/v2/repository/models/embedder/unload", {})[0] == 403
    folder = models["embedder"].parent
    with start({}, load_from=folder) as own:
        assert own.get("/v2")[1]["extensions"] == ["binary_tensor_data", "model_repository"]
        assert own.post(INFER, as_json(FEEDS))[0] == 404
        for name in ("nobody", "..", "%2e%2e%2fmodels"):
            assert own.post(f"/v2/repository/models/{name}/load", {})[0] == 404
        assert own.post("/v2/repository/models/embedder/load", {})[0] == 200
        assert own.post(INFER, as_json(FEEDS))[1]["model_version"] == "1"
        assert own.post("/v2/repository/models/embedder/load", {})[0] == 200
        assert own.post(INFER, as_json(FEEDS))[1]["model_version"] == "2"
        index = {entry["name"]: entry["state"] for entry in own.post("/v2/repository/index", {})[1]}
        assert (index["embedder"], index["plain"]) == ("READY", "UNAVAILABLE")
        assert own.post("/v2/repository/models/embedder/unload", {})[0] == 200
        assert own.post(INFER, as_json(FEEDS))[0] == 404
