"""What may spoil or explain a run: steps of the system's clock, and the energy it took."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

STEP = 0.05
"""Seconds the clock may jump between two looks. Slewing moves it by less than a thousandth of the time."""


class ClockWatch:
    """Compares the wall clock, which LoadGen measures with, with the monotonic one. Use in a ``with``."""

    def __init__(
        self,
        *,
        every: float = 0.5,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps: list[float] = []
        self._every = every
        self._wall, self._steady = wall, steady
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="clock-watch", daemon=True)

    def __enter__(self) -> ClockWatch:
        self._last = self._wall() - self._steady()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        """Note a step since the last look."""
        now = self._wall() - self._steady()
        if abs(now - self._last) > STEP:
            self.steps.append(now - self._last)
        self._last = now

    def _look(self) -> None:
        while not self._stop.wait(self._every):
            self.look()


class Energy:
    """Joules by part of the machine: the processor's own counters (RAPL) and the GPUs' (NVML), where they can be read.

    This is not MLPerf power, which needs an approved meter.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        self._zones = [zone for zone in sorted(root.glob("*-rapl:*")) if zone.name.count(":") == 1]
        self._gpus = _Gpus()
        self._start = self._read()

    def joules(self) -> dict[str, float]:
        """Since this object was made."""
        found: dict[str, float] = {}
        for name, (end, wrap) in self._read().items():
            if name in self._start:
                used = end - self._start[name][0]
                found[name] = (used if used >= 0 else used + wrap) / 1e6
        return found

    def _read(self) -> dict[str, tuple[int, int]]:
        """Microjoules by name, and where the counter starts over."""
        found = {f"gpu-{i}": (value, 0) for i, value in enumerate(self._gpus.microjoules())}
        for zone in self._zones:
            try:
                name, used, wrap = (
                    (zone / file).read_text().strip() for file in ("name", "energy_uj", "max_energy_range_uj")
                )
                found[name] = int(used), int(wrap)
            except (OSError, ValueError):
                continue
        return found


class _Gpus:
    """The energy counters of NVIDIA's GPUs, through the driver's library; none where there is no such library."""

    def __init__(self) -> None:
        self._handles: list[ctypes.c_void_p] = []
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        count = ctypes.c_uint()
        if self._library.nvmlInit_v2() or self._library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if not self._library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
                self._handles.append(handle)

    def microjoules(self) -> list[int]:
        """One count per GPU that has one."""
        found: list[int] = []
        for handle in self._handles:
            millijoules = ctypes.c_ulonglong()
            if not self._library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
                found.append(millijoules.value * 1000)
        return found
