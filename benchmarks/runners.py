"""One small class per engine: load a model, run a feed. Imports NumPy only: it also runs in the peers' environment.

Each runner states how its engine is commonly run for throughput and latency of one caller: static shapes where the
engine wants them, single precision everywhere, and the same number of threads.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
"""Name to NumPy array."""


class Runner:
    """An engine holding one model. `prepare` imports the engine, so that load times leave imports out."""

    def prepare(self) -> str:
        """Import the engine; returns its version."""
        raise NotImplementedError

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> None:
        """Load `model` for inputs of `shape` (batch, sequence), replacing what was loaded before."""
        raise NotImplementedError

    def run(self, feed: Arrays) -> Arrays:
        """Padded inputs `[batch, sequence]` to named outputs."""
        raise NotImplementedError

    def run_ragged(self, feeds: list[Arrays]) -> list[Arrays]:
        """Unpadded sequences, each input `[length]`, to the outputs of each. Only Espalier can."""
        raise NotImplementedError("this engine has no ragged input")


class OnnxRuntime(Runner):
    def prepare(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        for name, value in options.items():
            settings.add_session_config_entry(name, value)
        self._session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feed: Arrays) -> Arrays:
        outputs = self._session.run(None, {name: feed[name] for name in self._inputs})
        return dict(zip(self._outputs, outputs, strict=True))


class Espalier(Runner):
    def prepare(self) -> str:
        import espalier
        import espalier.session  # imported on first use otherwise, which would count as loading

        return espalier.__version__

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> None:
        import espalier

        self._session = espalier.load(model, threads=threads, **options)
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feed: Arrays) -> Arrays:
        outputs = self._session.run(None, {name: feed[name] for name in self._inputs})
        return dict(zip(self._outputs, outputs, strict=True))

    def run_ragged(self, feeds: list[Arrays]) -> list[Arrays]:
        sequences = [{name: feed[name] for name in self._inputs if name != "attention_mask"} for feed in feeds]
        outputs = self._session.run_ragged(None, sequences)
        return [dict(zip(self._outputs, one, strict=True)) for one in zip(*outputs, strict=True)]


class DeepSparse(Runner):
    def prepare(self) -> str:
        os.environ["NM_DISABLE_ANALYTICS"] = "1"  # it reports its use over the network otherwise
        return str(importlib.import_module("deepsparse").__version__)

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> None:
        if shape is None:
            raise ValueError("DeepSparse compiles for one (batch, sequence); none was given")
        engine = importlib.import_module("deepsparse").Engine
        self._engine = None  # two compiled models need not be held at once
        with tempfile.TemporaryDirectory() as folder:
            # It writes the static shapes into the very file it is given.
            copy = str(Path(folder) / "model.onnx")
            shutil.copyfile(model, copy)
            self._engine = engine(copy, batch_size=shape[0], num_cores=threads, input_shapes=[list(shape)])

    def run(self, feed: Arrays) -> Arrays:
        engine: Any = self._engine
        outputs = engine.run([np.ascontiguousarray(feed[name]) for name in engine.input_names])
        return dict(zip(engine.output_names, outputs, strict=True))


class DeepSparseEmulated(DeepSparse):
    """With the faster sparse int8 that it offers processors without VNNI."""

    def prepare(self) -> str:
        os.environ["NM_FAST_VNNI_EMULATION"] = "1"
        return super().prepare()


class OpenVINO(Runner):
    def prepare(self) -> str:
        openvino = importlib.import_module("openvino")
        self._core: Any = openvino.Core()
        return str(openvino.__version__).split("-")[0]

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> None:
        network = self._core.read_model(model)
        if shape is not None:
            network.reshape({i.get_any_name(): list(shape) for i in network.inputs})
        # One caller at a time: the latency hint uses every thread for each call. The throughput hint splits the threads
        # into streams that only a queue of calls can fill.
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = self._core.compile_model(network, "CPU", settings)
        self._inputs = [i.get_any_name() for i in compiled.inputs]
        self._outputs = [o.get_any_name() for o in compiled.outputs]
        self._request = compiled.create_infer_request()

    def run(self, feed: Arrays) -> Arrays:
        results = self._request.infer({name: feed[name] for name in self._inputs})
        return {name: np.array(results[i]) for i, name in enumerate(self._outputs)}


RUNNERS: dict[str, type[Runner]] = {
    "onnxruntime": OnnxRuntime,
    "espalier": Espalier,
    "deepsparse": DeepSparse,
    "deepsparse-emulated": DeepSparseEmulated,
    "openvino": OpenVINO,
}
