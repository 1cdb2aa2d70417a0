"""Folders that cannot be read, and odd ones that can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from espalier import hf
from espalier.errors import ModelError, ModelFormatError, ModelNotFoundError, UnsupportedModelError
from espalier.ir import reference

Edit = Callable[..., None]
Arrays = dict[str, np.ndarray]


@pytest.fixture
def folder(bert_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT to damage."""
    return Path(shutil.copytree(bert_folder, tmp_path / "copy"))


def change_weights(folder: Path, change: Callable[[Arrays], Arrays | None]) -> None:
    path = folder / "model.safetensors"
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    save_file(change(arrays) or arrays, path)


def output(folder: Path) -> np.ndarray:
    ids = np.arange(6).reshape(1, 6)
    graph = hf.read(folder)
    return reference.run(graph, {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0})[
        "last_hidden_state"
    ]


# ---- weights that do not fit -----------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(folder: Path) -> None:
    name = "encoder.layer.1.attention.self.key.weight"
    change_weights(folder, lambda arrays: {k: v for k, v in arrays.items() if k != name})
    with pytest.raises(ModelFormatError, match=rf"'{name}' of shape \[32, 32\] is missing"):
        hf.read(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    change_weights(folder, lambda arrays: arrays.update({name: np.zeros((47, 32), np.float32)}))
    with pytest.raises(ModelFormatError, match=rf"'{name}' must have shape \[48, 32\], got \[47, 32\]"):
        hf.read(folder)


def test_a_transposed_weight_is_not_taken_for_the_right_one(folder: Path) -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    change_weights(folder, lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name].T)}))
    with pytest.raises(ModelFormatError, match="must have shape"):
        hf.read(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    change_weights(folder, lambda arrays: arrays.update({"encoder.layer.2.output.dense.bias": np.zeros(3, np.float32)}))
    with pytest.raises(ModelFormatError, match=r"unexpected tensors 'encoder\.layer\.2\.output\.dense\.bias'"):
        hf.read(folder)


def test_an_integer_weight_is_refused(folder: Path) -> None:
    name = "encoder.layer.0.output.dense.weight"
    change_weights(folder, lambda arrays: arrays.update({name: arrays[name].astype(np.int8)}))
    with pytest.raises(ModelFormatError, match=f"'{name}' must be of a float type.*got I8"):
        hf.read(folder)


def test_more_layers_in_the_configuration_than_in_the_file(folder: Path, edit_config: Edit) -> None:
    edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(ModelFormatError, match=r"encoder\.layer\.2\..* is missing"):
        hf.read(folder)


def test_a_head_that_the_weights_lack(folder: Path, edit_config: Edit) -> None:
    edit_config(folder, architectures=["BertForQuestionAnswering"])
    with pytest.raises(ModelFormatError, match=r"'qa_outputs\.weight' .* is missing"):
        hf.read(folder)


# ---- names that checkpoints have had ---------------------------------------------------------------------------------


def test_old_and_prefixed_names_and_leftovers_change_nothing(folder: Path) -> None:
    wanted = output(folder)

    def old(arrays: Arrays) -> Arrays:
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
            for name, array in arrays.items()
        }
        return renamed | {"embeddings.position_ids": np.arange(40)[None]}

    change_weights(folder, old)
    np.testing.assert_array_equal(output(folder), wanted)
    for prefix in ("bert.", "model.", ""):
        change_weights(
            folder,
            lambda arrays, p=prefix: {p + k.removeprefix("bert.").removeprefix("model."): v for k, v in arrays.items()},
        )
        np.testing.assert_array_equal(output(folder), wanted)
    change_weights(folder, lambda arrays: arrays.update({"cls.predictions.bias": np.zeros(60, np.float32)}))
    np.testing.assert_array_equal(output(folder), wanted)


def test_the_same_parameter_under_two_names(folder: Path) -> None:
    change_weights(folder, lambda arrays: arrays.update({"embeddings.LayerNorm.gamma": np.ones(32, np.float32)}))
    with pytest.raises(ModelFormatError, match="the same parameter"):
        hf.read(folder)


def test_two_encoders_in_one_file(folder: Path) -> None:
    change_weights(folder, lambda arrays: {f"{p}{k}": v for k, v in arrays.items() for p in ("question.", "passage.")})
    with pytest.raises(ModelFormatError, match=r"expected one tensor named .*word_embeddings\.weight, got "):
        hf.read(folder)


def test_a_wrapped_model_keeps_its_head(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("Bert", "QuestionAnswering").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda arrays: {f"model.{name}": array for name, array in arrays.items()})
    assert hf.read(tmp_path).outputs == ["start_logits", "end_logits"]


def test_without_architectures_it_is_a_base_model(folder: Path, edit_config: Edit) -> None:
    edit_config(folder, architectures=None)
    assert hf.read(folder).outputs == ["last_hidden_state", "pooler_output"]


def test_a_pretraining_class_over_an_encoder_alone(folder: Path, edit_config: Edit) -> None:
    edit_config(folder, architectures=["BertForMaskedLM"])
    assert hf.read(folder).outputs == ["last_hidden_state", "pooler_output"]


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deberta-v2"}, "model_type to be one of bert, .*'deberta-v2'.*optimum-cli export onnx"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForQuestionAnswering.*got 'BertForMultipleChoice'"),
        ({"architectures": ["RobertaModel"]}, "got 'RobertaModel'"),
        ({"hidden_act": "mish"}, "hidden_act to be one of gelu.*'mish'"),
        ({"position_embedding_type": "relative_key"}, "'absolute', got 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is set"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_settings_that_are_not_supported(changes: Any, message: str, folder: Path, edit_config: Edit) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        hf.read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": 3}, "'model_type' must be a string"),
        ({"hidden_size": "32"}, "'hidden_size' must be an integer >= 1, got '32'"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be an integer >= 1"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide the hidden size 32"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' must be an integer"),
        ({"layer_norm_eps": float("nan")}, "'layer_norm_eps' must be a finite number"),
        ({"is_decoder": "no"}, "'is_decoder' must be true or false"),
        ({"architectures": "BertModel"}, "architectures must be a list"),
    ],
)
def test_settings_that_make_no_sense(changes: Any, message: str, folder: Path, edit_config: Edit) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelFormatError, match=message):
        hf.read(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 1}'])
def test_a_configuration_that_is_no_json_object(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        hf.read(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KEYS = ["model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        "intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "id2label",
        "position_embedding_type", "is_decoder", "quantization_config", "tie_word_embeddings"]  # fmt: skip


def assert_read_or_refused(folder: Path) -> None:
    """Either a graph comes out, or a ModelError that names the folder."""
    try:
        found = hf.read(folder).outputs
    except ModelError as error:
        found = [str(error)] if str(folder) in str(error) else []
    assert found


ONE_FOLDER = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONE_FOLDER
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_any_value_of_a_setting_is_read_or_refused(changes: dict[str, Any], folder: Path, bert_folder: Path) -> None:
    values = json.loads((bert_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    assert_read_or_refused(folder)


@ONE_FOLDER
@given(data=st.data())
def test_damaged_weights_are_read_or_refused(data: st.DataObject, folder: Path, bert_folder: Path) -> None:
    blob = bytearray((bert_folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(blob)))
    # A new file every time: the graph of the last one may still map the old.
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(blob[:cut])
    assert_read_or_refused(folder)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        hf.read(tmp_path / "nothing")
    with pytest.raises(ModelFormatError, match="is a file"):
        hf.read(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"expected model\.safetensors"):
        hf.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json: no such file"):
        hf.read(folder)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"import BertModel as M.*save_pretrained"):
        hf.read(folder)


def test_shards(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("Bert")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    np.testing.assert_array_equal(output(tmp_path / "many"), output(tmp_path / "one"))
    index = tmp_path / "many" / "model.safetensors.index.json"
    good = index.read_text()
    for bad, error, message in [
        ({"weight_map": {}}, ModelFormatError, "weight_map"),
        ({"weight_map": {"a": "../one/model.safetensors"}}, ModelFormatError, "inside of the model folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, ModelFormatError, "inside of the model folder"),
        ({"weight_map": {"a": 3}}, ModelFormatError, "path of a part"),
        ({"weight_map": {"a": "gone.safetensors"}}, ModelNotFoundError, "no such file"),
        ({"weight_map": {"a": shards[0].name}}, ModelFormatError, "'a' is missing"),
    ]:
        index.write_text(json.dumps(bad))
        with pytest.raises(error, match=message):
            hf.read(tmp_path / "many")
    index.write_text(good)
    shards[1].unlink()
    with pytest.raises(ModelNotFoundError, match=shards[1].name):
        hf.read(tmp_path / "many")


def test_reading_imports_no_framework(bert_folder: Path) -> None:
    program = (
        "import sys; from espalier import hf; hf.read(sys.argv[1]); "
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime', 'tokenizers') if m in sys.modules])"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program, str(bert_folder)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
