"""Beside plain PyTorch on the same GPU, model and sequences, in one run.

    python benchmarks/gpu/plain.py

Plain is how a BERT is commonly run: `torch.compile`, bf16, batches of 64 padded to 384 tokens; and better: sorted by
length, each batch padded to its own longest. The outputs are compared first, and the turns are interleaved.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, MODELS, SEED, TINY, Encoder, Run, lengths_of, program_of

from espalier import hf, passes
from espalier.gpu.batches import split

WIDTH = 384
BATCH = 64
STEP = 32
"""Sorted batches are padded to multiples of this, so that few shapes are compiled."""


def folder_of(name: str, shape: Encoder) -> Path:
    """A model folder of that shape with random weights, saved once."""
    from transformers import BertConfig, BertForQuestionAnswering

    path = HERE.parent / ".cache" / f"{name}-random"
    if not (path / "model.safetensors").exists():
        torch.manual_seed(SEED)
        config = BertConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, intermediate_size=shape.ffn, max_position_embeddings=shape.positions,
        )  # fmt: skip
        model = BertForQuestionAnswering(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.04)
        model.save_pretrained(path)
    return path


class Plain:
    """The model in PyTorch. ``call`` gives one ``[tokens, 2]`` array per sequence, in order."""

    def __init__(self, folder: Path, device: str, *, compiled: bool) -> None:
        from transformers import BertForQuestionAnswering

        self.device = torch.device("cpu" if device == "torch-cpu" else device)
        model = BertForQuestionAnswering.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.bfloat16)
        self.model: Any = model.to(self.device).eval()
        if compiled:
            self.model = torch.compile(self.model, dynamic=False, mode="max-autotune")

    def call(self, ids: list[np.ndarray], *, sort: bool) -> list[np.ndarray]:
        """All sequences, ``BATCH`` at a time, padded as ``sort`` says."""
        order = np.argsort([-len(row) for row in ids], kind="stable") if sort else np.arange(len(ids))
        found: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                numbers = order[start : start + BATCH]
                longest = max(len(ids[n]) for n in numbers)
                width = -(-longest // STEP) * STEP if sort else WIDTH
                # Always whole batches: another shape would be compiled again.
                padded = torch.zeros((BATCH, width), dtype=torch.int64)
                mask = torch.zeros_like(padded)
                mask[len(numbers) :, 0] = 1
                for row, n in enumerate(numbers):
                    padded[row, : len(ids[n])] = torch.from_numpy(ids[n])
                    mask[row, : len(ids[n])] = 1
                out = self.model(input_ids=padded.to(self.device), attention_mask=mask.to(self.device))
                scores = torch.stack([out.start_logits, out.end_logits], -1).float().cpu().numpy()
                found |= {int(n): scores[row, : len(ids[n])] for row, n in enumerate(numbers)}
        return [found[n] for n in range(len(ids))]


def compare(run: Run, name: str, shape: Encoder, precision: str) -> dict[str, Any]:
    """Samples per second of each, the median of three interleaved turns after one to warm up."""
    folder = folder_of("tiny" if run.smoke else name, shape)
    graph = passes.run(hf.read(folder))
    program = program_of(run, graph, precision)
    random = np.random.default_rng(SEED)
    ids = [random.integers(4, shape.vocabulary, n) for n in lengths_of(run, 6 if run.smoke else 2048)]
    feeds = {
        "input_ids": ids,
        "attention_mask": [np.ones_like(row) for row in ids],
        "token_type_ids": [np.zeros_like(row) for row in ids],
    }
    plain = Plain(folder, run.options.device, compiled=not run.smoke)

    def ours() -> list[np.ndarray]:
        return [np.stack(pair, -1) for pair in zip(*program.run_ragged(feeds).values(), strict=True)]

    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "espalier": ours,
        "padded": lambda: plain.call(ids, sort=False),
        "sorted": lambda: plain.call(ids, sort=True),
    }
    answers = {way: call() for way, call in ways.items()}
    largest = max(float(np.abs(row).max()) for row in answers["padded"])
    errors = {
        way: max(float(np.abs(a - b).max()) for a, b in zip(answers[way], answers["padded"], strict=True)) / largest
        for way in ("espalier", "sorted")
    }
    if max(errors.values()) > (0.3 if precision == "fp8" else 0.1):
        return {"agrees": False, "errors": errors}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(1 if run.smoke else 3):
        for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            ways[way]()
            seconds[way].append(time.perf_counter() - begin)
    rates = {way: len(ids) / statistics.median(values) for way, values in seconds.items()}
    return {
        "agrees": True,
        "errors": errors,
        "samples_per_s": rates,
        "times_padded": rates["espalier"] / rates["padded"],
        "times_sorted": rates["espalier"] / rates["sorted"],
        "batches": len(split([len(row) for row in ids], tokens=program.limits.tokens, sequences=1024)),
    }


def main(arguments: list[str] | None = None) -> int:
    run = Run("plain", __doc__, arguments)
    for name in ("bert-large", "bert-base"):
        shape = TINY if run.smoke else MODELS[name]
        for precision in ("bf16", "fp8"):
            run.row(f"{name}/{precision}", partial(compare, run, name, shape, precision))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
