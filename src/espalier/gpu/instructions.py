"""The instructions of a lowered graph, one class per kind of work. Data, and how each asks the kernels for its result.

Values are named as in the graph. A value exists in the compute type, as e4m3, or in both, as its readers want
(:class:`~espalier.gpu.form.Form`); it is dropped after its last reader, which gives its memory to the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from espalier.gpu.batches import DeviceBatch
from espalier.gpu.form import Form, Result, emit
from espalier.gpu.kernels.eager import EagerKernels, normalise
from espalier.gpu.weights import Weight, dequantize_int8, quantize_int8, scalars

Observer = Callable[[str, torch.Tensor], None]
"""Told the name of every weight and what it is about to be multiplied by, for calibration."""


@dataclass
class State:
    """What instructions work on during one run. ``tables`` and ``weights`` are the model's, ``values`` this batch's."""

    kernels: EagerKernels
    tables: Mapping[str, torch.Tensor]
    weights: Mapping[str, Weight]
    batch: DeviceBatch
    outputs: list[torch.Tensor]
    observer: Observer | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    quantized: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Instruction(ABC):
    """``out`` is the value made, ``label`` its name in reports; ``last``: values that nobody reads afterwards.

    Lowering sets ``form`` and ``last`` once all instructions are there.
    """

    out: str
    label: str
    form: Form = field(default_factory=lambda: Form(torch.float32))
    last: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        """The kind, for reports."""
        return type(self).__name__

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The values it reads."""

    @abstractmethod
    def compute(self, state: State) -> Result:
        """The result, in the forms that ``form`` asks for."""

    def run(self, state: State) -> None:
        """Compute, keep the result, and drop what was read for the last time."""
        kept, quantized = self.compute(state)
        if kept is not None:
            state.values[self.out] = kept
        if quantized is not None:
            state.quantized[self.out] = quantized
        for name in self.last:
            state.values.pop(name, None)
            state.quantized.pop(name, None)


@dataclass(kw_only=True)
class Load(Instruction):
    """A float input of the graph."""

    number: int

    @property
    def reads(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def compute(self, state: State) -> Result:
        """From the batch."""
        return emit(state.batch.floats[self.number], self.form)


@dataclass(kw_only=True)
class Embed(Instruction):
    """The sum of rows of ``tables``: pairs of a table and the number of an index input."""

    tables: tuple[tuple[str, int], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def compute(self, state: State) -> Result:
        """One gather per table."""
        rows = [state.tables[name].index_select(0, state.batch.indices[number]) for name, number in self.tables]
        total = rows[0].float()
        for more in rows[1:]:
            total = total + more
        return emit(total, self.form)


@dataclass(kw_only=True)
class Gemm(Instruction):
    """A linear layer, or several that read the same value, side by side; ``weight`` names it among the weights."""

    x: str
    weight: str
    activation: str = ""

    @property
    def op(self) -> str:
        """As in the dialect."""
        return "Linear"

    @property
    def reads(self) -> tuple[str, ...]:
        """Its input."""
        return (self.x,)

    def compute(self, state: State) -> Result:
        """The input in the form that the weight reads."""
        weight = state.weights[self.weight]
        x = (state.quantized if weight.reads_fp8 else state.values)[self.x]
        if state.observer is not None:
            state.observer(self.weight, x[: int(state.batch.bounds[-1])])  # without what fills up the bucket
        return state.kernels.gemm(x, weight, self.activation, self.form)


@dataclass(kw_only=True)
class Norm(Instruction):
    """LayerNorm of ``x``, or of the sum of ``x`` and ``residual``. ``gamma``, ``beta`` name tables; "" for none."""

    x: str
    residual: str
    gamma: str
    beta: str
    epsilon: float

    @property
    def op(self) -> str:
        """As in the dialect."""
        return "LayerNorm"

    @property
    def reads(self) -> tuple[str, ...]:
        """Both terms of the sum."""
        return (self.x, self.residual) if self.residual else (self.x,)

    def compute(self, state: State) -> Result:
        """By the kernel."""
        residual = state.values[self.residual] if self.residual else None
        beta = state.tables[self.beta] if self.beta else None
        return state.kernels.norm(
            state.values[self.x], residual, state.tables[self.gamma], beta, self.epsilon, self.form
        )


@dataclass(kw_only=True)
class Activate(Instruction):
    """An activation that no linear layer took along."""

    x: str
    kind: str

    @property
    def op(self) -> str:
        """As in the dialect."""
        return "Activation"

    @property
    def reads(self) -> tuple[str, ...]:
        """Its input."""
        return (self.x,)

    def compute(self, state: State) -> Result:
        """By the kernel."""
        return state.kernels.unary(state.values[self.x], None, self.kind, self.form)


_ARITHMETIC: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
}


@dataclass(kw_only=True)
class Arithmetic(Instruction):
    """``x kind y``, where either may name a table ``[F]`` or ``[]`` instead of a value."""

    kind: str
    x: str
    y: str

    @property
    def op(self) -> str:
        """As in the dialect."""
        return self.kind

    @property
    def reads(self) -> tuple[str, ...]:
        """Both operands; those that are tables are never dropped."""
        return (self.x, self.y)

    def compute(self, state: State) -> Result:
        """In float32."""
        x, y = (state.values[name] if name in state.values else state.tables[name] for name in (self.x, self.y))
        return emit(_ARITHMETIC[self.kind](x.float(), y.float()), self.form)


@dataclass(kw_only=True)
class Attend(Instruction):
    """Attention of ``heads``; ``bias`` is the number of a bias input, -1 for none."""

    q: str
    k: str
    v: str
    heads: int
    scale: float
    bias: int

    @property
    def op(self) -> str:
        """As in the dialect."""
        return "Attention"

    @property
    def reads(self) -> tuple[str, ...]:
        """Queries, keys and values."""
        return (self.q, self.k, self.v)

    def compute(self, state: State) -> Result:
        """By the kernel."""
        q, k, v = (state.values[name] for name in self.reads)
        bias = state.batch.biases[self.bias] if self.bias >= 0 else None
        return state.kernels.attention(q, k, v, self.heads, self.scale, state.batch, bias, self.form)


@dataclass(kw_only=True)
class Simple(Instruction):
    """What reads one value and has no kernel of its own."""

    x: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Its input."""
        return (self.x,)

    @abstractmethod
    def value(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """The result in any float type."""

    def compute(self, state: State) -> Result:
        """The value, in the forms wanted."""
        value = self.value(state.values[self.x], state)
        if self.form.scale is None:
            return value.to(self.form.dtype), None
        return emit(value.float(), self.form)


@dataclass(kw_only=True)
class SliceFeatures(Simple):
    """Features ``[start, stop)``: a view, no work."""

    start: int
    stop: int

    def value(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """A view."""
        return x[:, self.start : self.stop]


@dataclass(kw_only=True)
class SelectToken(Simple):
    """One token of every sequence, by its column in the padded batch."""

    column: int

    def value(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """By row."""
        return x.index_select(0, state.batch.picks[self.column])


@dataclass(kw_only=True)
class MaskedMean(Simple):
    """The mean over each sequence's tokens."""

    epsilon: float

    def value(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """By the kernel."""
        return state.kernels.segment_mean(x, state.batch, self.epsilon)


@dataclass(kw_only=True)
class L2Normalize(Simple):
    """Rows of length one."""

    epsilon: float

    def value(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """In PyTorch."""
        return normalise(x, self.epsilon)


@dataclass(kw_only=True)
class Softmax(Simple):
    """Over the features."""

    def value(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """In PyTorch."""
        return torch.softmax(x.float(), dim=-1)


@dataclass(kw_only=True)
class FakeQuantize(Simple):
    """To 8 bits and back. ``signed``: of int8 and not uint8."""

    scale: float
    zero: int
    signed: bool

    def value(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """In PyTorch."""
        scale, zero = scalars(self.scale, self.zero, x.device)
        quantized = quantize_int8(x.float(), scale, zero, signed=self.signed)
        return dequantize_int8(quantized, scale, zero, signed=self.signed)


@dataclass(kw_only=True)
class Store(Instruction):
    """Features ``[first, first + width)`` of ``x`` into the output of that number."""

    x: str
    number: int
    first: int
    width: int

    @property
    def reads(self) -> tuple[str, ...]:
        """Its input."""
        return (self.x,)

    def compute(self, state: State) -> Result:
        """In float32, into the output's own memory."""
        state.outputs[self.number].copy_(state.values[self.x][:, self.first : self.first + self.width])
        return None, None
