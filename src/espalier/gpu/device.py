"""Which devices there are, what each can do, and the errors that say what is missing.

:func:`capabilities` is a pure function of numbers, so that choices for GPUs that are not at hand can be tested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.errors import InputError, MissingDependencyError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

CHECKING = "torch-cpu"
"""The name of the executor in plain PyTorch on the CPU: slow, for checking what a GPU will compute."""

LANES = 2
"""Batches under way at once: one travels while another is computed."""

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")


def is_gpu(device: str) -> bool:
    """Whether ``device`` names this executor (``cuda``, ``cuda:1``, ``torch-cpu``) and not the native engine (``cpu``).

    Raises InputError for any other name.
    """
    if device == "cpu":
        return False
    if device == CHECKING or re.fullmatch(r"cuda(:\d+)?", device):
        return True
    raise InputError(
        f"unknown device {device!r}; expected 'cpu', 'cuda', 'cuda:N', or '{CHECKING}' (PyTorch on the CPU, to check)"
    )


def require_torch() -> Any:
    """The module torch. Raises MissingDependencyError."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"running on a GPU needs PyTorch, which cannot be imported ({error}); run: pip install 'espalier[gpu]'"
        ) from error
    return torch


@dataclass(frozen=True)
class Capabilities:
    """What a device offers. ``missing``: what it does not, by feature, with the reason. ``memory``: in bytes.

    ``multiprocessors`` is 0 where there are none to speak of; ``tma``: whether kernels with tensor descriptors run.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    missing: dict[str, str]

    def has(self, feature: str) -> bool:
        """``fp8``, ``bf16``, ``2:4``, ``tma``, ``int8`` or ``triton``."""
        return feature not in self.missing


def capabilities(
    name: str, capability: tuple[int, int], multiprocessors: int, memory: int, *, triton: bool, semi_structured: bool
) -> Capabilities:
    """The features of a CUDA device by its compute capability and by what is installed.

    ``semi_structured``: whether PyTorch was built with 2:4 products. Raises UnsupportedModelError below Ampere.
    """
    at = f"{name} has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        raise UnsupportedModelError(f"{at}; Espalier needs 8.0 (Ampere) or later: use device='cpu'")
    missing: dict[str, str] = {}
    if capability < (9, 0):
        missing["fp8"] = f"{at}, and FP8 needs 9.0 (Hopper)"
        missing["tma"] = f"{at}, and tensor descriptors need 9.0 (Hopper)"
    if not triton:
        missing["triton"] = "Triton is not installed: pip install 'espalier[gpu]'"
        missing["tma"] = missing["triton"]
    if not semi_structured:
        missing["2:4"] = "this PyTorch was built without cuSPARSELt"
    return Capabilities(name, capability, multiprocessors, memory, missing)


def checking_capabilities() -> Capabilities:
    """PyTorch on the CPU: every precision is emulated, nothing is made for speed."""
    reason = "the device is a CPU"
    return Capabilities(CHECKING, (0, 0), 0, 0, dict.fromkeys(("tma", "triton", "2:4"), reason))


def find(device: str) -> tuple[torch.device, Capabilities]:
    """The device of that name and what it can do.

    Raises MissingDependencyError without PyTorch or Triton, InputError where there is no such GPU, and
    UnsupportedModelError for a GPU that is too old.
    """
    torch = require_torch()
    if device == CHECKING:
        return torch.device("cpu"), checking_capabilities()
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = (
            f"this PyTorch ({torch.__version__}) was built without CUDA: pip install torch from the CUDA index"
            if built is None
            else f"PyTorch (CUDA {built}) finds no GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
        )
        raise InputError(f"device {device!r} cannot be used; {reason}, or use device='cpu'")
    place = torch.device(device)
    index = torch.cuda.current_device() if place.index is None else place.index
    count = torch.cuda.device_count()
    if index >= count:
        raise InputError(f"device {device!r} does not exist; there are {count}: cuda:0 to cuda:{count - 1}")
    properties = torch.cuda.get_device_properties(index)
    found = capabilities(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.total_memory,
        triton=_has_triton(),
        semi_structured=hasattr(torch, "_cslt_sparse_mm") and torch.backends.cusparselt.is_available(),
    )
    if not found.has("triton"):
        raise MissingDependencyError(f"running on a GPU needs Triton; {found.missing['triton']}")
    return torch.device("cuda", index), found


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def choose_precision(wanted: str | None, found: Capabilities, *, calibrated: bool) -> str:
    """The precision to run in; ``fp8`` stands for FP8 where calibrated and bf16 elsewhere.

    Raises InputError for an unknown precision or one without what it needs, UnsupportedModelError for one that the
    device does not have.
    """
    if wanted is not None and wanted not in PRECISIONS:
        raise InputError(f"unknown precision {wanted!r}; expected one of {', '.join(PRECISIONS)}")
    chosen = wanted or ("fp8" if calibrated else "bf16")
    if chosen == "fp8" and not calibrated:
        raise InputError("FP8 needs scales from calibration: run `espalier calibrate`, and pass the file it writes")
    if calibrated and chosen != "fp8":
        raise InputError(f"a calibration was given, but precision {chosen!r} does not use it; leave out one of the two")
    if chosen == "fp8" and not found.has("fp8"):
        raise UnsupportedModelError(f"{found.missing['fp8']}; run in bf16 without a calibration")
    return chosen
