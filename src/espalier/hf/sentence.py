"""Folders in the layout of sentence-transformers.

``modules.json`` lists an encoder and the modules that turn its tokens into one vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from espalier.errors import ModelFormatError, UnsupportedModelError
from espalier.hf.builder import Layers
from espalier.hf.config import Config, inside, read_bytes
from espalier.hf.encoders import Encoder, use_onnx
from espalier.hf.weights import Weights

MODULES = "modules.json"

_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_ACTIVATIONS = {
    "Identity": "",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
}


def read_modules(folder: Path) -> list[tuple[str, Path]]:
    """The kind and the folder of every module, in order, e.g. ``[("Transformer", folder), ("Pooling", ...)]``.

    Raises ModelFormatError when ``modules.json`` is not such a list, UnsupportedModelError when it does not begin
    with a Transformer and a Pooling.
    """
    path = folder / MODULES
    text = read_bytes(path, "the list of modules of a sentence-transformers model")
    try:
        entries = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("type"), str) for entry in entries
    ):
        raise ModelFormatError(f"{path}: expected a list of modules with a type and a path, got {str(entries)[:80]}")
    modules = [(entry["type"].rsplit(".", 1)[-1], inside(folder, entry.get("path"), path)) for entry in entries]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedModelError(
            f"{path}: expected a Transformer followed by a Pooling, got {', '.join(kinds) or 'nothing'}. {use_onnx()}"
        )
    for kind, part in modules[1:]:
        if kind not in _MODULES:
            raise UnsupportedModelError(
                f"{path}: expected modules of the kinds {', '.join(_MODULES)}, got {kind!r} ({part.name}). {use_onnx()}"
            )
    return modules


def add_modules(encoder: Encoder, modules: list[tuple[str, Path]]) -> None:
    """Build all modules after the Transformer.

    Outputs: ``sentence_embedding`` [batch, features], and ``token_embeddings`` [batch, seq, hidden] before pooling.
    """
    _check_transformer(modules[0][1])
    x, width = encoder.hidden, encoder.sizes.hidden
    for kind, folder in modules[1:]:
        x, width = _MODULES[kind](encoder, folder, x, width)
    encoder.layers.b.output(x, "sentence_embedding")
    encoder.layers.b.output(encoder.hidden, "token_embeddings")


def _check_transformer(folder: Path) -> None:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return
    config = Config.read(path, {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"})
    for key, expected in config.defaults.items():
        if config.get(key) != expected:
            raise UnsupportedModelError(f"{path}: expected {key} {expected!r}, got {config.get(key)!r}. {use_onnx()}")


def _pooling(encoder: Encoder, folder: Path, x: str, width: int) -> tuple[str, int]:
    config = Config.read(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.flag(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if modes == ["mean"]:
        return encoder.layers.b.add("MaskedMean", x, encoder.mask, name=folder.name, epsilon=1e-9), width
    if modes == ["cls"]:
        return encoder.layers.b.add("SelectToken", x, name=folder.name, index=0), width
    raise UnsupportedModelError(f"{config.path}: expected the pooling mode mean or cls, got {modes}. {use_onnx()}")


def _normalize(encoder: Encoder, folder: Path, x: str, width: int) -> tuple[str, int]:
    if (folder / "config.json").is_file():
        _check_names(Config.read(folder / "config.json"))
    return encoder.layers.b.add("L2Normalize", x, name=folder.name, epsilon=1e-12), width


def _dense(encoder: Encoder, folder: Path, x: str, width: int) -> tuple[str, int]:
    config = Config.read(
        folder / "config.json", {"activation_function": "torch.nn.modules.activation.Tanh", "bias": True}
    )
    _check_names(config)
    function = config.text("activation_function")
    kind = function.rsplit(".", 1)[-1]
    if not function.startswith("torch.nn.") or kind not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{config.path}: expected an activation_function of torch.nn among {', '.join(_ACTIVATIONS)}, got "
            f"{function!r}. {use_onnx()}"
        )
    if config.flag("use_residual"):
        raise UnsupportedModelError(f"{config.path}: a Dense module with a residual is not supported. {use_onnx()}")
    if config.integer("in_features") != width:
        raise ModelFormatError(f"{config.path}: in_features must be {width}, got {config.integer('in_features')}")
    rows = config.integer("out_features")
    layers = _layers(encoder, folder)
    weight = layers.weight("linear.weight", rows, width)
    bias = layers.weight("linear.bias", rows) if config.flag("bias") else ""
    y = layers.activation(layers.b.add("Linear", x, weight, bias, name=f"{folder.name}.linear"), _ACTIVATIONS[kind])
    layers.weights.finish(("(?!)",))
    return y, rows


def _layer_norm(encoder: Encoder, folder: Path, x: str, width: int) -> tuple[str, int]:
    config = Config.read(folder / "config.json")
    if config.integer("dimension") != width:
        raise ModelFormatError(f"{config.path}: dimension must be {width}, got {config.integer('dimension')}")
    layers = _layers(encoder, folder)
    y = layers.norm(x, "norm", width, 1e-5)
    layers.weights.finish(("(?!)",))
    return y, width


def _dropout(encoder: Encoder, folder: Path, x: str, width: int) -> tuple[str, int]:
    return x, width  # the identity when not training


def _layers(encoder: Encoder, folder: Path) -> Layers:
    return Layers(encoder.layers.b, Weights.read(folder), label=f"{folder.name}.")


def _check_names(config: Config) -> None:
    """Modules must read and write the sentence embedding, which is what they do unless told otherwise."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedModelError(
                f"{config.path}: expected {key} 'sentence_embedding', got {config.get(key)!r}. {use_onnx()}"
            )


_MODULES: dict[str, Callable[[Encoder, Path, str, int], tuple[str, int]]] = {
    "Pooling": _pooling,
    "Normalize": _normalize,
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Dropout": _dropout,
}
