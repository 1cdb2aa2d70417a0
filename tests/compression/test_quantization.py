"""Eight bit layers: the arithmetic of the native dialect, ranges, rounding, smoothing, and how layers are chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.compression.config import Calibration, Config, Quantization
from espalier.compression.quantization.linear import (
    HIGH,
    STATIC,
    TOKEN,
    QuantizedLinear,
    quantized_layers,
    round_static,
    row_scales,
)
from espalier.compression.quantization.quantizer import FLOAT, QuantizationReport, Quantizer
from espalier.compression.quantization.ranges import Inputs, parameters, range_of
from espalier.compression.quantization.smooth import pairs_of, smooth
from espalier.compression.second_order import dampen, inverse_factor, output_error, round_columns
from espalier.errors import ConfigError, DataError, TrainingError, UnsupportedModelError
from espalier.ir.ops import qlinear


def layer(activations: str, inputs: int = 24, outputs: int = 16) -> QuantizedLinear:
    torch.manual_seed(1)
    module = nn.Linear(inputs, outputs)
    with torch.no_grad():
        module.weight[3] = 0  # a row of zeros
        module.weight[:, ::3] = 0
    made = QuantizedLinear.convert(module, activations)
    if activations == STATIC:
        made.set_input(*parameters(-1.5, 3.1))
    return made


# --- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [STATIC, TOKEN])
def test_a_layer_computes_what_the_dialect_says(activations: str) -> None:
    module = layer(activations)
    x = torch.randn(2, 7, 24) * 2  # beyond the static range too
    x[0, 0] = 0
    x[0, 1] = 0.7
    x[0, 2, 0] = 1000
    stored = [None if t is None else t.numpy().reshape(()) for t in (module.input_scale, module.input_zero_point)]
    scales, bias = module.weight_scale.numpy()[:, 0], module.bias.detach().numpy()
    want = qlinear(x.numpy(), module.integers().numpy(), scales, None, bias, *stored, activations)
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert bool((module.integers()[:, ::3] == 0).all())
    assert float(module.weight_scale[3]) == 1


def test_a_conversion_keeps_the_object_and_its_parameters() -> None:
    module = nn.Linear(8, 4)
    weight = module.weight
    made = QuantizedLinear.convert(module, STATIC)
    assert made is module
    assert made.weight is weight
    assert set(made.state_dict()) == {"weight", "bias", "weight_scale", "input_scale", "input_zero_point"}
    made.active = False
    x = torch.randn(3, 8)
    assert torch.equal(made(x), nn.functional.linear(x, weight, made.bias))
    made.revert()
    assert type(module) is nn.Linear
    assert set(module.state_dict()) == {"weight", "bias"}
    with pytest.raises(UnsupportedModelError, match=r"only nn\.Linear can be quantised"):
        QuantizedLinear.convert(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), TOKEN)


def test_gradients_pass_the_rounding_and_stop_where_values_are_cut_off() -> None:
    module = layer(STATIC)
    x = torch.zeros(1, 24, requires_grad=True)
    with torch.no_grad():
        x[0, 1], x[0, 2] = 100.0, -0.5
    module(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad[0, 1]) == 0
    assert float(x.grad[0, 2]) == pytest.approx(float(module.rounded_weight().detach()[:, 2].sum()), rel=1e-5)
    assert module.weight.grad is not None
    assert bool((module.weight.grad[:, 2] != 0).all())


def test_scales_follow_growing_weights_only() -> None:
    module = layer(TOKEN)
    before = module.weight_scale.clone()
    with torch.no_grad():
        module.weight[0] *= 2
        module.weight[1] *= 0.5
    module.follow()
    assert float(module.weight_scale[0]) == pytest.approx(2 * float(before[0]))
    assert torch.equal(module.weight_scale[1:], before[1:])


def test_training_makes_up_for_rounding() -> None:
    torch.manual_seed(0)
    x, dense = torch.randn(200, 24), nn.Linear(24, 16)
    want = dense(x).detach()
    module = QuantizedLinear.convert(dense, STATIC)
    module.set_input(*parameters(-1.0, 1.0))  # cuts off a third of the inputs
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = ((module(x) - want) ** 2).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.follow()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    with pytest.raises(TrainingError, match="weight to quantise is not a finite number"):
        row_scales(torch.full((2, 2), value))


# --- ranges -----------------------------------------------------------------------------------------------------------


def seen(*batches: Tensor) -> Inputs:
    inputs = Inputs(batches[0].shape[1], len(batches))
    for batch in batches:
        inputs.see(batch)
    return inputs


def test_parameters_of_ranges() -> None:
    scale, zero = parameters(-1.0, 1.55)
    assert float(scale) == pytest.approx(0.01)
    assert int(zero) == -28
    for low, high in ((0.0, 5.0), (-5.0, 0.0), (-3.0, 3.0)):
        ends = torch.tensor([low, 0.0, high])
        np.testing.assert_allclose(round_static(ends, *parameters(low, high)), ends, atol=0.02)
        assert float(round_static(ends, *parameters(low, high))[1]) == 0
    # Nothing was seen but zeros, or numbers too small for a scale.
    for low, high in ((0.0, 0.0), (0.0, 1e-42)):
        assert float(parameters(low, high)[0]) == 1


def test_min_and_max_are_of_all_inputs() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(3000, 512) for _ in range(3)]
    batches[1][1234, 7] = -44
    inputs = seen(*batches)
    assert inputs.low == -44
    assert inputs.high == max(float(batch.max()) for batch in batches)
    assert inputs.tokens == 9000
    assert inputs.sample.numel() <= 1 << 20
    assert range_of("minmax", inputs, 99) == (inputs.low, inputs.high)


def test_no_value_is_overlooked() -> None:
    """Outliers of one feature, and of one place in every sequence, whatever the numbers of either are."""
    torch.manual_seed(0)
    x = torch.randn(4096, 384)
    x[31::32, 3] = 60  # [SEP] of sequences of 32 tokens
    inputs = seen(x, x)
    assert inputs.counts.sum() == 2 * x.numel()
    assert range_of("mse", inputs, 99)[1] > 50
    assert 0.5 < float((inputs.sample[:, 3] == 60).float().mean()) * 32 < 2


def test_a_histogram_grows_with_what_it_meets() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(500, 8) * size for size in (0.1, 30.0, 1.0)]
    inputs = seen(torch.zeros(3, 8), *batches)
    values = torch.cat(batches).flatten().numpy()
    assert inputs.counts.sum() == len(values) + 24
    assert inputs.reach >= np.abs(values).max()
    width = 2 * inputs.reach / len(inputs.counts)
    for at in (1.0, 20.0):
        below = inputs.counts[inputs.middles < at].sum() - 24
        assert (values < at - width).sum() <= below <= (values < at + width).sum()
    exact = ((round_static(torch.tensor(values), *parameters(-60.0, 60.0)).numpy() - values) ** 2).mean()
    low, high = range_of("mse", inputs, 99)
    found = ((round_static(torch.tensor(values), *parameters(low, high)).numpy() - values) ** 2).mean()
    assert found < exact


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_an_outlier_is_cut_off_where_that_pays(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 64)
    x[5, 5] = 80
    low, high = range_of(method, seen(x), 99.9)
    assert -6 < low <= float(torch.quantile(x, 0.01))
    assert 2 < high < 75
    if method == "mse":  # the value cut off counts, too
        cut, whole = (round_static(x, *parameters(*ends)) for ends in ((low, high), (float(x.min()), 80.0)))
        assert float(((cut - x) ** 2).mean()) < float(((whole - x) ** 2).mean())


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_inputs(method: str, value: float) -> None:
    x = torch.full((10, 4), value)
    low, high = range_of(method, seen(x), 99.9)
    assert low <= 0 <= high
    np.testing.assert_allclose(round_static(x, *parameters(low, high)), x, atol=0.02)


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_gptq_rounds_better_and_keeps_the_mask() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 32) @ torch.randn(32, 32)
    hessian = (x.T @ x / 500).double()
    weight = torch.randn(16, 32)
    mask = torch.rand(16, 32) > 0.6
    weight *= mask
    scale = weight.abs().amax(1, keepdim=True) / 7  # four bits, where rounding shows
    factor = inverse_factor(dampen(hessian, 0.01), "H")
    nearest = torch.round(weight / scale).clamp(-7, 7) * scale
    found = [round_columns(weight, factor, mask, scale, 7, block) for block in (1, 5, 64)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    steps = found[0]
    assert bool((steps[~mask] == 0).all())
    assert bool((steps == steps.round()).all())
    assert float(steps.abs().max()) <= 7
    assert output_error(weight - steps * scale, hessian) < 0.75 * output_error(weight - nearest, hessian)


# --- smoothing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "count"), [("gelu", 2), ("relu", 4)])
def test_smoothing_changes_nothing_but_the_sizes(activation: str, count: int, make_folder: Callable[..., Path]) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(make_folder(hidden_act=activation), attn_implementation="eager").eval()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    pairs, notes = pairs_of(model, names)
    assert len(pairs) == count
    assert any("LayerNorm" in note for note in notes)
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    with torch.no_grad():
        before = model(ids).last_hidden_state
        weights = [pair.reader.weight.clone() for pair in pairs]
        for pair in pairs:
            smooth(pair, torch.cat([torch.zeros(1), torch.logspace(-3, 3, pair.reader.in_features - 1)]), 0.7)
        np.testing.assert_allclose(model(ids).last_hidden_state, before, atol=2e-5)
    assert all(not torch.equal(pair.reader.weight, old) for pair, old in zip(pairs, weights, strict=True))
    assert pairs_of(nn.Linear(2, 2), ["x"])[0] == []


# --- the whole model --------------------------------------------------------------------------------------------------


class Residuals(nn.Module):
    """Blocks whose inner width can be made hard to quantise: one feature of one block is an outlier."""

    def __init__(self, outlier: float = 0.0, blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in range(blocks)
        )
        if outlier:
            with torch.no_grad():
                self.layers[1]["up"].bias[0] = outlier
                self.layers[1]["down"].weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["down"](torch.relu(block["up"](x)))
        return x


def quantize(
    model: nn.Module, batches: list[Tensor] | None = None, *, calibration: int = 4, **settings: Any
) -> QuantizationReport:
    config = Config(quantization=Quantization(**settings), calibration=Calibration(batches=calibration))
    given = [torch.randn(40, 16) for _ in range(6)] if batches is None else batches
    return Quantizer(model, config).quantize(lambda: given, lambda m, x: m(x).sum(), lambda m, x: m(x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("activations", ["static", "dynamic", "auto"])
def test_every_layer_becomes_eight_bits(activations: str, rounding: str) -> None:
    model = Residuals()
    report = quantize(model, activations=activations, rounding=rounding)
    assert report.fidelity is not None
    assert report.fidelity > 0.999
    assert [row.name for row in report.layers] == list(quantized_layers(model))
    kinds = {row.activations for row in report.layers}
    assert kinds == {STATIC} if activations == "static" else kinds <= {STATIC, TOKEN}
    for row in report.layers:
        assert row.error is not None
        assert 0 < row.error < 1e-3
    if rounding == "gptq":
        for module in quantized_layers(model).values():
            assert torch.equal(module.integers().float() * module.weight_scale, module.weight)


def test_zeros_stay_zero() -> None:
    model = Residuals()
    masks = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                masks[name] = torch.rand_like(module.weight) > 0.8
                module.weight *= masks[name]
    quantize(model, rounding="gptq", smooth=0.5)
    for name, module in quantized_layers(model).items():
        assert bool((module.integers()[~masks[name]] == 0).all())
        assert int(module.integers().abs().max()) <= HIGH


def test_what_harms_most_becomes_dynamic_and_then_float() -> None:
    hard = "layers.1.down"
    plain = quantize(Residuals(outlier=3e4), activations="static", range="minmax", accuracy_target=0)
    assert plain.fidelity is not None
    assert plain.fidelity < 0.97
    model = Residuals(outlier=3e4)
    weight = model.layers[1]["down"].weight.detach().clone()
    report = quantize(model, activations="static", range="minmax", rounding="gptq", accuracy_target=0.999)
    rows = {row.name: row for row in report.layers}
    assert [name for name, row in rows.items() if row.activations == FLOAT] == [hard]
    assert "variance is explained" in rows[hard].why
    assert rows[hard].error == 0
    assert report.fidelity is not None
    assert report.fidelity >= 0.999
    assert type(model.layers[1]["down"]) is nn.Linear
    assert torch.equal(model.layers[1]["down"].weight, weight)  # as it was, not as it was rounded
    assert rows["layers.0.up"].harm is not None
    assert "5 static, 1 kept float" in str(report)


def test_automatic_inputs_are_static_where_that_is_nearly_as_exact() -> None:
    batches = [torch.randn(40, 16) * torch.logspace(-3, 2, 40)[:, None] for _ in range(6)]  # tokens of all sizes
    assert quantize(Residuals(), activations="auto").count(STATIC) > 0
    # A small token among large ones has no digits left under a common range; the errors of large ones hide that.
    report = quantize(Residuals(), batches, activations="auto", range="minmax")
    for row in report.layers:
        assert row.error_static is not None
        assert row.error_token is not None
        assert (row.activations == TOKEN) == (row.error_static > 10 * row.error_token)


def test_layers_that_are_kept_float() -> None:
    model = Residuals()
    report = quantize(model, keep_float=("down",))
    assert [row.name for row in report.layers if row.activations == FLOAT] == [f"layers.{i}.down" for i in range(3)]
    assert {row.why for row in report.layers if row.activations == FLOAT} == {"kept by keep_float"}
    with pytest.raises(ConfigError, match="keep_float: 'sideways' matches none of the 6 layers"):
        quantize(Residuals(), keep_float=("sideways",))
    with pytest.raises(ConfigError, match="nothing to quantise"):
        quantize(Residuals(), keep_float=(".",))


def test_calibration_that_cannot_be() -> None:
    with pytest.raises(DataError, match="no calibration batch"):
        quantize(Residuals(), [])
    for value in (float("nan"), float("inf")):
        with pytest.raises(TrainingError, match="not a finite number"):
            quantize(Residuals(), [torch.full((4, 16), value)])
    report = quantize(Residuals(), [torch.randn(40, 16)] * 2)
    assert any("judged on those of the calibration" in note for note in report.notes)


def test_inputs_that_are_always_the_same() -> None:
    for value in (0.0, 2.0):
        report = quantize(Residuals(), [torch.full((4, 16), value)] * 6)
        assert all(row.error is not None and row.error < 1e-3 for row in report.layers)


def test_the_state_makes_an_equal_model() -> None:
    model, again = Residuals(outlier=3e4), Residuals(outlier=3e4)
    config = Config(quantization=Quantization(range="minmax"), calibration=Calibration(batches=4))
    batches = [torch.randn(40, 16) for _ in range(6)]
    quantizer = Quantizer(model, config)
    quantizer.quantize(lambda: batches, lambda m, x: m(x).sum(), lambda m, x: m(x))
    other = Quantizer(again, config)
    assert not other.done
    other.load_state_dict(quantizer.state_dict())
    again.load_state_dict(model.state_dict())
    assert other.done
    assert other.report == quantizer.report
    assert torch.equal(again(batches[0]), model(batches[0]))
