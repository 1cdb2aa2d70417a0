"""Convolutions in compression: the same network before, during and after, with zeros where the pattern says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.compression import calibration
from espalier.compression.compress import compress
from espalier.compression.config import Config, Schedule, Training
from espalier.compression.convolution import Convolution, as_linear
from espalier.errors import ConfigError

TRAINING = Training(steps=6, batch_tokens=16, max_length=100)


class Network(nn.Module):
    """Strides, dilation, padding of every kind, a convolution in groups, a linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, (3, 5), stride=2, padding=(1, 2), bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding="same", dilation=2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=4, padding=1),
            nn.Conv2d(16, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect"),
        )
        self.output = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.body(F.relu(self.stem(x))).mean((2, 3)))
        return y


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 10, 12, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.mean((2, 3)).repeat(1, 2)[:, :4]).square().mean()


PRUNED = ["body.0", "body.3", "body.6"]


def test_the_network_computes_the_same_meanwhile() -> None:
    model = Network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(images())
    parameters = {id(p) for p in model.parameters()}
    with as_linear(model):
        inside = {n for n, m in model.named_modules() if isinstance(m, Convolution)}
        assert inside == {"stem", *PRUNED}
        torch.testing.assert_close(model(images()), expected)
        assert {id(p) for p in model.parameters()} == parameters
    assert not any(isinstance(m, Convolution) for m in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert repr(model) == repr(Network())


def test_layers_are_reverted_after_an_error() -> None:
    model = Network()
    with pytest.raises(ZeroDivisionError), as_linear(model):
        raise ZeroDivisionError
    assert model.body[0].weight.shape == (16, 8, 3, 5)


def test_inputs_and_gradients_are_those_of_the_matrix() -> None:
    model, batch = Network().eval(), images()
    with as_linear(model):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Convolution)}
        outputs: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for name, layer in layers.items():
            layer.register_forward_hook(lambda m, i, y, name=name: outputs.__setitem__(name, y))
        calibration.feed(model, layers, [batch], lambda m, b: m(b).sum(), rows.__setitem__)
        with torch.no_grad():
            model(batch)
        for name, layer in layers.items():
            bias = 0 if layer.bias is None else layer.bias
            wanted = outputs[name].flatten(2).transpose(1, 2).flatten(0, 1)
            torch.testing.assert_close(rows[name] @ layer.weight.T + bias, wanted, rtol=1e-4, atol=1e-5)
        found: dict[str, Tensor] = {}
        calibration.sample_gradients(
            model, layers, [batch], loss, lambda name, gradients: found.__setitem__(name, gradients.mean(0))
        )
        loss(model, batch).backward()
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            torch.testing.assert_close(found[name], layer.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt", "obert", "movement"])
@pytest.mark.parametrize(("pattern", "block"), [("unstructured", (1, 1)), ("4x1", (4, 1)), ("1x4", (1, 4))])
def test_every_score_and_pattern(score: str, pattern: str, block: tuple[int, int]) -> None:
    model = Network()
    gradual = Schedule(kind="gradual", steps=2, start=0.2, end=0.6) if score == "movement" else Schedule(kind="oneshot")
    config = Config(sparsity=0.5, pattern=pattern, score=score, training=TRAINING, schedule=gradual)
    report = compress(model, config, batches=[images()] * 8, loss=loss)
    assert [layer.name for layer in report.layers][:3] == PRUNED
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    rows, channels = block
    for name in PRUNED:
        weight = model.get_submodule(name).weight.detach()
        outputs, inputs = weight.shape[:2]
        groups = weight.unflatten(0, (outputs // rows, rows)).unflatten(2, (inputs // channels, channels))
        alive = (groups != 0).any(3).any(1)
        assert alive.float().mean() == pytest.approx(0.5, abs=0.05)
    assert (model.stem.weight != 0).all()


def test_least_squares_beats_magnitude() -> None:
    """What is left makes up for what is gone."""
    off: dict[str, float] = {}
    for score in ("magnitude", "sparsegpt"):
        model = Network().eval()
        expected = model(images(32)).detach()
        config = Config(sparsity=0.6, pattern="4x1", score=score, training=Training(steps=0), exclude=("output",))
        compress(model, config, batches=[images(32)], loss=loss)
        off[score] = float((model.eval()(images(32)) - expected).square().mean())
    assert off["sparsegpt"] < off["magnitude"]


def test_a_resumed_run(tmp_path: Path) -> None:
    config = Config(sparsity=0.5, pattern="4x1", training=Training(steps=4, batch_tokens=16, checkpoint_every=2))
    compress(Network(), config, batches=[images()] * 8, loss=loss, output=tmp_path / "run")
    assert (tmp_path / "run" / "report.json").is_file()


def test_what_is_not_known_of_convolutions() -> None:
    with pytest.raises(ConfigError, match="cost model"):
        compress(Network(), Config(speedup=2.0), batches=[images()], loss=loss)
    with pytest.raises(ConfigError, match="does not divide"):
        compress(Network(), Config(sparsity=0.5, pattern="1x16"), batches=[images()], loss=loss)


def test_the_engine_runs_what_was_pruned(tmp_path: Path) -> None:
    """From a module to an ONNX file to the formats that the zeros allow."""
    torch.manual_seed(0)
    layers: list[Any] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    compress(model, Config(sparsity=0.9, pattern="4x1", score="magnitude", exclude=("10",)))
    path, x = tmp_path / "model.onnx", torch.randn(2, 3, 16, 16)
    torch.onnx.export(model, (x,), str(path), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    session = espalier.load(path)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).detach().numpy(), atol=1e-5)
    assert {layer.where for layer in session.report().layers} == {"native"}
    zeros = [layer.sparsity for layer in session.report().layers if layer.op == "Linear"]
    assert sum(share is not None and share > 0.85 for share in zeros) == 3
