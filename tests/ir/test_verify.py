"""Graphs that the verifier must accept, and one broken graph for each of its rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from espalier.errors import GraphError, InputNameError, InputShapeError, InputTypeError
from espalier.ir import Graph, Node, TensorType, reference, verify


def f32(*shape: int | str) -> TensorType:
    return TensorType("float32", shape)


def small() -> Graph:
    """y = relu(w x + b), from x [batch, seq, 3]."""
    return Graph(
        "small",
        ["x"],
        ["y"],
        [
            Node("Linear", ["x", "w", "b"], ["h"], name="dense"),
            Node("Activation", ["h"], ["y"], {"kind": "relu"}),
        ],
        {"w": np.array([[1, 0, 0], [0, -1, 0]], np.float32), "b": np.zeros(2, np.float32)},
        {
            "x": f32("batch", "seq", 3),
            "w": f32(2, 3),
            "b": f32(2),
            "h": f32("batch", "seq", 2),
            "y": f32("batch", "seq", 2),
        },
    )


def test_a_good_graph_passes() -> None:
    verify(small())


def test_other_names_for_extents_pass() -> None:
    graph = small()
    graph.types["h"] = f32("?1", "?2", 2)
    graph.types["y"] = f32("n", 7, 2)
    verify(graph)
    graph.types["y"] = TensorType("float32", None)
    verify(graph)


def test_an_absent_optional_operand_passes() -> None:
    graph = small()
    for inputs in (["x", "w", ""], ["x", "w"]):
        graph.nodes[0].inputs = inputs
        verify(graph)


def test_inputs_and_constants_may_be_outputs() -> None:
    graph = small()
    graph.outputs = ["x", "b", "y"]
    verify(graph)


def rename_output(graph: Graph, index: int, name: str) -> None:
    graph.nodes[index].outputs = [name]


def replace_input(graph: Graph, position: int, name: str) -> None:
    graph.nodes[0].inputs[position] = name


def feed_weight(graph: Graph) -> None:
    graph.inputs.append("v")
    graph.types["v"] = f32(2, 3)
    replace_input(graph, 1, "v")


BROKEN: dict[str, tuple[Callable[[Graph], Any], str]] = {
    "order": (lambda g: g.nodes.reverse(), r"node 0 \(Activation\) reads 'h', which is made later"),
    "undefined": (lambda g: replace_input(g, 0, "z"), r"\(Linear 'dense'\) reads 'z', which is never made"),
    "two producers": (lambda g: rename_output(g, 1, "h"), "value 'h' has two producers"),
    "input made again": (lambda g: rename_output(g, 1, "x"), "value 'x' has two producers"),
    "constant made again": (lambda g: rename_output(g, 1, "w"), "value 'w' has two producers"),
    "input twice": (lambda g: g.inputs.append("x"), "value 'x' has two producers"),
    "constant that is an input": (lambda g: g.inputs.append("w"), "value 'w' has two producers"),
    "input without a name": (lambda g: g.inputs.append(""), "empty name"),
    "input without a type": (lambda g: g.types.pop("x"), "graph input 'x' has no type"),
    "output never made": (lambda g: g.outputs.append("z"), "graph output 'z' is never made"),
    "output twice": (lambda g: g.outputs.append("y"), "distinct names"),
    "unknown op": (lambda g: setattr(g.nodes[0], "op", "Conv"), r"is no op of the native dialect; expected one of Pos"),
    "too many operands": (lambda g: g.nodes[1].inputs.append("x"), r"node 1 .*takes 1 operands, got 2"),
    "too few operands": (lambda g: g.nodes[0].inputs.clear(), "takes 2 to 3 operands, got 0"),
    "two outputs": (lambda g: g.nodes[1].outputs.append("z"), "must have one output"),
    "unknown attribute": (lambda g: g.nodes[1].attrs.update(alpha=1), "no attribute 'alpha'"),
    "missing attribute": (lambda g: g.nodes[1].attrs.clear(), "'kind' is missing"),
    "computed weight": (feed_weight, "operand 'weight' must be a constant, got the computed value 'v'"),
    "wrong extent": (lambda g: g.types.update(y=f32("batch", "seq", 3)), r"'y' is declared float32\[batch, seq, 3\]"),
    "wrong rank": (lambda g: g.types.update(y=f32("batch", 2)), "'y' is declared"),
    "wrong dtype": (lambda g: g.types.update(y=TensorType("float16", ("batch", "seq", 2))), "'y' is declared float16"),
    "untyped value": (lambda g: g.types.pop("h"), "output 'h' has no type; expected float32"),
    "untyped constant": (lambda g: g.types.pop("w"), "constant 'w' has no type"),
    "constant of another shape": (lambda g: g.types.update(w=f32(3, 2)), r"constant 'w' is declared float32\[3, 2\]"),
    "constant of another dtype": (lambda g: g.constants.update(w=np.zeros((2, 3))), r"but is float64\[2, 3\]"),
    "foreign node without a proto": (lambda g: setattr(g.nodes[1], "domain", ""), "has no ONNX node to run"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph_is_refused(case: str) -> None:
    change, message = BROKEN[case]
    graph = small()
    change(graph)
    with pytest.raises(GraphError, match=message):
        verify(graph)


def foreign(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Node:
    from onnx import helper

    return Node(op, inputs, outputs, domain="", proto=helper.make_node(op, inputs, outputs, **attributes))


def test_foreign_nodes_need_no_types() -> None:
    graph = small()
    graph.nodes.append(foreign("NonZero", ["y"], ["where"]))
    graph.outputs.append("where")
    verify(graph)


def test_a_native_node_cannot_read_an_untyped_value() -> None:
    graph = small()
    graph.nodes.insert(0, foreign("Identity", ["x"], ["z"]))
    graph.nodes[1].inputs[0] = "z"
    with pytest.raises(GraphError, match="'z', whose type is unknown"):
        verify(graph)


def test_a_subgraph_may_not_capture_what_is_made_later() -> None:
    from onnx import TensorProto, helper

    branch = helper.make_graph(
        [helper.make_node("Neg", ["y"], ["inner"])],
        "b",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    graph = small()
    graph.inputs.append("flag")
    graph.types["flag"] = TensorType("bool", ())
    node = foreign("If", ["flag"], ["out"], then_branch=branch, else_branch=branch)
    graph.nodes.append(node)
    verify(graph)
    graph.nodes.insert(0, graph.nodes.pop())
    with pytest.raises(GraphError, match="captures 'y', which is made later"):
        verify(graph)


# ---- running ---------------------------------------------------------------------------------------------------------


def test_the_reference_runs_a_graph() -> None:
    x = np.array([[[1, 2, 3], [-1, -2, 3]]], np.float32)
    found = reference.run(small(), {"x": x})
    np.testing.assert_array_equal(found["y"], [[[1, 0], [0, 2]]])


def test_the_reference_refuses_foreign_nodes() -> None:
    graph = small()
    graph.nodes.append(foreign("Sin", ["y"], ["z"]))
    with pytest.raises(GraphError, match=r"Sin .* of domain 'ai.onnx' is not native"):
        reference.run(graph, {"x": np.zeros((1, 1, 3), np.float32)})


@pytest.mark.parametrize(
    ("feeds", "error", "message"),
    [
        ({}, InputNameError, "input 'x' is missing"),
        ({"x": np.zeros((1, 1, 3), np.float32), "y": np.zeros(1)}, InputNameError, "no input 'y'; expected: x"),
        ({"x": np.zeros((1, 1, 3))}, InputTypeError, "dtype float32, got float64"),
        ({"x": np.zeros((1, 3), np.float32)}, InputShapeError, r"shape float32\[batch, seq, 3\], got \[1, 3\]"),
        ({"x": np.zeros((1, 1, 4), np.float32)}, InputShapeError, r"extent 3 \(fixed by the model\) on axis 2"),
    ],
)
def test_the_reference_checks_its_feeds(feeds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        reference.run(small(), feeds)


def test_a_symbol_has_one_value() -> None:
    graph = small()
    graph.inputs.append("m")
    graph.types["m"] = TensorType("int64", ("batch", "seq"))
    with pytest.raises(InputShapeError, match=r"'m' must have extent 4 \(seq, as in 'x'\) on axis 1, got \[2, 5\]"):
        reference.run(graph, {"x": np.zeros((2, 4, 3), np.float32), "m": np.zeros((2, 5), np.int64)})
