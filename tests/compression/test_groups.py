"""Patterns: sums over groups, masks, and what stays in every window."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="masks are PyTorch tensors")

from espalier.compression.groups import parse_pattern  # noqa: E402
from espalier.errors import ConfigError  # noqa: E402


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2x3", "2:4", "1:3"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5])
def test_a_mask_has_the_pattern_and_the_count(pattern: str, sparsity: float) -> None:
    groups = parse_pattern(pattern)
    shape = (8, 12)
    scores = groups.reduce(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    count = groups.count(sparsity, shape)
    kept = groups.select(scores, count, torch.ones_like(scores, dtype=torch.bool))
    assert int((~kept).sum()) == count
    mask = groups.expand(kept)
    assert mask.shape == shape
    # Every group is all there or all gone.
    tiles = mask.reshape(8 // groups.rows, groups.rows, 12 // groups.columns, groups.columns)
    assert torch.equal(tiles.all(3).all(1), tiles.any(3).any(1))
    if groups.window:
        assert int(mask.reshape(8, -1, groups.window).sum(-1).min()) >= groups.keep
    elif count < kept.numel():
        assert scores[~kept].max() <= scores[kept].min()


def test_what_is_gone_stays_gone() -> None:
    groups = parse_pattern("2:4")
    scores = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    everything = torch.ones_like(scores, dtype=torch.bool)
    first = groups.select(scores, 16, everything)
    second = groups.select(scores.flip(0), 32, first)
    assert not bool((second & ~first).any())
    assert int((~second).sum()) == 32
    assert torch.equal(second.reshape(4, 4, 4).sum(-1), torch.full((4, 4), 2))


def test_equal_scores_go_by_position() -> None:
    groups = parse_pattern("unstructured")
    kept = groups.select(torch.ones(2, 4), 3, torch.ones(2, 4, dtype=torch.bool))
    assert kept.tolist() == [[False, False, False, True], [True] * 4]


def test_a_pattern_that_does_not_divide_a_layer_is_an_error() -> None:
    for pattern in ("3x1", "1x5", "2:5"):
        with pytest.raises(ConfigError, match="does not divide the layer 'up' of 8 outputs and 12 inputs"):
            parse_pattern(pattern).check("up", (8, 12))
