"""A server with small models in this process, on loopback, and the clients of these tests."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from espalier.loading import LoadSettings
from espalier.serve import ServerConfig
from espalier.serve.rpc.messages import SERVICE, message, methods
from espalier.serve.server import Server

HIDDEN, LAYERS, WORDS = 16, 1, 65
LABELS = ["low", "middle", "high"]
HEADS = {
    "embedder": ("BertModel", {}),
    "answerer": ("BertForQuestionAnswering", {"qa_outputs": 2}),
    "classifier": ("BertForSequenceClassification", {"bert.pooler.dense": HIDDEN, "classifier": 3}),
    "labeller": ("BertForTokenClassification", {"classifier": 3}),
}


def save_bert(folder: Path, architecture: str, heads: dict[str, int]) -> None:
    """A random encoder as Hugging Face saves it."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    prefix = "" if architecture == "BertModel" else "bert."
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, rows: int, columns: int = HIDDEN) -> None:
        weights[f"{name}.weight"] = rng.normal(0, 0.3, (rows, columns)).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(0, 0.3, rows).astype(np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(HIDDEN, np.float32)
        weights[f"{name}.bias"] = np.zeros(HIDDEN, np.float32)

    for table, rows in (("word", WORDS), ("position", 128), ("token_type", 2)):
        values = rng.normal(0, 1, (rows, HIDDEN)).astype(np.float32)
        weights[f"{prefix}embeddings.{table}_embeddings.weight"] = values
    norm(f"{prefix}embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"{prefix}encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            linear(f"{at}.attention.self.{part}", HIDDEN)
        linear(f"{at}.attention.output.dense", HIDDEN)
        norm(f"{at}.attention.output.LayerNorm")
        linear(f"{at}.intermediate.dense", 2 * HIDDEN)
        linear(f"{at}.output.dense", HIDDEN, 2 * HIDDEN)
        norm(f"{at}.output.LayerNorm")
    if not prefix:
        linear("pooler.dense", HIDDEN)
    for name, rows in heads.items():
        linear(name, rows)
    config = {
        "architectures": [architecture], "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "intermediate_size": 2 * HIDDEN, "vocab_size": WORDS, "type_vocab_size": 2,
        "max_position_embeddings": 128, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "id2label": dict(enumerate(LABELS[: 3 if "classifier" in heads else 2])),
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def save_plain(path: Path) -> None:
    """A model that no task knows: ``y = x @ x.T``, and a text that comes back as it is; ONNX Runtime runs it."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
        helper.make_node("Identity", ["s"], ["same"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b"]),
        helper.make_tensor_value_info("s", TensorProto.STRING, ["n"]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "a"]),
        helper.make_tensor_value_info("same", TensorProto.STRING, ["n"]),
    ]
    graph = helper.make_graph(nodes, "plain", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], None]) -> dict[str, Path]:
    """Paths by name: one model per task, and one of none."""
    folder = tmp_path_factory.mktemp("models")
    for name, (architecture, heads) in HEADS.items():
        save_bert(folder / name, architecture, heads)
        save_tokenizer(folder / name)
    save_plain(folder / "plain.onnx")
    return {**{name: folder / name for name in HEADS}, "plain": folder / "plain.onnx"}


class Client:
    """Requests to a running server."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.port = server.http_port
        self.rpc_port = server.grpc_port

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        status, _, body = self.send("GET", path, None, headers)
        return status, json.loads(body)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        status, _, data = self.send("POST", path, body, headers)
        return status, json.loads(data)

    def call(self, name: str, request: Any = None, **options: Any) -> Any:
        """One gRPC method; ``request`` is a message, its bytes, or nothing. Raises grpc.RpcError."""
        kind, answer = methods()[name]
        data = request if isinstance(request, bytes) else (request or kind()).SerializeToString()
        with grpc.insecure_channel(f"127.0.0.1:{self.rpc_port}") as channel:
            return channel.unary_unary(f"/{SERVICE}/{name}", None, answer.FromString)(
                data, **{"timeout": 20, **options}
            )


@contextmanager
def running(models: dict[str, Path], **options: Any) -> Iterator[Client]:
    """A server on free ports of loopback, in a thread."""
    config = ServerConfig(**{"http_port": 0, "grpc_port": 0, "load": LoadSettings(threads=1, tune=False), **options})
    server, ready, failed = Server(config), threading.Event(), []
    loop = asyncio.new_event_loop()

    def work() -> None:
        try:
            loop.run_until_complete(server.run(models, lambda _: ready.set()))
        except BaseException as error:  # noqa: BLE001 - the test has to see it
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(60)
    if failed:
        raise failed[0]
    try:
        yield Client(server, loop)
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
        loop.close()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """``with start(models, **options) as client``: a server of one's own."""
    return running


@pytest.fixture(scope="session")
def client(models: dict[str, Path]) -> Iterator[Client]:
    """A server with all models, shared by the tests."""
    with running(models) as found:
        yield found


class SlowSession:
    """A model that takes its time: ``ids`` in, their sum out, ``seconds`` per batch. ``started`` counts sequences.

    ``warmed``: batches of so many tokens it was warmed up for.
    """

    threads = 1
    warmed: int | None = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.go = threading.Event()
        self.go.set()
        self.started: list[int] = []

    def get_inputs(self) -> list[Any]:
        from espalier._session.describe import TensorInfo

        return [TensorInfo("ids", ["batch", "tokens"], "tensor(int64)")]

    def get_outputs(self) -> list[Any]:
        from espalier._session.describe import TensorInfo

        return [TensorInfo("sum", ["batch"], "tensor(int64)")]

    def check(self, feeds: Any) -> bool:
        return True

    def warm_up(self, *, tokens: int) -> float:
        self.warmed = tokens
        return 0.0

    def run_ragged(self, names: Any, rows: list[Any]) -> list[list[np.ndarray]]:
        self.started += [int(row["ids"].sum()) for row in rows]
        self.go.wait(10)
        threading.Event().wait(self.seconds)
        return [[row["ids"].sum() for row in rows]]

    def report(self) -> Any:
        class Report:
            layers = ()

        return Report()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowSession:
    """The session of every model that a server loads."""
    session = SlowSession(0.01)
    monkeypatch.setattr(LoadSettings, "open", lambda _, path: session)
    return session


@pytest.fixture(scope="session")
def infer_request() -> Callable[..., Any]:
    """``infer_request(model, {name: (datatype, array)})`` is a ModelInferRequest with raw contents."""

    def make(model: str, inputs: dict[str, tuple[str, np.ndarray]]) -> Any:
        request = message("ModelInferRequest")(model_name=model)
        for name, (datatype, array) in inputs.items():
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        return request

    return make
