"""Folders in the layout of sentence-transformers, with vectors computed here from the encoder's tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from espalier import hf
from espalier.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from espalier.ir import reference

Arrays = dict[str, np.ndarray]

IDS = np.arange(18).reshape(3, 6) + 5
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
FEEDS: Arrays = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": IDS * 0}

Module = tuple[str, str, dict[str, Any], Arrays]
"""Kind, folder, configuration, weights."""

POOLING: Module = ("Pooling", "1_Pooling", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {})
CLS: Module = ("Pooling", "1_Pooling", {"pooling_mode": "cls"}, {})
NORMALIZE: Module = ("Normalize", "2_Normalize", {}, {})
RNG = np.random.default_rng(5)
DENSE_WEIGHTS = {
    "linear.weight": RNG.standard_normal((8, 32)).astype(np.float32),
    "linear.bias": RNG.standard_normal(8).astype(np.float32),
}
DENSE_CONFIG = {
    "in_features": 32,
    "out_features": 8,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
DENSE: Module = ("Dense", "2_Dense", DENSE_CONFIG, DENSE_WEIGHTS)


def dense(weights: Arrays | None = None, **changes: Any) -> Module:
    return ("Dense", "2_Dense", {**DENSE_CONFIG, **changes}, DENSE_WEIGHTS if weights is None else weights)


Layout = Callable[..., Path]


@pytest.fixture
def layout(bert_folder: Path, tmp_path: Path) -> Layout:
    def make(*modules: Module, home: str = "", package: str = "sentence_transformers.models.") -> Path:
        root = tmp_path / "model"
        shutil.copytree(bert_folder, root / home)
        listed = [{"idx": 0, "name": "0", "path": home, "type": f"{package}Transformer"}]
        for index, (kind, folder, config, weights) in enumerate(modules, 1):
            (root / folder).mkdir(parents=True)
            (root / folder / "config.json").write_text(json.dumps(config))
            if weights:
                save_file(weights, root / folder / "model.safetensors")
            listed.append({"idx": index, "name": str(index), "path": folder, "type": package + kind})
        (root / "modules.json").write_text(json.dumps(listed))
        return root

    return make


def run(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The sentence embedding and the tokens it was made of."""
    found = reference.run(hf.read(folder), FEEDS)
    assert list(found) == ["sentence_embedding", "token_embeddings"]
    return found["sentence_embedding"], found["token_embeddings"]


def mean(tokens: np.ndarray) -> np.ndarray:
    return np.stack([row[mask == 1].mean(axis=0) for row, mask in zip(tokens, MASK, strict=True)])


def test_mean_pooling(layout: Layout) -> None:
    vector, tokens = run(layout(POOLING))
    np.testing.assert_allclose(vector, mean(tokens), atol=1e-6)


def test_an_encoder_in_a_folder_of_its_own_and_new_module_paths(layout: Layout) -> None:
    vector, tokens = run(layout(CLS, NORMALIZE, home="0_Transformer", package="sentence_transformers.base.modules.x."))
    np.testing.assert_allclose(vector, tokens[:, 0] / np.linalg.norm(tokens[:, 0], axis=1, keepdims=True), atol=1e-6)


def test_dense_and_layer_norm(layout: Layout) -> None:
    norm: Module = ("LayerNorm", "4_LayerNorm", {"dimension": 8}, {"norm.weight": 2 * np.ones(8, np.float32),
                                                                  "norm.bias": np.ones(8, np.float32)})  # fmt: skip
    vector, tokens = run(layout(POOLING, DENSE, ("Dropout", "3_Dropout", {"dropout": 0.5}, {}), norm))
    wide = np.tanh(mean(tokens) @ DENSE_WEIGHTS["linear.weight"].T + DENSE_WEIGHTS["linear.bias"])
    centred = wide - wide.mean(axis=1, keepdims=True)
    wanted = 2 * centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) + 1
    np.testing.assert_allclose(vector, wanted, atol=1e-5)


def test_dense_without_bias_and_activation(layout: Layout) -> None:
    weights = {"linear.weight": DENSE_WEIGHTS["linear.weight"]}
    plain = dense(weights, bias=False, activation_function="torch.nn.modules.linear.Identity")
    vector, tokens = run(layout(POOLING, plain))
    np.testing.assert_allclose(vector, mean(tokens) @ weights["linear.weight"].T, atol=1e-5)


@pytest.mark.parametrize("kind", ["max", "mean_sqrt_len_tokens", "lasttoken", ["mean", "cls"]])
def test_poolings_that_are_not_supported(kind: Any, layout: Layout) -> None:
    with pytest.raises(UnsupportedModelError, match="expected the pooling mode mean or cls"):
        hf.read(layout(("Pooling", "1_Pooling", {"pooling_mode": kind}, {})))


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ((), UnsupportedModelError, "expected a Transformer followed by a Pooling, got Transformer"),
        ((POOLING, ("CNN", "2_CNN", {}, {})), UnsupportedModelError, r"got 'CNN' \(2_CNN\)"),
        ((POOLING, dense({})), ModelNotFoundError, r"expected model\.safetensors"),
        ((POOLING, dense(in_features=33)), ModelFormatError, "in_features must be 32, got 33"),
        ((POOLING, dense(out_features=9)), ModelFormatError, r"shape \[9, 32\], got \[8, 32\]"),
        ((POOLING, dense(bias=False)), ModelFormatError, r"unexpected tensors 'linear\.bias'"),
        ((POOLING, dense(use_residual=True)), UnsupportedModelError, "residual"),
        ((POOLING, dense(activation_function="os.Tanh")), UnsupportedModelError, "of torch.nn among"),
        ((POOLING, dense(module_input_name="token_embeddings")), UnsupportedModelError, "module_input_name"),
    ],
)
def test_modules_that_cannot_be_built(modules: Any, error: type[Exception], message: str, layout: Layout) -> None:
    with pytest.raises(error, match=message):
        hf.read(layout(*modules))


@pytest.mark.parametrize("text", ["{}", "[3]", '[{"type": 3}]', "[", '[{"type": "x.Transformer", "path": "../.."}]'])
def test_a_list_of_modules_that_is_none(text: str, layout: Layout) -> None:
    folder = layout(POOLING)
    (folder / "modules.json").write_text(text)
    with pytest.raises(ModelFormatError, match=r"modules\.json"):
        hf.read(folder)


def test_a_transformer_with_another_task(layout: Layout) -> None:
    folder = layout(POOLING)
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "fill-mask"}')
    with pytest.raises(UnsupportedModelError, match="'feature-extraction', got 'fill-mask'"):
        hf.read(folder)


def test_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(max_length=2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = hf.load_tokenizer(tmp_path)
    assert loaded.encode("a b a c").ids == [0, 1, 0, 2]

    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="is not a tokenizer"):
        hf.load_tokenizer(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        hf.load_tokenizer(tmp_path / "nowhere")


def test_tokenizer_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from espalier.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="pip install tokenizers"):
        hf.load_tokenizer(tmp_path)
