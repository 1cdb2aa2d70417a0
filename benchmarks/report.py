"""The results as tables: for the terminal, and with `python benchmarks/report.py` as Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results" / "engine.json"
BASELINE = "onnxruntime"
COST_COLUMNS = ("load_to_first_answer_s", "load_s", "import_s", "peak_mib", "file_mib", "compile_s")


def speedups(entries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`{"espalier/onnxruntime": 4.2, ...}`: how many times faster the first is than the second, in one row."""
    times = {name: entry["median_ms"] for name, entry in entries.items() if "median_ms" in entry}
    return {f"{a}/{b}": round(times[b] / times[a], 3) for a in times for b in times if (a != b and "espalier" in (a, b))
            or (a != b and b == BASELINE)}  # fmt: skip


def rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: milliseconds of each engine, then Espalier's speed-up over each peer."""
    names: list[str] = []
    for row in result["rows"].values():
        names += [name for name in row["engines"] if name not in names]
    peers = [name for name in names if name != "espalier"]
    header = ["model / shape", *(f"{name} ms" for name in names), *(f"over {name}" for name in peers)]
    cells = []
    for identity, row in result["rows"].items():
        times = [row["engines"].get(name, {}) for name in names]
        ratios = [row["speedup"].get(f"espalier/{name}") for name in peers]
        cells.append([
            identity,
            *("failed" if "error" in entry else f"{entry['median_ms']:,.1f}" if entry else "" for entry in times),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ])  # fmt: skip
    return header, cells


def costs(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the load times, memory and file sizes."""
    cells = []
    for name, entry in result["costs"].items():
        values = {**entry, **({"file_mib": entry["file_bytes"] / 2**20} if "file_bytes" in entry else {})}
        cells.append([name, *("" if key not in values else f"{values[key]:,.2f}" for key in COST_COLUMNS)])
    return ["cost", *COST_COLUMNS], cells


def best_against(result: dict[str, Any], peer: str = "deepsparse") -> list[str]:
    """Espalier's best format against the peer's best, at equal sparsity and shape; one line each.

    Formats are rows of their own, measured minutes apart, so they are compared by what each gained over the baseline of
    its own row rather than by their times.
    """
    best: dict[tuple[float, str], dict[str, tuple[float, str]]] = {}
    for row in result["rows"].values():
        for engine in ("espalier", peer):
            gain = row["speedup"].get(f"{engine}/{BASELINE}")
            if gain is not None and row["sparsity"]:
                slot = best.setdefault((row["sparsity"], row["shape"]), {})
                slot[engine] = max(slot.get(engine, (0.0, "")), (gain, row["pattern"]))
    lines = []
    for (sparsity, shape), slot in sorted(best.items()):
        if len(slot) == 2:
            (ours, our_format), (theirs, their_format) = slot["espalier"], slot[peer]
            lines.append(
                f"best at {sparsity:.0%}, {shape}: espalier {our_format} {ours:.2f}x the baseline, "
                f"{peer} {their_format} {theirs:.2f}x: {ours / theirs:.2f} times"
            )
    return lines


def show(result: dict[str, Any], console: Console) -> None:
    for header, cells in (rows(result), costs(result)):
        if cells:
            table = Table()
            for index, title in enumerate(header):
                table.add_column(title, no_wrap=index == 0, justify="right" if index else "left")
            for cell in cells:
                table.add_row(*cell)
            console.print(table)
    for line in best_against(result):
        console.print(line)


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for header, cells in (rows(result), costs(result)):
        if cells:
            lines += ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)] + [""]
    return "\n".join(lines + [f"- {line}" for line in best_against(result)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    print(markdown(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
