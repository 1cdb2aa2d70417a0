"""Pruning in other people's loops: a plain one, and the Trainer of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pruning is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the callback is for its Trainer")

from espalier.compression.callbacks import PruningCallback  # noqa: E402
from espalier.compression.config import Config, Schedule  # noqa: E402
from espalier.compression.hook import PruningHook  # noqa: E402
from espalier.errors import ConfigError  # noqa: E402


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def batches() -> list[Any]:
    return list(torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(0)))


def loss(model: Any, batch: Any) -> Any:
    return ((model(batch) - batch[:, :4]) ** 2).sum(1).mean()


@pytest.mark.parametrize("score", ["sparsegpt", "movement", "obert"])
def test_a_plain_loop_prunes_in_three_lines(score: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = Schedule(kind="gradual", steps=3, first=0.5, start=0.2, end=0.8)
    config = Config(sparsity=0.75, pattern="4x1", score=score, schedule=schedule)
    hook = PruningHook(model, config, steps=10, batches=batches, loss=loss)
    seen = []
    for step in range(10):
        optimizer.zero_grad()
        loss(model, batches()[step % 5]).backward()
        hook.before_step()
        optimizer.step()
        hook.after_step(optimizer)
        seen.append(float((model[0].weight == 0).float().mean()))
    assert seen == sorted(seen)
    assert len(hook.reports) == 3
    assert seen[0] == 0
    assert hook.pruner.sparsity() == pytest.approx(0.75)
    assert seen[-1] == pytest.approx(0.75)


def test_a_loop_goes_on_after_an_interruption() -> None:
    schedule = Schedule(kind="gradual", steps=2, first=0.5, start=0.0, end=0.5)
    config = Config(sparsity=0.5, pattern="unstructured", score="magnitude", schedule=schedule)
    model = network()
    hook = PruningHook(model, config, steps=4, batches=batches, loss=loss)
    hook.advance()
    hook.after_step()
    other = network()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again = PruningHook(other, config, steps=4, batches=batches, loss=loss)
    again.load_state_dict(copy.deepcopy(hook.state_dict()))
    assert hook.after_step() is not None
    assert again.after_step() is not None
    assert torch.equal(model[0].weight, other[0].weight)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        PruningHook(model, config, steps=0, batches=batches, loss=loss)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 50, (7,), generator=generator), "labels": index % 2}


@pytest.mark.parametrize("score", ["magnitude", "sparsegpt", "obert", "movement"])
def test_the_trainer_of_transformers(score: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    start = 0.2 if score == "movement" else 0.0
    schedule = Schedule(kind="gradual", steps=2, first=0.5, start=start, end=0.7)
    callback = PruningCallback(Config(sparsity=0.75, score=score, schedule=schedule))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    assert callback.hook is not None
    assert len(callback.hook.reports) == 2
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.75)
    assert bool((model.classifier.weight != 0).all())


def test_the_callback_by_hand() -> None:
    """What the Trainer does, without it: the order of its events."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = Schedule(kind="gradual", steps=2, first=0.5, start=0.0, end=0.5)
    callback = PruningCallback(Config(sparsity=0.5, score="sparsegpt", schedule=schedule), batches, loss)
    state = transformers.TrainerState(max_steps=4, global_step=0)
    known = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(None, state, None, **known)
    assert callback.hook is not None
    assert callback.hook.pruner.sparsity() == pytest.approx(0.25)
    for batch in batches()[:4]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        callback.on_pre_optimizer_step(None, state, None, **known)
        optimizer.step()
        callback.on_step_end(None, state, None, **known)
    callback.on_train_end(None, state, None, **known)
    assert float((model[0].weight == 0).float().mean()) == pytest.approx(0.5)


def test_a_trainer_without_data_needs_batches() -> None:
    state = transformers.TrainerState(max_steps=4, global_step=0)
    with pytest.raises(ConfigError, match="give PruningCallback its batches"):
        PruningCallback(Config(sparsity=0.5)).on_train_begin(None, state, None, model=network())
