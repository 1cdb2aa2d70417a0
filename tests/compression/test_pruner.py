"""The pruner: every pattern with every score and allocation, what stays zero, and what survives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pruning is PyTorch's")

from espalier.compression.config import Calibration, Config, Schedule  # noqa: E402
from espalier.compression.costs import GRID, Costs  # noqa: E402
from espalier.compression.groups import parse_pattern  # noqa: E402
from espalier.compression.layers import find_linear  # noqa: E402
from espalier.compression.pruner import Pruner  # noqa: E402
from espalier.compression.scores import SCORES  # noqa: E402
from espalier.errors import ConfigError, DataError, TrainingError  # noqa: E402


class Net(torch.nn.Module):
    """A stack of linear layers, and a head that pruning should leave alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), torch.nn.Linear(16, 8)])
        self.classifier = torch.nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.classifier(x)


TEACHER = Net()


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator)
    return [0.3 * torch.randn(64, 16, generator=generator) @ mix for _ in range(3)]


def loss(model: Any, batch: Any) -> Any:
    noise = torch.randn(len(batch), 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = TEACHER(batch) + noise
    return ((model(batch) - wanted) ** 2).sum(1).mean()


def distance(model: Any) -> float:
    with torch.no_grad():
        return float(torch.stack([((model(b) - TEACHER(b)) ** 2).mean() for b in batches()]).mean())


class Made(Costs):
    """Costs without a clock: a layer's time is its size times what is left, and the rest of the model is a fifth."""

    def __init__(self) -> None:
        pass

    def linear(self, shape: tuple[int, int], sparsity: float, groups: Any) -> float:
        return shape[0] * shape[1] * (1 - 0.9 * sparsity)

    def rest(self, model: Any, linear: Any, lengths: Any) -> tuple[float, str]:
        return 300.0, "made up"


def train(pruner: Pruner, model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches()[:steps]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        pruner.observe()
        optimizer.step()
        pruner.enforce(optimizer)


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "cost"])
def test_every_combination_reaches_its_target(score: str, pattern: str, allocation: str) -> None:
    model = Net()
    config = Config(sparsity=0.5, pattern=pattern, score=score, allocation=allocation)
    pruner = Pruner(model, config, costs=Made() if allocation == "cost" else None)
    train(pruner, model)
    report = pruner.prune(0.5, batches, loss)
    if allocation == "cost":
        assert report.speedup is not None
        assert report.speedup >= (1152 + 300) / (1152 * 0.55 + 300) - 1e-6
    else:
        assert report.sparsity == pruner.sparsity() == pytest.approx(0.5, abs=0.01)
    assert [row.name for row in report.layers] == list(pruner.layers) == ["blocks.0", "blocks.1", "blocks.2"]
    groups = parse_pattern(pattern)
    for name, module in pruner.layers.items():
        assert bool((module.weight[~pruner.masks[name]] == 0).all())
        whole = groups.reduce(pruner.masks[name].float())
        assert set(whole.unique().tolist()) <= {0.0, float(groups.size)}
    before = {name: module.weight == 0 for name, module in pruner.layers.items()}
    train(pruner, model)
    for name, module in pruner.layers.items():
        assert bool((module.weight[before[name]] == 0).all())


def test_second_order_beats_magnitude() -> None:
    found = {}
    for score in ("magnitude", "wanda", "sparsegpt", "obert"):
        model = Net()
        Pruner(model, Config(sparsity=0.5, pattern="4x1", score=score)).prune(0.5, batches, loss)
        found[score] = distance(model)
    assert found["sparsegpt"] < 0.6 * found["magnitude"]
    assert found["obert"] < 0.6 * found["magnitude"]
    assert found["wanda"] < found["magnitude"]


@pytest.mark.parametrize("score", ["sparsegpt", "obert"])
def test_pruning_is_deterministic_and_goes_on_from_where_it_was(score: str) -> None:
    results = []
    for _ in range(2):
        model = Net()
        pruner = Pruner(model, Config(sparsity=0.8, pattern="4x1", score=score))
        pruner.prune(0.4, batches, loss)
        first = {name: mask.clone() for name, mask in pruner.masks.items()}
        pruner.prune(0.8, batches, loss)
        assert all(not bool((mask & ~first[name]).any()) for name, mask in pruner.masks.items())
        results.append(torch.cat([m.weight.detach().flatten() for m in pruner.layers.values()]))
    assert torch.equal(*results)
    assert pruner.sparsity() == pytest.approx(0.8, abs=0.02)


def test_pruning_in_turn_uses_the_inputs_layers_really_get() -> None:
    found = {}
    for sequential in (False, True):
        model = Net()
        config = Config(sparsity=0.6, pattern="4x1", calibration=Calibration(sequential=sequential))
        Pruner(model, config).prune(0.6, batches, loss)
        found[sequential] = distance(model)
    assert found[True] != found[False]


def test_state_survives_and_another_model_is_refused() -> None:
    model = Net()
    config = Config(sparsity=0.5, pattern="unstructured", score="movement", schedule=Schedule(start=0.1))
    pruner = Pruner(model, config)
    train(pruner, model)
    pruner.prune(0.3, batches, loss)
    state, weights = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    other = Net()
    other.load_state_dict(weights)
    again = Pruner(other, config)
    again.load_state_dict(state)
    assert again.layer_report() == pruner.layer_report()
    for one, network in ((pruner, model), (again, other)):
        one.prune(0.5, batches, loss)
        assert network is one.model
    assert all(torch.equal(pruner.masks[n], again.masks[n]) for n in pruner.masks)
    with pytest.raises(ValueError, match="other layers"):
        Pruner(torch.nn.Sequential(torch.nn.Linear(4, 4)), Config()).load_state_dict(state)


def test_a_constant_schedule_keeps_the_zeros_there_are() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[0].weight[:4] = 0
    pruner = Pruner(model, Config(schedule=Schedule(kind="constant")))
    train(pruner, model)
    assert not bool(model.blocks[0].weight[:4].any())
    assert pruner.sparsity() == pytest.approx(64 / 1152)


def test_optimiser_moments_of_zeros_are_zero() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model, batches()[0]).backward()
    optimizer.step()
    pruner = Pruner(model, Config(sparsity=0.5, score="magnitude"))
    pruner.prune(0.5, batches, loss)
    pruner.enforce(optimizer)
    for name, module in pruner.layers.items():
        assert not bool(optimizer.state[module.weight]["exp_avg"][~pruner.masks[name]].any())


def test_training_mode_and_gradients_are_left_alone() -> None:
    model = Net().train()
    loss(model, batches()[0]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    Pruner(model, Config(sparsity=0.5, score="obert")).prune(0.5, batches, loss)
    assert model.training
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_which_layers_count() -> None:
    model = Net()
    assert list(find_linear(model, (), ())) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_linear(model, ("classifier",), (r"blocks\.1",))) == ["blocks.0", "blocks.2", "classifier"]
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    assert list(find_linear(plain, (), ())) == ["0", "2"]
    with pytest.raises(ConfigError, match="'blokcs' matches none of the model's 4 linear layers"):
        find_linear(model, (), ("blokcs",))
    with pytest.raises(ConfigError, match="no linear layer to prune"):
        find_linear(torch.nn.Sequential(torch.nn.ReLU()), (), ())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": 0.5, "pattern": "3x1"}, "does not divide the layer 'blocks.0'"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "at most 0.5 zeros"),
        ({"sparsity": 0.0001, "pattern": "4x1"}, "takes away none"),
        ({"sparsity": 0.5, "pattern": "neurons"}, "families bert"),
        ({"sparsity": 0.5, "pattern": "layers", "score": "magnitude"}, "'wanda' and 'sparsegpt'"),
        ({"sparsity": 0.9, "pattern": "layers"}, "keep at least one"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(settings: dict[str, Any], says: str) -> None:
    from espalier.errors import EspalierError

    with pytest.raises(EspalierError, match=says):
        Pruner(Net(), Config(**settings))


def test_no_data_is_an_error_and_changes_nothing() -> None:
    for score in ("wanda", "sparsegpt", "obert"):
        model = Net()
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(DataError, match="no calibration batch"):
            Pruner(model, Config(sparsity=0.5, score=score)).prune(0.5, list, loss)
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    with pytest.raises(TrainingError, match="training steps"):
        Pruner(Net(), Config(sparsity=0.5, score="movement")).prune(0.5, batches, loss)


def test_calibration_takes_so_many_batches() -> None:
    drawn: list[int] = []

    def counted() -> Any:
        for index, batch in enumerate(batches()):
            drawn.append(index)
            yield batch

    config = Config(sparsity=0.5, score="wanda", calibration=Calibration(batches=2))
    Pruner(Net(), config).prune(0.5, counted, loss)
    assert drawn == [0, 1]


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global", "cost"])
def test_a_speed_up_is_met_by_every_allocation(allocation: str) -> None:
    config = Config(speedup=2.0, pattern="4x1", score="sparsegpt", allocation=allocation)
    pruner = Pruner(Net(), config, costs=Made())
    dense = 1152 + 300
    assert 300 + 1152 * (1 - 0.9 * pruner.target) == pytest.approx(dense / 2, rel=5e-3)
    report = pruner.prune(pruner.target, batches, loss)
    assert report.speedup is not None
    assert 1.93 <= report.speedup <= 2.15
    assert "made up" in report.notes
    assert all(row.speedup is not None and row.speedup >= 1 for row in report.layers)


def test_cost_spares_the_layer_that_gains_nothing() -> None:
    class Flat(Made):
        def linear(self, shape: tuple[int, int], sparsity: float, groups: Any) -> float:
            return 512.0 if shape == (32, 16) else super().linear(shape, sparsity, groups)

    pruner = Pruner(Net(), Config(sparsity=0.6, pattern="4x1", allocation="cost"), costs=Flat())
    report = pruner.prune(0.6, batches, loss)
    assert {row.name: row.sparsity for row in report.layers}["blocks.0"] == 0


def test_a_speed_up_beyond_the_pattern_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"speed-up of 4 cannot be reached.*the engine gains 3\.44"):
        _ = Pruner(Net(), Config(speedup=4.0, pattern="4x1"), costs=Made()).target


def test_costs_are_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier import _native

    cache = tmp_path / "costs.json"
    costs = Costs(cache=cache)
    shape, groups = (64, 96), parse_pattern("4x1")
    dense, sparse = costs.linear(shape, 0.0, groups), costs.linear(shape, 0.95, groups)
    assert 0 < sparse < dense
    between = costs.linear(shape, 0.955, groups)
    assert min(costs.linear(shape, 0.96, groups), sparse) <= between <= max(costs.linear(shape, 0.96, groups), sparse)

    def gone(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(_native, "compress", gone)
    assert Costs(cache=cache).linear(shape, 0.95, groups) == sparse
    cache.write_text("broken")
    monkeypatch.undo()
    assert Costs(cache=cache).linear(shape, 0.0, groups) > 0


def test_measured_windows_have_as_many_zeros_as_asked() -> None:
    assert list(GRID) == sorted(set(GRID))
    costs = Costs.__new__(Costs)
    costs.isa, costs._panel, costs._known = "scalar", 8, {}
    seen: list[Any] = []

    class Native:
        @staticmethod
        def compress(dense: np.ndarray) -> Any:
            seen.append(dense)
            raise StopIteration

    import espalier

    original = espalier._native
    try:
        espalier._native = Native
        for pattern, sparsity in (("2:4", 0.5), ("4x1", 0.75)):
            with pytest.raises(StopIteration):
                costs._measure((16, 32), sparsity, parse_pattern(pattern))
    finally:
        espalier._native = original
    assert [float((dense == 0).mean()) for dense in seen] == [0.5, 0.75]
