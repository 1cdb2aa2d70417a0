"""Load a model and run it: :func:`load`, :func:`compile` and :class:`Session`."""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from espalier._session import checks, ragged
from espalier._session.describe import TensorInfo, describe
from espalier._session.report import Report, report_of
from espalier._session.source import Source, identify
from espalier._session.steps import AnyStep, NativeStep, OrtStep, prepare
from espalier.errors import (
    GraphError,
    InputError,
    InputShapeError,
    InputTypeError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from espalier.loading import TOLERANCE_8_BITS, LoadSettings
from espalier.ort import OrtProgram
from espalier.passes import partition as cut
from espalier.passes.partition import OrtSegment, Program

if TYPE_CHECKING:
    import onnx

    from espalier.compiler.packed import Accelerator
    from espalier.ir.graph import Graph

TYPICAL_LENGTHS = (8, 32, 128, 384)
"""Tokens of queries, sentences, paragraphs and pages, for who does not know better."""

Model = Union[str, "os.PathLike[str]", bytes, "onnx.ModelProto"]


def load(
    model: Model,
    *,
    threads: int | None = None,
    tune: bool = True,
    device: str = "cpu",
    precision: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
) -> Session:
    """Open a model for running.

    ``model`` is an ONNX file, a Hugging Face folder (``config.json`` and safetensors), a compiled ``.espalier`` plan
    (told apart by content), serialised ONNX bytes or an ``onnx.ModelProto``. ``threads`` defaults to the cores the
    process may use; ``tune`` chooses each layer's weight format by measurement instead of by the cost model.

    ``device``: ``cpu``, or a GPU (``cuda``, ``cuda:1``), which needs ``espalier[gpu]``. There ``precision`` is ``bf16``
    unless it says ``fp16`` or ``fp32``; a ``calibration``, a file that ``espalier calibrate`` wrote, means FP8 in
    the layers it names. ``torch-cpu`` computes on the CPU what a GPU would, slowly.

    Raises ModelNotFoundError, ModelFormatError, UnsupportedModelError, InputTypeError, InputError or
    MissingDependencyError.
    """
    settings = LoadSettings(threads=threads, tune=tune, device=device, precision=precision, calibration=calibration)
    source = identify(model)
    return _open(source, *_ready(source, settings), settings)


def compile(
    model: Model,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    tune: bool = True,
    exact: bool = False,
) -> Path:
    """Write ``model`` as a compiled plan to ``out`` and return its path.

    A plan stands alone, its size goes by the nonzeros, and it loads on any machine: packing happens there. Large
    embedding tables are rounded to 16-bit integers unless ``exact``. The model is also built once here, which shows
    what the engine runs and, with ``tune``, leaves the measured formats in this machine's cache for later loads.

    Raises what :func:`load` raises.
    """
    settings = LoadSettings(threads=threads, tune=tune)
    source = identify(model)
    if source.kind == "plan":
        raise ModelFormatError(f"{source.name} is a compiled plan already; give the model it was made from, or copy it")
    program, _ = _ready(source, settings)
    program.steps = [_embedded(step) if isinstance(step, OrtSegment) else step for step in program.steps]
    from espalier import compiler

    return compiler.save_plan(program, Path(os.fspath(out)), exact=exact)


def calibrate(
    model: Model,
    samples: Iterable[Mapping[str, Any] | Sequence[Any]],
    out: str | os.PathLike[str],
    *,
    device: str = "torch-cpu",
    max_error: float | None = None,
) -> Path:
    """Learn the scales that FP8 on a GPU needs from ``samples`` of real inputs, and write them to ``out``.

    Each sample is what :meth:`Session.run` takes (a dict of arrays) or what :meth:`Session.run_ragged` takes (a list of
    sequences); a few hundred sequences are plenty. Layers whose results FP8 would change by more than ``max_error``,
    relative and root mean square (0.1 for None), are left in bf16; the file can be edited by hand. It computes on
    ``device`` in float32, without a GPU by default.

    Raises what :func:`load` and :meth:`Session.run` raise.
    """
    if not LoadSettings(device=device).is_gpu:
        raise InputError(f"scales are learnt in PyTorch: pass device='torch-cpu' or 'cuda'; got {device!r}")
    session = load(model, device=device, precision="fp32", tune=False)
    from espalier.gpu.calibration import MAX_ERROR, learn
    from espalier.gpu.program import GpuProgram

    given = list(samples)
    steps = [step for step in session._steps if isinstance(step, NativeStep)]
    programs = [step.program for step in steps if isinstance(step.program, GpuProgram)]

    def run() -> None:
        for sample in given:
            if isinstance(sample, Mapping):
                session.run(None, sample)
            else:
                session.run_ragged(None, sample)

    learn(programs, run, max_error=MAX_ERROR if max_error is None else max_error).save(out)
    return Path(os.fspath(out))


class Session:
    """A loaded model. Made by :func:`load`; safe to use from several threads at once.

    The calling convention is ONNX Runtime's: ``run(output_names, {name: array})`` returns a list of arrays.
    """

    def __init__(
        self,
        program: Program,
        steps: list[AnyStep],
        *,
        name: str,
        original: Path | bytes | None,
        settings: LoadSettings,
    ) -> None:
        self._program = program
        self._steps = steps
        self._name = name
        self._threads = settings.thread_count
        self._original = original
        self._settings = settings
        self._fallback: OrtStep | None = None
        self._lock = threading.Lock()
        shapes = [kind.shape for kind in map(program.types.get, program.inputs) if kind is not None]
        self._batched = all(shape is not None and len(shape) > 1 and isinstance(shape[0], str) for shape in shapes)
        self._whole = steps[0] if len(steps) == 1 and isinstance(steps[0], OrtStep) and steps[0].segment.whole else None

    def __repr__(self) -> str:
        parts = [(step.program.where if isinstance(step, NativeStep) else "ONNX Runtime") for step in self._steps]
        return f"<espalier.Session {self._name!r}, threads={self._threads}: {' > '.join(parts) or 'constant'}>"

    @property
    def threads(self) -> int:
        """Threads each run uses."""
        return self._threads

    @property
    def device(self) -> str:
        """Where the native parts run: ``cpu``, ``cuda``, ``cuda:N`` or ``torch-cpu``."""
        return self._settings.device

    @property
    def accelerator(self) -> Accelerator | None:
        """The GPU that the native parts run on; None where they run on the CPU, and without native parts."""
        found = (step.program.accelerator for step in self._steps if isinstance(step, NativeStep))
        return next((accelerator for accelerator in found if accelerator is not None), None)

    @property
    def tolerance(self) -> float:
        """The largest error that this session's arithmetic explains, relative to the largest output (at least 1).

        In 8 bits a last bit tips a rounding over now and then, and the layers behind it carry that on.
        """
        native = (step.program for step in self._steps if isinstance(step, NativeStep))
        in_8_bits = any("int8" in layer.type for program in native for layer in program.layers())
        return max(self._settings.tolerance, TOLERANCE_8_BITS if in_8_bits else 0.0)

    def get_inputs(self) -> list[TensorInfo]:
        """The inputs in order, described as ONNX Runtime does."""
        if self._whole is not None:
            return [TensorInfo(arg.name, arg.shape, arg.type) for arg in self._whole.program.session.get_inputs()]
        return [describe(name, self._program.types.get(name)) for name in self._program.inputs]

    def get_outputs(self) -> list[TensorInfo]:
        """The outputs in order, described as ONNX Runtime does."""
        if self._whole is not None:
            return [TensorInfo(arg.name, arg.shape, arg.type) for arg in self._whole.program.session.get_outputs()]
        return [describe(name, self._program.types.get(name)) for name in self._program.outputs]

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """Run the model on padded inputs and return the outputs named, all of them for None.

        ``input_feed`` maps every input's name to an array of its exact dtype. ``run_options`` is ONNX Runtime's
        ``RunOptions``, for the parts that it runs. Outputs at padding positions are unspecified.

        Raises InputNameError, InputTypeError, InputShapeError or InputError.
        """
        feeds = checks.check_feeds(input_feed)
        if self._whole is not None:
            return self._run_whole(self._whole, output_names, feeds, run_options)
        wanted = checks.choose_outputs(output_names, self._program.outputs)
        checks.check_names(feeds, self._program.inputs)
        extents = checks.check_arrays(self._program, feeds)
        if any(feeds[name].size == 0 for name in self._program.inputs):
            return self._run_empty(wanted, feeds, extents, run_options)
        try:
            return self._run_steps(wanted, feeds, run_options)
        except checks.MaskValueError:
            if self._original is None:
                raise
            return self._run_fallback(wanted, feeds, run_options)

    def run_ragged(self, output_names: Sequence[str] | None, sequences: Sequence[Any]) -> list[list[np.ndarray]]:
        """Run sequences of different lengths without padding.

        Each sequence is a list or 1-D array of token ids, or a dict of input name to 1-D array. A missing attention
        mask is all ones, missing token types are zeros. Returns, per output, one array per sequence: the padded
        result's without the batch axis.

        Raises InputNameError, InputTypeError, InputShapeError or InputError.
        """
        infos = self.get_inputs()
        outputs = checks.choose_outputs(output_names, [info.name for info in self.get_outputs()])
        rows = ragged.feeds_of(sequences, infos)
        if not rows:
            return [[] for _ in outputs]
        step = self._steps[0] if len(self._steps) == 1 else None
        if isinstance(step, NativeStep) and set(outputs) <= set(step.outputs):
            try:
                step.check_rows(rows)
            except checks.MaskValueError:
                if self._original is None:
                    raise
            else:
                results = step.run_ragged({name: [row[name] for row in rows] for name in step.inputs})
                return [results[name] for name in outputs]
        return ragged.by_length(self.run, outputs, rows, infos, self.get_outputs())

    def check(self, input_feed: Mapping[str, Any]) -> bool:
        """Raise what :meth:`run` would raise of an input, before anything is computed.

        True when the rows of the batch are independent, so that :meth:`run_ragged` gives each row of these padded
        inputs what :meth:`run` gives it, together with whatever other rows.
        """
        feeds = checks.check_feeds(input_feed)
        if self._whole is not None:
            return False  # ONNX Runtime checks as it runs
        checks.check_names(feeds, self._program.inputs)
        checks.check_arrays(self._program, feeds)
        step = self._steps[0] if len(self._steps) == 1 else None
        if not isinstance(step, NativeStep) or not all(feeds[name].size for name in self._program.inputs):
            return False
        try:
            step.check(feeds)
        except checks.MaskValueError:
            if self._original is None:
                raise
            return False
        return self._batched

    def warm_up(self, lengths: Sequence[int] = TYPICAL_LENGTHS, *, tokens: int | None = None) -> float:
        """Do what the first runs would otherwise pay for, and return the seconds it took. Does nothing on a CPU.

        On a GPU: choose kernels and capture graphs for batches of every size. ``lengths``: of sequences like those to
        come, in tokens; ``tokens``: of the largest batch to come, None for the backend's own limit.

        Raises InputError for no lengths, and for numbers below 1.
        """
        if not lengths or min(lengths) < 1 or (tokens is not None and tokens < 1):
            got = f"{list(lengths)[:8]}, in batches of {tokens}"
            raise InputError(f"a warm-up needs lengths of sequences of at least one token; got {got}")
        return sum(step.program.warm_up(lengths, tokens=tokens) for step in self._steps if isinstance(step, NativeStep))

    def report(self) -> Report:
        """What runs where, in which format, at which sparsity, in how much time so far, and why not natively."""
        return report_of(self._name, self._threads, self._steps, self._fallback)

    def _run_whole(
        self, step: OrtStep, output_names: Sequence[str] | None, feeds: Mapping[str, Any], run_options: Any
    ) -> list[Any]:
        if isinstance(output_names, str):
            raise InputTypeError(f"output_names must be a list of names or None; got {output_names!r}")
        try:
            return step.run_list(output_names, feeds, run_options)
        except InputError:
            # ONNX Runtime accepts more than the checks do, so they only speak once it has refused.
            checks.choose_outputs(output_names, [info.name for info in self.get_outputs()])
            optional = [arg.name for arg in step.program.session.get_overridable_initializers()]
            checks.diagnose(self._program, feeds, [info.name for info in self.get_inputs()], optional)
            raise

    def _run_steps(self, wanted: list[str], feeds: Mapping[str, Any], run_options: Any) -> list[Any]:
        values: dict[str, Any] = {**self._program.constants, **feeds}
        given = set(self._program.inputs)
        for step in self._steps:
            if isinstance(step, NativeStep):
                step.check(values, given)
        for step in self._steps:
            if isinstance(step, NativeStep):
                step.check(values, set(values) - given)
            values.update(step.run(values, run_options))
        return [values[name] for name in wanted]

    def _run_empty(
        self, wanted: list[str], feeds: Mapping[str, Any], extents: dict[str, int], run_options: Any
    ) -> list[Any]:
        """Nothing to compute: the outputs are as empty as the inputs, or the model needs at least one token."""
        shapes = {name: self._empty_shape(name, extents) for name in wanted}
        if all(shape is not None for shape in shapes.values()):
            return [np.zeros(shapes[name] or (), self._program.types[name].dtype) for name in wanted]
        if self._original is not None:
            return self._run_fallback(wanted, feeds, run_options)
        raise InputShapeError("an input is empty: give every sequence at least one token, and the batch one sequence")

    def _empty_shape(self, name: str, extents: dict[str, int]) -> tuple[int, ...] | None:
        kind = self._program.types.get(name)
        if kind is None or kind.shape is None:
            return None
        bound = [extents.get(dim) if isinstance(dim, str) else dim for dim in kind.shape]
        shape = tuple(dim for dim in bound if dim is not None)
        return shape if len(shape) == len(bound) and 0 in shape else None

    def _run_fallback(self, wanted: list[str], feeds: Mapping[str, Any], run_options: Any) -> list[Any]:
        """The whole model in ONNX Runtime, for input that only it gives a meaning to; opened on first use."""
        with self._lock:
            if self._fallback is None and self._original is not None:
                program = OrtProgram(self._original, threads=self._threads, shared=True)
                segment = OrtSegment(b"", self._program.inputs, self._program.outputs, whole=True)
                self._fallback = OrtStep(segment, program)
            fallback = self._fallback
        if fallback is None:
            raise InputError("this input needs the original ONNX model, which a plan or a folder does not have")
        return fallback.run_list(wanted, feeds, run_options)


def _program(source: Source, *, images: bool) -> Program:
    """Import, lift and cut the model. ``images``: whether what runs native parts has convolutions."""
    model = source.model
    if source.kind == "plan" and isinstance(model, Path):
        from espalier import compiler

        return compiler.read_plan(model)
    from espalier import passes

    if source.kind == "hf" and isinstance(model, Path):
        from espalier import hf

        graph = passes.run(hf.read(model))
        return Program.of(graph, cut.partition(graph))
    from espalier import onnx

    try:
        graph = passes.run(_read_bytes(model) if isinstance(model, bytes) else onnx.read(model))
        return Program.of(graph, cut.partition(graph, model, images=images))
    except (ModelFormatError, UnsupportedModelError, GraphError) as error:
        return _unread(source, error)


def _read_bytes(data: bytes) -> Graph:
    """Read serialised ONNX; the reader maps files, and a map outlives its file's name."""
    from espalier import onnx

    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        try:
            return onnx.read(path)
        except (ModelFormatError, ModelNotFoundError) as error:
            raise type(error)(str(error).replace(str(path), "the model")) from error


def _unread(source: Source, error: ModelError | GraphError) -> Program:
    """A model that only ONNX Runtime understands: one step over the file. It says so itself when it does not either."""
    if isinstance(error, GraphError):
        warnings.warn(f"{source.name} runs in ONNX Runtime: a pass failed ({error})", RuntimeWarning, stacklevel=4)
    try:
        program = OrtProgram(source.model, threads=1)
    except ModelError:
        if isinstance(error, ModelError):
            raise error from None
        raise
    inputs = [arg.name for arg in program.session.get_inputs()]
    outputs = [arg.name for arg in program.session.get_outputs()]
    reason = cut.Placed("model", "", f"{type(error).__name__}: {error}")
    segment = OrtSegment(source.model, inputs, outputs, [reason], whole=True)
    return Program(source.name, inputs, outputs, {}, [segment])


def _ready(source: Source, settings: LoadSettings) -> tuple[Program, list[AnyStep]]:
    """The program and its steps, ready to run; the whole model in ONNX Runtime where the engine refuses a part.

    What a GPU refuses is refused: a model asked for there must not run elsewhere unnoticed.
    """
    program = _program(source, images=not settings.is_gpu)
    try:
        return program, prepare(program.steps, settings)
    except (UnsupportedModelError, ModelFormatError, GraphError) as error:
        native = any(isinstance(step, cut.NativeSegment) for step in program.steps)
        if source.kind != "onnx" or not native or settings.is_gpu:
            raise
        program = _unread(source, error)
        return program, prepare(program.steps, settings)


def _open(source: Source, program: Program, steps: list[AnyStep], settings: LoadSettings) -> Session:
    # The steps hold what they need; the weights they were made from must not stay in memory beside them.
    ends = replace(program, steps=[])
    original = source.model if source.kind == "onnx" else None
    return Session(ends, steps, name=source.name, original=original, settings=settings)


def _embedded(segment: OrtSegment) -> OrtSegment:
    """The segment with its model as bytes, external data included, so that a plan stands alone."""
    if isinstance(segment.model, bytes):
        return segment
    import onnx

    try:
        data = onnx.load(segment.model).SerializeToString()
    except ValueError as error:
        raise UnsupportedModelError(
            f"{segment.model} runs in ONNX Runtime as a whole and exceeds 2 GiB, which a plan cannot hold: "
            "load the ONNX file directly"
        ) from error
    return OrtSegment(data, segment.inputs, segment.outputs, segment.nodes, segment.whole)
