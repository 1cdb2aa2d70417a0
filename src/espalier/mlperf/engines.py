"""The engines that the harness can drive, each as it is commonly run: features in, one answer per feature out.

Only :class:`Espalier` runs sequences as they are; the others get padded batches. Imports are local, so that an engine
can live in an environment that has nothing else (``--python``).
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from espalier.data.batching import Feature
from espalier.errors import InputError, MissingDependencyError
from espalier.loading import LoadSettings
from espalier.mlperf.system import Machine, describe_machine

if TYPE_CHECKING:
    from espalier.compiler.packed import Accelerator
    from espalier.pipelines import Pipeline


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """``load``: how Espalier loads the model; the others only take its threads.

    ``padding``: ``"none"``, ``"longest"`` of a batch, or ``"max"`` (``max_length`` tokens). ``batch``: most sequences
    of a padded batch.
    """

    load: LoadSettings
    padding: str
    batch: int
    max_length: int

    @property
    def threads(self) -> int:
        """Threads of a run."""
        return self.load.thread_count

    def to_dict(self) -> dict[str, Any]:
        """All settings side by side, ready for JSON."""
        found = asdict(self)
        load = found.pop("load")
        calibration = load["calibration"] and os.fspath(load["calibration"])
        return {**load, "threads": self.threads, "calibration": calibration, **found}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineSettings:
        """The opposite of :meth:`to_dict`."""
        load = {field.name: values[field.name] for field in fields(LoadSettings)}
        return cls(load=LoadSettings(**load), **{name: value for name, value in values.items() if name not in load})


class Engine(ABC):
    """One model, loaded."""

    name: ClassVar[str]
    package: ClassVar[str]
    paddings: ClassVar[tuple[str, ...]] = ("max", "longest")
    """What it can do, the usual first."""
    wants_onnx: ClassVar[bool] = True
    workers: ClassVar[int] = 1
    """Threads that call :meth:`run`: two where one can hand out answers while the other has the engine."""

    def __init__(self, model: Path, pipeline: type[Pipeline], settings: EngineSettings) -> None:
        """Load ``model``, whose outputs ``pipeline`` understands."""
        self.settings = settings
        self.pipeline = pipeline

    @property
    def version(self) -> str:
        """The engine's version, as its package says."""
        return str(getattr(importlib.import_module(self.package), "__version__", "unknown"))

    @property
    def machines(self) -> list[Machine]:
        """The machines that it runs on."""
        return [describe_machine(self.accelerator)]

    @property
    def accelerator(self) -> Accelerator | None:
        """The GPU it runs on, None for the CPU."""
        return None

    def warm_up(self, features: Sequence[Feature]) -> None:
        """Do what the first queries would otherwise pay for; ``features`` are some of those to come."""
        self.run(features[:4])

    @abstractmethod
    def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        """The answer to each feature; see :meth:`Pipeline.result`."""


class Espalier(Engine):
    """This project's engine, without padding."""

    name = "espalier"
    package = "espalier"
    paddings = ("none",)
    wants_onnx = False
    workers = 2

    def __init__(self, model: Path, pipeline: type[Pipeline], settings: EngineSettings) -> None:
        super().__init__(model, pipeline, settings)
        self._pipeline = pipeline(settings.load.open(model), None)

    @property
    def accelerator(self) -> Accelerator | None:
        return self._pipeline.session.accelerator

    def warm_up(self, features: Sequence[Feature]) -> None:
        self._pipeline.session.warm_up([len(feature.ids) for feature in features])
        super().warm_up(features)

    def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        return self._pipeline.run(features)


class Padded(Engine):
    """An engine of padded batches. ``_infer`` takes and gives arrays by name."""

    static: ClassVar[bool] = False
    """Whether it was prepared for one shape, so that short batches are filled with empty rows."""

    _inputs: Sequence[str]
    _outputs: list[str]

    @abstractmethod
    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        size = self.settings.batch
        found: list[np.ndarray] = []
        for start in range(0, len(features), size):
            found += self._run(features[start : start + size])
        return found

    def _run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        lengths = [len(f.ids) for f in features]
        width = self.settings.max_length if self.settings.padding == "max" else max(lengths)
        shape = (self.settings.batch if self.static else len(features), width)
        ids, types, mask = (np.zeros(shape, np.int64) for _ in range(3))
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            ids[row, :length], types[row, :length], mask[row, :length] = feature.ids, feature.types, 1
        mask[len(features) :, 0] = 1  # a row that attends to nothing would be NaN
        known = {"input_ids": ids, "token_type_ids": types, "segment_ids": types, "attention_mask": mask}
        known["input_mask"] = mask
        outputs = self._infer({name: known[name] for name in self._inputs})
        arrays = [outputs[name] for name in self._outputs]
        return [
            self.pipeline.result([a[row, :length] if a.ndim > 1 and a.shape[1] == width else a[row] for a in arrays])
            for row, length in enumerate(lengths)
        ]


class OnnxRuntime(Padded):
    """ONNX Runtime on the CPU, all optimisations on."""

    name = "onnxruntime"
    package = "onnxruntime"

    def __init__(self, model: Path, pipeline: type[Pipeline], settings: EngineSettings) -> None:
        super().__init__(model, pipeline, settings)
        runtime: Any = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = pipeline.choose({o.name: len(o.shape) for o in self._session.get_outputs()})

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))


class OpenVino(Padded):
    """OpenVINO on the CPU, in the precision of the model."""

    name = "openvino"
    package = "openvino"

    def __init__(self, model: Path, pipeline: type[Pipeline], settings: EngineSettings) -> None:
        super().__init__(model, pipeline, settings)
        core: Any = importlib.import_module("openvino").Core()
        network = core.read_model(str(model))
        self.static = settings.padding == "max"  # type: ignore[misc]
        if self.static:
            shape = [settings.batch, settings.max_length]
            network.reshape({i.get_any_name(): shape for i in network.inputs})
        # The latency hint gives every thread to the one call there is; the throughput hint needs a queue of calls.
        options = {"INFERENCE_NUM_THREADS": settings.threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(network, "CPU", {**options, "INFERENCE_PRECISION_HINT": "f32"})
        self._inputs = [i.get_any_name() for i in compiled.inputs]
        self._names = [o.get_any_name() for o in compiled.outputs]
        self._outputs = pipeline.choose({o.get_any_name(): len(o.partial_shape) for o in compiled.outputs})
        self._request = compiled.create_infer_request()

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._request.infer(feeds)
        return {name: np.array(results[i]) for i, name in enumerate(self._names)}


class DeepSparse(Padded):
    """DeepSparse, which compiles for one shape."""

    name = "deepsparse"
    package = "deepsparse"
    paddings = ("max",)
    static = True

    def __init__(self, model: Path, pipeline: type[Pipeline], settings: EngineSettings) -> None:
        super().__init__(model, pipeline, settings)
        os.environ["NM_DISABLE_ANALYTICS"] = "1"  # it reports its use over the network otherwise
        engine: Any = importlib.import_module("deepsparse").Engine
        shape = [settings.batch, settings.max_length]
        with tempfile.TemporaryDirectory() as folder:
            copy = str(Path(folder) / "model.onnx")  # it writes the shapes into the file it is given
            shutil.copyfile(model, copy)
            self._engine = engine(copy, batch_size=settings.batch, num_cores=settings.threads, input_shapes=[shape])
        self._inputs = self._engine.input_names
        self._outputs = pipeline.choose(dict.fromkeys(self._engine.output_names, 2))

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._engine.run([np.ascontiguousarray(feeds[name]) for name in self._inputs])
        return dict(zip(self._engine.output_names, outputs, strict=True))


class Noop(Engine):
    """Answers nothing at once: measures the harness."""

    name = "noop"
    package = "espalier"
    paddings = ("none",)
    wants_onnx = False

    def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        return [_NOTHING] * len(features)


_NOTHING = np.zeros(2, np.float32)

ENGINES: dict[str, type[Engine]] = {e.name: e for e in (Espalier, OnnxRuntime, OpenVino, DeepSparse, Noop)}


def find_engine(name: str) -> type[Engine]:
    """The engine of that name. Raises InputError, which lists the names."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    return ENGINES[name]


def open_engine(name: str, model: Path, pipeline: type[Pipeline], settings: EngineSettings) -> Engine:
    """Load ``model`` in an engine. Raises what the engine raises, and MissingDependencyError where it is missing."""
    kind: Callable[..., Engine] = find_engine(name)
    try:
        return kind(model, pipeline, settings)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the engine {name} is not installed here ({error}): pip install {find_engine(name).package}, or name the "
            "interpreter of an environment that has it with --python"
        ) from error
