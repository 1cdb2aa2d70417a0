"""Feed damaged models to `espalier.load` and run what loads: only Espalier's own exceptions may come out.

Usage: python tests/fuzz/target.py {onnx,onnx8,hf,plan,plan8} SEED COUNT [FOLDER]

The kinds with an 8 have their linear layers quantised.

Runs in a process of its own with bounded memory and time, so that a crash, a hang or a huge allocation of native code
is a failed run. Every case is on disk before it is tried: after a failure FOLDER holds it. Seeds make runs repeatable.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import random
import resource
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import espalier
from espalier.errors import EspalierError
from espalier.ir import Graph

MEMORY = 6 << 30
SECONDS = 20
"""For one case; most take milliseconds."""
VOCABULARY, POSITIONS, HIDDEN, WIDE = 40, 16, 16, 32
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 65535, 65537, 2**31 - 1, 2**31, 2**32, 2**48, 2**63 - 1, 2**64 - 1, -(2**63))
VALUES: tuple[Any, ...] = (*NUMBERS, None, "", "x", [], {}, 0.5, 1e308, True)


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
    }
    layer = "encoder.layer.0."
    for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
        shapes |= {f"{layer}{name}.weight": (HIDDEN, HIDDEN), f"{layer}{name}.bias": (HIDDEN,)}
    shapes |= {f"{layer}intermediate.dense.weight": (WIDE, HIDDEN), f"{layer}intermediate.dense.bias": (WIDE,)}
    shapes |= {f"{layer}output.dense.weight": (HIDDEN, WIDE), f"{layer}output.dense.bias": (HIDDEN,)}
    for name in ("embeddings.LayerNorm", f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"):
        shapes |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in found.items():
        if name.startswith("encoder") and array.ndim == 2:
            array[rng.random(array.shape) < 0.8] = 0
    return found


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def corpus(kind: str, folder: Path) -> dict[str, bytes]:
    """The files of a sound one-layer BERT, by name."""
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDE,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "hidden_act": "gelu",
    }  # fmt: skip
    header, data = dict[str, Any](), b""
    for name, array in _tensors().items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": _safetensors(header, data)}
    if kind == "hf":
        return files
    source = folder / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    from espalier import hf
    from espalier.onnx import writer

    graph = hf.read(source)
    if kind.endswith("8"):
        _quantise(graph)
    model = writer.to_model(graph).SerializeToString()
    if kind.startswith("onnx"):
        return {"model.onnx": model}
    return {"model.espalier": espalier.compile(model, folder / "sound.espalier", threads=1, tune=False).read_bytes()}


def _quantise(graph: Graph) -> None:
    """Every linear layer in 8 bits; every other one with a scale per token and without zeros."""
    scale = graph.add_constant("scale", np.asarray(0.05, np.float32))
    zero = graph.add_constant("zero", np.asarray(128, np.uint8))
    for number, node in enumerate([node for node in graph.nodes if node.op == "Linear"]):
        x, weight, bias = node.inputs
        step = np.abs(graph.constants[weight]).max() / np.float32(127)
        q = np.rint(graph.constants[weight] / step).astype(np.int8)
        if number % 2:
            q[q == 0] = 1
        parts = [x, graph.add_constant("q", q), graph.add_constant("step", step), "", bias]
        node.op, node.attrs = "QLinear", {"activations": "token" if number % 2 else "static"}
        node.inputs = parts if number % 2 else [*parts, scale, zero]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, repeated, overwritten with an extreme number, or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not out:
            break
        at = rng.randrange(min(len(out), 2048) if rng.random() < 0.5 else len(out))
        size = rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) & (2**64 - 1))
            case 4:
                del out[at : at + size]
            case _:
                out[at : at + 10] = b"\xff" * rng.randrange(1, 10) + b"\x7f"  # a varint, often a length
    return bytes(out)


def edit(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place in it changed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.93:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        copy: Any = value.copy()
        if rng.random() < 0.08:
            del copy[key]
        elif isinstance(copy, list) and rng.random() < 0.1:
            copy.insert(key, value[rng.randrange(len(value))])
        elif rng.random() < 0.1:
            copy[key] = rng.choice(list(value.values()) if isinstance(value, dict) else value)
        else:
            copy[key] = edit(value[key], rng)
        return copy
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1))
    return rng.choice(VALUES)


def _edit_plan(data: bytes, rng: random.Random) -> bytes:
    """A plan whose program or tensors are wrong although its checksum is right: what an attacker would write."""
    header, body = _parts(data)
    metadata = header.pop("__metadata__")
    program = json.loads(metadata["espalier.program"])
    if rng.random() < 0.7:
        program = edit(program, rng)
    if rng.random() < 0.4:
        changed = bytearray(body)
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 128, 255))
        body = bytes(changed)
    description = json.dumps(program)
    digest = hashlib.sha256(description.encode())
    digest.update(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    digest.update(body)
    metadata |= {"espalier.program": description, "espalier.sha256": digest.hexdigest()}
    return _safetensors({"__metadata__": metadata, **header}, body)


def mutate(kind: str, name: str, data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage(data, rng)
    if kind.startswith("plan"):
        return _edit_plan(data, rng)
    if name.endswith(".json"):
        return json.dumps(edit(json.loads(data), rng)).encode()
    if name.endswith(".safetensors"):
        header, body = _parts(data)
        return _safetensors(edit(header, rng), body)
    return damage(data, rng)


def try_model(path: Path) -> None:
    """Load it and run it on whatever it says it takes."""
    try:
        session = espalier.load(path, threads=1, tune=False)
        feeds = {info.name: np.ones((2, 5), np.int64) for info in session.get_inputs()}
        session.run(None, feeds)
    except EspalierError:
        pass


def main(kind: str, seed: int, count: int, folder: Path) -> None:
    sound = corpus(kind, folder)
    place = folder / "case"
    place.mkdir(exist_ok=True)
    path = place if kind == "hf" else place / next(iter(sound))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for case in range(count):
        rng = random.Random(f"{kind} {seed} {case}")
        victim = rng.choice(list(sound))
        for name, content in sound.items():
            (place / name).unlink(missing_ok=True)  # a new file: an earlier session may have the old one mapped
            (place / name).write_bytes(mutate(kind, name, content, rng) if name == victim and case else content)
        print(f"{kind} {seed} case {case}: {victim}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try_model(path)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4] if len(sys.argv) > 4 else temporary))
