"""Distillation: how far a pruned network is from the dense one it came from, part by part.

Each part is a mean that does not depend on the batch's size, so that the weights in ``Recovery`` mean the same for
every budget of tokens. Hidden states: SquareHead (Kurtic et al. 2023, arXiv 2310.06927). Logits: Hinton et al. 2015,
arXiv 1503.02531, with the factor of the squared temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.compression.config import Recovery
from espalier.compression.tasks.base import Outputs, Wants
from espalier.errors import ConfigError

_EPSILON = 1e-8


@dataclass(frozen=True)
class Plan:
    """Which parts a run distils. ``teacher`` says whether the dense model is needed at all."""

    weights: Recovery

    @property
    def wants(self) -> Wants:
        """What forward passes must return besides logits and embeddings."""
        return Wants(hidden=self.weights.hidden > 0, attention=self.weights.attention > 0)

    @property
    def teacher(self) -> bool:
        """Whether any part compares with the dense model."""
        w = self.weights
        return max(w.logits, w.hidden, w.embeddings, w.attention) > 0

    @property
    def compact(self) -> bool:
        """Whether the dense model's part is a few numbers per sequence, so that all of it can be kept in memory."""
        return self.teacher and not (self.wants.hidden or self.wants.attention)


def distillation(student: Outputs, teacher: Outputs, mask: Tensor, weights: Recovery) -> dict[str, Tensor]:
    """The weighted parts of the distance, by name; parts of weight 0 are not computed.

    ``mask``: ``[sequences, tokens]``, 1 for tokens. Raises ConfigError when the models do not have a part that is asked
    for, or their widths differ.
    """
    parts: dict[str, Tensor] = {}
    if weights.logits > 0 and student.logits:
        parts["logits"] = weights.logits * logits_distance(student.logits, teacher.logits, mask, weights.temperature)
    if weights.hidden > 0:
        parts["hidden"] = weights.hidden * hidden_distance(student.hidden, teacher.hidden, mask)
    if weights.embeddings > 0 and student.embedding is not None:
        parts["embeddings"] = weights.embeddings * embedding_distance(student.embedding, teacher.embedding)
    if weights.attention > 0:
        parts["attention"] = weights.attention * attention_distance(student.attention, teacher.attention, mask)
    return parts


def logits_distance(student: dict[str, Tensor], teacher: dict[str, Tensor], mask: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's distribution from the teacher's at ``temperature``, times its square.

    Mean over sequences, or over tokens where every token has scores; over the names.
    """
    found = []
    for name, scores in student.items():
        soft = F.log_softmax(teacher[name].float() / temperature, dim=-1)
        divergence = (soft.exp() * (soft - F.log_softmax(scores.float() / temperature, dim=-1))).sum(-1)
        per_token = divergence.shape == mask.shape
        found.append(_masked_mean(divergence, mask) if per_token else divergence.mean())
    return torch.stack(found).mean() * temperature**2


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Squared error of the hidden states after each layer over the teacher's mean square, over tokens and layers.

    A student of fewer layers is held against evenly spaced layers of the teacher.
    """
    if not student or not teacher:
        raise ConfigError("recovery.hidden needs hidden states, which the model does not return; set it to 0")
    column = mask.unsqueeze(-1)
    found = []
    last, steps = len(teacher) - 1, len(student) - 1
    # The first state is the embeddings: where they are frozen it is equal, where not it follows from the others.
    for index in range(1, len(student)):
        s, t = student[index].float(), teacher[round(index * last / steps)].float()
        if s.shape != t.shape:
            raise ConfigError(
                f"recovery.hidden compares states of {s.shape[-1]} and {t.shape[-1]} features; the teacher must be as "
                "wide as the model, or recovery.hidden 0"
            )
        found.append(((s - t) ** 2 * column).sum() / ((t**2 * column).sum() + _EPSILON))
    return torch.stack(found).mean()


def embedding_distance(student: Tensor, teacher: Tensor | None) -> Tensor:
    """Squared distance of the embeddings on the unit sphere, which is 2 - 2 cos; mean over sequences."""
    if teacher is None or teacher.shape != student.shape:
        raise ConfigError("recovery.embeddings needs a teacher whose embeddings are as wide as the model's")
    difference = F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)
    return (difference**2).sum(-1).mean()


def attention_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """KL divergence of the student's attention from the teacher's; mean over queries, heads and layers."""
    if not student or len(student) != len(teacher):
        raise ConfigError("recovery.attention needs attention from as many layers of the model as of the teacher")
    found = []
    for s, t in zip(student, teacher, strict=True):
        if s.shape != t.shape:
            raise ConfigError("recovery.attention needs a teacher with as many heads as the model")
        divergence = (t * ((t + _EPSILON).log() - (s + _EPSILON).log())).sum(-1).mean(1)
        found.append(_masked_mean(divergence, mask))
    return torch.stack(found).mean()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
