"""The loop: prune when the schedule says so, learn in between, and never lose what has been learned."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression import checkpoint
from espalier.compression.calibration import evaluating
from espalier.compression.config import Config, Training
from espalier.compression.distributed import World, pick_device, tensors_of
from espalier.compression.progress import Monitor, Status
from espalier.compression.pruner import Pruner
from espalier.compression.quantization.quantizer import Quantizer
from espalier.compression.recovery import Plan, distillation
from espalier.compression.schedules import learning_rate_at, sparsity_at
from espalier.compression.tasks.base import EncoderTask, Task
from espalier.compression.teacher import Teacher
from espalier.data import Batch
from espalier.doctor import cpu
from espalier.errors import CheckpointError, ConfigError, TrainingError

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
"""Of processors that multiply bfloat16, as the kernel of the system names them: any one of these will do."""
_LENGTHS = ("minutes", "steps", "epochs")
"""Fields of a training by which a resumed run may be made longer or shorter: the schedules follow the share that is
done, and pruning never goes back."""
_FREE = frozenset(("threads", "training.checkpoint_every", *(f"training.{name}" for name in _LENGTHS)))
"""Settings that a resumed run may change."""
_LOG_EVERY = 10
_CLIP = 1.0
_CALIBRATION = 1_000_000
"""The first number of the epochs from which pruning draws its batches, which no run reaches by training."""


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped the run; ``checkpoint`` is where it can go on from, None when nothing was written."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(f"stopped; the checkpoint is {path}" if path else "stopped without a checkpoint")
        self.checkpoint = path


@dataclass
class History:
    """What happened in a run. ``steps`` are means over a few optimiser steps each, ``prunings`` one row per pruning."""

    steps: list[dict[str, float]] = field(default_factory=list)
    prunings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _State:
    step: int = 0
    epoch: int = 0
    position: int = 0  # batches of this epoch that are done, over all processes
    tokens: int = 0
    elapsed: float = 0.0
    target: float = 0.0  # sparsity of the last pruning
    window: dict[str, float] = field(default_factory=dict)  # sums since the last row of the log
    cached: bool | None = None


@dataclass(frozen=True)
class _Budget:
    """How long a run is: whichever limit comes first. Without any there is no training."""

    steps: int | None
    epochs: float | None
    seconds: float | None
    per_epoch: int

    @staticmethod
    def of(training: Training, per_epoch: int) -> _Budget:
        seconds = None if training.minutes is None else training.minutes * 60
        return _Budget(training.steps, training.epochs, seconds, per_epoch)

    def fraction(self, step: int, elapsed: float) -> float:
        """The share of the run that is done, 0 to 1."""
        shares = []
        if self.steps is not None:
            shares.append(step / self.steps if self.steps else 1.0)
        if self.epochs is not None:
            shares.append(step / (self.epochs * self.per_epoch) if self.epochs else 1.0)
        if self.seconds is not None:
            shares.append(elapsed / self.seconds if self.seconds else 1.0)
        return min(1.0, max(shares, default=1.0))

    @property
    def limited(self) -> bool:
        """Whether there is any training."""
        return any(limit is not None for limit in (self.steps, self.epochs, self.seconds))

    @property
    def planned_epochs(self) -> float | None:
        """Epochs, where a number of steps or epochs limits the run."""
        found = [] if self.steps is None else [self.steps / self.per_epoch]
        found += [] if self.epochs is None else [self.epochs]
        return min(found, default=None)


class Trainer:
    """Trains ``model`` in place. ``pruner`` None trains it dense; ``teacher`` None learns from labels alone;
    ``quantizer`` None leaves it float.

    ``output`` gets the log and the checkpoints; None writes nothing, and an interruption loses the run.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        task: Task,
        pruner: Pruner | None,
        config: Config,
        output: Path | None,
        *,
        monitor: Monitor | None = None,
        world: World | None = None,
        quantizer: Quantizer | None = None,
    ) -> None:
        self.world = world or World(0, 1, pick_device())
        self.device = self.world.device
        self.task = task
        self.pruner = pruner
        self.quantizer = quantizer
        self.config = config
        self.output = output
        self.monitor = monitor or Monitor()
        self.model = model.to(self.device)
        self.plan = Plan(config.recovery)
        self.precision = precision_of(config.training.precision, self.device)
        self.teacher: Teacher | None = None
        if self.plan.teacher and teacher is not None and isinstance(task, EncoderTask):
            self.teacher = Teacher(teacher, task, self.plan, device=self.device, precision=self.precision)
        self.history = History()
        self._labels = config.recovery.task if self.teacher is not None else 1.0
        self._state = _State()
        self._learned, self._learning = 0, 0.0  # tokens and seconds of this process's steps, prunings left out
        self._stop = threading.Event()
        self._keys: list[Any] = []
        self._keys_epoch = -1
        self._last: Path | None = None

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool = False) -> History:
        """Train to the end. With ``resume``, go on from the last checkpoint, bit for bit.

        A resumed run may be made longer or shorter (``training.minutes``, ``steps``, ``epochs``), which its notes say.

        Raises TrainingInterrupted after Ctrl-C, TrainingError for a loss that is no number, CheckpointError when a
        checkpoint cannot be written or read, ConfigError when there is none or it is of another run.
        """
        with threads(self.config.threads):
            return self._run(resume)

    def _run(self, resume: bool) -> History:
        training = self.config.training
        torch.manual_seed(self.config.seed + self.world.rank)
        if training.freeze_embeddings:
            freeze_embeddings(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.model, training)
        per_epoch = math.ceil(len(self._epoch(0)) / self.world.size)
        budget = _Budget.of(training, per_epoch)
        if not budget.limited and (self.pruner is None or self.config.schedule.kind == "gradual"):
            what = "dense training" if self.pruner is None else "gradual pruning"
            raise ConfigError(f"{what} needs a length: set training.epochs, steps or minutes")
        if resume:
            self._restore(optimizer)
        elif self.output is not None and self.world.leader:
            (self.output / LOG).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        if budget.limited and training.precision == "bfloat16" and self.precision != torch.bfloat16:
            self._note("this device has no bfloat16 instructions: trained in float32")
        self._prepare_teacher(budget)
        # Dropout is for learning from labels; a pruned network has no capacity to spare for it.
        self.model.train(self.teacher is None and self.pruner is None)
        began, before = time.monotonic(), self._state.elapsed
        with self._stop_on_signal():
            while True:
                self._state.elapsed = self.world.agree(before + time.monotonic() - began)
                fraction = budget.fraction(self._state.step, self._state.elapsed)
                self._prune(fraction, optimizer)
                self._quantize(fraction)
                if self.world.anyone(self._stop.is_set()):  # asked for while pruning, which may take minutes
                    self._state.elapsed = before + time.monotonic() - began
                    self._save(optimizer)
                    raise TrainingInterrupted(self._last)
                if fraction >= 1:
                    break
                stepping, tokens = time.monotonic(), self._state.tokens
                self._step(fraction, optimizer, parameters)
                self._learned += self._state.tokens - tokens
                self._learning += time.monotonic() - stepping
                self._report(budget, before + time.monotonic() - began)
                every = training.checkpoint_every
                stop = self.world.anyone(self._stop.is_set())
                if stop or (every and self._state.step % every == 0):
                    self._state.elapsed = before + time.monotonic() - began
                    self._save(optimizer)
                if stop:
                    raise TrainingInterrupted(self._last)
            if self._state.step:
                self._save(optimizer)
        self._flush_window()
        self.model.eval()
        self.history.step, self.history.tokens = self._state.step, self._state.tokens
        self.history.seconds = self._state.elapsed
        return self.history

    def _note(self, text: str) -> None:
        """Say something for the report as well, once also where a resumed run says it again."""
        if text not in self.history.notes:
            self.history.notes.append(text)
            self.monitor.say(text)

    def stop(self) -> None:
        """Stop after the step in progress, as Ctrl-C does."""
        self._stop.set()

    def _step(self, fraction: float, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        rate = learning_rate_at(self.config.schedule, self.config.training, fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = self._next()
        parts = self._losses(batch)
        stacked = torch.stack(list(parts.values()))
        values = stacked.detach().tolist()  # one wait for the device instead of one for each part
        value = sum(values)
        if not math.isfinite(value):
            self._not_a_number("the loss", value, rate)
        torch.autograd.backward(stacked.sum())
        self.world.average_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, _CLIP))
        if not math.isfinite(norm):
            self._not_a_number("the gradient's norm", norm, rate)
        if self.pruner is not None:
            self.pruner.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.pruner is not None:
            self.pruner.enforce()
        if self.quantizer is not None:
            self.quantizer.follow()
        state = self._state
        state.step += 1
        state.tokens += getattr(batch, "tokens", 0) * self.world.size
        sums = {"loss": value, "count": 1.0, "learning_rate": rate, **dict(zip(parts, values, strict=True))}
        for name, number in sums.items():
            state.window[name] = state.window.get(name, 0.0) + number
        if state.step % _LOG_EVERY == 0:
            self._flush_window()

    def _losses(self, batch: Any) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            if self.teacher is None or not isinstance(self.task, EncoderTask):
                return {"task": self.task.loss(self.model, batch)}
            student = self.task.outputs(self.model, batch, self.plan.wants)
        if self._labels > 0:
            parts["task"] = self._labels * self.task.task_loss(student, batch)
        parts |= distillation(student, self.teacher.outputs(batch), batch.mask, self.config.recovery)
        if not parts:
            raise ConfigError(
                f"the task {self.task.name!r} has nothing that config.recovery asks for; set recovery.task, hidden, "
                "logits or embeddings above 0"
            )
        return parts

    def _not_a_number(self, what: str, value: float, rate: float) -> None:
        found = f"the last checkpoint is {self._last}" if self._last else "there is no checkpoint yet"
        raise TrainingError(
            f"{what} became {value} at step {self._state.step + 1} (learning rate {rate:.2g}, {self.precision}); "
            f"{found}. Start again with a lower learning rate, or with precision float32"
        )

    # --- pruning ------------------------------------------------------------------------------------------------------

    def _prune(self, fraction: float, optimizer: torch.optim.Optimizer) -> None:
        pruner = self.pruner
        if pruner is None:
            return
        wanted = sparsity_at(self.config.schedule, pruner.target, fraction)
        if wanted <= self._state.target + 1e-9:
            return
        self.monitor.stage(f"pruning to {wanted:.1%} with {self.config.score}")
        start = time.monotonic()
        batches = self._calibration(len(self.history.prunings))
        with evaluating(self.model):
            report = pruner.prune(wanted, batches, self.task.pruning_loss)
        self.model.zero_grad(set_to_none=True)
        self.world.share([*self.model.state_dict().values(), *tensors_of(pruner.masks)])
        pruner.enforce(optimizer)
        self.history.notes.extend(note for note in report.notes if note not in self.history.notes)
        self._state.target = wanted
        row = {"step": self._state.step, "fraction": fraction, "target": wanted, "sparsity": pruner.sparsity()}
        row |= {"seconds": time.monotonic() - start, "report": plain(report)}
        self.history.prunings.append(row)
        self._log(row | {"event": "pruning"})
        self.monitor.say(f"pruned to {pruner.sparsity():.1%} with {self.config.score} in {row['seconds']:.1f} s")

    def _quantize(self, fraction: float) -> None:
        quantizer = self.quantizer
        if quantizer is None or quantizer.done or fraction < quantizer.begins - 1e-9:
            return
        self.monitor.stage("quantising to 8 bits")
        start = time.monotonic()
        with evaluating(self.model):
            batches = self._calibration(len(self.history.prunings))
            report = quantizer.quantize(batches, self.task.pruning_loss, self.task.answers)
        self.model.zero_grad(set_to_none=True)
        self.world.share([*self.model.state_dict().values()])
        self.history.notes.extend(report.notes)
        self.monitor.say(f"{report}, in {time.monotonic() - start:.1f} s")

    def _calibration(self, number: int) -> Callable[[], Iterator[Any]]:
        """Batches of the training data in an order of their own for each ``number``, the same on every call."""
        keys = self.task.epoch(self.config.training.batch_tokens, seed=self.config.seed, epoch=_CALIBRATION + number)
        return lambda: (self._on_device(self.task.batch(key)) for key in keys)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> list[Any]:
        if epoch != self._keys_epoch:
            self._keys = self.task.epoch(self.config.training.batch_tokens, seed=self.config.seed, epoch=epoch)
            self._keys_epoch = epoch
        return self._keys

    def _next(self) -> Any:
        state, world = self._state, self.world
        keys = self._epoch(state.epoch)
        # The last round of an epoch may be short of batches: the first ones fill it up.
        key = keys[(state.position + world.rank) % len(keys)]
        state.position += world.size
        if state.position >= len(keys):
            state.epoch, state.position = state.epoch + 1, 0
        return self._on_device(self.task.batch(key))

    def _on_device(self, batch: Any) -> Any:
        if isinstance(batch, Batch):
            return batch.to(self.device)
        return move(batch, self.device)

    def _prepare_teacher(self, budget: _Budget) -> None:
        teacher, state = self.teacher, self._state
        if teacher is None:
            return
        tokens = 4 * self.config.training.batch_tokens
        if state.cached is None:
            state.cached = self.world.size == 1 and teacher.worth_caching(
                budget=tokens, epochs=budget.planned_epochs, seconds=budget.seconds
            )
        if state.cached:
            self.monitor.stage("running the dense model over the data")
            start = time.monotonic()
            teacher.fill(tokens)
            state.elapsed += time.monotonic() - start

    # --- log and checkpoints ------------------------------------------------------------------------------------------

    def _report(self, budget: _Budget, elapsed: float) -> None:
        state = self._state
        fraction = budget.fraction(state.step, elapsed)
        eta = elapsed * (1 - fraction) / fraction if fraction > 0 and state.step > 2 else None
        count = state.window.get("count", 0.0)
        latest = state.window if count else {**self.history.steps[-1], "count": 1.0}
        status = Status(
            step=state.step,
            fraction=fraction,
            loss=latest["loss"] / latest["count"],
            sparsity=self._state.target,
            learning_rate=latest["learning_rate"] / latest["count"],
            tokens_per_second=self._learned / self._learning if self._learning > 0 else 0.0,
            eta=eta,
        )
        self.monitor.step(status)

    def _flush_window(self) -> None:
        state = self._state
        count = state.window.pop("count", 0.0)
        if not count:
            return
        row = {name: total / count for name, total in state.window.items()}
        row |= {"step": state.step, "epoch": state.epoch, "tokens": state.tokens, "sparsity": state.target}
        state.window = {}
        self.history.steps.append(row)
        self._log(row)

    def _log(self, row: dict[str, Any]) -> None:
        if self.output is None or not self.world.leader:
            return
        try:
            with (self.output / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.output / LOG}: {error.strerror or error}") from error

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        if self.output is None:
            return
        if self.world.leader:
            state = {
                "config": self.config.to_dict(),
                "state": asdict(self._state),
                "history": asdict(self.history),
                "model": self.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "pruner": None if self.pruner is None else self.pruner.state_dict(),
                "quantizer": None if self.quantizer is None else self.quantizer.state_dict(),
                "rng": rng_state(self.device),
                "batches": len(self._epoch(self._state.epoch)),
            }
            self._last = checkpoint.save(self.output / CHECKPOINTS, self._state.step, state)
        self.world.wait()

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        path = None if self.output is None else checkpoint.find_latest(self.output / CHECKPOINTS)
        if path is None:
            raise ConfigError(f"there is no checkpoint in {self.output} to resume from; start without --resume")
        saved = checkpoint.load(path)
        differing = differences(saved["config"], self.config.to_dict())
        if differing:
            raise ConfigError(
                f"{path} is of a run with another configuration ({', '.join(differing)}); resume with the same, or "
                "start into another folder"
            )
        if saved["batches"] != len(self._epoch(0)):
            raise ConfigError(
                f"{path} is of a run over {saved['batches']} batches an epoch, the data given make "
                f"{len(self._epoch(0))}; resume with the same data"
            )
        try:
            if self.quantizer is not None:
                self.quantizer.load_state_dict(saved["quantizer"])
            self.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if self.pruner is not None:
                self.pruner.load_state_dict(saved["pruner"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is of another model: {str(error).splitlines()[0]}") from error
        set_rng_state(saved["rng"], self.device)
        self._state = _State(**saved["state"])
        self.history = History(**saved["history"])
        self._last = path
        if self.output is not None and self.world.leader:
            rows: list[dict[str, Any]] = [
                *self.history.steps,
                *({**row, "event": "pruning"} for row in self.history.prunings),
            ]
            text = "".join(json.dumps(row, default=str) + "\n" for row in sorted(rows, key=lambda row: row["step"]))
            (self.output / LOG).write_text(text, encoding="utf-8")
        self.monitor.say(f"resuming from step {self._state.step}")
        for name in _LENGTHS:
            before, now = saved["config"]["training"].get(name), getattr(self.config.training, name)
            if before != now:
                self._note(f"training.{name} was {before} until step {self._state.step} and {now} from there on")

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first Ctrl-C stops after the step in progress, the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()
            os.write(2, b"\nstopping after this step or pruning and writing a checkpoint; again to stop at once\n")

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


# --- parts that stand alone -------------------------------------------------------------------------------------------


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """The type of activations: bfloat16 where asked for and computed by the device itself, float32 elsewhere.

    ``auto`` asks for it on a GPU only. A processor without such instructions takes 50 times as long in bfloat16.
    """
    if name == "float32" or (name == "auto" and device.type == "cpu"):
        return torch.float32
    computed = bool(BF16_FLAGS.intersection(cpu().flags)) if device.type == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if computed else torch.float32


def freeze_embeddings(model: nn.Module) -> None:
    """No gradients for embedding tables and what is computed from them alone, so that backward passes stop early."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in ("embeddings", "embeddings_project") or isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only. Raises ConfigError when nothing is left to train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("every parameter is frozen; there is nothing to train")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=trained[0].device.type in ("cpu", "cuda"))


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of PyTorch's generators."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put PyTorch's generators back into a state of :func:`rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def move(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, in dicts, lists and tuples, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        moved = [move(item, device) for item in value]
        return moved if isinstance(value, list) else tuple(moved)
    return value


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: dataclasses as dicts, tensors and arrays as lists, anything strange as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return (
            {name: plain(item) for name, item in vars(value).items()} if hasattr(value, "__dict__") else asdict(value)
        )
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    to_list: Callable[[], Any] | None = getattr(value, "tolist", None)
    return plain(to_list()) if to_list is not None else str(value)


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """The names of the fields in which two configurations differ, without those that a resumed run may change."""
    found: list[str] = []
    for name in sorted({*a, *b}):
        path = f"{prefix}{name}"
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{path}.")
        elif plain(left) != plain(right) and path not in _FREE:
            found.append(path)
    return found


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use ``count`` threads, for None as many as before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
