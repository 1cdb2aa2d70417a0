"""Sessions over whole, native and mixed models, held to ONNX Runtime on the same model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import espalier
from espalier import session as module
from espalier._session import checks
from espalier._session.source import Source
from espalier._session.steps import prepare
from espalier.errors import EspalierError, InputError, InputNameError, InputShapeError, InputTypeError
from espalier.ir import Graph
from espalier.ir.graph import TensorType
from espalier.loading import LoadSettings
from espalier.passes.partition import NativeSegment, OrtSegment, Program, Step, partition

pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4
Feeds = dict[str, np.ndarray]
MakeFeeds = Callable[..., Feeds]
Write = Callable[[Graph], bytes]


def open_graph(graph: Graph, original: bytes | None = None) -> espalier.Session:
    """A session over a graph that is lifted already."""
    return open_steps(graph, partition(graph, original), original)


def open_steps(graph: Graph, steps: list[Step], original: bytes | None = None) -> espalier.Session:
    source = Source("onnx" if original else "hf", original or Path(graph.name))
    settings = LoadSettings(threads=1, tune=False)
    return module._open(source, Program.of(graph, steps), prepare(steps, settings), settings)


def peer(data: bytes, feeds: Feeds) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    outputs: list[Any] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )
    return outputs


def agree(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)


def test_native_model_agrees_with_onnxruntime(tiny: Graph, make_feeds: MakeFeeds, onnx_bytes: Write) -> None:
    data = onnx_bytes(tiny)
    session = open_graph(tiny, data)
    assert [layer.where for layer in session.report().steps] == ["native"]
    feeds = make_feeds(tiny.inputs, [5, 16, 1])
    hidden, scores = session.run(None, feeds)
    want_hidden, want_scores = peer(data, feeds)
    valid = feeds["attention_mask"] == 1
    assert hidden.shape == want_hidden.shape
    agree(hidden[valid], want_hidden[valid])
    agree(scores, want_scores)


def test_mixed_model_agrees_with_onnxruntime(mixed: Graph, make_feeds: MakeFeeds, onnx_bytes: Write) -> None:
    data = onnx_bytes(mixed)
    session = open_graph(mixed, data)
    steps = session.report().steps
    assert [step.where for step in steps] == ["ONNX Runtime", "native", "ONNX Runtime"]
    assert steps[1].exact_padding
    feeds = make_feeds(mixed.inputs, [7, 3])
    # ReduceSum reads padding too, so every token must agree.
    for got, want in zip(session.run(None, feeds), peer(data, feeds), strict=True):
        agree(got, want)


def test_outputs_by_name_and_in_any_order(tiny: Graph, make_feeds: MakeFeeds) -> None:
    session = open_graph(tiny)
    feeds = make_feeds(tiny.inputs, [4])
    hidden, scores = session.run(None, feeds)
    again = session.run([tiny.outputs[1], tiny.outputs[0]], feeds)
    np.testing.assert_array_equal(again[0], scores)
    np.testing.assert_array_equal(again[1], hidden)
    assert len(session.run([], feeds)) == 2


def test_describes_itself_as_onnxruntime_does(tiny: Graph, onnx_bytes: Write) -> None:
    data = onnx_bytes(tiny)
    whole = open_steps(tiny, [_whole(tiny, data)], data)
    native = open_graph(tiny, data)
    assert native.get_inputs() == whole.get_inputs()
    assert native.get_outputs() == whole.get_outputs()
    assert native.get_inputs()[0].type == "tensor(int64)"
    assert native.get_inputs()[0].shape == ["batch", "seq"]


def _whole(graph: Graph, data: bytes) -> OrtSegment:
    return OrtSegment(data, graph.inputs, graph.outputs, whole=True)


@pytest.mark.parametrize("kind", ["native", "mixed", "whole"])
def test_eight_threads_give_the_same_bits(
    kind: str, tiny: Graph, mixed: Graph, make_feeds: MakeFeeds, onnx_bytes: Write
) -> None:
    graph = mixed if kind == "mixed" else tiny
    data = onnx_bytes(graph)
    steps = [_whole(graph, data)] if kind == "whole" else partition(graph, data)
    session = open_steps(graph, steps, data)
    inputs = [make_feeds(graph.inputs, [1 + (seed * 5) % 16, 1 + (seed * 3) % 16], seed=seed) for seed in range(16)]
    expected = [session.run(None, feeds) for feeds in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for want, got in zip(expected, pool.map(lambda feeds: session.run(None, feeds), inputs), strict=True):
                for first, second in zip(want, got, strict=True):
                    np.testing.assert_array_equal(first, second)


def test_ragged_is_the_padded_result_without_the_padding(tiny: Graph, make_feeds: MakeFeeds) -> None:
    session = open_graph(tiny)
    lengths = [3, 16, 1, 8]
    feeds = make_feeds(tiny.inputs, lengths)
    hidden, scores = session.run(None, feeds)
    rows = [{name: feeds[name][i, :n] for name in tiny.inputs} for i, n in enumerate(lengths)]
    ragged_hidden, ragged_scores = session.run_ragged(None, rows)
    for i, n in enumerate(lengths):
        agree(ragged_hidden[i], hidden[i, :n])
        agree(ragged_scores[i], scores[i])


def test_ragged_fills_in_masks_and_token_types(tiny: Graph) -> None:
    session = open_graph(tiny)
    ids = [[5, 6, 7], np.array([9, 3, 2, 1], np.int32)]
    explicit = [{"input_ids": row, "attention_mask": [1] * len(row), "token_type_ids": [0] * len(row)} for row in ids]
    (short,) = session.run_ragged([tiny.outputs[1]], ids)
    (full,) = session.run_ragged([tiny.outputs[1]], explicit)
    np.testing.assert_array_equal(short, full)
    assert session.run_ragged(None, []) == [[], []]


def test_ragged_with_foreign_parts_never_pads(mixed: Graph, make_feeds: MakeFeeds) -> None:
    session = open_graph(mixed)
    rows = [[4, 5, 6], [7], [8, 9, 1]]
    hidden, sums = session.run_ragged(None, rows)
    for row, got_hidden, got_sums in zip(rows, hidden, sums, strict=True):
        want_hidden, want_sums = session.run(None, {"input_ids": np.array([row])})
        agree(got_hidden, want_hidden[0])
        agree(got_sums, want_sums[0])


@pytest.mark.parametrize(
    ("sequences", "error", "words"),
    [
        ("abc", InputTypeError, "list of token id"),
        ({"input_ids": [1]}, InputTypeError, "wrap one sequence"),
        ([[1], []], InputShapeError, "sequence 1 is empty"),
        ([[[1, 2]]], InputShapeError, "without a batch axis"),
        ([[1.5]], InputTypeError, "int64"),
        ([{"inputids": [1]}], InputNameError, "did you mean 'input_ids'"),
        ([{"token_type_ids": [1]}], InputNameError, "missing 'input_ids'"),
        ([{"input_ids": [1, 2], "token_type_ids": [1]}], InputShapeError, "one value per token"),
        ([[1], [99]], InputShapeError, "99"),
        ([[-1]], InputShapeError, "-1"),
        ([[1] * 17], InputShapeError, "17 tokens"),
        ([{"input_ids": [1], "attention_mask": [2]}], InputShapeError, "0 \\(padding\\) and 1"),
    ],
)
def test_ragged_refuses(tiny: Graph, sequences: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_graph(tiny).run_ragged(None, sequences)


def test_wrong_names(tiny: Graph, make_feeds: MakeFeeds) -> None:
    session = open_graph(tiny)
    feeds = make_feeds(tiny.inputs, [4])
    with pytest.raises(InputNameError, match="did you mean 'input_ids'"):
        session.run(None, {**feeds, "input_id": feeds["input_ids"]})
    with pytest.raises(InputNameError, match="missing 'attention_mask'"):
        session.run(None, {name: feeds[name] for name in feeds if name != "attention_mask"})
    with pytest.raises(InputNameError, match="no output 'nothing'"):
        session.run(["nothing"], feeds)
    with pytest.raises(InputTypeError, match="list of names"):
        session.run("nothing", feeds)
    with pytest.raises(InputTypeError, match="dict"):
        session.run(None, [feeds])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda ids: ids.astype(np.int32), InputTypeError, r"astype\(numpy.int64\)"),
        (lambda ids: ids.astype(np.float32), InputTypeError, "got float32"),
        (lambda ids: ids.astype(">i8"), InputTypeError, "byte order"),
        (lambda ids: ids.tolist(), InputTypeError, "got list"),
        (lambda ids: ids[0], InputShapeError, "add the batch axis"),
        (lambda ids: ids[None], InputShapeError, "got 3"),
        (lambda ids: ids[:, :-1], InputShapeError, "disagree on 'seq'"),
        (lambda ids: ids[:1], InputShapeError, "disagree on 'batch'"),
        (lambda ids: ids - 50, InputShapeError, "ids from 0 to 49"),
        (lambda ids: ids + 50, InputShapeError, "ids from 0 to 49"),
    ],
)
def test_wrong_ids(
    tiny: Graph, make_feeds: MakeFeeds, change: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    feeds = make_feeds(tiny.inputs, [4, 4])
    with pytest.raises(error, match=words):
        open_graph(tiny).run(None, {**feeds, "input_ids": change(feeds["input_ids"])})


def test_ids_under_the_mask_are_checked_too(tiny: Graph, make_feeds: MakeFeeds) -> None:
    feeds = make_feeds(tiny.inputs, [4, 2])
    feeds["input_ids"][1, 3] = 50
    with pytest.raises(InputShapeError, match="got 50"):
        open_graph(tiny).run(None, feeds)


def test_longer_than_the_position_table(tiny: Graph, make_feeds: MakeFeeds) -> None:
    with pytest.raises(InputShapeError, match=r"17 tokens.*room for 16"):
        open_graph(tiny).run(None, make_feeds(tiny.inputs, [17]))


def test_values_that_a_foreign_step_makes_are_checked(mixed: Graph, make_feeds: MakeFeeds) -> None:
    feeds = make_feeds(mixed.inputs, [17])
    with pytest.raises(InputShapeError, match="17 tokens"):
        open_graph(mixed).run(None, feeds)


def test_mask_of_other_values(tiny: Graph, make_feeds: MakeFeeds, onnx_bytes: Write) -> None:
    feeds = make_feeds(tiny.inputs, [4, 2])
    feeds["attention_mask"][0] = 2
    with pytest.raises(InputShapeError, match=r"\(attention_mask != 0\)"):
        open_graph(tiny).run(None, feeds)
    data = onnx_bytes(tiny)
    session = open_graph(tiny, data)
    assert session.report().fallback_runs == 0
    for got, want in zip(session.run(None, feeds), peer(data, feeds), strict=True):
        agree(got, want)
    assert session.report().fallback_runs == 1
    assert "1 run(s) went to ONNX Runtime" in str(session.report())
    row = {name: feeds[name][0] for name in tiny.inputs}
    agree(session.run_ragged(None, [row])[1][0], peer(data, {name: feeds[name][:1] for name in feeds})[1][0])


def test_empty_batch(tiny: Graph) -> None:
    session = open_graph(tiny)
    hidden, scores = session.run(None, {name: np.zeros((0, 5), np.int64) for name in tiny.inputs})
    assert hidden.shape == (0, 5, 16)
    assert scores.shape == (0, 3)
    assert hidden.dtype == scores.dtype == np.float32


def test_empty_sequence(tiny: Graph) -> None:
    session = open_graph(tiny)
    feeds = {name: np.zeros((2, 0), np.int64) for name in tiny.inputs}
    (hidden,) = session.run([tiny.outputs[0]], feeds)
    assert hidden.shape == (2, 0, 16)
    with pytest.raises(InputShapeError, match="at least one token"):
        session.run(None, feeds)


def test_real_passes_find_the_native_parts(mixed: Graph, make_feeds: MakeFeeds, onnx_bytes: Write) -> None:
    data = onnx_bytes(mixed)
    session = espalier.load(data, threads=1, tune=False)
    where = [step.where for step in session.report().steps]
    assert where.count("native") == 1
    assert where[-1] == "ONNX Runtime"
    feeds = make_feeds(mixed.inputs, [7, 3])
    for got, want in zip(session.run(None, feeds), peer(data, feeds), strict=True):
        agree(got, want)


def test_a_folder_and_its_onnx_twin(tmp_path: Path, make_feeds: MakeFeeds, onnx_bytes: Write) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = transformers.BertForQuestionAnswering(config).eval()
    model.save_pretrained(tmp_path)
    session = espalier.load(tmp_path, threads=1, tune=False)
    feeds = make_feeds([info.name for info in session.get_inputs()], [5, 9])
    with torch.no_grad():
        want = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    valid = feeds["attention_mask"] == 1
    start, end = session.run(["start_logits", "end_logits"], feeds)
    agree(start[valid], want.start_logits.numpy()[valid])
    agree(end[valid], want.end_logits.numpy()[valid])


def test_report(tiny: Graph, mixed: Graph, make_feeds: MakeFeeds) -> None:
    session = open_graph(mixed)
    assert session.report().steps[0].time_ms is None
    session.run(None, make_feeds(mixed.inputs, [3]))
    report = session.report()
    assert all(step.calls == 1 and step.time_ms is not None for step in report.steps)
    foreign = [layer for layer in report.layers if layer.where != "native"]
    assert {layer.op for layer in foreign} == {"Greater", "Cast", "ReduceSum"}
    assert all("dialect" in layer.why for layer in foreign)
    assert any(layer.op == "Attention" or "Attention" in layer.name for layer in report.layers)
    assert "ReduceSum is not of the dialect" in " ".join(str(report).split())
    assert report.to_dict()["threads"] == 1


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_threads_must_be_a_positive_number(threads: Any) -> None:
    with pytest.raises((InputError, InputTypeError), match="threads"):
        espalier.load("model.onnx", threads=threads)


def test_steps_of_the_fixtures(tiny: Graph, mixed: Graph) -> None:
    assert [type(step) for step in partition(tiny)] == [NativeSegment]
    assert [type(step) for step in partition(mixed)] == [OrtSegment, NativeSegment, OrtSegment]


def test_only_espalier_errors_for_any_feeds(tiny: Graph) -> None:
    session = open_graph(tiny)
    for bad in (None, 3, {}, {1: 2}, {"input_ids": None}, dict.fromkeys(tiny.inputs)):
        with pytest.raises(EspalierError):
            session.run(None, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["string", "str", "bfloat16"])
def test_float64_is_not_taken_for_a_type_that_numpy_lacks(wanted: str) -> None:
    with pytest.raises(InputTypeError, match=f"must be {wanted}; got float64"):
        checks.check_array("x", np.zeros(2), TensorType(wanted, ("n",)))
