"""ResNet-50's shape beside ONNX Runtime, DeepSparse and OpenVINO: interleaved, outputs checked before timing.

    python benchmarks/images.py                                    # everything; resumes where an earlier run stopped
    python benchmarks/images.py --only 4x1-90 --batch 1 --engines onnxruntime,espalier --output images.json

The weights are random, so this measures speed and agreement between runtimes, never accuracy. ONNX Runtime runs the
dense float32 model, and a quantised one beside it; the others run the row's model. Every convolution but the first is
pruned, as is usual.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import machine
import measure
import models
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from remote import EngineFailedError, Remote
from rich.console import Console
from rich.table import Table
from worker import Engine

RESULTS = Path(__file__).resolve().parent / "results" / "images.json"
NAMES = ("dense", "unstructured-80", "unstructured-90", "4x1-90", "4x1-95", "dense-int8", "1x4-80-int8", "1x4-90-int8")
BATCHES = (1, 16)
SIZE, CLASSES = 224, 1000
BLOCKS = (3, 4, 6, 3)
"""Of each of the four stages."""
BASELINE, SAME = "onnxruntime", "onnxruntime-int8"
ENGINES = (BASELINE, "espalier", "deepsparse", "openvino")
TOLERANCE, TOLERANCE_INT8 = 2e-4, 0.25
"""Of differences from ONNX Runtime on the same model: the largest over the largest output; in 8 bits, root mean
squares. Random weights leave outputs that are a small part of what is rounded on the way to them."""

Floats = NDArray[np.float32]


class ResNet:
    """ResNet-50 v1.5 (strides in the 3x3 layers) with normalisation folded in, as ONNX."""

    def __init__(self, chosen: models.Variant, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._chosen = chosen
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def _op(self, op: str, *inputs: str, output: str = "", **attrs: Any) -> str:
        name = output or f"{op.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attrs))
        return name

    def _constant(self, array: Floats) -> str:
        name = f"weight{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def _conv(self, x: str, inputs: int, outputs: int, kernel: int, stride: int = 1, gain: float = 2.0) -> str:
        shape = (outputs, inputs, kernel, kernel)
        weight = self._random.normal(0, np.sqrt(gain / (inputs * kernel * kernel)), shape)
        if self._chosen.sparsity and inputs > 3:
            prune(weight, self._chosen.sparsity, models.BLOCKS[self._chosen.pattern])
            # As many outputs as the dense layer has: training would see to that.
            weight /= np.sqrt(np.mean(weight**2) / (gain / (inputs * kernel * kernel)))
        bias = self._constant(self._random.normal(0, 0.1, outputs))
        attrs = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        return self._op("Conv", x, self._constant(weight), bias, **attrs)

    def build(self) -> onnx.ModelProto:
        x = self._op("Relu", self._conv("image", 3, 64, 7, 2))
        x = self._op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        inputs = 64
        for stage, blocks in enumerate(BLOCKS):
            width = 64 << stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                y = self._op("Relu", self._conv(x, inputs, width, 1))
                y = self._op("Relu", self._conv(y, width, width, 3, stride))
                y = self._conv(y, width, 4 * width, 1, gain=0.5)
                shortcut = x if block else self._conv(x, inputs, 4 * width, 1, stride, gain=1.0)
                x = self._op("Relu", self._op("Add", y, shortcut))
                inputs = 4 * width
        x = self._op("Flatten", self._op("GlobalAveragePool", x), axis=1)
        weight = self._constant(self._random.normal(0, 1 / np.sqrt(inputs), (CLASSES, inputs)))
        self._op("Gemm", x, weight, self._constant(np.zeros(CLASSES)), output="logits", transB=1)
        graph = helper.make_graph(
            self._nodes,
            "resnet50",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", models.OPSET)])
        model.ir_version = 8
        return onnx.shape_inference.infer_shapes(model)


def prune(weight: Any, sparsity: float, block: tuple[int, int]) -> None:
    """Zero, in place, the groups of outputs x inputs (of one tap) with the smallest L1 norm.

    Args:
        weight: `[outputs, inputs, rows, columns]`, the first two divisible by the block.
    """
    height, width = block
    outputs, inputs, *kernel = weight.shape
    groups = weight.reshape(outputs // height, height, inputs // width, width, *kernel)
    norms = np.abs(groups).sum(axis=(1, 3), keepdims=True)
    groups *= norms > np.quantile(norms, sparsity)


def images(batch: int, seed: int) -> Floats:
    return np.random.default_rng([seed, batch]).normal(size=(batch, 3, SIZE, SIZE)).astype(np.float32)


def build(name: str, cache: Path, seed: int) -> Path:
    """The model's ONNX file, built if it is not in `cache` yet."""
    chosen = models.variant(name)
    path = cache / f"resnet50-{name}-seed{seed}-opset{models.OPSET}.onnx"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    if chosen.quantized:
        _quantize(build(chosen.float_name, cache, seed), partial, seed)
    else:
        onnx.save(ResNet(chosen, seed).build(), str(partial))
    partial.replace(path)
    return path


def _quantize(source: Path, target: Path, seed: int) -> None:
    """ONNX Runtime's static quantiser: uint8 activations, int8 weights with a scale per output, Q and DQ everywhere."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"image": images(4, seed + 1 + i)} for i in range(4)])

        def get_next(self) -> Any:
            return next(self.left, None)

    quantization.quantize_static(
        str(source),
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )


def agreement(reference: Floats, found: Floats, quantized: bool) -> float:
    """How far `found` is off; ValueError where that is too far."""
    if reference.shape != found.shape:
        raise ValueError(f"logits are {found.shape}, expected {reference.shape}")
    if quantized:
        off, limit = float(np.sqrt(np.mean((reference - found) ** 2) / np.mean(reference**2))), TOLERANCE_INT8
    else:
        off, limit = float(np.abs(reference - found).max() / np.abs(reference).max()), TOLERANCE
    if not off <= limit:
        raise ValueError(f"outputs differ by {off:.2e} > {limit:.0e}")
    return off


class Bench:
    """The results file, and one row after the other."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.command = f"python {shlex.join(['benchmarks/images.py', *sys.argv[1:]])}"
        settings = {"seed": options.seed, "threads": options.threads, "opset": models.OPSET, "size": SIZE}
        self.result: dict[str, Any] = {"machine": machine.describe(), "settings": settings, "rows": {}}
        self.result["versions"] = machine.versions()
        if options.output.exists() and not options.fresh:
            earlier = json.loads(options.output.read_text())
            if earlier["settings"] != settings or earlier["machine"]["cpu"] != self.result["machine"]["cpu"]:
                raise SystemExit(f"{options.output} was made otherwise: start over with --fresh, or use --output")
            self.result["rows"] = earlier["rows"]
            self.result["versions"] = {**earlier["versions"], **self.result["versions"]}

    def row(self, name: str, batch: int) -> bool:
        """Measure and store a row; False when an engine failed or disagreed."""
        options, quantized = self.options, bool(models.variant(name).quantized)
        path = build(name, options.cache, options.seed)
        shape, feed = (batch, 3, SIZE, SIZE), {"image": images(batch, options.seed)}
        oracle = Engine(BASELINE)
        oracle.prepare()
        # Sums of integers saturate by default on x86 processors without VNNI.
        oracle.load(str(path), None, options.threads, {"session.x64quantprecision": "1"} if quantized else {})
        oracle.set_calls([[feed]], ragged=False)
        reference = oracle.outputs()[0][0]["logits"]
        del oracle
        ready: dict[str, measure.Timed] = {}
        entries: dict[str, dict[str, Any]] = {}
        remotes: list[Remote] = []
        names = [e for e in options.engines if e in (BASELINE, "espalier") or options.peers.exists()]
        for engine_name in [*names, SAME] if quantized and BASELINE in names else names:
            dense = engine_name == BASELINE
            try:
                engine: Any
                if engine_name in ("deepsparse", "openvino"):
                    engine = Remote(options.peers, engine_name)
                    remotes.append(engine)
                    self.result["versions"][engine_name] = engine.version
                else:
                    engine = Engine(BASELINE if engine_name == SAME else engine_name)
                    engine.prepare()
                model = build("dense", options.cache, options.seed) if dense else path
                engine.load(str(model), shape, options.threads, {})
                engine.set_calls([[feed]], False)
                found = engine.outputs()[0][0]["logits"]
                # The dense model is another one than the row's, and ONNX Runtime is what the others are held to.
                entries[engine_name] = {} if dense else {"difference": agreement(reference, found, quantized)}
                ready[engine_name] = engine
            except (EngineFailedError, ValueError, RuntimeError) as error:
                entries[engine_name] = {"error": f"{type(error).__name__}: {error}"[:300]}
                self.console.print(f"[red]{name}/{batch}: {engine_name}:[/] {entries[engine_name]['error']}")
        stamp = {
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": machine.commit(),
            "command": self.command,
            "busy_before": machine.busy(),
        }
        timed = measure.interleave(ready, dict.fromkeys(ready, 1), rounds=options.rounds, tick=lambda: None)
        for engine_name, ((*seconds,),) in timed.items():
            low, median, high = (1e3 * float(np.percentile(seconds, q)) for q in (10, 50, 90))
            entries[engine_name] |= {
                "median_ms": round(median, 3),
                "p10_ms": round(low, 3),
                "p90_ms": round(high, 3),
                "images_per_s": round(1e3 * batch / median, 2),
            }
        for remote in remotes:
            remote.close()
        ours = entries.get("espalier", {}).get("median_ms")
        speedup = {
            engine: round(entry["median_ms"] / ours, 3)
            for engine, entry in entries.items()
            if ours and engine != "espalier" and "median_ms" in entry
        }
        self.result["rows"][f"{name}/{batch}"] = {**stamp, "engines": entries, "speedup": speedup}
        self._save()
        return all("error" not in entry for entry in entries.values())

    def _save(self) -> None:
        path: Path = self.options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n")
        partial.replace(path)

    def show(self) -> None:
        engines = [*ENGINES, SAME]
        table = Table("images/s", *engines, *(f"x {name}" for name in engines if name != "espalier"))
        for name, row in self.result["rows"].items():
            rates = [str(row["engines"].get(e, {}).get("images_per_s", "")) for e in engines]
            table.add_row(name, *rates, *(str(row["speedup"].get(e, "")) for e in engines if e != "espalier"))
        self.console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=NAMES, help="models (default: all)")
    parser.add_argument("--batch", action="append", type=int, help=f"images per call (default: {BATCHES})")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=models.SEED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=machine.PEERS, help="Python of the peers' environment")
    parser.add_argument("--cache", type=Path, default=models.CACHE, help="where models are built")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    options.engines = options.engines.split(",")
    if set(options.engines) - set(ENGINES):
        parser.error(f"unknown engines; choose from {', '.join(ENGINES)}")
    console = Console() if sys.stdout.isatty() else Console(width=180)
    bench = Bench(options, console)
    good = True
    for name in options.only or NAMES:
        for batch in options.batch or BATCHES:
            if f"{name}/{batch}" not in bench.result["rows"]:
                console.print(f"{name}/{batch}")
                good &= bench.row(name, batch)
    bench.show()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
