"""The verb: ``espalier.compress(model, Config(...))``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.checkpoint import find_latest
from espalier.compression.config import Config
from espalier.compression.convolution import as_linear
from espalier.compression.distributed import World, world
from espalier.compression.export import Exported, check_place, export
from espalier.compression.groups import STRUCTURED
from espalier.compression.measure import Sizes, Speed, measure_sizes, measure_speed, sample
from espalier.compression.progress import Monitor
from espalier.compression.progress import monitor as usual_monitor
from espalier.compression.pruner import Pruner
from espalier.compression.quantization.quantizer import QuantizationReport, Quantizer
from espalier.compression.recovery import Plan
from espalier.compression.report import CompressionReport, LayerRow
from espalier.compression.tasks import TASKS, Columns, CustomTask, Embeddings, EncoderTask, QuestionAnswering, Task
from espalier.compression.tasks.models import model_home
from espalier.compression.trainer import CHECKPOINTS, LOG, History, Trainer, plain, threads
from espalier.data import Feature, Tokens
from espalier.data.metrics import Scores, recovery_interval
from espalier.errors import ConfigError, InputError, ModelError


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a task reads. ``training``: files or datasets on disk; ``evaluation``: held-out data, never trained on.

    ``guessed``: for SQuAD, a list of answers whose place is a guess; ``limit``: evaluate on that many questions only.
    """

    training: tuple[Path, ...] = ()
    evaluation: Path | None = None
    columns: Columns = field(default_factory=Columns)
    guessed: Path | None = None
    limit: int | None = None


def compress(
    model: nn.Module | str | os.PathLike[str],
    config: Config,
    *,
    task: str | None = None,
    data: Data | None = None,
    output: str | os.PathLike[str] | None = None,
    teacher: str | os.PathLike[str] | None = None,
    batches: Sequence[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    resume: bool = False,
    measure: bool = True,
    monitor: Monitor | None = None,
    device: torch.device | None = None,
) -> CompressionReport:
    """Prune or quantise a network, and train it until it is as good again.

    ``model`` is a Hugging Face folder, with a ``task`` (:data:`.tasks.TASKS`), ``data`` and an ``output`` folder, which
    gets the compressed folder, ``model.onnx`` and the report, all verified; ``teacher`` is the folder to learn from, by
    default the model as it was. With no sparsity in ``config`` the model is fine-tuned dense.

    Or ``model`` is any module, compressed in place, with ``batches`` (a sequence of anything) and
    ``loss(model, batch)``; without batches it is pruned once, by scores that need no data. Its linear layers and 2-D
    convolutions count, and with a quantisation the linear layers alone.
    ``output`` then gets log and checkpoints.

    ``resume`` goes on from the last checkpoint in ``output``. ``measure=False`` leaves out the timing. ``monitor``
    shows the progress: by default a bar or lines on stderr.

    Raises InputError, ConfigError, DataError, the errors of loading, TrainingError, CheckpointError, ExportError, and
    TrainingInterrupted (a KeyboardInterrupt) after Ctrl-C.
    """
    shown = monitor or usual_monitor()
    # One process shows and writes; the others work.
    with world(device) as job, shown if job.leader else Monitor() as visible:
        if isinstance(model, nn.Module):
            if task is not None or data is not None or teacher is not None:
                raise InputError("task, data and teacher go with a model folder; with a module give batches and loss")
            place = None if output is None else Path(output)
            return _compress_module(model, config, batches, loss, place, resume, visible, job)
        if batches is not None or loss is not None:
            raise InputError("batches and loss go with a module; with a model folder give task and data")
        if task is None or output is None:
            raise InputError("a model folder needs a task and an output folder; give both")
        run = _FolderRun(
            source=Path(model),
            config=config,
            task_name=task,
            data=data or Data(),
            output=Path(output),
            teacher=None if teacher is None else Path(teacher),
            resume=resume,
            measure=measure,
            monitor=visible,
            job=job,
        )
        with threads(config.threads):
            return run.run()


def is_sparse(config: Config) -> bool:
    """Whether ``config`` asks for zeros, or for keeping those that are there."""
    return bool(config.sparsity) or config.speedup is not None or config.keeps_zeros


def make_task(name: str, folder: Path, config: Config, data: Data) -> EncoderTask:
    """The task of that name with the folder's tokenizer, before it has read data. Raises ConfigError for no task."""
    kind = TASKS.get(name)
    if kind is None:
        raise ConfigError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    length = config.training.max_length or kind.default_max_length
    home = model_home(folder)
    tokens = Tokens.read(home if (home / "tokenizer.json").is_file() else folder, length)
    if issubclass(kind, QuestionAnswering):
        return kind(tokens, columns=data.columns, seed=config.seed, guessed=data.guessed, limit=data.limit)
    if data.guessed is not None:
        raise ConfigError("guessed starts are a matter of question answering; leave them out")
    return kind(tokens, columns=data.columns, seed=config.seed)


@dataclass(kw_only=True)
class _FolderRun:
    """The steps of compressing a folder, in order."""

    source: Path
    config: Config
    task_name: str
    data: Data
    output: Path
    teacher: Path | None
    resume: bool
    measure: bool
    monitor: Monitor
    job: World

    def run(self) -> CompressionReport:
        config, sparse = self.config, is_sparse(self.config)
        inputs = [self.source, *self.data.training, *([self.data.evaluation] if self.data.evaluation else [])]
        inputs += [self.teacher] if self.teacher else []
        if self.job.leader:
            check_place(self.output, inputs, resume=self.resume or _unstarted(self.output))
        self.job.wait()
        model_home(self.source)
        task = make_task(self.task_name, self.source, config, self.data)
        plan = Plan(config.recovery)
        if isinstance(task, Embeddings) and config.recovery.task > 0:
            raise ConfigError("the task 'embeddings' has no labels: set recovery.task to 0 and distil")
        self._read(task)
        attention = plan.wants.attention
        model = task.load(self.source, attention=attention).to(self.job.device)
        if sparse and task.notes and self.teacher is None:
            raise ConfigError(
                f"{self.source} has no trained head for {self.task_name!r} ({task.notes[0]}); fine-tune it first with "
                "sparsity 0, or give a trained teacher"
            )
        dense_folder = self.teacher or (self.source if sparse else None)
        teacher = None if dense_folder is None else task.load(dense_folder, attention=attention).to(self.job.device)
        if isinstance(task, Embeddings) and teacher is None:
            raise ConfigError("the task 'embeddings' learns from a teacher: give one, or a sparsity")
        dense = None if teacher is None else self._evaluate(task, teacher, "the dense model")
        lengths = [len(feature.ids) for feature in sample(self._samples(task), seed=config.seed)]
        pruner = Pruner(model, config, lengths=lengths) if sparse else None
        self.output.mkdir(parents=True, exist_ok=True)
        quantizer = Quantizer(model, config) if config.quantization is not None else None
        trainer = Trainer(
            *(model, teacher, task, pruner, config, self.output),
            monitor=self.monitor,
            world=self.job,
            quantizer=quantizer,
        )
        history = trainer.run(resume=self.resume)
        zeros = 0.0 if pruner is None else pruner.sparsity()
        rows = [] if pruner is None else pruner.layer_report()
        if pruner is not None:
            model = self._shrink(model, pruner, history)
        masks = {} if pruner is None else {name: mask.detach().cpu() for name, mask in pruner.masks.items()}
        compressed = self._evaluate(task, model, "the result")
        found = self._finish(task, model, masks, dense_folder) if self.job.leader else None
        self.job.wait()
        quantization = None if quantizer is None else quantizer.report
        report = self._report(task, history, quantization, zeros, rows, dense, compressed, found)
        if self.job.leader:
            report.save(self.output)
            # The verified export holds all that the checkpoint was kept for.
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
        return report

    def _read(self, task: EncoderTask) -> None:
        self.monitor.stage("reading the data")
        task.read(self.data.training)
        if self.data.evaluation is not None:
            task.read_evaluation(self.data.evaluation)
        elif self.data.limit is not None:
            raise ConfigError("a limit on the evaluation needs data to evaluate on")

    def _evaluate(self, task: EncoderTask, model: nn.Module, what: str) -> Scores | None:
        if self.data.evaluation is None or not self.job.leader:
            return None
        self.monitor.stage(f"evaluating {what}")
        scores = task.evaluate(model)
        if scores is not None:
            self.monitor.say(f"{what}: {scores.name} {scores.value:.4f}")
        return scores

    def _shrink(self, model: nn.Module, pruner: Pruner, history: History) -> nn.Module:
        """Take out what structured patterns have emptied; the pruner's masks follow."""
        if self.config.pattern not in STRUCTURED:
            return model
        before = sum(p.numel() for p in model.parameters())
        small = pruner.shrink()
        after = sum(p.numel() for p in small.parameters())
        history.notes.append(
            f"{before - after} of {before} parameters are gone"
            if after < before
            else "the model keeps its size: a Hugging Face folder cannot say what was pruned, so it stays as zeros"
        )
        return small

    def _finish(
        self,
        task: EncoderTask,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        dense_folder: Path | None,
    ) -> tuple[Exported, Sizes | None, Speed | None, list[str]]:
        threads = self.config.threads
        self.monitor.stage("exporting and verifying")
        samples = self._samples(task)
        exported = export(model.cpu(), task, self.source, self.output, masks, samples=samples, threads=threads)
        notes: list[str] = []
        sizes: Sizes | None = None
        speed: Speed | None = None
        try:
            sizes = measure_sizes(dense_folder or self.source, self.output, exported.onnx)
            if self.measure and dense_folder is not None:
                self.monitor.stage("timing beside the dense model")
                speed = measure_speed(dense_folder, self.output, samples, threads=threads, seed=self.config.seed)
        except ModelError as error:
            notes.append(f"not measured in the engine: {error}")
        wanted = self.config.speedup
        if speed is not None and wanted is not None and abs(speed.ratio / wanted - 1) > 0.1:
            notes.append(f"asked for {wanted:g} times the dense speed, measured {speed.ratio:.2f} times")
        return exported, sizes, speed, notes

    def _samples(self, task: EncoderTask) -> list[Feature]:
        return task.evaluation_features() or task.training

    def _report(
        self,
        task: EncoderTask,
        history: History,
        quantization: QuantizationReport | None,
        zeros: float,
        rows: Sequence[Any],
        dense: Scores | None,
        compressed: Scores | None,
        found: tuple[Exported, Sizes | None, Speed | None, list[str]] | None,
    ) -> CompressionReport:
        exported, sizes, speed, notes = found or (None, None, None, [])
        interval = recovery_interval(compressed, dense) if dense is not None and compressed is not None else None
        tokens = self.config.training.batch_tokens
        return CompressionReport(
            model=self.source.resolve().name,
            task=task.name,
            output=str(self.output),
            sparsity=zeros,
            config=self.config.to_dict(),
            layers=layer_rows(rows, {} if exported is None else exported.formats, speed),
            history=history,
            quantization=quantization,
            dense=None if dense is None else dense.metric(),
            compressed=None if compressed is None else compressed.metric(),
            recovery=interval,
            sizes=sizes,
            speed=speed,
            checks=() if exported is None else tuple(map(str, exported.checks)),
            notes=(*task.notes, *notes, *(() if exported is None else exported.notes)),
            data={
                "training": [path.name for path in self.data.training],
                "examples": len(task.training),
                "tokens": int(task.lengths.sum()),
                "padding": task.padding(tokens),
                "evaluation": None if self.data.evaluation is None else self.data.evaluation.name,
            },
            machine=_machine(self.job),
            versions=_versions(),
        )


def _unstarted(output: Path) -> bool:
    """Whether a folder holds only what a run leaves that ended before its first checkpoint: nothing worth keeping."""
    if not output.is_dir():
        return False
    others = {path.name for path in output.iterdir()} - {LOG, CHECKPOINTS}
    return not others and find_latest(output / CHECKPOINTS) is None


def _compress_module(
    model: nn.Module,
    config: Config,
    batches: Sequence[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    output: Path | None,
    resume: bool,
    monitor: Monitor,
    job: World,
) -> CompressionReport:
    if (batches is None) != (loss is None):
        raise InputError("give batches and loss together: batches are what loss(model, batch) understands")
    if not is_sparse(config) and batches is None:
        raise InputError("there is nothing to do: config asks for no pruning, and there are no batches to train on")
    if config.quantization is not None and batches is None:
        raise InputError("quantisation needs batches and loss to calibrate on; give both")
    if resume and output is None:
        raise InputError("resume needs the output folder of the run to go on with")
    if output is not None:
        check_place(output, [], resume=resume or _unstarted(output))
        output.mkdir(parents=True, exist_ok=True)
    # Quantised convolutions are for a quantiser of ONNX files: where config quantises, they are left alone.
    with as_linear(model) if is_sparse(config) and config.quantization is None else nullcontext():
        return _run_module(model, config, batches, loss, output, resume, monitor, job)


def _run_module(
    model: nn.Module,
    config: Config,
    batches: Sequence[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    output: Path | None,
    resume: bool,
    monitor: Monitor,
    job: World,
) -> CompressionReport:
    pruner = Pruner(model, config) if is_sparse(config) else None
    quantizer = Quantizer(model, config) if config.quantization is not None else None
    history = History()
    training = model.training
    if batches is not None and loss is not None:
        task: Task = CustomTask(batches, loss)
        device = next(model.parameters()).device
        trainer = Trainer(
            *(model, None, task, pruner, config, output),
            monitor=monitor,
            world=World(job.rank, job.size, device),
            quantizer=quantizer,
        )
        history = trainer.run(resume=resume)
    elif pruner is not None:
        history.notes.append("no batches were given: pruned once, not trained")
        report = pruner.prune(pruner.target, list, _no_loss)
        row = {"step": 0, "fraction": 1.0, "target": pruner.target, "sparsity": pruner.sparsity()}
        history.prunings.append(row | {"seconds": 0.0, "report": plain(report)})
    model.train(training)
    summary = CompressionReport(
        model=type(model).__name__,
        task="custom" if batches is not None else "none",
        output=None if output is None else str(output),
        sparsity=0.0 if pruner is None else pruner.sparsity(),
        config=config.to_dict(),
        layers=layer_rows([] if pruner is None else pruner.layer_report(), {}, None),
        history=history,
        quantization=None if quantizer is None else quantizer.report,
        machine=_machine(job),
        versions=_versions(),
    )
    if output is not None and job.leader:
        summary.save(output)
    return summary


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise InputError("this score needs data; give batches and loss")


def layer_rows(rows: Sequence[Any], formats: Mapping[str, str], speed: Speed | None) -> tuple[LayerRow, ...]:
    """The pruner's report on each layer with what the engine made of it."""
    found: list[LayerRow] = []
    for row in rows:
        values = plain(row)
        name = str(values["name"])
        found.append(
            LayerRow(
                name=name,
                shape=tuple(values["shape"]),
                pattern=str(values["pattern"]),
                sparsity=float(values["sparsity"]),
                error_before=values.get("error_before"),
                error_after=values.get("error_after"),
                format=formats.get(name, ""),
                dense_ms=None if speed is None else _of_layer(speed.dense_ms, name),
                sparse_ms=None if speed is None else _of_layer(speed.sparse_ms, name),
                expected_speedup=values.get("speedup"),
            )
        )
    return tuple(found)


def _of_layer(times: Mapping[str, float], name: str) -> float | None:
    for key, value in times.items():
        if key == name or key.endswith(f".{name}") or name.endswith(f".{key}"):
            return value
    return None


def _machine(job: World) -> dict[str, Any]:
    from espalier.doctor import machine

    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    found = {**machine(), "device": device, "processes": job.size, "training_threads": torch.get_num_threads()}
    return {name: value for name, value in found.items() if name != "versions"}


def _versions() -> dict[str, str]:
    from espalier.doctor import installed

    return installed()
