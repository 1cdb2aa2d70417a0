"""Devices, their features, and the errors that say what is missing; for GPUs that are not here too."""

from __future__ import annotations

import builtins
import subprocess
import sys
from typing import Any

import pytest

import espalier
from espalier.errors import InputError, MissingDependencyError, UnsupportedModelError
from espalier.gpu import device


def made_up(capability: tuple[int, int] = (9, 0), *, triton: bool = True, semi: bool = True) -> device.Capabilities:
    return device.capabilities("a GPU", capability, 132, 80 << 30, triton=triton, semi_structured=semi)


@pytest.mark.parametrize(
    ("name", "gpu"), [("cpu", False), ("cuda", True), ("cuda:0", True), ("cuda:11", True), ("torch-cpu", True)]
)
def test_names(name: str, gpu: bool) -> None:
    assert device.is_gpu(name) is gpu


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "", "cuda:1 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown device"):
        device.is_gpu(name)


def test_hopper_has_everything() -> None:
    found = made_up()
    assert not found.missing
    assert found.has("fp8")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_ampere_and_ada_run_in_half_precision(capability: tuple[int, int]) -> None:
    found = made_up(capability)
    assert set(found.missing) == {"fp8", "tma"}
    assert device.choose_precision(None, found, calibrated=False) == "bf16"
    assert device.choose_precision("fp16", found, calibrated=False) == "fp16"
    with pytest.raises(UnsupportedModelError, match=r"compute capability 8\.\d, and FP8 needs 9\.0"):
        device.choose_precision(None, found, calibrated=True)


def test_older_gpus_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"compute capability 7\.5; Espalier needs 8\.0"):
        made_up((7, 5))


def test_what_is_not_installed_is_named() -> None:
    assert "pip install 'espalier[gpu]'" in made_up(triton=False).missing["triton"]
    assert "cuSPARSELt" in made_up(semi=False).missing["2:4"]


def test_precisions() -> None:
    found = made_up()
    assert device.choose_precision(None, found, calibrated=True) == "fp8"
    assert device.choose_precision("fp8", found, calibrated=True) == "fp8"
    for wanted, calibrated, message in (
        ("fp4", False, "unknown precision 'fp4'"),
        ("fp8", False, "run `espalier calibrate`"),
        ("bf16", True, "leave out one of the two"),
    ):
        with pytest.raises(InputError, match=message):
            device.choose_precision(wanted, found, calibrated=calibrated)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "gpu"},
        {"precision": "bf16"},
        {"calibration": "scales.json"},
        {"device": "torch-cpu", "precision": "x"},
    ],
)
def test_what_a_session_refuses(options: dict[str, Any]) -> None:
    from espalier._session.build import build
    from espalier.loading import LoadSettings
    from espalier.passes.partition import NativeSegment

    with pytest.raises(InputError):
        build([NativeSegment(None)], LoadSettings(**options))  # type: ignore[arg-type]


def test_without_torch_the_message_ends_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_torch(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(MissingDependencyError, match=r"pip install 'espalier\[gpu\]'$"):
        device.find("cuda")


def test_without_a_gpu_the_message_says_why() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=r"built without CUDA|finds no GPU"):
        device.find("cuda")


def test_importing_and_naming_a_gpu_imports_no_torch() -> None:
    code = (
        "import sys, espalier, espalier.gpu, espalier.gpu.device\n"
        "from espalier.loading import LoadSettings\n"
        "LoadSettings(device='cuda', precision='bf16')\n"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_calibrate_is_public() -> None:
    assert "calibrate" in espalier.__all__
    assert callable(espalier.calibrate)
