"""The ONNX project's own backend tests, run through a session: whatever ONNX Runtime passes must pass here."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import espalier
from espalier.errors import EspalierError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

with warnings.catch_warnings():
    # The cases divide by zero and overflow on purpose while they compute their references.
    warnings.simplefilter("ignore")
    import onnx.backend.test.case.node as cases
    from onnx.backend.test.loader import load_model_tests
    from onnx.backend.test.runner import Runner

# Modules whose references take seconds to compute.
SLOW = {"averagepool", "lppool", "maxpool"}
CHUNKS = 12
MODULES = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
FAST = [name for name in MODULES if name not in SLOW]
# Every third chunk by default, all of them with the slow tests.
GROUPS = [
    pytest.param(FAST[start::CHUNKS], id=str(start), marks=[pytest.mark.slow] if start % 3 else [])
    for start in range(CHUNKS)
]
GROUPS += [pytest.param([name], id=name, marks=pytest.mark.slow) for name in sorted(SLOW & set(MODULES))]


class Case(NamedTuple):
    name: str
    model: Any
    data: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float
    atol: float


_BY_MODULE: dict[str, list[Any]] = {}


def node_cases(modules: Sequence[str]) -> Iterator[Case]:
    """The cases of these modules. Importing one computes its references and appends its cases to a list."""
    for name in modules:
        if name not in _BY_MODULE:
            before = len(cases._NodeTestCases)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(f"{cases.__name__}.{name}")
            _BY_MODULE[name] = cases._NodeTestCases[before:]
        for case in _BY_MODULE[name]:
            yield Case(case.name, case.model, case.data_sets, case.rtol, case.atol)


def model_cases(kind: str) -> Iterator[Case]:
    """Cases that the onnx package carries as files."""
    for case in load_model_tests(kind=kind):
        folder = Path(case.model_dir)
        model = onnx.load(folder / "model.onnx")
        data = []
        for part in sorted(folder.glob("test_data_set_*")):
            ends = []
            for end, values in (("input", model.graph.input), ("output", model.graph.output)):
                files = sorted(part.glob(f"{end}_*.pb"), key=lambda file: int(file.stem.rpartition("_")[2]))
                ends.append([_read(file, value.type) for file, value in zip(files, values, strict=False)])
            data.append((ends[0], ends[1]))
        yield Case(case.name, model, data, case.rtol, case.atol)


def _read(file: Path, kind: Any) -> Any:
    if kind.HasField("sequence_type"):
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))
    if kind.HasField("optional_type"):
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(file.read_bytes()))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


def run_all(session: Any, case: Case) -> list[list[Any]]:
    """The outputs of every data set; raises what the session raises."""
    names = [value.name for value in case.model.graph.input]
    return [session.run(None, dict(zip(names, inputs, strict=False))) for inputs, _ in case.data]


def difference(case: Case, results: list[list[Any]]) -> str:
    """How the results differ from the stored ones, "" when they do not."""
    try:
        for (_, outputs), got in zip(case.data, results, strict=True):
            Runner.assert_similar_outputs(outputs, got, case.rtol, case.atol)
    except (AssertionError, TypeError, ValueError, AttributeError, IndexError) as error:
        # The runner cannot compare everything, None inside a sequence for one.
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return ""


def passes_in_onnxruntime(case: Case) -> bool:
    """Whether ONNX Runtime itself passes. Whatever it does instead of passing counts as not passing."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        data = case.model.SerializeToString()
        results = run_all(onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]), case)
    except Exception:  # noqa: BLE001 - the peer's failures are of every kind
        return False
    return not difference(case, results)


def check(found: Iterator[Case]) -> int:
    """Every case that ONNX Runtime passes passes; the others end in an answer or an Espalier exception."""
    passed, broken = 0, []
    for case in found:
        expected = passes_in_onnxruntime(case)
        problem = ""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*a pass failed")
                session = espalier.load(case.model, threads=1, tune=False)
            results = run_all(session, case)
        except EspalierError as error:
            problem = f"{type(error).__name__}: {error}" if expected else ""
        except Exception as error:  # noqa: BLE001 - anything else is a bug to list with the rest
            problem = f"leaked {type(error).__name__}: {error}"
        else:
            problem = difference(case, results) if expected else ""
        if problem:
            broken.append(f"{case.name}: {problem[:400]}")
        passed += expected
    assert not broken, f"{len(broken)} cases:\n" + "\n".join(broken)
    return passed


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy", "ignore::RuntimeWarning:onnx")
@pytest.mark.parametrize("modules", GROUPS)
def test_node_cases(modules: list[str]) -> None:
    assert check(node_cases(modules)) > 0


@pytest.mark.parametrize("kind", ["simple", "pytorch-converted", "pytorch-operator"])
def test_model_cases(kind: str) -> None:
    assert check(model_cases(kind)) > 5


def test_the_cases_are_all_there() -> None:
    """A rename inside the onnx package would otherwise leave nothing to run."""
    assert len(FAST) > 150
    assert sum(1 for _ in node_cases(FAST[::CHUNKS])) > 50
