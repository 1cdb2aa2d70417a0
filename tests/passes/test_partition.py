"""Cutting graphs into steps: order, convexity, what pays, what may leak padding."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from espalier.errors import GraphError
from espalier.ir.graph import Graph, Node, TensorType, node_reads
from espalier.passes.partition import MAX_ISLANDS, NativeSegment, OrtSegment, Step, partition

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402

TOKENS = TensorType("float32", ("batch", "seq", 8))
ORIGINAL = b"the model as it was given"


class Maker:
    """Builds graphs over one token input ``x``: ``native`` adds a Linear, ``light`` a LayerNorm."""

    def __init__(self) -> None:
        self.graph = Graph("g", ["x"], [], [], {}, {"x": TOKENS}, {"": 17})
        self.graph.add_constant("w", np.ones((8, 8), np.float32))
        self.graph.add_constant("g", np.ones(8, np.float32))

    def native(self, *inputs: str, op: str = "", kind: TensorType = TOKENS) -> str:
        if len(inputs) == 2:
            return self._add(Node("Add", list(inputs), []), kind)
        if op == "SelectToken":
            return self._add(Node(op, list(inputs), [], {"index": 0}), TensorType("float32", ("batch", 8)))
        return self._add(Node("Linear", [*inputs, "w", ""], []), kind)

    def light(self, x: str) -> str:
        return self._add(Node("LayerNorm", [x, "g", ""], [], {"epsilon": 1e-5}), TOKENS)

    def foreign(self, *inputs: str, op: str = "Sum", kind: TensorType = TOKENS) -> str:
        name = f"v{len(self.graph.nodes)}"
        proto = helper.make_node(op, list(inputs), [name])
        return self._add(Node(op, list(inputs), [], domain="", proto=proto, why="test"), kind)

    def _add(self, node: Node, kind: TensorType) -> str:
        name = f"v{len(self.graph.nodes)}"
        node.outputs, node.name = [name], name
        self.graph.nodes.append(node)
        self.graph.types[name] = kind
        return name

    def done(self, *outputs: str) -> Graph:
        self.graph.outputs = list(outputs)
        return self.graph


def kinds(steps: list[Step]) -> str:
    return "".join("N" if isinstance(step, NativeSegment) else "F" for step in steps)


def ends(step: Step) -> tuple[list[str], list[str]]:
    return (step.graph.inputs, step.graph.outputs) if isinstance(step, NativeSegment) else (step.inputs, step.outputs)


def check(graph: Graph, steps: list[Step]) -> None:
    """Every step reads only what came before, and together they make the outputs with every node once."""
    known = set(graph.inputs)
    count = 0
    for step in steps:
        inputs, outputs = ends(step)
        assert set(inputs) <= known, "a step reads what a later one makes"
        known |= set(outputs)
        if isinstance(step, NativeSegment):
            assert all(node.is_native for node in step.graph.nodes)
            assert set(step.graph.types) >= {*inputs, *outputs}
            assert set(step.graph.constants) <= {name for node in step.graph.nodes for name in node_reads(node)}
            count += len(step.graph.nodes)
        else:
            assert isinstance(step.model, bytes)
            body = onnx.ModelProto.FromString(step.model).graph
            assert [value.name for value in body.input] == inputs
            assert [value.name for value in body.output] == outputs
            count += len(body.node)
    assert count == len(graph.nodes)
    assert set(graph.outputs) <= known


def test_all_native() -> None:
    make = Maker()
    graph = make.done(make.native(make.native("x")))
    steps = partition(graph, ORIGINAL)
    assert kinds(steps) == "N"
    assert not steps[0].exact_padding  # type: ignore[union-attr]
    check(graph, steps)


def test_nothing_native_is_the_original() -> None:
    make = Maker()
    (step,) = partition(make.done(make.foreign("x")), ORIGINAL)
    assert isinstance(step, OrtSegment)
    assert step.whole
    assert step.model is ORIGINAL
    assert [node.why for node in step.nodes] == ["test"]


def test_light_native_nodes_alone_do_not_pay() -> None:
    make = Maker()
    (step,) = partition(make.done(make.foreign(make.light("x"))), ORIGINAL)
    assert isinstance(step, OrtSegment)
    assert step.whole
    assert "no linear layer" in step.nodes[0].why


def test_a_small_native_share_does_not_pay() -> None:
    make = Maker()
    make.graph.add_constant("big", np.ones((64, 64), np.float32))
    graph = make.done(make.foreign(make.native("x"), "big", op="MatMul"))
    (step,) = partition(graph, ORIGINAL)
    assert isinstance(step, OrtSegment)
    assert "only 2%" in step.nodes[0].why


def test_tables_that_are_looked_up_are_no_work() -> None:
    make = Maker()
    make.graph.add_constant("table", np.ones((1000, 8), np.float32))
    ids = TensorType("int64", ("batch", "seq"))
    make.graph.inputs.append("ids")
    make.graph.types["ids"] = ids
    graph = make.done(make.native(make.foreign("table", "ids", op="Gather")))
    assert kinds(partition(graph, ORIGINAL)) == "FN"


def test_weights_inside_control_flow_count() -> None:
    make = Maker()
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "inner")
    then = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["o"])],
        "then",
        [],
        [helper.make_tensor_value_info("o", 1, None)],
        [weight],
    )
    make.graph.inputs.append("flag")
    make.graph.types["flag"] = TensorType("bool", ())
    out = make.foreign("flag", op="If")
    make.graph.nodes[-1].proto = helper.make_node("If", ["flag"], [out], then_branch=then, else_branch=then)
    (step,) = partition(make.done(make.native("x"), out), ORIGINAL)
    assert isinstance(step, OrtSegment)


def test_too_many_islands() -> None:
    make = Maker()
    value = "x"
    for _ in range(MAX_ISLANDS + 1):
        value = make.foreign(make.native(value))
    graph = make.done(value)
    (step,) = partition(graph, ORIGINAL)
    assert isinstance(step, OrtSegment)
    assert "5 separate native parts" in step.nodes[0].why
    # Without an original there is nothing to fall back to.
    steps = partition(graph)
    assert kinds(steps) == "NF" * (MAX_ISLANDS + 1)
    check(graph, steps)


def test_light_nodes_join_the_segment_that_reads_them() -> None:
    make = Maker()
    # The foreign node would separate the light one from the rest if it ran as early as it can.
    light = make.light("x")
    graph = make.done(make.native(light, make.native(make.foreign("x"))))
    steps = partition(graph, ORIGINAL)
    assert kinds(steps) == "FN"
    check(graph, steps)


def test_convex() -> None:
    make = Maker()
    first = make.native("x")
    graph = make.done(make.native(first, make.foreign(first)))
    steps = partition(graph)
    assert kinds(steps) == "NFN"
    check(graph, steps)


def test_padding_that_may_leak() -> None:
    make = Maker()
    hidden = make.native("x")
    graph = make.done(make.foreign(hidden))
    (native, _) = partition(graph)
    assert isinstance(native, NativeSegment)
    assert native.exact_padding


def test_padding_that_cannot_leak() -> None:
    make = Maker()
    hidden = make.native("x")
    picked = make.native(hidden, op="SelectToken")
    graph = make.done(hidden, make.foreign(picked, kind=TensorType("float32", ("batch", 8))))
    (native, _) = partition(graph)
    assert isinstance(native, NativeSegment)
    # The hidden state leaves as an output of the model, where padding means nothing; one row per sequence is exact.
    assert not native.exact_padding


def test_an_edge_of_unknown_type() -> None:
    make = Maker()
    strange = make.foreign("x", kind=TensorType("sequence", None))
    graph = make.done(make.native(strange))
    (step,) = partition(graph, ORIGINAL)
    assert isinstance(step, OrtSegment)
    assert "unknown" in step.nodes[-1].why
    make = Maker()
    make.graph.types["x"] = TensorType("unknown", None)
    graph = make.done(make.foreign("x"))
    with pytest.raises(GraphError, match="element type"):
        partition(graph)


def test_values_captured_by_a_subgraph() -> None:
    make = Maker()
    hidden = make.native("x")
    body = helper.make_graph(
        [helper.make_node("Identity", [hidden], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)]
    )
    make.graph.inputs.append("flag")
    make.graph.types["flag"] = TensorType("bool", ())
    out = make.foreign("flag", op="If")
    make.graph.nodes[-1].proto = helper.make_node("If", ["flag"], [out], then_branch=body, else_branch=body)
    steps = partition(make.done(out))
    assert kinds(steps) == "NF"
    assert set(ends(steps[1])[0]) == {"flag", hidden}


def test_order_is_checked() -> None:
    make = Maker()
    make.foreign(make.native("x"))
    make.graph.nodes.reverse()
    with pytest.raises(GraphError, match="topological"):
        partition(make.done("v1"))


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs(seed: int) -> None:
    rng = random.Random(seed)
    make = Maker()
    values = ["x"]
    for _ in range(rng.randint(2, 25)):
        choose: Any = rng.choice([make.native, make.light, make.foreign])
        values.append(
            choose(rng.choice(values[-4:])) if rng.random() < 0.6 else make.foreign(*rng.choices(values, k=2))
        )
    graph = make.done(*dict.fromkeys(rng.choices(values[1:], k=2) + values[-1:]))
    graph.prune()
    steps = partition(graph)
    check(graph, steps)
    # Adjacent steps of one kind would be one step.
    pattern = kinds(steps)
    assert "NN" not in pattern
    assert "FF" not in pattern
