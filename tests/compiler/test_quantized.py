"""Lowered 8 bit layers against the NumPy bodies of the dialect, and their plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier import compiler
from espalier.compiler.native import NativeProgram
from espalier.ir import Graph, Node, TensorType, reference, verify
from espalier.passes.partition import NativeSegment, Program

FEATURES = 16
RANDOM = np.random.default_rng(4)
STATIC = (0.03, np.uint8(120))


class Builder:
    """A graph over tokens ``x`` ``[batch, seq, 16]``, value by value."""

    def __init__(self) -> None:
        kind = TensorType("float32", ("batch", "seq", FEATURES))
        self.graph = Graph("quantised", ["x"], [], [], {}, {"x": kind})

    def constant(self, value: Any) -> str:
        return self.graph.add_constant("c", np.asarray(value))

    def node(self, op: str, inputs: list[str], features: int, **attrs: Any) -> str:
        name = self.graph.fresh(op.lower())
        self.graph.nodes.append(Node(op, inputs, [name], attrs, name=name))
        self.graph.types[name] = TensorType("float32", ("batch", "seq", features))
        return name

    def linear(
        self,
        x: str,
        rows: int = FEATURES,
        *,
        static: tuple[float, Any] | None = STATIC,
        dtype: str = "int8",
        zeros: bool = False,
        sparsity: float = 0.0,
        weight: np.ndarray | None = None,
    ) -> str:
        columns = int((self.graph.types[x].shape or ())[-1])
        limits = np.iinfo(dtype)
        zero = RANDOM.integers(limits.min, limits.max + 1, rows).astype(dtype) if zeros else np.zeros((), dtype)
        if weight is None:
            weight = RANDOM.integers(limits.min, limits.max + 1, (rows, columns)).astype(dtype)
            empty = RANDOM.random((rows, -(-columns // 4))).repeat(4, 1)[:, :columns] < sparsity
            weight = np.where(empty, zero.reshape(-1, 1), weight)
        scale = RANDOM.uniform(1e-3, 2e-3, rows).astype(np.float32)
        inputs = [x, *map(self.constant, (weight, scale, zero, RANDOM.normal(0, 1, rows).astype(np.float32)))]
        inputs += [self.constant(np.float32(static[0])), self.constant(static[1])] if static else []
        return self.node("QLinear", inputs, rows, activations="static" if static else "token")

    def rounded(self, x: str, static: tuple[float, Any] = STATIC) -> str:
        inputs = [x, self.constant(np.float32(static[0])), self.constant(static[1])]
        return self.node("FakeQuantize", inputs, int((self.graph.types[x].shape or ())[-1]))

    def done(self, *outputs: str) -> Graph:
        self.graph.outputs = list(outputs)
        verify(self.graph)
        return self.graph


X = RANDOM.normal(0, 1, (3, 7, FEATURES)).astype(np.float32)
X[0, 0], X[0, 1, :3], X[0, 2, 0] = 0, [100, -100, 1e-9], np.nan


def check(graph: Graph) -> NativeProgram:
    """The compiled graph, which computes what the NumPy bodies do."""
    program = NativeProgram(graph, threads=1, tune=False)
    found, wanted = program.run({"x": X}), reference.run(graph, {"x": X})
    for name in graph.outputs:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-6, atol=2e-6)
    return program


def quantisations(program: NativeProgram) -> int:
    return sum(row.name.startswith("quantize:") for row in program.profile())


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize(("dtype", "zeros"), [("int8", False), ("int8", True), ("uint8", True)])
@pytest.mark.parametrize("static", [None, STATIC, (0.03, np.int8(-8)), (0.03, np.int8(-128)), (0.03, np.uint8(255))])
def test_layers(static: Any, dtype: str, zeros: bool, sparsity: float) -> None:
    b = Builder()
    program = check(b.done(b.linear("x", 12, static=static, dtype=dtype, zeros=zeros, sparsity=sparsity)))
    (layer,) = program.layers()
    assert layer.type == ("int8" if static else "int8 per token")
    assert layer.format in ("dense8", "1x4x8")
    assert layer.sparsity == pytest.approx(sparsity, abs=0.12)


def test_integers_are_made_once_for_all_readers_of_the_same() -> None:
    b = Builder()
    other = (0.05, np.uint8(120))
    outputs = [b.linear("x"), b.linear("x"), b.linear("x", static=None), b.linear("x", static=None), b.rounded("x")]
    assert quantisations(check(b.done(*outputs))) == 2
    assert quantisations(check(b.done(*outputs, b.linear("x", static=other)))) == 3


def test_integers_are_made_where_their_value_is() -> None:
    b = Builder()
    wide = b.node("Activation", [b.linear("x", 32)], 32, kind="relu")
    again = (0.03, np.uint8(3))
    y = b.linear(wide, static=again)
    assert quantisations(check(b.done(y))) == 1
    # Also with a residual, and for two readers of the same; not when somebody reads floats, or other integers.
    total = b.node("Add", ["x", y], FEATURES)
    readers = [b.linear(total, static=again), b.rounded(total, again)]
    assert quantisations(check(b.done(*readers))) == 1
    assert quantisations(check(b.done(*readers, total))) == 2
    assert quantisations(check(b.done(*readers, b.linear(total)))) == 3


def operations(program: NativeProgram, kind: str) -> list[str]:
    return [row.name for row in program.profile() if row.name.startswith(kind)]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("after", [(0.04, np.uint8(0)), (0.04, np.int8(-20))])
def test_sums_of_integers_that_are_rounded_again(after: Any, relu: bool) -> None:
    b = Builder()
    left, right = b.rounded(b.linear("x")), b.rounded("x", (0.05, np.int8(3)))
    total = b.node("Add", [left, right], FEATURES)
    if relu:
        total = b.node("Activation", [total], FEATURES, kind="relu")
    again = b.node("Add", [b.rounded(total, after), right], FEATURES)
    last = b.rounded(again)
    program = check(b.done(b.linear(total, static=after), last))
    assert set(operations(program, "fakequantize")) == {last}  # the output has floats, and no operand
    assert len(operations(program, "add") + operations(program, "activation")) == 2
    assert operations(program, "quantize:") == ["quantize:x", "quantize:x"]


@pytest.mark.parametrize("read", ["output", "other integers", "another activation", "one operand"])
def test_sums_that_somebody_reads_as_floats(read: str) -> None:
    b = Builder()
    left, right = b.rounded(b.linear("x")), b.rounded("x")
    total = b.node("Add", [left, "x" if read == "one operand" else right], FEATURES)
    outputs = [b.rounded(total)]
    if read == "output":
        outputs.append(total)
    if read == "other integers":
        outputs.append(b.linear(total, static=(0.05, np.uint8(7))))
    if read == "another activation":
        outputs = [b.rounded(b.node("Activation", [total], FEATURES, kind="gelu"))]
    program = check(b.done(*outputs))
    assert left in operations(program, "fakequantize")
    assert operations(program, "quantize:add") or read == "another activation"


def test_unstructured_zeros_may_run_as_floats() -> None:
    b = Builder()
    weight = RANDOM.integers(1, 127, (64, FEATURES)) * (RANDOM.random((64, FEATURES)) < 0.05)
    program = check(b.done(b.linear("x", 64, weight=weight.astype(np.int8)), b.linear("x", 64, static=None)))
    assert [(layer.type, layer.format) for layer in program.layers()] == [
        ("int8", "unstructured"), ("int8 per token", "dense8"),
    ]  # fmt: skip


def test_a_row_that_could_overflow_runs_as_floats() -> None:
    b = Builder()
    columns = 2**31 // (255 * 255) + 1
    shape = ("batch", "seq", columns)
    b.graph.types["x"] = TensorType("float32", shape)
    static = (1.0, np.uint8(0))
    y = b.linear("x", 4, static=static, dtype="uint8", weight=np.full((4, columns), 255, np.uint8))
    graph = b.done(y)
    program = NativeProgram(graph, threads=1, tune=False)
    x = np.full((1, 2, columns), 255, np.float32)
    # Sums of 33 thousand equal floats.
    np.testing.assert_allclose(program.run({"x": x})[y], reference.run(graph, {"x": x})[y], rtol=1e-3)
    assert program.layers()[0].format in ("dense", "unstructured", "4x1")


@pytest.mark.parametrize("exact", [False, True])
def test_a_plan_gives_the_same_bits_and_is_small(tmp_path: Path, exact: bool) -> None:
    b = Builder()
    x = b.linear("x", 256)
    for static, dtype, zeros in ((STATIC, "int8", False), (None, "uint8", True)):
        x = b.linear(x, 256, static=static, dtype=dtype, zeros=zeros, sparsity=0.9)
    graph = b.done(x)
    graph.nodes[0].why = "a remark"
    path = compiler.save_plan(Program.of(graph, [NativeSegment(graph)]), tmp_path / "q.espalier", exact=exact)
    step = compiler.read_plan(path).steps[0]
    assert isinstance(step, NativeSegment)
    assert step.graph.nodes[0].why == "a remark"
    programs = [NativeProgram(g, threads=1, tune=False) for g in (graph, step.graph)]
    first, second = (program.run({"x": X})[x] for program in programs)
    np.testing.assert_array_equal(first, second)
    assert programs[0].layers() == programs[1].layers()
    assert path.stat().st_size < 2 * 0.05 * 4 * 256 * 256 + 256 * FEATURES + 12_000
