"""The Open Inference Protocol over gRPC."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import espalier
from espalier.serve.rpc.messages import message

IDS = np.array([[2, 9, 10, 3], [2, 11, 3, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
FEEDS = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)}
Make = Callable[..., Any]


@pytest.fixture
def good(infer_request: Make) -> Any:
    return infer_request("embedder", {name: ("INT64", array) for name, array in FEEDS.items()})


def code(client: Any, request: Any, method: str = "ModelInfer") -> str:
    with pytest.raises(grpc.RpcError) as caught:
        client.call(method, request)
    assert caught.value.details()
    return str(caught.value.code().name)


def test_the_server_and_models_describe_themselves(client: Any) -> None:
    assert client.call("ServerLive").live
    assert client.call("ServerReady").ready
    assert client.call("ServerMetadata").extensions == ["binary_tensor_data"]
    found = client.call("ModelMetadata", message("ModelMetadataRequest")(name="embedder"))
    first = found.inputs[0]
    assert (first.name, first.datatype, list(first.shape)) == ("input_ids", "INT64", [-1, -1])
    assert client.call("ModelReady", message("ModelReadyRequest")(name="embedder")).ready
    assert [model.name for model in client.call("RepositoryIndex").models] == [
        "embedder",
        "answerer",
        "classifier",
        "labeller",
        "plain",
    ]


def test_raw_and_typed_contents_give_what_the_session_gives(client: Any, models: dict[str, Path], good: Any) -> None:
    session = espalier.load(models["embedder"], threads=1, tune=False)
    expected = session.run(None, FEEDS)
    typed = message("ModelInferRequest")(model_name="embedder", id="seven")
    for name, array in FEEDS.items():
        tensor = typed.inputs.add(name=name, datatype="INT64", shape=array.shape)
        tensor.contents.int64_contents.extend(array.reshape(-1).tolist())
    for request in (good, typed):
        found = client.call("ModelInfer", request)
        assert found.id == request.id
        for output, raw, array in zip(found.outputs, found.raw_output_contents, expected, strict=True):
            np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(output.shape), array)


def test_bad_input_is_an_invalid_argument(client: Any, good: Any, infer_request: Make) -> None:
    def changed(change: Callable[[Any], Any]) -> Any:
        request = message("ModelInferRequest").FromString(good.SerializeToString())
        change(request)
        return request

    bad = {
        "truncated": good.SerializeToString()[:-3],
        "noise": b"\xff" * 40,
        "fewer bytes": changed(lambda r: r.raw_input_contents.__setitem__(0, b"123")),
        "fewer contents": changed(lambda r: r.raw_input_contents.pop()),
        "both": changed(lambda r: r.inputs[0].contents.int64_contents.append(1)),
        "neither": changed(lambda r: r.ClearField("raw_input_contents")),
        "twice": changed(lambda r: setattr(r.inputs[1], "name", "input_ids")),
        "unknown type": changed(lambda r: setattr(r.inputs[0], "datatype", "INT7")),
        "other type": changed(lambda r: setattr(r.inputs[0], "datatype", "FP64")),
        "huge shape": changed(lambda r: r.inputs[0].shape.__setitem__(0, 2**62)),
        "zero size": infer_request("embedder", {n: ("INT64", a[:, :0]) for n, a in FEEDS.items()}),
        "unknown output": changed(lambda r: r.outputs.add(name="nothing")),
        "unknown parameter": changed(lambda r: r.inputs[0].parameters["shared_memory_region"].CopyFrom(
            message("InferParameter")(string_param="x"))),
        "id outside": infer_request("embedder", {n: ("INT64", a + 1000) for n, a in FEEDS.items()}),
    }  # fmt: skip
    for name, request in bad.items():
        assert code(client, request) == "INVALID_ARGUMENT", name
        assert client.call("ModelInfer", good).outputs
    assert code(client, infer_request("nobody", {})) == "NOT_FOUND"


def test_a_message_too_large_is_refused(client: Any, good: Any, infer_request: Make) -> None:
    large = infer_request("embedder", {"input_ids": ("INT64", np.zeros((1, 3 << 20), np.int64))})
    assert code(client, large) == "RESOURCE_EXHAUSTED"
    assert client.call("ModelInfer", good).outputs


def test_models_are_loaded_only_when_allowed(client: Any) -> None:
    request = message("RepositoryModelLoadRequest")(model_name="embedder")
    assert code(client, request, "RepositoryModelLoad") == "PERMISSION_DENIED"


def test_other_definitions_of_the_messages_do_no_harm() -> None:
    from google.protobuf import descriptor_pb2, descriptor_pool

    # As a client's package would bring them along.
    file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
    file.message_type.add(name="ModelInferRequest")
    descriptor_pool.Default().Add(file)
    assert "inputs" in message("ModelInferRequest").DESCRIPTOR.fields_by_name
