"""The heads transformers puts on an encoder, by task; each makes the graph's outputs under their usual names."""

from __future__ import annotations

from collections.abc import Callable

from espalier.errors import ModelFormatError, UnsupportedModelError
from espalier.hf.config import Config
from espalier.hf.encoders import Encoder, Family, use_onnx

BASE = "Model"
"""The task of a model without a head."""

LEFTOVERS = (
    r"(^|\.)position_ids$",
    r"(^|\.)token_type_ids$",
    r"(^|\.)pooler\.dense\.",
    r"(^|\.)cls\.(predictions|seq_relationship)\.",
    r"(^|\.)lm_head\.",
    r"(^|\.)vocab_(transform|layer_norm|projector)\.",
    r"(^|\.)(discriminator_predictions|generator_predictions|generator_lm_head)\.",
)
"""Tensors that checkpoints carry whether or not the model uses them: buffers, the pooler, heads of pre-training."""


def task_of(family: Family, config: Config) -> str:
    """The task in the first name of ``architectures``; BASE where there is none.

    Raises UnsupportedModelError when the class is not of this family, or its head is not supported.
    """
    names = config.get("architectures")
    if names is None or names == []:
        return BASE
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ModelFormatError(f"{config.path}: architectures must be a list of class names, got {str(names)[:80]}")
    for prefix in family.classes:
        rest = names[0].removeprefix(prefix)
        task = rest.removeprefix("For")
        if rest != names[0] and task in _heads(family):
            return task
    known = ", ".join(_class(family.classes[0], task) for task in _heads(family))
    raise UnsupportedModelError(
        f"{config.path}: expected one of the architectures {known}, got {names[0]!r}. {use_onnx()}"
    )


def add_head(encoder: Encoder, task: str) -> None:
    """Build the head of a task and the graph's outputs.

    A checkpoint may name a pre-training architecture and yet hold the encoder alone, saved by a program that had
    loaded only that; then the outputs are those of the encoder.

    Raises ModelFormatError when a tensor of the head is missing or of a wrong shape.
    """
    pretraining = {"MaskedLM": _LM_MODULES, "PreTraining": _LM_MODULES}.get(task, ())
    if pretraining and not any(encoder.layers.weights.any_under(encoder.root + name) for name in pretraining):
        task = BASE
    _heads(encoder.family)[task](encoder)


_LM_MODULES = ("cls.", "lm_head.", "vocab_", "discriminator_predictions.", "generator_")


def _class(prefix: str, task: str) -> str:
    return prefix + (task if task == BASE else f"For{task}")


def _heads(family: Family) -> dict[str, Callable[[Encoder], None]]:
    return {
        BASE: base,
        "QuestionAnswering": question_answering,
        "TokenClassification": token_classification,
        "SequenceClassification": _CLASSIFIERS[family.module],
        "MaskedLM": _LANGUAGE[family.module],
    } | _EXTRA.get(family.module, {})


def base(e: Encoder) -> None:
    pooled = _pooled(e) if e.prefix + "pooler.dense.weight" in e.layers.weights else ""
    e.layers.b.output(e.hidden, "last_hidden_state")
    if pooled:
        e.layers.b.output(pooled, "pooler_output")


def question_answering(e: Encoder) -> None:
    if e.config.labels() != 2:
        raise ModelFormatError(f"{e.config.path}: question answering needs 2 labels, got {e.config.labels()}")
    logits = e.layers.linear(e.hidden, e.root + "qa_outputs", e.sizes.hidden, 2)
    for index, name in enumerate(("start_logits", "end_logits")):
        part = e.layers.b.add("SliceFeatures", logits, start=index, stop=index + 1, squeeze=True)
        e.layers.b.output(part, name)


def token_classification(e: Encoder) -> None:
    _logits(e, e.hidden, "classifier")


def _first(e: Encoder) -> str:
    return e.layers.b.add("SelectToken", e.hidden, index=0)


def _pooled(e: Encoder) -> str:
    dense = e.layers.linear(_first(e), e.prefix + "pooler.dense", e.sizes.hidden, e.sizes.hidden)
    return e.layers.activation(dense, "tanh")


def _logits(e: Encoder, x: str, module: str) -> None:
    e.layers.b.output(e.layers.linear(x, e.root + module, e.sizes.hidden, e.config.labels()), "logits")


def _pooler_classifier(e: Encoder) -> None:
    _logits(e, _pooled(e), "classifier")


def _dense_classifier(dense: str, kind: str, out: str) -> Callable[[Encoder], None]:
    def head(e: Encoder) -> None:
        x = e.layers.linear(_first(e), e.root + dense, e.sizes.hidden, e.sizes.hidden)
        _logits(e, e.layers.activation(x, kind), out)

    return head


_CLASSIFIERS = {
    "bert": _pooler_classifier,
    "roberta": _dense_classifier("classifier.dense", "tanh", "classifier.out_proj"),
    "mpnet": _dense_classifier("classifier.dense", "tanh", "classifier.out_proj"),
    "electra": _dense_classifier("classifier.dense", "gelu", "classifier.out_proj"),
    "distilbert": _dense_classifier("pre_classifier", "relu", "classifier"),
}


def _language_logits(
    e: Encoder, dense: str, norm: str, decoder: str, biases: tuple[str, ...], kind: str | None, name: str = "logits"
) -> None:
    """Scores of the vocabulary. ``biases``: names the bias may have. ``kind`` None: the encoder's activation."""
    layers, sizes, width = e.layers, e.sizes, e.sizes.embedding
    x = layers.linear(e.hidden, e.root + dense, sizes.hidden, width)
    x = layers.activation(x, sizes.activation if kind is None else kind)
    x = layers.norm(x, e.root + norm, width, sizes.epsilon)
    tied = e.config.get("tie_word_embeddings") is not False
    weight = e.prefix + "embeddings.word_embeddings" if tied else e.root + decoder
    found = [bias for bias in biases if e.root + bias in layers.weights]
    # Tied, the bias is the head's; untied, the decoder's own, which comes last.
    bias = e.root + ((found[0] if tied else found[-1]) if found else biases[0])
    table = layers.weight(f"{weight}.weight", sizes.vocabulary, width)
    scores = layers.b.add("Linear", x, table, layers.weight(bias, sizes.vocabulary), name=e.root + decoder)
    layers.b.output(scores, name)


def _bert_language(e: Encoder, name: str = "logits") -> None:
    where = "cls.predictions."
    biases = (where + "bias", where + "decoder.bias")
    _language_logits(e, where + "transform.dense", where + "transform.LayerNorm", where + "decoder", biases, None, name)


def _roberta_language(e: Encoder) -> None:
    biases = ("lm_head.bias", "lm_head.decoder.bias")
    _language_logits(e, "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", biases, "gelu")


def _electra_language(e: Encoder) -> None:
    where = "generator_predictions."
    _language_logits(e, where + "dense", where + "LayerNorm", "generator_lm_head", ("generator_lm_head.bias",), "gelu")


def _distilbert_language(e: Encoder) -> None:
    _language_logits(e, "vocab_transform", "vocab_layer_norm", "vocab_projector", ("vocab_projector.bias",), None)


_LANGUAGE: dict[str, Callable[[Encoder], None]] = {
    "bert": _bert_language,
    "roberta": _roberta_language,
    "mpnet": _roberta_language,
    "electra": _electra_language,
    "distilbert": _distilbert_language,
}


def _next_sentence(e: Encoder, name: str = "logits") -> None:
    e.layers.b.output(e.layers.linear(_pooled(e), e.root + "cls.seq_relationship", e.sizes.hidden, 2), name)


def _bert_pretraining(e: Encoder) -> None:
    _bert_language(e, "prediction_logits")
    _next_sentence(e, "seq_relationship_logits")


def _discriminator(e: Encoder) -> None:
    where, width = e.root + "discriminator_predictions.", e.sizes.hidden
    x = e.layers.activation(e.layers.linear(e.hidden, where + "dense", width, width), e.sizes.activation)
    x = e.layers.linear(x, where + "dense_prediction", width, 1)
    e.layers.b.output(e.layers.b.add("SliceFeatures", x, start=0, stop=1, squeeze=True), "logits")


_EXTRA: dict[str, dict[str, Callable[[Encoder], None]]] = {
    "bert": {"NextSentencePrediction": _next_sentence, "PreTraining": _bert_pretraining},
    "electra": {"PreTraining": _discriminator},
}
