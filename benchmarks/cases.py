"""What is measured: the cases, their inputs, and how each engine is commonly handed them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from models import SEED, SQUAD_OCTILES, Feed, feed, minilm_folder

Arrays = dict[str, Any]
BATCH = 16
"""Sequences per call where a data set is cut into batches."""

# MLPerf Inference's BERT benchmark: maximum length, document stride, maximum query length.
MAX_LENGTH, STRIDE, MAX_QUERY = 384, 128, 64
SQUAD_FEATURES = 10_833

MINILM = "minilm"

SHAPES: dict[str, tuple[int, int, tuple[int, ...] | None]] = {
    "1x8": (1, 8, None),  # a query
    "16x128": (16, 128, None),
    "1x128": (1, 128, None),
    "1x384": (1, 384, None),
    "8x384": (8, 384, None),
    "8x384-ragged": (8, 384, SQUAD_OCTILES),
}
PEER_SHAPES = ("1x8", "16x128", "1x128")
"""Where the peers that compile for one shape (tens of seconds each) are measured unless asked for everywhere."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a model and the padded batches it is run on.

    `ragged`: the engine under test gets the sequences unpadded and sorted by length, the others padded as they come.
    """

    model: str
    shape: str
    feeds: tuple[Feed, ...] = field(repr=False)
    ragged: bool = False
    peers: bool = True

    @property
    def id(self) -> str:
        return f"{self.model}/{self.shape}"

    @property
    def extent(self) -> tuple[int, int]:
        """(batch, sequence), the same in every batch."""
        batch, sequence = self.feeds[0]["input_ids"].shape
        return batch, sequence

    @property
    def lengths(self) -> list[int]:
        return [int(n) for one in self.feeds for n in one["attention_mask"].sum(1)]

    def sequences(self) -> list[Feed]:
        """Every sequence without its padding, each input `[length]`."""
        rows = [{name: array[i] for name, array in one.items()} for one in self.feeds for i in range(self.extent[0])]
        return [{name: a[:n] for name, a in row.items()} for row, n in zip(rows, self.lengths, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A case as one engine gets it: `calls[i]` is one padded feed, or the sequences of one ragged batch."""

    calls: list[list[Arrays]]
    order: list[int]
    """The case's sequence at each place of the calls, laid end to end."""
    ragged: bool = False
    how: str = "padded"


def work(case: Case, engine: str) -> Work:
    """How `engine` is run on `case`; `<engine>-sorted` pads each batch only to its own longest, after sorting."""
    if not (case.ragged and (engine == "espalier" or engine.endswith("-sorted"))):
        return Work(calls=[[one] for one in case.feeds], order=list(range(len(case.lengths))))
    sequences = case.sequences()
    # Longest first: the largest buffers are claimed once.
    order = [int(i) for i in np.argsort([-n for n in case.lengths], kind="stable")]
    batches = [[sequences[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    if engine == "espalier":
        return Work(calls=batches, order=order, ragged=True, how="unpadded, sorted by length")
    padded: list[list[Arrays]] = [[_pad_to(batch, max(len(one["input_ids"]) for one in batch))] for batch in batches]
    return Work(calls=padded, order=order, how="sorted by length, padded to each batch's longest")


def _pad_to(sequences: list[Feed], length: int) -> Feed:
    """Right-padded with zeros to `[sequences, length]`."""
    return {
        name: np.stack([np.pad(one[name], (0, length - len(one[name]))) for one in sequences]) for name in sequences[0]
    }


def restore(case: Case, given: Work, outputs: list[list[Arrays]]) -> list[Arrays]:
    """Outputs per call as outputs per sequence, in the case's order, without padding."""
    flat: list[Arrays] = []
    for results in outputs:
        if given.ragged:
            flat += results
        else:
            batch = len(next(iter(results[0].values())))
            flat += [{name: array[i] for name, array in results[0].items()} for i in range(batch)]
    lengths, found = case.lengths, [Arrays() for _ in flat]
    for place, index in enumerate(given.order):
        found[index] = {
            # A vector per sequence (a pooled embedding) has no padding to lose.
            name: array if case.model == MINILM and array.ndim == 1 else array[: lengths[index]]
            for name, array in flat[place].items()
        }
    return found


def synthetic(names: list[str], *, seed: int = SEED) -> Iterator[Case]:
    """Every variant in `names` at every shape, on random tokens."""
    for name in names:
        for shape, (batch, sequence, lengths) in SHAPES.items():
            one = feed(batch, sequence, lengths=lengths, seed=seed)
            yield Case(model=name, shape=shape, feeds=(one,), peers=shape in PEER_SHAPES)


def minilm(*, seed: int = SEED) -> Iterator[Case]:
    """The real MiniLM on real text: the standard library's `pydoc_data.topics`, cut into passages."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    documents = [topics[name] for name in sorted(topics)]
    long = [ids for text in documents if len(ids := tokenizer.encode(text).ids) >= 128]
    head, tail = long[0][0], long[0][-1]  # [CLS] and [SEP]
    full = [[*ids[:127], tail] for ids in long[:BATCH]]
    passages = [tokenizer.encode(part).ids for text in documents for part in text.split("\n\n")]
    passages = [[*ids[:255], tail] if len(ids) > 256 else ids for ids in passages if len(ids) >= 8 and ids[0] == head]
    chosen = np.random.default_rng(seed).permutation(len(passages))[: 4 * BATCH]
    for shape, rows in (("16x128", full), ("1x128", full[:1])):
        yield Case(model=MINILM, shape=shape, feeds=(_batch(rows, 128),), peers=False)
    sample = [passages[i] for i in chosen]
    longest = max(map(len, sample))
    feeds = tuple(_batch(sample[at : at + BATCH], longest) for at in range(0, len(sample), BATCH))
    yield Case(model=MINILM, shape="passages", feeds=feeds, ragged=True, peers=False)


def _batch(rows: list[list[int]], length: int) -> Feed:
    return _pad_to([_sequence(row, [0] * len(row)) for row in rows], length)


def _sequence(ids: list[int], types: list[int]) -> Feed:
    return {
        "input_ids": np.asarray(ids, np.int64),
        "attention_mask": np.ones(len(ids), np.int64),
        "token_type_ids": np.asarray(types, np.int64),
    }


@dataclass(frozen=True, kw_only=True)
class Squad:
    """SQuAD v1.1 dev as MLPerf's BERT benchmark cuts it into features."""

    features: list[tuple[list[int], int]]
    """(token ids with [CLS] and [SEP], tokens up to and including the first [SEP])."""

    @classmethod
    def read(cls, folder: Path, say: Callable[[str], None]) -> Squad:
        """From `dev-v1.1*.json` and `vocab.txt` in `folder`. Raises LookupError when they are not there."""
        from tokenizers import BertWordPieceTokenizer

        files, vocabulary = sorted(folder.glob("dev-v1.1*.json")), folder / "vocab.txt"
        files = [path for path in files if "guessed" not in path.name]
        if not files or not vocabulary.exists():
            raise LookupError(f"no dev-v1.1*.json and vocab.txt in {folder}; give their folder with --data")
        tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
        cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        features: list[tuple[list[int], int]] = []
        for article in json.loads(files[0].read_text())["data"]:
            for paragraph in article["paragraphs"]:
                context = tokenizer.encode(paragraph["context"], add_special_tokens=False).ids
                for question in paragraph["qas"]:
                    query = tokenizer.encode(question["question"], add_special_tokens=False).ids[:MAX_QUERY]
                    for span in _spans(context, MAX_LENGTH - len(query) - 3):
                        features.append(([cls_id, *query, sep_id, *span, sep_id], len(query) + 2))
        if len(features) != SQUAD_FEATURES:
            say(f"{files[0].name}: {len(features):,} features, MLPerf counts {SQUAD_FEATURES:,}")
        return cls(features=features)

    @property
    def mean(self) -> float:
        return float(np.mean([len(ids) for ids, _ in self.features]))

    def sample(self, count: int, *, seed: int = SEED) -> tuple[Feed, ...]:
        """`count` features whose lengths are spread as the whole set's, shuffled, padded to 384, in batches of 16.

        One feature comes from each of `count` equal strata of the features sorted by length, so the sample's mean
        length is the set's; `count` must be a multiple of 16, the batch the peers are compiled for.
        """
        if count <= 0 or count % BATCH:
            raise ValueError(f"the sample must be a positive multiple of {BATCH}; got {count}")
        by_length = sorted(range(len(self.features)), key=lambda i: (len(self.features[i][0]), i))
        picked = [by_length[int((k + 0.5) * len(by_length) / count)] for k in range(count)]
        rows = [self.features[picked[i]] for i in np.random.default_rng(seed).permutation(count)]
        sequences = [_sequence(ids, [0] * first + [1] * (len(ids) - first)) for ids, first in rows]
        return tuple(_pad_to(sequences[at : at + BATCH], MAX_LENGTH) for at in range(0, count, BATCH))


def _spans(context: list[int], room: int) -> Iterator[list[int]]:
    start = 0
    while True:
        yield context[start : start + room]
        if start + room >= len(context):
            return
        start += STRIDE
