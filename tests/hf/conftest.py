"""Tiny random checkpoints, saved by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCAB, MAX_POSITIONS = 60, 40

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "attn_implementation": "eager",
}
_DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "attn_implementation": "eager",
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertConfig", _SIZES),
    "Roberta": ("RobertaConfig", {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1}),
    "XLMRoberta": ("XLMRobertaConfig", {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1}),
    "Camembert": ("CamembertConfig", {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1}),
    "DistilBert": ("DistilBertConfig", _DISTILBERT),
    "Electra": ("ElectraConfig", {**_SIZES, "embedding_size": 16}),
    "MPNet": ("MPNetConfig", {**_SIZES, "pad_token_id": 1}),
}

Maker = Callable[..., Any]


@pytest.fixture(scope="session")
def make_model() -> Maker:
    """``make_model(family, task, **settings)``: a model in evaluation mode with weights that all matter."""
    torch = pytest.importorskip("torch", reason="reference models come from PyTorch")
    transformers = pytest.importorskip("transformers", reason="reference models come from transformers")
    torch.set_num_threads(1)

    def make(family: str, task: str = "Model", seed: int = 0, **settings: Any) -> Any:
        config_class, values = CONFIGS[family]
        config = getattr(transformers, config_class)(**{**values, **settings})
        torch.manual_seed(seed)
        name = family + (task if task == "Model" else f"For{task}")
        model = getattr(transformers, name)(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # Biases and norms start as zeros and ones; a reader that swapped or dropped them would pass unseen.
                norm = parameter.ndim == 1 and parameter_name.lower().endswith("norm.weight")
                parameter.copy_(0.2 * torch.randn_like(parameter) + float(norm))
        return model

    return make


@pytest.fixture(scope="session")
def bert_folder(make_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BertModel with its pooler. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("bert") / "tiny-bert"
    make_model("Bert").save_pretrained(folder)
    return folder


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """``edit_config(folder, key=value)``; a value of None removes the key."""

    def edit(folder: Path, **changes: Any) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit
