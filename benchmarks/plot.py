"""Draw speed-up over ONNX Runtime against sparsity, one line per format, DeepSparse beside, from the committed results.

    python benchmarks/plot.py          # writes docs/speed-up.svg and docs/speed-up.png

Needs matplotlib (`pip install espalier[bench]`). The same results give the same SVG, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "engine.json"
TARGET = HERE.parent / "docs" / "speed-up"
SHAPES = {"16x128": "16 sequences of 128 tokens", "1x128": "1 sequence of 128 tokens"}
# (engine, pattern): label, colour, marker, line.
LINES = {
    ("espalier", "4x1"): ("Espalier, 4x1 blocks", "#1b7837", "s", "-"),
    ("espalier", "1x4"): ("Espalier, 1x4 blocks", "#7fbf7b", "^", "-"),
    ("espalier", "unstructured"): ("Espalier, unstructured", "#00441b", "o", "-"),
    ("deepsparse", "1x4"): ("DeepSparse 1.8, 1x4 blocks", "#af8dc3", "^", "--"),
    ("deepsparse", "4x1"): ("DeepSparse 1.8, 4x1 blocks", "#762a83", "s", "--"),
    ("deepsparse", "unstructured"): ("DeepSparse 1.8, unstructured", "#40004b", "o", "--"),
}


def points(result: dict[str, Any], shape: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """`(sparsity, speed-up)` of each line at one shape; the dense model starts every line."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in LINES}
    for row in result["rows"].values():
        if row["shape"] != shape or row["model"] == "minilm":
            continue
        for engine, pattern in LINES:
            ratio = row["speedup"].get(f"{engine}/onnxruntime")
            if ratio is not None and row["pattern"] in ("dense", pattern):
                found[engine, pattern].append((row["sparsity"], ratio))
    # A line that has only the dense point says nothing.
    return {key: sorted(values) for key, values in found.items() if any(s for s, _ in values)}


def place(sparsity: float) -> float:
    """Position along the axis: each step to the right halves the weights that are left."""
    return -math.log2(1 - sparsity)


def draw(result: dict[str, Any], target: Path) -> list[Path]:
    """Write `target` as SVG and PNG. Raises LookupError when the results hold nothing to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "espalier", "svg.fonttype": "none", "font.size": 10})
    import matplotlib.pyplot as plt

    panels = {shape: lines for shape in SHAPES if (lines := points(result, shape))}
    if not panels:
        raise LookupError(f"no row at {' or '.join(SHAPES)} with a sparse model; run benchmarks/engine.py first")
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), sharey=True, squeeze=False)
    for axis, (shape, lines) in zip(axes[0], panels.items(), strict=True):
        for key, values in lines.items():
            label, colour, marker, style = LINES[key]
            axis.plot([place(s) for s, _ in values], [ratio for _, ratio in values], style, color=colour, marker=marker,
                      markersize=5, label=label)  # fmt: skip
        ticks = sorted({s for values in lines.values() for s, _ in values})
        axis.set_xticks([place(s) for s in ticks], ["dense" if s == 0 else f"{s:.0%}" for s in ticks])
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.set_title(SHAPES[shape])
        axis.set_xlabel("encoder weights that are zero")
    axes[0][0].set_ylabel("times faster than ONNX Runtime, dense")
    axes[0][0].legend(frameon=False, loc="upper left")
    machine, threads = result["machine"], result["settings"]["threads"]
    figure.suptitle(
        f"BERT-base shape, fp32, {threads} thread{'s' * (threads != 1)}, {machine['cpu']} ({isa(machine['isa'])})",
        fontsize=10,
    )
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    written = [target.with_suffix(".svg"), target.with_suffix(".png")]
    figure.savefig(written[0], metadata={"Date": None})
    figure.savefig(written[1], dpi=144, metadata={"Software": None})
    plt.close(figure)
    return written


def isa(flags: list[str]) -> str:
    """The widest instruction set among the flags, as people call it."""
    for flag, name in (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON")):
        if flag in flags:
            return name
    return "no vector extension known"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--target", type=Path, default=TARGET, help="without extension (default: docs/speed-up)")
    arguments = parser.parse_args()
    if not arguments.results.exists():
        raise SystemExit(f"no {arguments.results}; run benchmarks/engine.py first")
    for path in draw(json.loads(arguments.results.read_text()), arguments.target):
        print(path)


if __name__ == "__main__":
    main()
