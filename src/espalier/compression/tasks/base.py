"""What every task offers the trainer."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compression.tasks.models import load_encoder
from espalier.data import (
    Batch,
    Feature,
    Table,
    Tokens,
    collate,
    epoch_order,
    fixed_order,
    padding_share,
    read_dataset,
    read_table,
)
from espalier.data.hub import is_dataset
from espalier.data.metrics import Scores
from espalier.data.tabular import SUFFIXES
from espalier.errors import ConfigError, DataError, InputError
from espalier.hf.encoders import FAMILIES

_ON_CPU, _ELSEWHERE = 2048, 12288
"""Tokens of a batch that is only run forward: on a CPU they should stay in its caches, which is a quarter faster."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of tables: ``text`` one or two, ``label`` the target. Empty: those the task finds by itself."""

    text: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What a forward pass must return besides the task's own outputs."""

    hidden: bool = False
    attention: bool = False


@dataclass(frozen=True)
class Outputs:
    """What a model said about a batch, in float32.

    ``logits``: scores by name, classes last: ``[sequences, classes]`` or ``[sequences, tokens, classes]``.
    ``hidden``: after the embeddings and after each layer, ``[sequences, tokens, features]``.
    ``embedding``: ``[sequences, features]``. ``attention``: probabilities, ``[sequences, heads, tokens, tokens]``.
    """

    logits: dict[str, Tensor] = field(default_factory=dict)
    hidden: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    attention: tuple[Tensor, ...] = ()


class Task(ABC):
    """Batches, losses and an evaluation. The trainer knows nothing else of what it trains."""

    name: ClassVar[str]

    @abstractmethod
    def epoch(self, budget: int, *, seed: int, epoch: int) -> list[Any]:
        """The keys of an epoch's batches in order; the same for the same arguments, and equally many every epoch."""

    @abstractmethod
    def batch(self, key: Any) -> Any:
        """The batch of a key, on the CPU."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The task's own loss, a scalar, from the labels in the batch."""

    def pruning_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss whose gradients say which weights matter."""
        return self.loss(model, batch)

    def answers(self, model: nn.Module, batch: Any) -> Tensor:
        """What the model says about a batch, ``[examples, values]``, by which two models are compared.

        Here the first float tensor among the model's own outputs. Raises InputError when there is none.
        """
        said: list[Any] = []
        handle = model.register_forward_hook(lambda module, inputs, output: said.append(output))
        try:
            self.loss(model, batch)
        finally:
            handle.remove()
        found = _first_float(said)
        if found is None:
            raise InputError("the loss does not call the model, or the model returns no float tensor")
        return found.detach().float().reshape(-1, found.shape[-1] if found.ndim else 1)

    def evaluate(self, model: nn.Module) -> Scores | None:
        """The figure on held-out data; None without such data."""
        return None


class EncoderTask(Task):
    """A task on token sequences: a Hugging Face encoder with a head.

    ``training`` are the features to train on; :meth:`read` and :meth:`read_evaluation` fill the task with data.
    """

    head: ClassVar[str]
    """The transformers class that carries the head, e.g. ``AutoModelForQuestionAnswering``."""

    default_max_length: ClassVar[int]

    scores_tokens: ClassVar[bool] = False
    """Whether the logits' second extent is the tokens."""

    def __init__(self, tokens: Tokens, *, columns: Columns | None = None, seed: int = 0) -> None:
        self.tokens = tokens
        self.columns = columns or Columns()
        self.seed = seed
        self.training: list[Feature] = []
        self.lengths = np.zeros(0, np.int64)
        self.padding_id = 0
        self.notes: list[str] = []

    # --- data ---------------------------------------------------------------------------------------------------------

    def read(self, paths: Sequence[Path]) -> None:
        """Read training data. Raises DataError, or ConfigError for columns that do not suit the task."""
        if not paths:
            raise DataError(f"the task {self.name!r} needs training data; give at least one file")
        self.training = self._read_training(paths)
        if not self.training:
            raise DataError(f"{', '.join(map(str, paths))}: nothing to train on; expected at least one example")
        self.lengths = np.array([len(feature.ids) for feature in self.training], np.int64)

    @abstractmethod
    def _read_training(self, paths: Sequence[Path]) -> list[Feature]: ...

    @abstractmethod
    def read_evaluation(self, path: Path) -> None:
        """Read held-out data, which is used for nothing but :meth:`evaluate`. Raises DataError."""

    def evaluation_features(self) -> list[Feature]:
        """The held-out sequences, empty without any."""
        return []

    def table(self, path: Path, columns: Sequence[str], *, split: str = "train") -> Table:
        """A table from a file or a dataset on disk. Raises DataError."""
        if path.is_dir():
            if not is_dataset(path):
                raise DataError(f"{path}: expected a file, or a folder made by Dataset.save_to_disk")
            table = read_dataset(path, split)
            for name in columns:
                table.column(name)
            return table
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: the task {self.name!r} reads {', '.join(SUFFIXES)} and datasets on disk")
        return read_table(path, columns)

    def epoch(self, budget: int, *, seed: int, epoch: int) -> list[np.ndarray]:
        return epoch_order(self.lengths, budget, seed=seed, epoch=epoch)

    def batch(self, key: np.ndarray) -> Batch:
        return collate(self.training, key, padding_id=self.padding_id)

    def fixed_batches(self, budget: int) -> list[np.ndarray]:
        """Keys of batches that hold all training data once, in an order that depends on the lengths alone."""
        return fixed_order(self.lengths, budget)

    def padding(self, budget: int) -> float:
        """The share of padding in the training batches."""
        return padding_share(self.lengths, self.fixed_batches(budget))

    # --- model --------------------------------------------------------------------------------------------------------

    def load(self, folder: Path, *, attention: bool = False) -> nn.Module:
        """The model in ``folder`` with this task's head, a new one where the folder has none; float32, on the CPU.

        ``attention``: its attention probabilities will be asked for. Raises ModelFormatError or ModelNotFoundError.
        """
        torch.manual_seed(self.seed)  # a new head starts from the seed
        model, notes = load_encoder(folder, self.head, attention=attention, **self._head_settings(folder))
        self.notes.extend(note for note in notes if note not in self.notes)
        config: Any = model.config
        self.padding_id = int(getattr(config, "pad_token_id", None) or 0)
        limit = getattr(config, "max_position_embeddings", None)
        family = FAMILIES.get(str(getattr(config, "model_type", "")))
        if limit is not None and family is not None and family.counts_real_tokens:
            # Their positions begin after that of the padding id.
            limit -= 1 + (self.padding_id if family.padding_idx is None else family.padding_idx)
        if limit is not None and self.tokens.max_length > limit:
            raise ConfigError(
                f"max_length {self.tokens.max_length} exceeds the {limit} positions of {folder}; give at most {limit}"
            )
        return model

    def _head_settings(self, folder: Path) -> dict[str, Any]:
        return {}

    def forward(self, model: nn.Module, batch: Batch, wants: Wants) -> Any:
        """The model's own outputs. Without padding no mask is given: attention is faster without."""
        known = _parameters(model)
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name in known}
        if inputs["input_ids"].numel() == batch.tokens:
            inputs.pop("attention_mask", None)
        flags = {"output_hidden_states": True} if wants.hidden else {}
        flags |= {"output_attentions": True} if wants.attention else {}
        return model(**inputs, **flags)

    def outputs(self, model: nn.Module, batch: Batch, wants: Wants) -> Outputs:
        """The model's outputs in one form for all tasks."""
        raw = self.forward(model, batch, wants)
        return Outputs(
            {name: scores.float() for name, scores in self._logits(raw, batch).items()},
            tuple(raw.hidden_states) if wants.hidden else (),
            self._embedding(raw, batch),
            tuple(raw.attentions) if wants.attention else (),
        )

    def answers(self, model: nn.Module, batch: Batch) -> Tensor:
        """Embeddings of length one, or the logits; of tokens without padding."""
        outputs = self.outputs(model, batch, Wants())
        if outputs.embedding is not None:
            return nn.functional.normalize(outputs.embedding, dim=-1)
        tokens = batch.mask != 0
        by_token = [
            scores[tokens] if scores.shape[:2] == tokens.shape else scores for scores in outputs.logits.values()
        ]
        return torch.cat([scores.reshape(len(scores), -1) for scores in by_token], 1)

    def _logits(self, raw: Any, batch: Batch) -> dict[str, Tensor]:
        return {}

    def _embedding(self, raw: Any, batch: Batch) -> Tensor | None:
        return None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task_loss(self.outputs(model, batch, Wants()), batch)

    @abstractmethod
    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The loss of the labels, from outputs computed already. Raises ConfigError when the task has none."""

    def predict(self, model: nn.Module, features: Sequence[Feature]) -> list[tuple[np.ndarray, Outputs]]:
        """Outputs for all features, batch by batch with the rows they belong to; evaluation mode, on the CPU."""
        lengths = np.array([len(feature.ids) for feature in features], np.int64)
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        found: list[tuple[np.ndarray, Outputs]] = []
        try:
            with torch.inference_mode():
                for rows in fixed_order(lengths, _ON_CPU if device.type == "cpu" else _ELSEWHERE):
                    batch = collate(features, rows, padding_id=self.padding_id).to(device)
                    out = self.outputs(model, batch, Wants())
                    embedding = None if out.embedding is None else out.embedding.cpu()
                    found.append((rows, Outputs({n: t.cpu() for n, t in out.logits.items()}, (), embedding)))
        finally:
            model.train(was_training)
        return found


def _first_float(value: Any) -> Tensor | None:
    """The first float tensor in nested outputs of a module."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := _first_float(part)) is not None), None)


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    found = getattr(model, "_espalier_inputs", None)
    if found is None:
        found = dict(inspect.signature(model.forward).parameters)
        if getattr(getattr(model, "config", None), "type_vocab_size", 2) < 2:
            found.pop("token_type_ids", None)  # there is one type, whatever the tokenizer says
        # On the instance, past nn.Module's bookkeeping: neither a parameter nor a buffer.
        object.__setattr__(model, "_espalier_inputs", found)
    known: Mapping[str, Any] = found
    return known


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labels that are not -100; 0 with gradient where there is none.

    ``scores``: ``[..., classes]``; ``labels``: int64 ``[...]``.
    """
    flat, wanted = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1).long()
    total = nn.functional.cross_entropy(flat, wanted, ignore_index=-100, reduction="sum")
    return total / (wanted != -100).sum().clamp(min=1)
