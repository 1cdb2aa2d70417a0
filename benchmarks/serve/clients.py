"""Real clients against a running server whose only model is called "model". Run by clients.sh.

Every client must get the same numbers. Exits with 1, and says who got what, when one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import subprocess
import sys
import time
import urllib.request
from functools import partial
from typing import Any

import numpy as np

IDS = np.array([[101, 7592, 2088, 102], [101, 7592, 102, 0]], np.int64)
FEEDS = {
    "input_ids": IDS,
    "attention_mask": (IDS != 0).astype(np.int64),
    "token_type_ids": np.zeros_like(IDS),
}
OUTPUT = "sentence_embedding"


def wait(port: int) -> None:
    """Until the server is ready. Raises TimeoutError."""
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1)
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("the server did not get ready in a minute")


def triton(module: Any, address: str, **form: bool) -> np.ndarray:
    """tritonclient, over HTTP (``binary`` or not) or gRPC."""
    client = module.InferenceServerClient(address)
    if not (client.is_server_ready() and client.is_model_ready("model") and client.get_model_metadata("model")):
        raise RuntimeError("the server or its model is not ready")
    inputs = []
    for name, array in FEEDS.items():
        tensor = module.InferInput(name, list(array.shape), "INT64")
        forms = {"binary_data": form["binary"]} if form else {}
        tensor.set_data_from_numpy(array, **forms)
        inputs.append(tensor)
    wanted = [module.InferRequestedOutput(OUTPUT, **forms)]
    return np.asarray(client.infer("model", inputs, outputs=wanted, request_id="one").as_numpy(OUTPUT), np.float32)


def triton_http(http: int, rpc: int, *, binary: bool) -> np.ndarray:
    """tritonclient over HTTP."""
    import tritonclient.http

    return triton(tritonclient.http, f"127.0.0.1:{http}", binary=binary)


def triton_grpc(http: int, rpc: int) -> np.ndarray:
    """tritonclient over gRPC."""
    import tritonclient.grpc

    return triton(tritonclient.grpc, f"127.0.0.1:{rpc}")


def kserve_http(http: int, rpc: int) -> np.ndarray:
    """kserve's client, over HTTP."""
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    async def run() -> Any:
        client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=30))
        inputs = []
        for name, array in FEEDS.items():
            tensor = InferInput(name, list(array.shape), "INT64")
            tensor.set_data_from_numpy(array, binary_data=False)
            inputs.append(tensor)
        request = InferRequest(infer_inputs=inputs, model_name="model")
        return await client.infer(f"http://127.0.0.1:{http}", request, model_name="model")

    found = {output.name: output for output in asyncio.run(run()).outputs}
    return np.asarray(found[OUTPUT].as_numpy(), np.float32).reshape(found[OUTPUT].shape)


def kserve_grpc(http: int, rpc: int) -> np.ndarray:
    """kserve's client, over gRPC."""
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    async def run() -> Any:
        client = InferenceGRPCClient(f"127.0.0.1:{rpc}")
        inputs = []
        for name, array in FEEDS.items():
            tensor = InferInput(name, list(array.shape), "INT64")
            tensor.set_data_from_numpy(array, binary_data=True)
            inputs.append(tensor)
        return await client.infer(InferRequest(infer_inputs=inputs, model_name="model"))

    found = {output.name: output for output in asyncio.run(run()).outputs}
    return np.asarray(found[OUTPUT].as_numpy(), np.float32).reshape(found[OUTPUT].shape)


def openai_client(http: int, rpc: int, *, encoding: Any) -> np.ndarray:
    """The openai client, with token ids, which need no tokenizer here."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{http}/v1", api_key="none-is-needed")
    if [model.id for model in client.models.list().data] != ["model"]:
        raise RuntimeError("the list of models is wrong")
    tokens = [row[row != 0].tolist() for row in IDS]
    found = client.embeddings.create(model="model", input=tokens, encoding_format=encoding).data
    rows = [np.frombuffer(base64.b64decode(r.embedding), "<f4") if encoding == "base64" else r.embedding for r in found]
    return np.array(rows, np.float32)


CLIENTS: dict[str, Any] = {
    "tritonclient-http-json": partial(triton_http, binary=False),
    "tritonclient-http-binary": partial(triton_http, binary=True),
    "tritonclient-grpc": triton_grpc,
    "openai-float": partial(openai_client, encoding="float"),
    "openai-base64": partial(openai_client, encoding="base64"),
    "kserve-http": kserve_http,
    "kserve-grpc": kserve_grpc,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Real clients against a running server.")
    parser.add_argument("--http", type=int, required=True)
    parser.add_argument("--grpc", type=int, required=True)
    parser.add_argument("--only", choices=CLIENTS, help="print this client's numbers")
    arguments = parser.parse_args()
    if arguments.only:
        del sys.argv[1:]  # kserve reads them as its own when it is imported
        found = CLIENTS[arguments.only](arguments.http, arguments.grpc)
        print(json.dumps((found / np.linalg.norm(found, axis=-1, keepdims=True)).tolist()))
        return
    wait(arguments.http)
    first: Any = None
    failed = []
    for name in CLIENTS:
        # One process each: two of these packages cannot be imported together, they define the same messages.
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], capture_output=True, text=True)
        found = np.array(json.loads(done.stdout)) if done.returncode == 0 else np.zeros(0)
        first = found if first is None else first
        same = found.size > 0 and found.shape == first.shape and np.allclose(found, first, atol=1e-6)
        print(f"{name:26}{'ok' if same else 'FAILED'}")
        if not same:
            failed.append(name)
            print(done.stderr[-2000:], file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
