"""Text to distil sentence embeddings on: short English texts from data at hand, one per line, without repeats.

    python benchmarks/compress/corpus.py ../shared/data build/compress/corpus.txt

Takes the sentences of the STS benchmark's *training* part, the sentences of SST-2, the questions and the sentences of
the paragraphs of SQuAD's training part, and the standard library's documentation of Python. Nothing of a development or
test part is taken, and a text that occurs in the development or test part of the STS benchmark is left out.
``--repeat stsb=8`` writes the texts of a source so often: those like the ones to be judged on are few.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
MOST_CHARACTERS = 600
FEWEST_WORDS = 3


def stsb(data: Path, part: str) -> Iterator[str]:
    with (data / "stsb" / f"stsb-en-{part}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            yield from row[:2]


def sst2(data: Path) -> Iterator[str]:
    for line in (data / "sst2" / "stsa.binary.train").read_text(encoding="utf-8").splitlines():
        yield line.partition(" ")[2]


def squad(data: Path) -> Iterator[str]:
    for article in json.loads((data / "squad" / "train-v1.1.rebuilt.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            yield from SENTENCE_END.split(paragraph["context"])
            for question in paragraph["qas"]:
                yield question["question"]


def pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    for topic in topics.values():
        for block in re.split(r"\n\s*\n", topic):
            text = " ".join(block.split())
            if not re.match(r"[*=\-+|>.]", text):
                yield from SENTENCE_END.split(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with stsb, sst2 and squad")
    parser.add_argument("output", type=Path, help="the text file to write")
    parser.add_argument("--sources", nargs="+", default=["stsb", "sst2", "squad", "pydoc"], help="which to take")
    parser.add_argument("--repeat", nargs="+", default=[], metavar="SOURCE=TIMES", help="write its texts so often")
    arguments = parser.parse_args()
    sources = {
        "stsb": lambda: stsb(arguments.data, "train"),
        "sst2": lambda: sst2(arguments.data),
        "squad": lambda: squad(arguments.data),
        "pydoc": pydoc,
    }
    if unknown := set(arguments.sources) - set(sources):
        sys.exit(f"unknown sources {sorted(unknown)}: expected some of {', '.join(sources)}")
    held_out = {" ".join(text.split()) for part in ("dev", "test") for text in stsb(arguments.data, part)}
    times = dict(entry.partition("=")[::2] for entry in arguments.repeat)
    if wrong := [entry for entry in times.items() if entry[0] not in arguments.sources or not entry[1].isdigit()]:
        sys.exit(f"--repeat: expected SOURCE=TIMES of {', '.join(arguments.sources)}, got {'='.join(wrong[0])}")
    seen: dict[str, int] = {}
    for name in arguments.sources:
        before = len(seen)
        for text in sources[name]():
            line = " ".join(text.split())
            if len(line) <= MOST_CHARACTERS and len(line.split()) >= FEWEST_WORDS and line not in held_out:
                seen.setdefault(line, int(times.get(name, 1)))
        print(f"{name}: {len(seen) - before} texts")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial")
    lines = [line for line, count in seen.items() for _ in range(count)]
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(arguments.output)
    print(f"{arguments.output}: {len(lines)} texts")


if __name__ == "__main__":
    main()
