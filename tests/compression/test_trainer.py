"""The loop: learns, prunes on time, resumes bit for bit, and stops with the reason said."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier.compression import checkpoint
from espalier.compression.config import Config, Recovery, Schedule, Training
from espalier.compression.progress import Monitor, Status, duration
from espalier.compression.pruner import Pruner
from espalier.compression.tasks import Classification, CustomTask, Embeddings
from espalier.compression.trainer import CHECKPOINTS, LOG, Trainer, TrainingInterrupted, freeze_embeddings
from espalier.data import Tokens
from espalier.doctor import cpu
from espalier.errors import CheckpointError, ConfigError, TrainingError

TRAINING = Training(steps=12, batch_tokens=128, learning_rate=2e-3, checkpoint_every=5, max_length=24)
LEARNED = Recovery(task=0, logits=0, hidden=1, embeddings=1)
GRADUAL = Schedule(kind="gradual", steps=3, first=0.5, start=0.0, end=0.6)


class StopAt(Monitor):
    """Asks the trainer to stop after a step, as a user would."""

    def __init__(self, step: int, how: Callable[[], None] | None = None) -> None:
        self.at, self.how = step, how
        self.trainer: Trainer | None = None
        self.seen: list[Status] = []

    def step(self, status: Status) -> None:
        self.seen.append(status)
        if status.step == self.at and self.trainer is not None:
            (self.how or self.trainer.stop)()


def embeddings_run(folder: Path, texts: Path, output: Path, config: Config, monitor: Monitor | None = None) -> Trainer:
    task = Embeddings(Tokens.read(folder, 24), seed=config.seed)
    task.read([texts])
    model, teacher = task.load(folder), task.load(folder)
    output.mkdir(exist_ok=True)
    pruner = Pruner(model, config) if config.sparsity else None
    trainer = Trainer(model, teacher, task, pruner, config, output, monitor=monitor, world=None)
    if isinstance(monitor, StopAt):
        monitor.trainer = trainer
    return trainer


def same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    "recovery", [LEARNED, Recovery(task=0, logits=0, hidden=0, embeddings=1)], ids=["live teacher", "kept outputs"]
)
@pytest.mark.parametrize("stop", [3, 7])
def test_resume_continues_bit_for_bit(
    encoder_folder: Path, texts_file: Path, tmp_path: Path, recovery: Recovery, stop: int
) -> None:
    config = Config(
        sparsity=0.8,
        pattern="unstructured",
        score="magnitude",
        schedule=GRADUAL,
        recovery=recovery,
        training=replace(TRAINING, batch_tokens=256),  # three epochs: enough for outputs to be kept
    )
    whole = embeddings_run(encoder_folder, texts_file, tmp_path / "whole", config)
    history = whole.run()
    broken = embeddings_run(encoder_folder, texts_file, tmp_path / "broken", config, StopAt(stop))
    with pytest.raises(TrainingInterrupted) as stopped:
        broken.run()
    assert stopped.value.checkpoint == checkpoint.path_of(tmp_path / "broken" / CHECKPOINTS, stop)
    again = embeddings_run(encoder_folder, texts_file, tmp_path / "broken", config)
    resumed = again.run(resume=True)
    same_weights(whole.model, again.model)
    assert resumed.steps == history.steps
    assert [p["step"] for p in resumed.prunings] == [p["step"] for p in history.prunings]
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("whole", "broken")]
    assert len(logs[0]) == len(logs[1])
    assert whole.teacher is not None
    assert whole.teacher.cached == (recovery.hidden == 0)


def test_resume_with_dropout_continues_bit_for_bit(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder("Model")
    rows = "\n".join(f"w{i % 9} w{i % 5},{i % 2}" for i in range(40))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}\n")
    config = Config(recovery=Recovery(task=1), training=TRAINING)

    def make(output: str, monitor: Monitor | None = None) -> Trainer:
        task = Classification(Tokens.read(folder, 24))
        task.read([tmp_path / "a.csv"])
        (tmp_path / output).mkdir(exist_ok=True)
        trainer = Trainer(task.load(folder), None, task, None, config, tmp_path / output, monitor=monitor)
        if isinstance(monitor, StopAt):
            monitor.trainer = trainer
        return trainer

    whole = make("whole")
    whole.run()
    with pytest.raises(TrainingInterrupted):
        make("broken", StopAt(6)).run()
    again = make("broken")
    again.run(resume=True)
    same_weights(whole.model, again.model)


def test_pruning_happens_on_time_and_zeros_stay(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    config = Config(
        sparsity=0.8, pattern="4x1", score="magnitude", schedule=GRADUAL, recovery=LEARNED, training=TRAINING
    )
    monitor = StopAt(-1)
    trainer = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config, monitor)
    history = trainer.run()
    assert [p["step"] for p in history.prunings] == [0, 4, 8]
    assert history.prunings[-1]["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert trainer.pruner is not None
    for name, layer in trainer.pruner.layers.items():
        assert float((layer.weight[~trainer.pruner.masks[name]] == 0).float().mean()) == 1
    assert [s.step for s in monitor.seen] == list(range(1, 13))
    assert monitor.seen[-1].sparsity == pytest.approx(0.8)
    assert monitor.seen[5].eta is not None
    rows = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert {row.get("event") for row in rows} == {None, "pruning"}
    assert all(row["loss"] > 0 for row in history.steps)


def test_distillation_recovers(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    training = Training(steps=150, batch_tokens=256, learning_rate=3e-3, checkpoint_every=0)
    config = Config(sparsity=0.7, pattern="unstructured", score="magnitude", recovery=LEARNED, training=training)
    trainer = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config)
    history = trainer.run()
    assert history.steps[-1]["loss"] < 0.5 * history.steps[0]["loss"]
    assert trainer.pruner is not None
    assert trainer.pruner.sparsity() == pytest.approx(0.7, abs=0.01)


def test_embeddings_stay_frozen(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    config = Config(sparsity=0.5, pattern="unstructured", score="magnitude", recovery=LEARNED, training=TRAINING)
    trainer = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "embeddings" in name}
    trainer.run()
    after = dict(trainer.model.named_parameters())
    assert len(before) == 5
    for name, parameter in before.items():
        assert torch.equal(parameter, after[name])
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
    freeze_embeddings(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint(
    encoder_folder: Path, texts_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = Config(sparsity=0.5, pattern="unstructured", score="magnitude", recovery=LEARNED, training=TRAINING)
    monitor = StopAt(2, how=lambda: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    trainer = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config, monitor)
    with pytest.raises(TrainingInterrupted, match="step-00000002"):
        trainer.run()
    assert signal.getsignal(number) is handler


def test_a_stop_while_pruning_keeps_the_pruning(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    config = Config(sparsity=0.5, pattern="unstructured", score="magnitude", recovery=LEARNED)
    trainer = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config)
    trainer.stop()
    with pytest.raises(TrainingInterrupted, match="step-00000000"):
        trainer.run()
    again = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config)
    history = again.run(resume=True)
    assert len(history.prunings) == 1
    same_weights(trainer.model, again.model)


def test_minutes_end_a_run(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    training = Training(minutes=0.01, steps=100_000, batch_tokens=128, checkpoint_every=0)
    config = Config(recovery=LEARNED, training=training)
    history = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config).run()
    assert 0 < history.step < 100_000
    assert 0.6 <= history.seconds < 10


# --- failures ---------------------------------------------------------------------------------------------------------


def linear_run(output: Path | None, loss: Callable[[nn.Module, Any], torch.Tensor], **training: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    task = CustomTask([torch.ones(2, 4)] * 3, loss)
    if output is not None:
        output.mkdir(exist_ok=True)
    config = Config(training=Training(**{"steps": 9, "checkpoint_every": 2, **training}))
    return Trainer(model, None, task, None, config, output)


def test_a_loss_that_is_no_number_names_step_and_checkpoint(tmp_path: Path) -> None:
    calls = 0

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value: torch.Tensor = model(batch).sum()
        return value * float("nan") if calls == 6 else value

    trainer = linear_run(tmp_path / "out", loss)
    with pytest.raises(TrainingError, match=r"the loss became nan at step 6 .*the last checkpoint is .*step-00000004"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_gradient_that_is_no_number_is_not_applied(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        # sqrt has an infinite slope at 0.
        return (model(batch) * 0).sqrt().sum()

    trainer = linear_run(tmp_path / "out", loss)
    with pytest.raises(TrainingError, match=r"the gradient's norm became nan at step 1 .*there is no checkpoint"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_disc_that_fills_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = linear_run(tmp_path / "out", lambda model, batch: model(batch).pow(2).sum())
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.run()


def test_a_resumed_run_may_be_made_longer(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).pow(2).sum()

    assert linear_run(tmp_path / "out", loss, steps=2).run().step == 2
    longer = linear_run(tmp_path / "out", loss, steps=5).run(resume=True)
    assert longer.step == 5
    assert longer.notes == ["training.steps was 2 until step 2 and 5 from there on"]
    again = linear_run(tmp_path / "out", loss, steps=5).run(resume=True)
    assert (again.step, again.notes) == (5, longer.notes)
    assert linear_run(tmp_path / "out", loss, steps=3).run(resume=True).step == 5


def test_resuming_what_does_not_fit(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).pow(2).sum()

    with pytest.raises(ConfigError, match="no checkpoint"):
        linear_run(tmp_path / "out", loss).run(resume=True)
    linear_run(tmp_path / "out", loss).run()
    with pytest.raises(ConfigError, match=r"another configuration \(training.learning_rate\)"):
        linear_run(tmp_path / "out", loss, learning_rate=1e-5).run(resume=True)
    other = linear_run(tmp_path / "out", loss)
    other.task = CustomTask([torch.ones(2, 4)] * 4, loss)
    with pytest.raises(ConfigError, match="3 batches an epoch, the data given make 4"):
        other.run(resume=True)
    wide = linear_run(tmp_path / "out", loss)
    wide.model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(CheckpointError, match="of another model"):
        wide.run(resume=True)


def test_nothing_to_train(tmp_path: Path) -> None:
    trainer = linear_run(None, lambda model, batch: model(batch).sum())
    trainer.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        trainer.run()


def test_durations() -> None:
    assert [duration(s) for s in (40, 700, 11100)] == ["40 s", "12 min", "3 h 05 min"]


@pytest.mark.parametrize(("flags", "expected"), [(("avx2",), torch.float32), (("avx2", "amx_bf16"), torch.bfloat16)])
def test_bfloat16_is_used_where_the_processor_computes_in_it_and_the_report_says_where_not(
    encoder_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    expected: torch.dtype,
) -> None:
    found = replace(cpu(), flags=flags)
    monkeypatch.setattr("espalier.compression.trainer.cpu", lambda: found)
    config = Config(training=replace(TRAINING, steps=1, precision="bfloat16"), recovery=LEARNED)
    trainer = embeddings_run(encoder_folder, texts_file, tmp_path / "out", config)
    notes = trainer.run().notes
    assert trainer.precision == expected
    assert any("no bfloat16 instructions" in note for note in notes) == (expected == torch.float32)
    assert Trainer(trainer.model, None, trainer.task, None, Config(), None).precision == torch.float32
