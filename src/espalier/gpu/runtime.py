"""The calls that concern a device itself: buffers, streams, graphs, events. One class for CUDA, one for the CPU.

Everything above them (lanes, buckets, the cache of graphs) takes one of these as an argument, and so runs, and is
tested, without a GPU.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Wait = Callable[[], None]
"""Returns once the work that was enqueued before it is done."""


class Runtime(ABC):
    """One device. ``device`` is PyTorch's name for it; ``captures``: whether capturing makes work faster there."""

    device: torch.device
    captures = True

    @abstractmethod
    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory on the host that the device can copy from and to by itself."""

    @abstractmethod
    def stream(self) -> Any:
        """A new queue of work."""

    @abstractmethod
    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Within it, work goes to ``stream``."""

    @abstractmethod
    def capture(self, work: Callable[[], None], stream: Any, pool: Any) -> Callable[[], None]:
        """What does ``work`` again by one call, at the same addresses. Graphs of one ``pool`` share their memory."""

    @abstractmethod
    def pool(self) -> Any:
        """Memory for graphs that never run at the same time."""

    @abstractmethod
    def mark(self, stream: Any) -> Wait:
        """A mark behind what ``stream`` has been given so far, to be waited for."""

    @abstractmethod
    def settle(self) -> None:
        """Wait for all work, of every stream."""

    @abstractmethod
    def seconds(self, call: Callable[[], object]) -> float:
        """How long ``call`` keeps the device busy."""


class CpuRuntime(Runtime):
    """PyTorch on the CPU: no queue, and a graph is the work itself."""

    captures = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Plain memory."""
        return torch.zeros(size, dtype=dtype)

    def stream(self) -> Any:
        """Nothing."""
        return None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Nothing."""
        return nullcontext()

    def capture(self, work: Callable[[], None], stream: Any, pool: Any) -> Callable[[], None]:
        """The work."""
        return work

    def pool(self) -> Any:
        """Nothing."""
        return None

    def mark(self, stream: Any) -> Wait:
        """All work is done at once."""
        return lambda: None

    def settle(self) -> None:
        """All work is done at once."""

    def seconds(self, call: Callable[[], object]) -> float:
        """By the clock."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaRuntime(Runtime):
    """One GPU."""

    _REPEATS = 20

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Pinned memory."""
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def stream(self) -> Any:
        """A CUDA stream."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """PyTorch's current stream."""
        return torch.cuda.stream(stream)

    def capture(self, work: Callable[[], None], stream: Any, pool: Any) -> Callable[[], None]:
        """A CUDA graph. Kernels are compiled and libraries opened by a run before: neither may happen in a capture."""
        with torch.cuda.stream(stream):
            work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def pool(self) -> Any:
        """A pool of PyTorch's allocator."""
        return torch.cuda.graph_pool_handle()

    def mark(self, stream: Any) -> Wait:
        """An event that a waiting thread sleeps on."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        wait: Wait = event.synchronize
        return wait

    def settle(self) -> None:
        """Of the whole device."""
        torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """The mean of a few repeats between two events, after one to warm up."""
        call()
        self.settle()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(self._REPEATS):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / self._REPEATS / 1e3
