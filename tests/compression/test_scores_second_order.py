"""Second-order pruning against brute force: least squares, elimination one at a time, and every choice tried."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch", reason="scores are PyTorch's")

from espalier.compression.config import Calibration  # noqa: E402
from espalier.compression.groups import Groups, parse_pattern  # noqa: E402
from espalier.compression.layers import Layer  # noqa: E402
from espalier.compression.scores.sparsegpt import SparseGPT  # noqa: E402
from espalier.compression.second_order import (  # noqa: E402
    cholesky,
    column_scores,
    compensate,
    dampen,
    eliminate,
    inverse_factor,
    output_error,
    refit,
    sweep,
)
from espalier.errors import TrainingError  # noqa: E402

SHAPE = (8, 12)


def problem(seed: int = 0, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, correlated inputs ``[tokens, inputs]`` and their Hessian; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(SHAPE[1], SHAPE[1], generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, SHAPE[1], generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return weight, x, x.T @ x / tokens


def error(weight: torch.Tensor, new: torch.Tensor, x: torch.Tensor) -> float:
    return float(((x @ (weight - new).T) ** 2).sum() / len(x))


def least_squares(weight: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Row by row, by a solver that knows nothing of Hessians."""
    result = torch.zeros_like(weight)
    for row, keep in enumerate(mask):
        wanted = (x @ weight[row])[:, None]
        result[row, keep] = torch.linalg.lstsq(x[:, keep], wanted).solution[:, 0]
    return result


def test_the_factor_holds_the_inverse_of_every_tail() -> None:
    _, _, hessian = problem()
    u = inverse_factor(hessian, "it")
    for i in range(len(hessian)):
        torch.testing.assert_close(u[i:, i:].T @ u[i:, i:], torch.linalg.inv(hessian[i:, i:]))


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2x2", "8x3"])
def test_scores_are_the_error_of_removing_a_group_and_refitting(pattern: str) -> None:
    weight, x, hessian = problem()
    groups = parse_pattern(pattern)
    scores = column_scores(weight, torch.linalg.inv(hessian), groups)
    for i, j in [(0, 0), (scores.shape[0] - 1, scores.shape[1] - 1), (0, scores.shape[1] // 2)]:
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[i, j] = False
        best = least_squares(weight, x, groups.expand(kept))
        assert float(scores[i, j]) == pytest.approx(error(weight, best, x), rel=1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4", "8x2"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_refitting_is_least_squares(pattern: str, share: float) -> None:
    weight, x, hessian = problem(1)
    groups = parse_pattern(pattern)
    scores = groups.reduce(weight**2)
    kept = groups.select(scores, groups.count(share, SHAPE), torch.ones_like(scores, dtype=torch.bool))
    fitted = refit(weight, hessian, kept, groups)
    torch.testing.assert_close(fitted, least_squares(weight, x, groups.expand(kept)))
    assert output_error(weight - fitted, hessian) == pytest.approx(error(weight, fitted, x))


def test_refitting_rows_that_keep_nothing_or_all() -> None:
    weight, _, hessian = problem()
    kept = torch.ones(SHAPE, dtype=torch.bool)
    kept[2] = False
    fitted = refit(weight, hessian, kept, parse_pattern("unstructured"))
    torch.testing.assert_close(fitted, weight * kept)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x2", "2:4", "8x1"])
@pytest.mark.parametrize("block", [4, 12])
def test_a_sweep_is_exact_elimination_from_left_to_right(pattern: str, block: int) -> None:
    weight, _, hessian = problem(2)
    groups = parse_pattern(pattern)
    every = torch.ones(groups.grid(SHAPE), dtype=torch.bool)
    count = groups.count(0.5, SHAPE)
    swept, kept = sweep(weight, inverse_factor(hessian, "it"), groups, every, count, block)
    mask = groups.expand(kept)
    assert int((~kept).sum()) == count
    # Brute force with the same mask: one column after the other, each with the exact update of what is to its right.
    slow = weight.clone()
    for column in range(0, SHAPE[1], groups.columns):
        columns = slice(column, column + groups.columns)
        inverse = torch.linalg.inv(hessian[column:, column:])
        gone = slow[:, columns] * ~mask[:, columns]
        corner = inverse[: groups.columns, : groups.columns]
        slow[:, column:] -= gone @ torch.linalg.inv(corner) @ inverse[: groups.columns]
        slow[:, columns] *= mask[:, columns]
    torch.testing.assert_close(swept, slow)
    assert torch.equal(swept != 0, mask)


def test_a_sweep_chooses_the_cheapest_rows_of_a_column() -> None:
    weight, _, hessian = problem(3)
    groups = parse_pattern("4x1")
    _, kept = sweep(weight, inverse_factor(hessian, "it"), groups, torch.ones(2, 12, dtype=torch.bool), 12, 1)
    # In blocks of one column each loses one of its two groups: the one of the lesser sum of w^2 / [H^-1]_jj, updated.
    assert kept.sum(0).tolist() == [1] * 12
    first = column_scores(weight, torch.linalg.inv(hessian), groups)[:, 0]
    assert not bool(kept[int(first.argmin()), 0])


def test_a_sweep_leaves_alone_what_is_gone() -> None:
    weight, _, hessian = problem(4)
    groups = parse_pattern("4x1")
    factor = inverse_factor(hessian, "it")
    first, kept = sweep(weight, factor, groups, torch.ones(2, 12, dtype=torch.bool), 6, 12)
    second, after = sweep(first, factor, groups, kept, 12, 12)
    assert not bool((after & ~kept).any())
    assert int((~after).sum()) == 12
    assert not bool(second[~groups.expand(after)].any())


def test_4x1_beats_magnitude_by_far_on_correlated_inputs() -> None:
    weight, x, hessian = problem(5)
    groups = parse_pattern("4x1")
    every = torch.ones(groups.grid(SHAPE), dtype=torch.bool)
    count = groups.count(0.5, SHAPE)
    _, kept = sweep(weight, inverse_factor(hessian, "it"), groups, every, count, 128)
    ours = error(weight, refit(weight, hessian, kept, groups), x)
    plain = groups.expand(groups.select(groups.reduce(weight**2), count, every))
    best = min(
        error(weight, least_squares(weight, x, groups.expand(torch.tensor(choice).reshape(2, 12))), x)
        for choice in _choices_near(kept)
    )
    assert ours < 0.5 * error(weight, weight * plain, x)
    assert best <= ours <= 3 * best


def _choices_near(kept: torch.Tensor) -> list[list[bool]]:
    """All masks that differ from one by an exchange of two groups."""
    flat = kept.flatten().tolist()
    on = [i for i, k in enumerate(flat) if k]
    off = [i for i, k in enumerate(flat) if not k]
    found = [flat]
    for i, j in itertools.product(on, off):
        other = list(flat)
        other[i], other[j] = False, True
        found.append(other)
    return found


# --- blocks of a Fisher matrix ----------------------------------------------------------------------------------------


def blocks(seed: int = 0, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(3, 40, n, generator=generator, dtype=torch.float64)
    g = g @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return g.transpose(1, 2) @ g / 40, torch.randn(3, n, generator=generator, dtype=torch.float64)


def cost(fisher: torch.Tensor, weight: torch.Tensor, gone: list[int]) -> float:
    """The least ``d^T F d / 2`` with ``d = -w`` at the places ``gone``."""
    inverse = torch.linalg.inv(fisher)[gone][:, gone]
    return float(weight[gone] @ torch.linalg.solve(inverse, weight[gone])) / 2


def test_the_first_to_go_costs_w_squared_over_twice_the_inverse() -> None:
    fisher, weight = blocks()
    losses = eliminate(fisher, weight[:, :, None], torch.ones(3, 6, dtype=torch.bool), "it")
    single = weight**2 / (2 * torch.linalg.inv(fisher).diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(losses.min(1).values, single.min(1).values)
    assert torch.equal(losses.argmin(1), single.argmin(1))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_elimination_is_greedy_and_exact(size: int) -> None:
    fisher, weight = blocks(1)
    groups = 6 // size
    losses = eliminate(fisher, weight.reshape(3, groups, size), torch.ones(3, groups, dtype=torch.bool), "it")
    for b in range(3):
        gone: list[int] = []
        spent = highest = 0.0
        for _ in range(groups):
            trials = {}
            for group in range(groups):
                places = list(range(group * size, group * size + size))
                if not set(places) & set(gone):
                    trials[group] = cost(fisher[b], weight[b], gone + places) - spent
            pick = min(trials, key=lambda group: trials[group])
            gone += range(pick * size, pick * size + size)
            spent += trials[pick]
            highest = max(highest, trials[pick])
            assert float(losses[b, pick]) == pytest.approx(highest, rel=1e-6)


def test_elimination_goes_on_where_an_earlier_one_stopped() -> None:
    fisher, weight = blocks(2)
    kept = torch.tensor([[True, False, True, True, False, True]] * 3)
    weight = weight * kept
    losses = eliminate(fisher, weight[:, :, None], kept, "it")
    assert not bool(losses[~kept].any())
    alive = kept[0].nonzero().flatten()
    small = fisher[:, alive][:, :, alive]
    again = eliminate(small, weight[:, alive][:, :, None], torch.ones(3, 4, dtype=torch.bool), "it")
    torch.testing.assert_close(losses[:, alive], again)


def test_compensation_is_the_best_there_is() -> None:
    fisher, weight = blocks(3)
    kept = torch.tensor([[True, False, True, True, False, False]] * 3)
    new = compensate(fisher, weight, kept)
    assert torch.equal(new != 0, kept)
    for b in range(3):
        change = new[b] - weight[b]
        assert float(change @ fisher[b] @ change) / 2 == pytest.approx(cost(fisher[b], weight[b], [1, 4, 5]))


# --- numerics ---------------------------------------------------------------------------------------------------------


def test_a_singular_matrix_is_an_error_and_dampening_helps_only_when_asked() -> None:
    x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    with pytest.raises(TrainingError, match=r"the Hessian of 'up' is singular.*dampening"):
        inverse_factor(dampen(hessian, 0.0), "the Hessian of 'up'")
    assert bool(inverse_factor(dampen(hessian, 0.01), "it").isfinite().all())
    with pytest.raises(TrainingError, match="singular"):
        cholesky(torch.zeros(2, 3, 3, dtype=torch.float64), "it")


def test_dampening_adds_a_share_of_the_mean() -> None:
    matrix = torch.diag(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(dampen(matrix, 0.5).diagonal(), torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_whole_columns_can_be_a_group() -> None:
    weight, x, hessian = problem(6)
    groups = Groups(pattern="neurons", rows=SHAPE[0], columns=1)
    every = torch.ones(1, SHAPE[1], dtype=torch.bool)
    swept, kept = sweep(weight, inverse_factor(hessian, "it"), groups, every, 6, 128)
    assert int(kept.sum()) == 6
    assert torch.equal(swept.any(0), kept[0])
    assert error(weight, refit(weight, hessian, kept, groups), x) <= error(weight, swept, x)


def test_an_outlier_among_the_outputs_does_not_decide_a_loss() -> None:
    weight, _, hessian = problem()

    def losses(factor: float) -> list[float]:
        module = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
        module.weight.data = weight.float()
        module.weight.data[3] *= factor
        score = SparseGPT(Calibration())
        score._hessians = {"it": hessian.float()}
        masks = {"it": torch.ones(SHAPE, dtype=torch.bool)}
        return score.losses(Layer("it", module, parse_pattern("unstructured"), masks), [0, 24, 48, 96])

    plain, outlier = losses(1.0), losses(1e3)
    assert plain == sorted(plain)
    assert plain[0] == outlier[0] == 0
    assert plain[3] == pytest.approx(96)  # everything is gone, and a layer counts by its weights
    assert outlier[3] == pytest.approx(96)
    assert outlier[1] > 0.1 * plain[1]  # relative to the norm of all outputs it would be next to nothing
