"""Distances between a student and its teacher: zero for the same, as defined for others."""

from __future__ import annotations

import pytest
import torch

from espalier.compression.config import Recovery
from espalier.compression.recovery import (
    Plan,
    attention_distance,
    distillation,
    embedding_distance,
    hidden_distance,
    logits_distance,
)
from espalier.compression.tasks import Outputs
from espalier.errors import ConfigError

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def outputs(seed: int) -> Outputs:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    attention = tuple(random(2, 2, 3, 3).softmax(-1) for _ in range(2))
    return Outputs({"logits": random(2, 4)}, tuple(random(2, 3, 5) for _ in range(3)), random(2, 5), attention)


def test_nothing_lies_between_a_model_and_itself() -> None:
    weights = Recovery(task=0, logits=1, hidden=1, embeddings=1, attention=1)
    parts = distillation(outputs(0), outputs(0), MASK, weights)
    assert set(parts) == {"logits", "hidden", "embeddings", "attention"}
    for part in parts.values():
        assert float(part) == pytest.approx(0, abs=1e-6)
    for part in distillation(outputs(0), outputs(1), MASK, weights).values():
        assert float(part) > 0


def test_weights_scale_and_zero_leaves_out() -> None:
    none = Recovery(task=0, logits=0, hidden=0, embeddings=0)
    assert distillation(outputs(0), outputs(1), MASK, none) == {}
    assert not Plan(none).teacher
    one, two = (Recovery(task=0, logits=0, hidden=w, embeddings=0) for w in (1, 2))
    single, double = (distillation(outputs(0), outputs(1), MASK, w)["hidden"] for w in (one, two))
    assert float(double) == pytest.approx(2 * float(single))


def test_padding_does_not_count() -> None:
    a, b = outputs(0), outputs(1)
    changed = tuple(h.clone() for h in a.hidden)
    for h in changed:
        h[1, 1:] = 1e3
    want = hidden_distance(a.hidden, b.hidden, MASK)
    torch.testing.assert_close(hidden_distance(changed, b.hidden, MASK), want)
    scores = {"logits": torch.randn(2, 3, 4)}
    wild = {"logits": scores["logits"].clone()}
    wild["logits"][1, 1:] = 50.0
    other = {"logits": torch.randn(2, 3, 4)}
    torch.testing.assert_close(logits_distance(scores, other, MASK, 2.0), logits_distance(wild, other, MASK, 2.0))


def test_logits_distance_is_the_divergence() -> None:
    s, t = torch.randn(2, 4), torch.randn(2, 4)
    want = torch.nn.functional.kl_div(
        (s / 3).log_softmax(-1), (t / 3).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(logits_distance({"x": s}, {"x": t}, MASK, 3.0), 9 * want)


def test_scores_of_padding_give_no_nan() -> None:
    scores = torch.randn(2, 3).masked_fill(MASK == 0, -1e4).requires_grad_()
    distance = logits_distance({"start": scores}, {"start": torch.randn(2, 3).masked_fill(MASK == 0, -1e4)}, MASK, 2.0)
    distance.backward()
    assert torch.isfinite(distance)
    assert torch.isfinite(scores.grad).all()


def test_embedding_distance_is_of_directions() -> None:
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    cosine = torch.nn.functional.cosine_similarity(a, b)
    torch.testing.assert_close(embedding_distance(3 * a, b), (2 - 2 * cosine).mean())


def test_teachers_of_another_shape() -> None:
    a, b = outputs(0), outputs(1)
    deeper = tuple(torch.stack([b.hidden[0], b.hidden[1], b.hidden[1], b.hidden[2], b.hidden[2]]))
    torch.testing.assert_close(
        hidden_distance(a.hidden, deeper, MASK),
        hidden_distance(a.hidden, (*b.hidden[:1], b.hidden[1], b.hidden[2]), MASK),
    )
    wide = tuple(torch.randn(2, 3, 7) for _ in range(3))
    with pytest.raises(ConfigError, match="as wide as the model"):
        hidden_distance(a.hidden, wide, MASK)
    with pytest.raises(ConfigError, match="as wide as the model"):
        embedding_distance(torch.randn(2, 5), torch.randn(2, 7))
    with pytest.raises(ConfigError, match="as many layers"):
        attention_distance(a.attention, b.attention[:1], MASK)
