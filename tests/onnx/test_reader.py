"""Reading ONNX files: zero copies, external data, every element type, and no file that crashes the reader."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from espalier.errors import ModelFormatError, ModelNotFoundError
from espalier.ir.graph import TensorType
from espalier.onnx import read
from espalier.onnx.reader import LARGE

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

WIDE = LARGE  # a float32 matrix of WIDE elements is four times as large as what stays in the file


def linear(weight: np.ndarray | None = None, **tensor: object) -> onnx.ModelProto:
    """``y = x @ w`` with one large weight."""
    array = np.arange(WIDE, dtype=np.float32).reshape(64, -1) if weight is None else weight
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", array.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def constant_model(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """A model that reads one initializer."""
    graph = helper.make_graph(
        [helper.make_node("Identity", [tensor.name], ["y"])],
        "constant",
        [],
        [helper.make_tensor_value_info("y", tensor.data_type, list(tensor.dims))],
        [tensor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def test_large_weights_are_views_of_the_file(tmp_path: Path) -> None:
    graph = read(saved(linear(), tmp_path))
    weight = graph.constants["w"]
    assert not weight.flags.owndata
    assert not weight.flags.writeable
    np.testing.assert_array_equal(weight, np.arange(WIDE, dtype=np.float32).reshape(64, -1))
    assert graph.inputs == ["x"]
    assert graph.outputs == ["y"]
    assert graph.types["x"] == TensorType("float32", ("batch", "seq", 64))
    assert graph.types["y"] == TensorType("float32", ("batch", "seq", WIDE // 64))
    assert graph.opsets == {"": 17}
    assert [(n.op, n.domain, n.is_native) for n in graph.nodes] == [("MatMul", "", False)]


def test_the_file_is_not_modified(tmp_path: Path) -> None:
    path = saved(linear(), tmp_path)
    before = path.read_bytes()
    read(path)
    assert path.read_bytes() == before


def test_unnamed_extents_are_distinct(tmp_path: Path) -> None:
    model = linear()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[:2]:
        dim.ClearField("dim_param")
    shape = read(saved(model, tmp_path)).types["x"].shape
    assert shape is not None
    assert str(shape[0]).startswith("?")
    assert shape[0] != shape[1]


@pytest.mark.parametrize(
    "element",
    ["FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64", "BOOL",
     "COMPLEX64", "COMPLEX128", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4"],
)  # fmt: skip
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_element_types(tmp_path: Path, element: str, raw: bool) -> None:
    number = getattr(TensorProto, element)
    kind = helper.tensor_dtype_to_np_dtype(number)
    array = np.arange(6).reshape(2, 3).astype(kind)
    tensor = (
        numpy_helper.from_array(array, "w") if raw else helper.make_tensor("w", number, [2, 3], array.ravel().tolist())
    )
    found = read(saved(constant_model(tensor), tmp_path)).constants["w"]
    assert found.dtype == kind
    assert found.shape == (2, 3)
    assert (found == array).all()


def test_strings(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b"bc"])
    assert read(saved(constant_model(tensor), tmp_path)).constants["w"].tolist() in (["a", "bc"], [b"a", b"bc"])


# --- external data -------------------------------------------------------------------------------------------------


def external(folder: Path, **entries: str) -> Path:
    """The linear model with its weight beside it; ``entries`` replace what the tensor says of it."""
    array = np.arange(WIDE, dtype=np.float32)
    (folder / "weights.bin").write_bytes(b"\0" * 8 + array.tobytes())
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": "8", "length": str(array.nbytes), **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return saved(model, folder)


def test_external_data_is_mapped(tmp_path: Path) -> None:
    weight = read(external(tmp_path)).constants["w"]
    assert not weight.flags.owndata
    np.testing.assert_array_equal(weight.ravel(), np.arange(WIDE, dtype=np.float32))


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../weights.bin"},
        {"location": "/etc/passwd"},
        {"location": "C:\\weights.bin"},
        {"location": "a\\..\\..\\weights.bin"},
        {"location": ""},
        {"offset": "-4"},
        {"offset": "many"},
        {"offset": "400000000000"},
        {"length": "4"},
        {"length": "-1"},
        {"offset": "16"},
    ],
    ids=str,
)
def test_external_data_that_is_wrong(tmp_path: Path, entries: dict[str, str]) -> None:
    with pytest.raises(ModelFormatError):
        read(external(tmp_path, **entries))


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"elsewhere\.bin"):
        read(external(tmp_path, location="elsewhere.bin"))


def test_external_link_out_of_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = external(inner, location="link.bin")
    (tmp_path / "secret").write_bytes(b"\0" * (8 + 4 * WIDE))
    os.symlink(tmp_path / "secret", inner / "link.bin")
    with pytest.raises(ModelFormatError, match="outside"):
        read(path)


def test_a_cache_of_links_into_one_store(tmp_path: Path) -> None:
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    store.mkdir()
    snapshot.mkdir()
    model = external(store)
    os.symlink(model, snapshot / "model.onnx")
    os.symlink(store / "weights.bin", snapshot / "weights.bin")
    assert read(snapshot / "model.onnx").constants["w"].size == WIDE


# --- what else a model may hold ---------------------------------------------------------------------------------------


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    model = linear()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Mine", "local"
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    model.functions.append(
        helper.make_function("local", "Mine", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)])
    )
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert [n.op for n in read(saved(model, tmp_path)).nodes] == ["MatMul"]


def test_sparse_initializers_become_dense(tmp_path: Path) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [2], [5.0, 7.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [1, 5])
    model = linear()
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 3]))
    model.graph.node.append(helper.make_node("Identity", ["s"], ["z"]))
    dense = read(saved(model, tmp_path)).constants["s"]
    np.testing.assert_array_equal(dense, [[0, 5, 0], [0, 0, 7]])


def test_subgraphs_are_kept(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["twice"])], "body", [],
        [helper.make_tensor_value_info("twice", TensorProto.FLOAT, None)],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    inputs = [helper.make_tensor_value_info("x", 1, [2]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = read(saved(model, tmp_path))
    assert found.nodes[0].proto.attribute[0].g.node[0].op_type == "Add"


# --- broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"not a model at all",
        b"\xff" * 64,
        b"\x0a\xff\xff\xff\xff\x0f",
        b"PK\x03\x04" + b"\0" * 60,
        b"\x08\x07",
    ],
    ids=["empty", "zero", "text", "ones", "long field", "zip", "no graph"],
)
def test_files_that_are_no_models(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError):
        read(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        read(tmp_path / "none.onnx")
    with pytest.raises(ModelNotFoundError, match="folder"):
        read(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = linear().SerializeToString()
    # The last field that is needed is the operator set, which comes last.
    for cut in [*range(1, 80), *range(80, len(data), 97), len(data) - 1]:
        path = tmp_path / "model.onnx"
        path.write_bytes(data[:cut])
        with pytest.raises(ModelFormatError):
            read(path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    data = linear().SerializeToString()
    head = data.index(np.arange(4, dtype=np.float32).tobytes())
    rng = np.random.default_rng(0)
    outside = [*range(head), *range(head + 4 * WIDE, len(data))]
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.choice(outside, rng.integers(1, 4)):
            broken[at] = rng.integers(256)
        path = tmp_path / "model.onnx"
        path.write_bytes(bytes(broken))
        with contextlib.suppress(ModelFormatError, ModelNotFoundError):
            read(path)


@pytest.mark.parametrize("dims", [[64, 65], [1 << 40, 1 << 40], [-1, 64], [0], [2] * 70], ids=str)
def test_shapes_that_the_bytes_do_not_fill(tmp_path: Path, dims: list[int]) -> None:
    for large in (True, False):
        tensor = numpy_helper.from_array(np.zeros(WIDE if large else 8, np.float32), "w")
        del tensor.dims[:]
        tensor.dims.extend(dims)
        with pytest.raises(ModelFormatError, match="'w'"):
            read(saved(constant_model(tensor), tmp_path))


def test_typed_data_that_is_too_short(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    tensor.dims[0] = 1 << 45
    with pytest.raises(ModelFormatError, match="3 values"):
        read(saved(constant_model(tensor), tmp_path))


def test_a_sparse_tensor_that_claims_too_much(tmp_path: Path) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [5.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [1])
    model = linear()
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 20, 1 << 20]))
    with pytest.raises(ModelFormatError, match="sparse"):
        read(saved(model, tmp_path))


@pytest.mark.parametrize("fault", ["undefined", "twice", "output", "opset", "duplicate"])
def test_graphs_that_do_not_hold_together(tmp_path: Path, fault: str) -> None:
    model = linear()
    if fault == "undefined":
        model.graph.node[0].input[0] = "nothing"
    elif fault == "twice":
        model.graph.node.append(model.graph.node[0])
    elif fault == "output":
        model.graph.output[0].name = "z"
    elif fault == "opset":
        del model.opset_import[:]
    else:
        model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(ModelFormatError):
        read(saved(model, tmp_path))


def test_an_operator_with_too_few_inputs_is_refused(tmp_path: Path) -> None:
    model = linear()
    del model.graph.node[0].input[1]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFormatError, match=r"product.*MatMul takes 2 to 2 inputs, got 1"):
        read(tmp_path / "m.onnx")


def test_an_attribute_of_another_type_is_refused(tmp_path: Path) -> None:
    model = constant_model(numpy_helper.from_array(np.zeros((2, 3), np.float32), "t"))
    model.graph.node[0].op_type = "Flatten"
    model.graph.node[0].attribute.append(helper.make_attribute("axis", "one"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFormatError, match=r"attribute 'axis' of Flatten must be of type INT"):
        read(tmp_path / "m.onnx")
