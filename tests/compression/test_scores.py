"""Scores as the pruner uses them: each on a small network, against a direct computation."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="scores are PyTorch's")

from espalier.compression.calibration import feed, sample_gradients, stages  # noqa: E402
from espalier.compression.config import Calibration  # noqa: E402
from espalier.compression.groups import Groups, parse_pattern  # noqa: E402
from espalier.compression.layers import Layer  # noqa: E402
from espalier.compression.scores import SCORES, score_class  # noqa: E402
from espalier.compression.scores.obert import Tiles  # noqa: E402
from espalier.errors import DataError, TrainingError  # noqa: E402


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator)
    return [torch.randn(n, 5, 8, generator=generator) @ mix for n in (6, 9)]


def loss(model: Any, batch: Any) -> Any:
    target = torch.sin(batch[..., :4])
    return ((model(batch) - target) ** 2).sum((1, 2)).mean()


def layers(model: Any, pattern: str) -> dict[str, Layer]:
    masks: dict[str, Any] = {}
    found = {}
    for name in ("0", "2"):
        module = model.get_submodule(name)
        masks[name] = torch.ones_like(module.weight, dtype=torch.bool)
        found[name] = Layer(name, module, parse_pattern(pattern), masks)
    return found


def test_feeding_gives_every_input_once() -> None:
    model = network()
    seen: dict[str, list[Any]] = {"0": [], "2": []}
    modules = {name: model.get_submodule(name) for name in seen}
    feed(model, modules, batches(), loss, lambda name, x: seen[name].append(x))
    torch.testing.assert_close(torch.cat(seen["0"]), torch.cat([b.reshape(-1, 8) for b in batches()]))
    wanted = torch.cat([model[:2](b).reshape(-1, 12) for b in batches()])
    torch.testing.assert_close(torch.cat(seen["2"]), wanted.detach())


def test_padding_is_left_out() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(8, 4)

        def forward(self, x: Any, attention_mask: Any) -> Any:
            return self.up(x)

    model, x = Masked(), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    seen: list[Any] = []
    feed(
        model,
        {"up": model.up},
        [x],
        lambda m, b: m(b, attention_mask=mask).sum(),
        lambda _, inputs: seen.append(inputs),
    )
    torch.testing.assert_close(torch.cat(seen), x[mask != 0])


def test_layers_of_one_input_stand_together() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.query, self.out = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Any) -> Any:
            return self.out(self.query(x) * self.value(x))

    model = Attention()
    found = stages(model, dict(model.named_children()), [torch.randn(2, 8)], lambda m, b: m(b).sum())
    assert [sorted(stage) for stage in found] == [["query", "value"], ["out"]]


def test_sample_gradients_are_those_of_single_samples() -> None:
    model = network()
    seen: dict[str, list[Any]] = {"0": [], "2": []}
    modules = {name: model.get_submodule(name) for name in seen}
    count = sample_gradients(model, modules, batches(), loss, lambda name, g: seen[name].append(g))
    assert count == 15
    samples = [s[None] for b in batches() for s in b]
    for name in seen:
        found = torch.cat(seen[name])
        for sample, gradient in zip(samples, found, strict=True):
            (single,) = torch.autograd.grad(loss(model, sample), [modules[name].weight])
            torch.testing.assert_close(gradient, single, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_layers_have_gradients_for_pruning_and_stay_frozen() -> None:
    model = network().requires_grad_(False)
    seen: list[str] = []
    modules = {"0": model[0]}
    assert sample_gradients(model, modules, batches(), loss, lambda name, g: seen.append(name)) == 15
    assert seen
    assert not any(p.requires_grad for p in model.parameters())


def test_calibration_without_data_or_with_unused_layers_is_an_error() -> None:
    model = network()
    modules = {"0": model[0], "unused": torch.nn.Linear(3, 3)}
    for collect in (feed, sample_gradients):
        with pytest.raises(DataError, match="no calibration batch"):
            collect(model, modules, [], loss, lambda *_: None)
    for collect in (feed, stages):
        arguments = (lambda *_: None,) if collect is feed else ()
        with pytest.raises(TrainingError, match="does not use the layer 'unused'"):
            collect(model, modules, batches(), loss, *arguments)
    with pytest.raises(TrainingError, match="not a finite number"):
        feed(model, {"0": model[0]}, [torch.full((1, 2, 8), torch.inf)], loss, lambda *_: None)


def test_magnitude() -> None:
    model = network()
    layer = layers(model, "4x1")["0"]
    weight = model[0].weight.detach().clone()
    score = score_class("magnitude")(Calibration())
    before, after = score.prune(layer, 12)
    norms = (weight.double().reshape(3, 4, 8) ** 2).sum(1)
    dropped = norms.flatten().sort().values[:12].sum()
    assert before == after == pytest.approx(float(dropped / norms.sum()))
    assert torch.equal(model[0].weight, weight * layer.mask)
    assert int(layer.mask.sum()) == 48


def test_wanda_compares_within_outputs() -> None:
    model = network()
    found = layers(model, "unstructured")
    weight = model[0].weight.detach().clone()
    score = score_class("wanda")(Calibration())
    score.collect(model, found, batches(), loss)
    norm = torch.cat([b.reshape(-1, 8) for b in batches()]).double().norm(dim=0)
    score.prune(found["0"], 48)
    for row, mask in zip(weight, found["0"].mask, strict=True):
        order = (row.abs() * norm).argsort()
        assert set(order[:4].tolist()) == set((~mask).nonzero().flatten().tolist())


def test_movement_adds_up_over_steps_and_survives() -> None:
    model = network()
    found = layers(model, "unstructured")
    score = score_class("movement")(Calibration())
    with pytest.raises(TrainingError, match="training steps"):
        score.scores(found["0"])
    wanted = torch.zeros(12, 8)
    for batch in batches():
        model.zero_grad()
        loss(model, batch).backward()
        score.observe(found)
        wanted -= model[0].weight.detach() * model[0].weight.grad
    torch.testing.assert_close(score.scores(found["0"]).float(), wanted)
    other = score_class("movement")(Calibration())
    other.load_state_dict(score.state_dict())
    score.prune(found["0"], 30)
    gone = (~found["0"].mask).nonzero().tolist()
    assert {tuple(place) for place in gone} == {
        (i // 8, i % 8) for i in wanted.flatten().argsort(stable=True)[:30].tolist()
    }
    torch.testing.assert_close(other.scores(found["0"]).float(), wanted)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
def test_sparsegpt_keeps_outputs_better_than_zeroing(pattern: str) -> None:
    model = network()
    found = layers(model, pattern)
    layer = found["0"]
    dense = model[0].weight.detach().clone()
    x = torch.cat([b.reshape(-1, 8) for b in batches()])
    score = score_class("sparsegpt")(Calibration(dampening=1e-4))
    score.collect(model, found, batches(), loss)
    before, after = score.prune(layer, layer.groups.count(0.5, layer.shape))
    new = model[0].weight.detach()
    whole = ((x @ dense.T) ** 2).sum()
    assert after == pytest.approx(float(((x @ (dense - new).T) ** 2).sum() / whole), rel=1e-3)
    assert before == pytest.approx(float(((x @ (dense - dense * layer.mask).T) ** 2).sum() / whole), rel=1e-3)
    assert after < 0.85 * before
    assert torch.equal(new != 0, layer.mask)
    assert "dampened by 0.0001" in score.notes[0]


def test_sparsegpt_gains_by_rounds() -> None:
    errors = []
    for step in (1.0, 0.3):
        model = network()
        found = layers(model, "4x1")
        score = score_class("sparsegpt")(Calibration(step=step))
        score.collect(model, found, batches(), loss)
        errors.append(score.prune(found["0"], 16)[1])
        assert int((~found["0"].kept).sum()) == 16
    assert errors[1] < errors[0]


def test_sparsegpt_losses_grow_and_are_those_of_pruning() -> None:
    model = network()
    found = layers(model, "unstructured")
    score = score_class("sparsegpt")(Calibration())
    score.collect(model, found, batches(), loss)
    losses = score.losses(found["0"], [0, 24, 48, 72, 96])
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(96)  # all is lost, counted by weights
    added = score.increments(found["0"])
    assert len(added) == 96
    assert added.sum() >= losses[-1]
    assert bool((added[1:] >= added[:-1]).all())


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
def test_obert_is_the_second_order_loss_of_the_empirical_fisher(pattern: str) -> None:
    model = network()
    found = layers(model, pattern)
    layer = found["0"]
    dense = model[0].weight.detach().double().clone()
    # One block for the whole layer: then everything can be computed directly.
    score = score_class("obert")(Calibration(fisher_block=96, dampening=0.1))
    score.collect(model, found, batches(), loss)
    if pattern in ("4x1", "1x4"):
        assert Tiles.of(layer.groups, layer.shape, 96).size == 32 if pattern == "4x1" else 8
    before, after = score.prune(layer, layer.groups.count(0.5, layer.shape))
    gradients = []
    check = network()
    for sample in (s[None] for b in batches() for s in b):
        gradients.append(torch.autograd.grad(loss(check, sample), [check[0].weight])[0].double())
    g = torch.stack(gradients)
    tiles = Tiles.of(layer.groups, layer.shape, 96)
    cut = tiles.cut(g)
    fisher = torch.einsum("sbi,sbj->bij", cut, cut) / len(g)
    fisher += 0.1 * fisher.diagonal(dim1=1, dim2=2).mean() * torch.eye(tiles.size, dtype=torch.float64)

    def quadratic(change: Any) -> float:
        parts = tiles.cut(change[None])[0]
        return float(torch.einsum("bi,bij,bj->", parts, fisher, parts)) / 2

    new = model[0].weight.detach().double()
    mask = layer.mask
    assert before == pytest.approx(quadratic(dense * ~mask) / quadratic(dense), rel=1e-4)
    assert after == pytest.approx(quadratic(dense - new) / quadratic(dense), rel=1e-4)
    assert after < before
    # No small change of the weights left makes it better.
    for seed in range(5):
        noise = torch.randn(new.shape, generator=torch.Generator().manual_seed(seed)).double() * 1e-3 * mask
        assert quadratic(dense - new - noise) > quadratic(dense - new)


def test_obert_takes_the_direct_route_where_groups_exceed_blocks() -> None:
    model = network()
    masks = {"2": torch.ones(4, 12, dtype=torch.bool)}
    layer = Layer("2", model[2], Groups(pattern="neurons", rows=4, columns=3), masks)
    score = score_class("obert")(Calibration(fisher_block=4, dampening=0.0))
    score.collect(model, {"2": layer}, batches(), loss)
    assert Tiles.of(layer.groups, layer.shape, 4).inside is False
    weight = model[2].weight.detach().double().clone()
    tiles = Tiles.of(layer.groups, layer.shape, 4)
    gradients = []
    sample_gradients(model, {"2": model[2]}, batches(), loss, lambda _, g: gradients.append(g.double()))
    cut, w = tiles.cut(torch.cat(gradients)), tiles.cut(weight[None])[0]
    fisher = torch.einsum("sbi,sbj->bij", cut, cut) / 15
    per_block = torch.einsum("bi,bij,bj->b", w, fisher, w) / 2
    by_hand = tiles.join(per_block[:, None].expand(-1, tiles.size) / tiles.size).reshape(4, 4, 3).sum((0, 2))
    torch.testing.assert_close(score.scores(layer)[0], by_hand, rtol=1e-4, atol=1e-8)
    score.prune(layer, 2)
    assert layer.mask.any(0).sum() == 6


def test_tiles_hold_whole_groups_and_come_back() -> None:
    values = torch.arange(12 * 16).reshape(1, 12, 16)
    for pattern, limit, size in [
        ("unstructured", 8, 8),
        ("4x1", 32, 32),
        ("1x4", 12, 8),
        ("2x2", 3, 2),
        ("12x16", 5, 4),
    ]:
        tiles = Tiles.of(parse_pattern(pattern), (12, 16), limit)
        assert tiles.size == size
        blocks = tiles.cut(values)
        assert blocks.shape == (1, 12 * 16 // size, size)
        assert torch.equal(tiles.join(blocks[0]), values[0])
    tiles = Tiles.of(parse_pattern("4x1"), (12, 16), 32)
    assert tiles.cut(values)[0, 0, :4].tolist() == [0, 16, 32, 48]
    groups = torch.arange(3 * 16).reshape(3, 16)
    assert torch.equal(tiles.join_groups(tiles.cut_groups(groups)), groups)


@pytest.mark.parametrize("name", [n for n in SCORES if n not in ("movement", "magnitude", "wanda")])
def test_a_singular_matrix_is_an_error_unless_dampened(name: str) -> None:
    model = network()
    found = layers(model, "unstructured")
    one = [torch.ones(1, 1, 8)]
    for dampening in (0.0, 0.01):
        score = score_class(name)(Calibration(dampening=dampening))
        score.collect(model, found, one, loss)
        if dampening:
            score.prune(found["0"], 40)
        else:
            with pytest.raises(TrainingError, match="of the layer '0' is singular"):
                score.prune(found["0"], 40)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    model = network()
    with pytest.raises(TrainingError, match=r"a gradient of the layer '.' is not a finite number"):
        sample_gradients(model, {"0": model[0]}, batches(), lambda m, b: m(b).sum() * torch.nan, lambda *_: None)
