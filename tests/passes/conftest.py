"""Tiny random models, exported by torch in the ways the exporters offer; each is exported once per session."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier.ir.graph import Graph

VOCAB, POSITIONS = 100, 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
}
_ROBERTA = {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1}
_DISTIL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": POSITIONS,
}
_THREE = ("input_ids", "attention_mask", "token_type_ids")
_TWO = _THREE[:2]
_HIDDEN = ("last_hidden_state", "pooler_output")
_SPANS = ("start_logits", "end_logits")

# name: (class, config class, sizes, inputs, outputs)
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "bert": ("BertModel", "BertConfig", _SIZES, _THREE, _HIDDEN),
    "bert without types": ("BertModel", "BertConfig", _SIZES, _TWO, _HIDDEN),
    "bert qa": ("BertForQuestionAnswering", "BertConfig", _SIZES, _THREE, _SPANS),
    "bert classes": ("BertForSequenceClassification", "BertConfig", _SIZES, _THREE, ("logits",)),
    "bert tokens": ("BertForTokenClassification", "BertConfig", _SIZES, _THREE, ("logits",)),
    "bert words": ("BertForMaskedLM", "BertConfig", _SIZES, _THREE, ("logits",)),
    "sentences": ("BertModel", "BertConfig", _SIZES, _TWO, ("sentence_embedding",)),
    "roberta": ("RobertaModel", "RobertaConfig", _ROBERTA, _TWO, _HIDDEN),
    "roberta classes": ("RobertaForSequenceClassification", "RobertaConfig", _ROBERTA, _TWO, ("logits",)),
    "xlm roberta": ("XLMRobertaModel", "XLMRobertaConfig", _ROBERTA, _TWO, _HIDDEN),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTIL, _TWO, ("last_hidden_state",)),
    "distilbert qa": ("DistilBertForQuestionAnswering", "DistilBertConfig", _DISTIL, _TWO, _SPANS),
    "distilbert classes": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL, _TWO, ("logits",)),
    "electra": ("ElectraModel", "ElectraConfig", {**_SIZES, "embedding_size": 16}, _THREE, ("last_hidden_state",)),
    "mpnet": ("MPNetModel", "MPNetConfig", {**_SIZES, "pad_token_id": 1}, _TWO, _HIDDEN),
}

Export = Callable[..., Path]


def _build(name: str, attention: str) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    import torch
    import transformers

    kind, config, sizes, inputs, outputs = MODELS[name]

    class Plain(torch.nn.Module):
        """Outputs by name and in order: the TorchScript exporter cannot call base models with all inputs."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            found = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
            if outputs != ("sentence_embedding",):
                return tuple(found[key] for key in outputs)
            tokens = found.last_hidden_state
            mask = attention_mask.unsqueeze(-1).expand(tokens.size()).float()
            pooled = (tokens * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
            return torch.nn.functional.normalize(pooled, p=2, dim=1)

    torch.manual_seed(0)
    made = getattr(transformers, config)(**sizes, **({} if name == "mpnet" else {"attn_implementation": attention}))
    model = getattr(transformers, kind)(made).eval()
    for parameter in model.parameters():
        # Random initialisation is too flat to tell a wrong scale, bias or mask from a right one.
        if parameter.dim() == 2:
            parameter.data *= 4
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return Plain(model).eval(), inputs, outputs


def _export(path: Path, name: str, attention: str, opset: int, dynamo: bool) -> None:
    import torch

    torch.set_num_threads(1)
    model, inputs, outputs = _build(name, attention)
    ids = torch.randint(5, VOCAB, (2, 11))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    kwargs: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs), "opset_version": opset}
    if dynamo:
        any_size = torch.export.Dim.DYNAMIC
        kwargs["dynamic_shapes"] = {key: {0: any_size, 1: any_size} for key in inputs}
        kwargs |= {"external_data": False, "verbose": False}
    else:
        kwargs["dynamic_axes"] = {key: {0: "batch", 1: "seq"} for key in (*inputs, *outputs)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (), str(path), kwargs={key: example[key] for key in inputs}, dynamo=dynamo, **kwargs)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """``export(name, attention="eager", opset=17, dynamo=False)``: path of the ONNX file."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exports")
    done: dict[tuple[Any, ...], Path] = {}

    def exported(name: str, attention: str = "eager", opset: int = 17, dynamo: bool = False) -> Path:
        key = (name, attention, opset, dynamo)
        if key not in done:
            path = folder / f"{len(done)}.onnx"
            _export(path, name, attention, opset, dynamo)
            done[key] = path
        return done[key]

    return exported


def _feeds(graph: Graph, batch: int = 3, tokens: int = 9) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Right-padded, left-padded and full sequences for a graph's inputs, and which tokens are valid."""
    rng = np.random.default_rng(0)
    columns = np.arange(tokens)
    mask = np.stack([columns < tokens, columns < 4, columns >= tokens - 3])[:batch].astype(np.int64)
    values = {
        "input_ids": rng.integers(5, VOCAB, (batch, tokens)) * mask + (1 - mask),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (batch, tokens)) * mask,
    }
    return {name: values[name].astype(graph.types[name].dtype) for name in graph.inputs}, mask > 0


def _evaluate(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A lifted graph's outputs: native nodes by their NumPy bodies, each foreign one by ONNX Runtime."""
    import onnxruntime
    from onnx import helper

    from espalier.ir.ops import OPS

    known: dict[str, Any] = {**graph.constants, **feeds}
    opsets = [helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()]
    for node in graph.nodes:
        if node.is_native:
            operands = [known[name] if name else None for name in node.inputs]
            known[node.outputs[0]] = OPS[node.op].apply(operands, node.attrs)
            continue
        names = [name for name in dict.fromkeys(node.proto.input) if name]
        types = [helper.np_dtype_to_tensor_dtype(known[name].dtype) for name in names]
        inputs = [
            helper.make_tensor_value_info(name, kind, known[name].shape)
            for name, kind in zip(names, types, strict=True)
        ]
        made = [name for name in node.outputs if name]
        body = helper.make_graph(
            [node.proto], "one", inputs, [helper.make_empty_tensor_value_info(name) for name in made]
        )
        model = helper.make_model(body, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        results = session.run(None, {name: known[name] for name in names})
        known.update(zip(made, results, strict=True))
    return {name: known[name] for name in graph.outputs}


def _assert_agrees(path: Path, graph: Graph, tolerance: float = 2e-5, batch: int = 3) -> None:
    import onnxruntime

    feeds, valid = _feeds(graph, batch)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    expected = dict(zip(graph.outputs, session.run(graph.outputs, feeds), strict=True))
    found = _evaluate(graph, feeds)
    for name, wanted in expected.items():
        got = found[name]
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        tokens = wanted.shape[:2] == valid.shape
        error = np.abs(got.astype(np.float64) - wanted)[valid if tokens else ...]
        assert error.max() <= tolerance * max(1.0, float(np.abs(wanted).max())), name


@pytest.fixture(scope="session")
def assert_agrees() -> Callable[..., None]:
    """``assert_agrees(path, graph)``: what ONNX Runtime gives on valid tokens, padded masks included."""
    pytest.importorskip("onnxruntime")
    return _assert_agrees


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., dict[str, np.ndarray]]:
    """``evaluate(graph, feeds)``: outputs of a graph of native and foreign nodes."""
    pytest.importorskip("onnxruntime")
    return _evaluate
