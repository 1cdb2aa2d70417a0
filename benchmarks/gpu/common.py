"""What the GPU benchmarks share: options, results that an interrupted run goes on with, models, sequence lengths.

Every script takes `--device`, `--results`, `--minutes`, `--only`, `--data` and `--smoke`. It writes a row as soon as it
is measured, skips rows that are there already (`--fresh` measures them again), and stops in good time: run it until it
says that nothing is left. `--smoke` is a tiny run on the CPU that shows that the script works, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import machine  # noqa: E402
from models import SQUAD_OCTILES  # noqa: E402

from espalier.gpu.device import CHECKING, find  # noqa: E402
from espalier.gpu.program import GpuProgram, Limits  # noqa: E402
from espalier.gpu.scales import Calibration  # noqa: E402
from espalier.ir import Graph, Node, TensorType, verify  # noqa: E402

SEED = 20
DATA = HERE.parent.parent.parent / "shared" / "data"


@dataclass(frozen=True)
class Options:
    """The command line, and the results file."""

    device: str
    smoke: bool
    results: Path
    minutes: float
    only: str
    fresh: bool
    data: Path


class Run:
    """One run of one script. Rows are measured by :meth:`row` unless they are there, or the time is up."""

    def __init__(self, name: str, description: str | None, arguments: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", default="cuda")
        parser.add_argument("--results", type=Path, default=HERE / "results" / f"{name}.json")
        parser.add_argument("--minutes", type=float, default=8.0, help="begin no row after so long")
        parser.add_argument("--only", default="", help="a pattern that the rows' names must match")
        parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
        parser.add_argument("--data", type=Path, default=DATA, help="the folder with squad/ and stsb/")
        parser.add_argument("--smoke", action="store_true", help="a tiny run on the CPU, to see that the script works")
        given = vars(parser.parse_args(arguments))
        if given["smoke"]:
            given |= {"device": CHECKING, "results": given["results"].with_suffix(".smoke.json")}
        self.options = Options(**given)
        _, self.found = find(self.options.device)
        self._start = time.monotonic()
        self.left: list[str] = []
        path = self.options.results
        self.rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() and not given["fresh"] else {}

    @property
    def smoke(self) -> bool:
        """Whether this is a tiny run on the CPU."""
        return self.options.smoke

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The row of that name, measured now if need be; None when it is left for the next run."""
        if not re.search(self.options.only, name):
            return None
        if name not in self.rows:
            if (time.monotonic() - self._start) / 60 > self.options.minutes:
                self.left.append(name)
                return None
            try:
                import torch

                torch.manual_seed(SEED)
                found = measure()
            except Exception as error:  # noqa: BLE001 - a row that fails is a result too, and the others go on
                found = {"error": f"{type(error).__name__}: {error}"}
            self.rows[name] = {**found, "commit": machine.commit(), "at": time.strftime("%Y-%m-%d %H:%M:%S")}
            self._save()
        row: dict[str, Any] = self.rows[name]
        shown = {key: value for key, value in row.items() if isinstance(value, int | float | str)}
        print(name, json.dumps(shown), flush=True)
        return row

    def finish(self) -> int:
        """Say what is left. Exit code 1 when a row failed or was wrong."""
        failed = [name for name, row in self.rows.items() if "error" in row or row.get("agrees") is False]
        if self.left:
            print(f"left for the next run of the same command: {', '.join(self.left)}")
        if failed:
            print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0

    def _save(self) -> None:
        import torch

        content = {
            "machine": {
                **machine.describe(),
                "gpu": self.found.name,
                "capability": list(self.found.capability),
                "multiprocessors": self.found.multiprocessors,
                "cuda": torch.version.cuda,
            },
            "versions": machine.versions(),
            "rows": self.rows,
        }
        path = self.options.results
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The shape of a BERT with a head for questions. ``head_size`` x ``heads`` need not be ``hidden``."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    head_size: int = 64
    vocabulary: int = 30522
    positions: int = 512
    semistructured: bool = False


MODELS = {
    "bert-large": Encoder(layers=24, hidden=1024, heads=16, ffn=4096),
    "bert-base": Encoder(layers=12, hidden=768, heads=12, ffn=3072),
    "minilm": Encoder(layers=6, hidden=384, heads=12, ffn=1536, head_size=32),
    "bert-large-half": Encoder(layers=24, hidden=1024, heads=8, ffn=2048),
    "bert-large-24": Encoder(layers=24, hidden=1024, heads=16, ffn=4096, semistructured=True),
}
"""``half``: structurally pruned, half of heads and FFN. ``24``: two of every four weights are zero."""

TINY = Encoder(layers=1, hidden=32, heads=2, ffn=64, head_size=16, vocabulary=200, positions=512)


def graph_of(shape: Encoder, *, seed: int = SEED) -> Graph:
    """The native graph, with random weights: speed and agreement can be measured on it, accuracy cannot."""
    random = np.random.default_rng(seed)
    kind = TensorType("int64", ("batch", "seq"))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    graph = Graph("encoder", names, [], [], {}, dict.fromkeys(names, kind))
    tokens = ("batch", "seq", shape.hidden)

    def weight(rows: int, columns: int, spread: float = 0.04) -> str:
        values = (random.standard_normal((rows, columns), np.float32) * spread).astype(np.float32)
        if shape.semistructured and rows % 16 == 0 and columns % 16 == 0 and spread < 0.1:
            groups = np.abs(values).reshape(rows, -1, 4)
            values *= (groups.argsort(axis=2).argsort(axis=2) >= 2).reshape(values.shape)
        return graph.add_constant("weight", values)

    def vector(size: int, mean: float = 0.0) -> str:
        return graph.add_constant("vector", (mean + 0.1 * random.standard_normal(size)).astype(np.float32))

    def node(op: str, inputs: list[str], out: tuple[Any, ...], name: str, dtype: str = "float32", **attrs: Any) -> str:
        graph.nodes.append(Node(op, inputs, [name], attrs, name=name))
        graph.types[name] = TensorType(dtype, out)
        return name

    def linear(x: str, rows: int, columns: int, name: str) -> str:
        return node("Linear", [x, weight(rows, columns), vector(rows)], ("batch", "seq", rows), name)

    def norm(x: str, name: str) -> str:
        return node("LayerNorm", [x, vector(shape.hidden, 1.0), vector(shape.hidden)], tokens, name, epsilon=1e-12)

    places = node("Positions", ["input_ids"], (1, "seq"), "positions", "int64", offset=0)
    words = node("Embedding", [weight(shape.vocabulary, shape.hidden, 0.1), "input_ids"], tokens, "words")
    types = node("Embedding", [weight(2, shape.hidden, 0.1), "token_type_ids"], tokens, "types")
    spots = node("Embedding", [weight(shape.positions, shape.hidden, 0.1), places], (1, "seq", shape.hidden), "spots")
    x = norm(node("Add", [node("Add", [words, types], tokens, "a"), spots], tokens, "b"), "embedded")
    width = shape.heads * shape.head_size
    for n in range(shape.layers):
        q, k, v = (linear(x, width, shape.hidden, f"{n}.{part}") for part in ("query", "key", "value"))
        mixed = node(
            "Attention", [q, k, v, "attention_mask"], ("batch", "seq", width), f"{n}.attention",
            heads=shape.heads, scale=shape.head_size**-0.5, mask_value=float(np.finfo(np.float32).min),
        )  # fmt: skip
        x = norm(node("Add", [linear(mixed, shape.hidden, width, f"{n}.output"), x], tokens, f"{n}.c"), f"{n}.norm")
        up = linear(x, shape.ffn, shape.hidden, f"{n}.up")
        up = node("Activation", [up], ("batch", "seq", shape.ffn), f"{n}.gelu", kind="gelu")
        x = norm(node("Add", [linear(up, shape.hidden, shape.ffn, f"{n}.down"), x], tokens, f"{n}.d"), f"{n}.out")
    graph.outputs = [linear(x, 2, shape.hidden, "logits")]
    verify(graph)
    return graph


def graph_named(run: Run, name: str) -> Graph:
    """The model of that name; a tiny one in its place in a smoke run."""
    if not run.smoke:
        return graph_of(MODELS[name])
    return graph_of(Encoder(**{**vars(TINY), "semistructured": MODELS[name].semistructured}))


def program_of(run: Run, graph: Graph, precision: str, limits: Limits | None = None) -> GpuProgram:
    """``graph`` on the run's device, calibrated on a few sequences where ``precision`` is fp8."""
    scales: Calibration | None = None
    if precision == "fp8":
        from espalier.gpu.calibration import learn

        wide = GpuProgram(graph, device=run.options.device, precision="fp32", tune=False)
        sample = rows_of(lengths_of(run, 16), graph, seed=1)
        scales = learn([wide], lambda: void(wide.run_ragged(sample)))
    return GpuProgram(graph, device=run.options.device, precision=precision, calibration=scales, limits=limits)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def lengths_of(run: Run, count: int) -> list[int]:
    """Lengths of SQuAD's features, cut as MLPerf does; from the data where it is there, else from its octiles."""
    path = run.options.data / "squad" / "dev-v1.1.rebuilt.json"
    if run.smoke:
        found = np.array([3, 17, 64, 65])
    elif path.exists():
        found = _squad_lengths(path)
    else:
        found = np.array(SQUAD_OCTILES)
    return [int(n) for n in np.random.default_rng(SEED).permutation(np.resize(found, count))]


def _squad_lengths(path: Path) -> np.ndarray:
    from tokenizers import BertWordPieceTokenizer

    from espalier.data import Tokens, read_squad
    from espalier.data.question_answering import MAX_LENGTH, cut_pieces

    cache = HERE.parent / ".cache" / "squad-lengths.npy"
    if not cache.exists():
        tokenizer = BertWordPieceTokenizer(str(path.parent / "vocab.txt"), lowercase=True)._tokenizer
        pieces = cut_pieces(Tokens(tokenizer, MAX_LENGTH), read_squad(path))
        cache.parent.mkdir(exist_ok=True)
        np.save(cache, np.array([len(piece.feature.ids) for piece in pieces]))
    lengths: np.ndarray = np.load(cache)
    return lengths


def rows_of(lengths: Iterable[int], graph: Graph, *, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Random sequences of these lengths, as :meth:`GpuProgram.run_ragged` takes them."""
    random = np.random.default_rng(seed)
    tables = (node.inputs for node in graph.nodes if node.op == "Embedding")
    vocabulary = next(graph.constants[table].shape[0] for table, ids in tables if ids == "input_ids")
    ids = [random.integers(4, vocabulary, n) for n in lengths]
    return {
        "input_ids": ids,
        "attention_mask": [np.ones_like(row) for row in ids],
        "token_type_ids": [(np.arange(len(row)) > len(row) // 8).astype(np.int64) for row in ids],
    }


def void(_value: object) -> None:
    """Nothing, of something that was computed for its effects."""
