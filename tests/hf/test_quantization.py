"""Checkpoints in the convention of compressed-tensors, made by hand from its documentation."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="reference models come from PyTorch")
from safetensors.numpy import load_file, save_file

from espalier import hf
from espalier.errors import ModelFormatError, UnsupportedModelError
from espalier.hf.config import Config
from espalier.hf.quantization import Quantization, read_quantization
from espalier.ir import reference
from espalier.ir.graph import Graph

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
STATIC = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
QUERY, DOWN = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"
FEEDS = {"input_ids": np.array([[2, 5, 9, 3], [2, 7, 3, 0]]), "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]])}
FEEDS["token_type_ids"] = np.zeros_like(FEEDS["input_ids"])


def settings(groups: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    usual = {
        "group_0": {"targets": [QUERY], "weights": WEIGHTS, "input_activations": STATIC, "output_activations": None},
        "group_1": {"targets": ["re:.*output\\.dense$"], "weights": WEIGHTS, "input_activations": TOKEN},
    }
    base = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": usual if groups is None else groups,
        "ignore": ["encoder.layer.0.attention.output.dense", "encoder.layer.1.attention.output.dense"],
        "kv_cache_scheme": None,
    }
    return {**base, **changes}


def quantized(tensors: dict[str, np.ndarray], name: str, *, static: bool) -> None:
    """Replace a float layer by an 8 bit one."""
    weight = tensors[f"{name}.weight"]
    scale = np.abs(weight).max(1, keepdims=True) / 127
    tensors[f"{name}.weight"] = np.rint(weight / scale).astype(np.int8)
    tensors[f"{name}.weight_scale"] = scale
    if static:
        tensors[f"{name}.input_scale"] = np.array([0.03], np.float32)
        tensors[f"{name}.input_zero_point"] = np.array([-7], np.int8)


@pytest.fixture
def folder(bert_folder: Path, tmp_path: Path, edit_config: Callable[..., None]) -> Path:
    """One static layer and two quantised per token; the others are float."""
    copy = tmp_path / "copy"
    shutil.copytree(bert_folder, copy)
    tensors = dict(load_file(copy / "model.safetensors"))
    quantized(tensors, QUERY, static=True)
    for index in range(2):
        quantized(tensors, f"encoder.layer.{index}.output.dense", static=False)
    save_file(tensors, copy / "model.safetensors")
    edit_config(copy, quantization_config=settings())
    return copy


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replace or, for None, remove tensors of the query layer."""
    found = dict(load_file(folder / "model.safetensors"))
    for name, array in tensors.items():
        if array is None:
            del found[f"{QUERY}.{name}"]
        else:
            found[f"{QUERY}.{name}"] = array
    save_file(found, folder / "model.safetensors")


def node(graph: Graph, name: str) -> Any:
    return next(node for node in graph.nodes if node.name == name)


def test_quantised_layers_stay_quantised(folder: Path, bert_folder: Path) -> None:
    graph = hf.read(folder)
    assert [n.attrs["activations"] for n in graph.nodes if n.op == "QLinear"] == ["static", "token", "token"]
    query = node(graph, QUERY)
    constants = [graph.constants.get(name) for name in query.inputs[1:]]
    assert [None if c is None else (c.dtype.name, c.shape) for c in constants] == [
        ("int8", (32, 32)), ("float32", (32,)), None, ("float32", (32,)), ("float32", ()), ("int8", ()),
    ]  # fmt: skip
    assert constants[-1] == -7
    stored = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(constants[0], stored[f"{QUERY}.weight"])
    # Inputs of this model lie within what the static layer's 8 bits hold, so both models say nearly the same.
    got, want = (reference.run(hf.read(place), FEEDS)["last_hidden_state"] for place in (folder, bert_folder))
    assert 1e-4 < np.abs(got - want).max() < 0.2


def test_one_scale_for_all_and_a_symmetric_input(folder: Path) -> None:
    change(folder, weight_scale=np.array([0.01], np.float32), input_zero_point=None)
    graph = hf.read(folder)
    constants = [graph.constants.get(name) for name in node(graph, QUERY).inputs[1:]]
    assert constants[1].shape == ()
    assert constants[-1].dtype == np.int8
    assert constants[-1] == 0


def test_weights_with_a_zero_point(folder: Path) -> None:
    change(folder, weight_zero_point=np.arange(32, dtype=np.int8)[:, None])
    graph = hf.read(folder)
    np.testing.assert_array_equal(graph.constants[node(graph, QUERY).inputs[3]], np.arange(32))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": np.zeros((32, 32), np.float32)}, "must be of I8 or U8, since config.json says.*got F32"),
        ({"weight_scale": None}, f"{QUERY}.weight_scale' of shape .* is missing"),
        ({"weight_scale": np.ones((31, 1), np.float32)}, r"must have shape \[32, 1\], got \[31, 1\]"),
        ({"weight_scale": np.zeros((32, 1), np.float32)}, "must hold finite numbers above 0"),
        ({"input_scale": np.array([np.nan], np.float32)}, "must hold finite numbers above 0"),
        ({"input_scale": np.ones(2, np.float32)}, r"must have shape \[1, 1\], got \[2\]"),
        ({"input_zero_point": np.zeros(1, np.int32)}, "must be of I8 or U8"),
        ({"weight_g_idx": np.zeros(32, np.int32)}, "unexpected tensors .*g_idx"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, tensors: dict[str, Any], message: str) -> None:
    change(folder, **tensors)
    with pytest.raises(ModelFormatError, match=message):
        hf.read(folder)


def test_integers_without_a_word_in_the_configuration(folder: Path, edit_config: Callable[..., None]) -> None:
    edit_config(folder, quantization_config=None)
    with pytest.raises(ModelFormatError, match=r"must be of a float type .* got I8; .*describe how it is quantised"):
        hf.read(folder)


def read_settings(values: Any) -> Quantization:
    return read_quantization(Config(Path("config.json"), {"quantization_config": values}, {}))


def group(**changes: Any) -> dict[str, Any]:
    base = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": TOKEN}
    return settings({"g": {**base, **changes}})


def test_which_layers_are_meant() -> None:
    by_class = read_settings(group())
    assert by_class.activations("a.b") == "token"
    assert by_class.activations("encoder.layer.0.attention.output.dense") is None
    both = settings()["config_groups"] | {
        "rest": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": TOKEN}
    }
    found = read_settings(settings(both))
    assert [found.activations(name) for name in (QUERY, DOWN, "x")] == ["static", "token", "token"]
    assert read_settings(None).activations("x") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "quant_method None, expected 'compressed-tensors'"),
        ([1], "must be a table"),
        (settings(format="pack-quantized"), "format 'pack-quantized', expected 'int-quantized'"),
        (settings(quantization_status="frozen"), "quantization_status 'frozen'"),
        (settings(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
        (settings(sparsity_config={"format": "sparse-bitmask"}), "format 'sparse-bitmask', expected 'dense'"),
        (settings(config_groups=None), "config_groups must be a table"),
        (group(weights={**WEIGHTS, "num_bits": 4}), r"g\.weights\.num_bits 4, expected 8"),
        (group(weights={**WEIGHTS, "num_bits": 8.0}), r"g\.weights\.num_bits 8\.0"),
        (group(weights={**WEIGHTS, "strategy": "group"}), "strategy 'group', expected 'channel' or 'tensor'"),
        (group(weights={**WEIGHTS, "type": "float"}), "type 'float', expected 'int'"),
        (group(input_activations=None), r"g\.input_activations must be a table"),
        (group(input_activations={**TOKEN, "dynamic": "local"}), "dynamic 'local', expected True"),
        (group(input_activations={**STATIC, "strategy": "channel"}), "strategy 'channel', expected 'tensor'"),
        (group(output_activations=STATIC), "output_activations is set"),
    ],
)
def test_what_cannot_be_read(values: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_settings(values)


@pytest.mark.parametrize("targets", [None, "Linear", [3], ["re:("]])
def test_targets_that_are_none(targets: Any) -> None:
    with pytest.raises(ModelFormatError, match=re.escape("g.targets")):
        read_settings(group(targets=targets))
