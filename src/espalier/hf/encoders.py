"""The encoder families: what their checkpoints call things, and the graph of their encoder.

All are post-norm transformers of one shape. What differs is data: names of parameters and settings, how positions are
counted, and MPNet's relative bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from espalier.errors import ModelFormatError, UnsupportedModelError
from espalier.hf.builder import Layers
from espalier.hf.config import Config

MASK_VALUE = float(np.finfo(np.float32).min)
"""What transformers adds to the scores of masked keys."""

_RELATIVE_BUCKETS = 32
_RELATIVE_DISTANCE = 128

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "",
}
"""The ``kind`` of Activation by the name transformers gives it; "" is the identity."""


@dataclass(frozen=True)
class LayerNames:
    """Modules of one transformer layer, below the layer's own name."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    mix: str = "attention.output.dense"
    mix_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    down_norm: str = "output.LayerNorm"


@dataclass(frozen=True)
class Family:
    """One encoder architecture as transformers writes it.

    ``classes`` are the prefixes of its class names, ``module`` the name of the encoder inside a model with a head.
    ``keys`` maps names of settings to the family's own; ``defaults`` (under the own names) stand in for absent ones.
    """

    classes: tuple[str, ...]
    module: str
    defaults: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=dict)
    layer: str = "encoder.layer"
    names: LayerNames = LayerNames()
    token_types: bool = True
    epsilon: float | None = None  # fixed in the code, whatever the configuration says
    counts_real_tokens: bool = False  # positions skip padding ids, which have the position of the padding id
    padding_idx: int | None = None  # fixed in the code, for families that count
    own_embedding_size: bool = False
    relative_bias: bool = False


_BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
}
_ROBERTA = {**_BERT, "pad_token_id": 1}

_ROBERTA_FAMILY = Family(
    ("Roberta", "XLMRoberta", "Camembert"), "roberta", {**_ROBERTA, "vocab_size": 50265}, counts_real_tokens=True
)

FAMILIES: dict[str, Family] = {
    "bert": Family(("Bert",), "bert", _BERT),
    "roberta": _ROBERTA_FAMILY,
    "xlm-roberta": Family(_ROBERTA_FAMILY.classes, "roberta", _ROBERTA, counts_real_tokens=True),
    "camembert": Family(_ROBERTA_FAMILY.classes, "roberta", _ROBERTA, counts_real_tokens=True),
    "electra": Family(
        ("Electra",),
        "electra",
        {**_BERT, "embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        own_embedding_size=True,
    ),
    "distilbert": Family(
        ("DistilBert",),
        "distilbert",
        {
            "vocab_size": 30522,
            "dim": 768,
            "n_layers": 6,
            "n_heads": 12,
            "hidden_dim": 3072,
            "activation": "gelu",
            "max_position_embeddings": 512,
        },
        keys={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        layer="transformer.layer",
        names=LayerNames(
            "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
            "ffn.lin1", "ffn.lin2", "output_layer_norm",
        ),
        token_types=False,
        epsilon=1e-12,
    ),
    "mpnet": Family(
        ("MPNet",),
        "mpnet",
        {**_ROBERTA, "vocab_size": 30527, "relative_attention_num_buckets": _RELATIVE_BUCKETS},
        names=LayerNames(
            "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm"
        ),
        token_types=False,
        counts_real_tokens=True,
        padding_idx=1,
        relative_bias=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The settings of an encoder that its graph depends on, checked."""

    vocabulary: int
    hidden: int
    embedding: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    token_types: int  # 0: the family has none
    activation: str  # a kind of Activation, "" for the identity
    epsilon: float

    @staticmethod
    def of(family: Family, config: Config) -> Sizes:
        """Raises ModelFormatError for a setting that makes no sense, UnsupportedModelError for one not supported."""
        key = {name: family.keys.get(name, name) for name in (*_BERT, "embedding_size")}
        hidden, heads = config.integer(key["hidden_size"]), config.integer(key["num_attention_heads"])
        if hidden % heads:
            raise ModelFormatError(f"{config.path}: {heads} attention heads do not divide the hidden size {hidden}")
        kind = config.get("position_embedding_type")
        if kind not in (None, "absolute"):
            raise UnsupportedModelError(
                f"{config.path}: expected position_embedding_type 'absolute', got {kind!r}. {use_onnx()}"
            )
        for flag in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
            if config.flag(flag):
                raise UnsupportedModelError(f"{config.path}: {flag} is set; expected an encoder. {use_onnx()}")
        if family.relative_bias and config.integer("relative_attention_num_buckets") != _RELATIVE_BUCKETS:
            raise UnsupportedModelError(
                f"{config.path}: expected relative_attention_num_buckets {_RELATIVE_BUCKETS}, which is fixed in the "
                f"model's code, got {config.get('relative_attention_num_buckets')}. {use_onnx()}"
            )
        return Sizes(
            vocabulary=config.integer("vocab_size"),
            hidden=hidden,
            embedding=config.integer(key["embedding_size"]) if family.own_embedding_size else hidden,
            layers=config.integer(key["num_hidden_layers"]),
            heads=heads,
            intermediate=config.integer(key["intermediate_size"]),
            positions=config.integer("max_position_embeddings"),
            token_types=config.integer("type_vocab_size") if family.token_types else 0,
            activation=activation_kind(config, key["hidden_act"]),
            epsilon=config.number("layer_norm_eps") if family.epsilon is None else family.epsilon,
        )


def activation_kind(config: Config, key: str) -> str:
    name = config.text(key)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{config.path}: expected {key} to be one of {', '.join(ACTIVATIONS)}, got {name!r}. {use_onnx()}"
        )
    return ACTIVATIONS[name]


def use_onnx() -> str:
    """What to do with a model that cannot be read from its folder."""
    return (
        "Export it and load the ONNX file instead: optimum-cli export onnx --model FOLDER OUT, "
        'then espalier.load("OUT/model.onnx")'
    )


@dataclass(frozen=True)
class Encoder:
    """An encoder that stands in a graph: what a head needs to go on."""

    layers: Layers
    family: Family
    config: Config
    sizes: Sizes
    prefix: str  # before the encoder's parameters
    root: str  # before the parameters of heads
    mask: str
    hidden: str  # the last hidden state, [batch, seq, hidden]


def add_encoder(layers: Layers, family: Family, config: Config, prefix: str) -> Encoder:
    """Build inputs, embeddings and transformer layers. ``prefix`` stands before the encoder's parameters."""
    sizes = Sizes.of(family, config)
    b = layers.b
    ids, mask = b.input("input_ids"), b.input("attention_mask")
    x = _embed(layers, family, config, sizes, prefix, ids)
    bias = ""
    if family.relative_bias:
        table = layers.weight(f"{prefix}encoder.relative_attention_bias.weight", _RELATIVE_BUCKETS, sizes.heads)
        bias = b.add(
            "RelativeBias",
            table,
            ids,
            name=f"{prefix}encoder.relative_attention_bias",
            num_buckets=_RELATIVE_BUCKETS,
            max_distance=_RELATIVE_DISTANCE,
        )
    for index in range(sizes.layers):
        x = _transform(layers, family.names, sizes, f"{prefix}{family.layer}.{index}.", x, mask, bias)
    # A wrapper around the whole model ("model.bert.") goes before its heads too; the encoder's own name does not.
    root = prefix.removesuffix(f"{family.module}.") if prefix.endswith(f"{family.module}.") else ""
    return Encoder(layers, family, config, sizes, prefix, root, mask, x)


def _embed(layers: Layers, family: Family, config: Config, sizes: Sizes, prefix: str, ids: str) -> str:
    b, features, where = layers.b, sizes.embedding, f"{prefix}embeddings."
    x = layers.embedding(ids, f"{where}word_embeddings", sizes.vocabulary, features)
    if sizes.token_types == 1:
        # Every token has type 0: a vector added to all, and no input.
        stored, table = layers.weights.take(f"{where}token_type_embeddings.weight", (1, features))
        x = b.add("Add", x, b.graph.add_constant(f"{stored}[0]", table[0]))
    elif sizes.token_types:
        types = b.input("token_type_ids")
        y = layers.embedding(types, f"{where}token_type_embeddings", sizes.token_types, features)
        x = b.add("Add", x, y)
    if family.counts_real_tokens:
        padding = config.integer("pad_token_id", least=0) if family.padding_idx is None else family.padding_idx
        columns = b.add("PositionsFromIds", ids, padding_idx=padding)
    else:
        columns = b.add("Positions", ids, offset=0)
    x = b.add("Add", x, layers.embedding(columns, f"{where}position_embeddings", sizes.positions, features))
    x = layers.norm(x, f"{where}LayerNorm", features, sizes.epsilon)
    if features != sizes.hidden:
        x = layers.linear(x, f"{prefix}embeddings_project", features, sizes.hidden)
    return x


def _transform(layers: Layers, names: LayerNames, sizes: Sizes, where: str, x: str, mask: str, bias: str) -> str:
    """One layer: attention and feed-forward, each with a residual and a norm after it."""
    b, width = layers.b, sizes.hidden
    q, k, v = (layers.linear(x, where + name, width, width) for name in (names.query, names.key, names.value))
    mixed = b.add(
        "Attention",
        *(q, k, v, mask, bias),
        name=where + "attention",
        heads=sizes.heads,
        scale=1 / math.sqrt(width // sizes.heads),
        mask_value=MASK_VALUE,
    )
    mixed = b.add("Add", layers.linear(mixed, where + names.mix, width, width), x)
    x = layers.norm(mixed, where + names.mix_norm, width, sizes.epsilon)
    up = layers.activation(layers.linear(x, where + names.up, width, sizes.intermediate), sizes.activation)
    y = b.add("Add", layers.linear(up, where + names.down, sizes.intermediate, width), x)
    return layers.norm(y, where + names.down_norm, width, sizes.epsilon)
