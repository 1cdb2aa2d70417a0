"""Writing a compressed model, and proving that what was written is what was trained.

Everything is written into a folder beside its place and checked there; only then do the files appear.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from espalier import hf, passes
from espalier._session.report import LayerReport
from espalier.bench.agreement import TOLERANCE, compare
from espalier.compression.quantization.linear import as_float, quantized_layers
from espalier.compression.tasks.base import EncoderTask, Wants
from espalier.compression.tasks.models import model_home, normalizes, save_model
from espalier.data import Feature, collate
from espalier.errors import ExportError, InputError, UnsupportedModelError
from espalier.ir.graph import Graph
from espalier.onnx.reader import read as read_onnx
from espalier.onnx.writer import write

ONNX = "model.onnx"
SPARSE_FROM = 0.6
"""Share of zeros from which a layer must run in a sparse kernel; below, a dense one may be the faster."""
_DENSE = ("dense", "dense8")
_SAMPLES = 8
_NOISE = 1.5
"""How far two runs of a quantised model may be apart, in units of its distance from the float model. A sum that differs
in its last bit tips a value that lies between two integers over to the other one, and the step that makes goes through
all later layers, so that outputs agree in size and not in digits. Two models rounded independently are 1.4 apart."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_SENTENCE = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


@dataclass(frozen=True)
class Check:
    """One thing that was verified; ``detail`` is for people."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Exported:
    """What was written. ``formats``: the engine's format per pruned layer, by the model's name of the layer."""

    folder: Path
    onnx: Path
    checks: tuple[Check, ...]
    formats: Mapping[str, str]
    notes: tuple[str, ...] = ()


def check_place(output: Path, inputs: Sequence[Path], *, resume: bool) -> None:
    """Refuse an output folder that is, holds or lies in an input, or already holds something else than this run.

    Raises InputError.
    """
    place = output.resolve()
    for given in inputs:
        source = given.resolve()
        if place == source or source.is_relative_to(place):
            raise InputError(f"{output} is or holds the input {given}, which stays as it is; choose another folder")
        if given.is_dir() and place.is_relative_to(source):
            raise InputError(f"{output} lies in the input folder {given}, which stays as it is; choose another folder")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; expected the name of a folder to make")
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise InputError(f"{output} is not empty; choose another folder, or go on with the run in it: --resume")


def export(
    model: nn.Module,
    task: EncoderTask,
    source: Path,
    output: Path,
    masks: Mapping[str, Tensor],
    *,
    samples: Sequence[Feature],
    threads: int | None = None,
    tune: bool = True,
) -> Exported:
    """Write ``model`` as a Hugging Face folder and an ONNX file into ``output``, verified.

    ``source`` is the folder it came from, for tokenizer and pooling; ``masks`` (bool, True for kept weights) by layer
    name; ``samples`` are run for the comparison of numbers.

    Raises ExportError when a check fails; nothing is written then.
    """
    model = model.eval()
    masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    with _staging(output) as stage:
        _write_folder(model, task, source, stage)
        onnx, notes = _write_onnx(model, task, stage, samples)
        checks: list[Check] = []
        formats: dict[str, str] = {}
        if quantized_layers(model):
            graphs = {"folder": hf.read(stage), "ONNX file": passes.run(read_onnx(onnx))}
            checks += [_same_integers(model, graph, label) for label, graph in graphs.items()]
        if masks:
            checks += [_zeros_kept(stage, masks), _onnx_zeros(onnx, masks)]
        if masks or quantized_layers(model):
            found, formats = _kernels(stage, masks, list(quantized_layers(model)), threads=threads, tune=tune)
            checks += found
        checks += _same_numbers(model, task, stage, samples, threads=threads)
        failed = [check for check in checks if not check.ok]
        if failed:
            raise ExportError(
                f"the export to {output} failed its verification and was not kept: "
                + "; ".join(f"{check.name}: {check.detail}" for check in failed)
                + ". The trained weights are in the last checkpoint"
            )
    return Exported(output, output / ONNX, tuple(checks), formats, tuple(notes))


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder whose files replace those of the same names in ``output`` when all went well."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as name:
        stage = Path(name)
        yield stage
        for path in sorted(stage.rglob("*")):
            target = output / path.relative_to(stage)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)


def _write_folder(model: nn.Module, task: EncoderTask, source: Path, stage: Path) -> None:
    home = model_home(source)
    # An encoder keeps the layout of sentence-transformers, pooling included; another head is a model of its own.
    layout = task.name == "embeddings"
    inner = stage / home.relative_to(source) if layout else stage
    inner.mkdir(parents=True, exist_ok=True)
    from safetensors import SafetensorError

    try:
        save_model(model, inner)
        for folder in dict.fromkeys((source, home)):
            for name in _TOKENIZER:
                if (folder / name).is_file() and not (inner / name).exists():
                    shutil.copyfile(folder / name, inner / name)
        if layout:
            _copy_sentence_parts(source, home, stage)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"cannot write the model to {stage.parent}: {getattr(error, 'strerror', None) or error}; is there room?"
        ) from error


def _copy_sentence_parts(source: Path, home: Path, stage: Path) -> None:
    from espalier.hf.sentence import read_modules

    if not (source / _SENTENCE[0]).is_file():
        return
    for name in _SENTENCE:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)
    for _, folder in read_modules(source)[1:]:
        for file in folder.glob("*") if folder.is_dir() and folder != home else ():
            if file.is_file():
                target = stage / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def _write_onnx(model: nn.Module, task: EncoderTask, stage: Path, samples: Sequence[Feature]) -> tuple[Path, list[str]]:
    """ONNX by way of the project's own reader and writer; by PyTorch's exporter for a family those do not know."""
    path = stage / ONNX
    try:
        return write(hf.read(stage), path), []
    except UnsupportedModelError as error:
        if quantized_layers(model):
            raise ExportError(f"a quantised model of this family cannot be written: {error}") from error
        _write_onnx_with_torch(model, task, path, samples[0])
        return path, [f"model.onnx was written by torch.onnx, because the folder cannot be read here: {error}"]


def _write_onnx_with_torch(model: nn.Module, task: EncoderTask, path: Path, sample: Feature) -> None:
    import warnings

    batch = collate([sample, sample], np.array([0, 1]))
    import inspect

    known = inspect.signature(model.forward).parameters
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name in known}
    names = ["start_logits", "end_logits"] if task.name == "question-answering" else ["logits"]
    outputs = ["last_hidden_state"] if task.name == "embeddings" else names
    axes = {name: {0: "batch", 1: "seq"} for name in (*inputs, *outputs)}
    if task.name == "classification":
        axes["logits"] = {0: "batch"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # notes of the tracing exporter about itself
        torch.onnx.export(
            _Named(model.cpu(), tuple(inputs), outputs),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )


class _Named(nn.Module):
    """Inputs by position, the chosen outputs as a tuple: what a tracing exporter understands."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        raw = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(raw[name] for name in self.outputs)


# --- the checks -------------------------------------------------------------------------------------------------------


def _zeros_kept(stage: Path, masks: Mapping[str, Tensor]) -> Check:
    """Every pruned weight of the file is exactly zero."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(stage.rglob("*.safetensors")):
        tensors |= load_file(path)
    lost: list[str] = []
    zeros = 0
    for name, mask in masks.items():
        weight = next((t for stored, t in tensors.items() if _same_layer(stored.removesuffix(".weight"), name)), None)
        if weight is None or weight.shape != mask.shape or bool((weight[~mask.cpu()] != 0).any()):
            lost.append(name)
        zeros += int((~mask).sum())
    if lost:
        return Check("zeros kept", False, f"{len(lost)} layers are not zero where they were pruned, first {lost[0]}")
    return Check("zeros kept", True, f"{zeros} zeros in {len(masks)} layers of model.safetensors")


def _onnx_zeros(path: Path, masks: Mapping[str, Tensor]) -> Check:
    """The ONNX file, whose matrices may have lost their names, holds at least the pruned zeros in their shapes."""
    import onnx

    shapes = {tuple(sorted(mask.shape)) for mask in masks.values()}
    arrays = (onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer)
    total = sum(int((array == 0).sum()) for array in arrays if tuple(sorted(array.shape)) in shapes)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return Check("zeros in ONNX", total >= pruned, f"{total} zeros in matrices of the pruned shapes, {pruned} pruned")


def _same_integers(model: nn.Module, graph: Graph, label: str) -> Check:
    """Every quantised layer is one in the file too, with the same integers, scales and zero points."""
    found = [[graph.constants.get(name) for name in node.inputs[1:]] for node in graph.nodes if node.op == "QLinear"]
    lost: list[str] = []
    layers = quantized_layers(model)
    for name, layer in layers.items():
        weight, scale = layer.integers().numpy(), layer.weight_scale.numpy()[:, 0]
        inputs = [None if t is None else t.numpy()[0] for t in (layer.input_scale, layer.input_zero_point)]
        wanted = {0: weight, 1: scale, **dict(enumerate(inputs, start=4))}
        if not any(all(_equal(wanted[i], have[i] if i < len(have) else None) for i in wanted) for have in found):
            lost.append(name)
    if lost or len(found) != len(layers):
        first = f", first {lost[0]}" if lost else ""
        what = f"{len(found)} int8 layers for {len(layers)}, {len(lost)} without an equal one{first}"
        return Check(f"integers, {label}", False, what)
    return Check(f"integers, {label}", True, f"{len(layers)} int8 layers with equal integers, scales and zero points")


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b))


def _kernels(
    stage: Path, masks: Mapping[str, Tensor], quantized: Sequence[str], *, threads: int | None, tune: bool
) -> tuple[list[Check], dict[str, str]]:
    """From either file, layers run natively: in a sparse format where they have at least SPARSE_FROM zeros, and with
    integers where they are quantised. Also returns the formats by the model's names."""
    import espalier

    checks: list[Check] = []
    formats: dict[str, str] = {}
    # Kernels of integers leave out blocks of 1x4: what lies in other blocks does not count as sparse for them.
    zeros = {name: _empty(mask, 4 if name in quantized else 1) for name, mask in masks.items()}
    for place, label in ((stage, "folder"), (stage / ONNX, "ONNX file")):
        try:
            report = espalier.load(place, threads=threads, tune=tune).report()
        except UnsupportedModelError as error:
            checks.append(Check(f"sparse kernels, {label}", label == "folder", f"not readable here: {error}"))
            continue
        linear = [layer for layer in report.layers if layer.sparsity is not None]
        dense = sum(layer.format in _DENSE for layer in linear)
        wrong: list[str] = []
        if label == "folder":
            rows = {name: _row(linear, name) for name in (*masks, *quantized)}
            formats = {name: row.format for name, row in rows.items() if row is not None}
            for name, share in zeros.items():
                if share >= SPARSE_FROM and formats.get(name, "dense") in _DENSE:
                    wrong.append(f"{name} ({formats.get(name, 'not run natively')}, {share:.0%} zeros)")
        else:
            # ONNX has no names of modules: count instead.
            expected = sum(share >= SPARSE_FROM for share in zeros.values())
            if len(linear) - dense < expected:
                wrong.append(f"{len(linear) - dense} layers in sparse formats, expected {expected}")
        detail = "; ".join(wrong[:3]) if wrong else f"{len(masks)} pruned layers, {dense} layers in the dense format"
        if masks:
            checks.append(Check(f"sparse kernels, {label}", not wrong, detail))
        if quantized:
            integer = sum(layer.type.startswith("int8") for layer in linear)
            said = f"{integer} of {len(quantized)} quantised layers run with integers"
            checks.append(Check(f"int8 kernels, {label}", integer == len(quantized), said))
    return checks, formats


def _row(layers: Sequence[LayerReport], name: str) -> LayerReport | None:
    return next((layer for layer in layers if _same_layer(layer.name, name)), None)


def _empty(mask: Tensor, width: int) -> float:
    """The share of blocks of one output by ``width`` inputs in which nothing is left."""
    padded = nn.functional.pad(mask, (0, -mask.shape[1] % width))
    return 1 - float(padded.reshape(len(mask), -1, width).any(2).float().mean())


def _same_numbers(
    model: nn.Module, task: EncoderTask, stage: Path, samples: Sequence[Feature], *, threads: int | None
) -> list[Check]:
    """The engine's outputs agree with PyTorch's on real examples, from the folder and from the ONNX file."""
    import espalier

    chosen = sorted(samples, key=lambda feature: len(feature.ids))
    chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, min(_SAMPLES, len(chosen))).astype(int)]
    expected = [expected_outputs(model, task, feature, stage) for feature in chosen]
    float_outputs = None
    if quantized_layers(model):
        with as_float(model):
            float_outputs = [expected_outputs(model, task, feature, stage) for feature in chosen]
    checks: list[Check] = []
    for place, label in ((stage, "folder"), (stage / ONNX, "ONNX file")):
        try:
            session = espalier.load(place, threads=threads, tune=False)
        except UnsupportedModelError:
            continue  # said by the check before
        known = {info.name for info in session.get_inputs()}
        names = [info.name for info in session.get_outputs() if info.name in expected[0]]
        if not names:
            checks.append(Check(f"numbers, {label}", False, "no output that PyTorch has too"))
            continue
        rows = session.run_ragged(names, [session_inputs(feature, known) for feature in chosen])
        got = [dict(zip(names, row, strict=True)) for row in zip(*rows, strict=True)]
        pairs = [(name, want, have) for name in names for want, have in zip(expected, got, strict=True)]
        worst = max(compare([name], [want[name]], [have[name]])[0].error for name, want, have in pairs)
        ok, said = worst <= TOLERANCE, f"relative error {worst:.1e}"
        if float_outputs is not None and not ok:
            worst = max(_apart(expected, got, name) / _apart(expected, float_outputs, name) for name in names)
            ok, said = worst <= _NOISE, f"{worst:.2f} times the difference that quantisation makes"
        checks.append(Check(f"numbers, {label}", ok, f"{said}, on {len(chosen)} examples ({', '.join(names)})"))
    return checks


def _apart(a: Sequence[Mapping[str, np.ndarray]], b: Sequence[Mapping[str, np.ndarray]], name: str) -> float:
    """The norm of the difference of an output over all examples."""
    squares = [((x[name] - y[name]).astype(np.float64) ** 2).sum() for x, y in zip(a, b, strict=True)]
    return max(float(np.sqrt(sum(squares))), float(np.finfo(np.float32).tiny))


def session_inputs(feature: Feature, known: set[str]) -> dict[str, np.ndarray]:
    """A feature as one sequence for ``Session.run_ragged``."""
    inputs = {"input_ids": feature.ids.astype(np.int64), "token_type_ids": feature.types.astype(np.int64)}
    return {name: array for name, array in inputs.items() if name in known}


def expected_outputs(model: nn.Module, task: EncoderTask, feature: Feature, folder: Path) -> dict[str, np.ndarray]:
    """What PyTorch says about one sequence, by the names the engine gives its outputs, without the batch axis."""
    device = next(model.parameters()).device
    batch = collate([feature], np.array([0])).to(device)
    with torch.inference_mode():
        raw = task.forward(model, batch, Wants())
        found = {name: value[0] for name, value in raw.items() if isinstance(value, Tensor)}
        embedding = task.outputs(model, batch, Wants()).embedding
    if embedding is not None:
        vector = nn.functional.normalize(embedding, dim=-1) if normalizes(folder) else embedding
        found |= {"sentence_embedding": vector[0], "token_embeddings": raw.last_hidden_state[0]}
    return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def _same_layer(a: str, b: str) -> bool:
    """Whether two names are of the same layer: one may begin with the name of the model inside the other."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")
