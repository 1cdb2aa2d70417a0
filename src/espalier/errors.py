"""Every exception Espalier raises on purpose.

    EspalierError(Exception)
     |- ModelError              the model file or folder cannot be used
     |   |- ModelFormatError        not what its name says: truncated, corrupt, unknown version   (ValueError)
     |   |- ModelNotFoundError      the path, or a file the model refers to, is missing            (FileNotFoundError)
     |   `- UnsupportedModelError   well formed, but neither the engine nor ONNX Runtime can run it
     |- InputError              what was passed to a session or a verb is wrong                   (ValueError)
     |   |- InputNameError          unknown, missing or duplicate input or output name
     |   |   `- UnknownModelError       no model of that name is served
     |   |- InputTypeError          wrong dtype                                                   (TypeError)
     |   |- InputShapeError         wrong rank, extent or length, or a token id out of range
     |   |- ConfigError             a configuration has an unknown field or a value it cannot have
     |   `- DataError               a data file is unreadable, empty or mislabelled; the message names file and line
     |- GraphError              a pass left the graph in a state its specification forbids
     |- EngineError             the native engine failed while running
     |- TrainingError           a training run cannot go on; the message names the last checkpoint
     |   `- CheckpointError         a checkpoint cannot be written or read                            (OSError)
     |- ExportError             an exported model failed its verification
     |- UnauthenticatedError    a server does not know who asks
     |- ForbiddenError          a server was not started so that it would do this
     |- RulesError              the rules of a benchmark forbid what was asked for
     |- SchedulingError         work was not done for want of time or room
     |   |- QueueFullError          as much waits as may; has ``retry_after``, in seconds
     |   |- DeadlineError           its deadline passed first
     |   `- SchedulerClosedError    no more work is taken
     `- MissingDependencyError  an optional package is needed; the message ends with the install command (ImportError)

A message says what was wrong, what was expected, what was got, and what to do next.
"""

from __future__ import annotations


class EspalierError(Exception):
    """Base of every exception Espalier raises on purpose."""


class ModelError(EspalierError):
    """The model file or folder cannot be used."""


class ModelFormatError(ModelError, ValueError):
    """The file is truncated, corrupt, of an unknown version, or not a model."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """The model path, or a file that the model refers to, does not exist."""


class UnsupportedModelError(ModelError):
    """The model is well formed, but nothing here can run it."""


class InputError(EspalierError, ValueError):
    """What was passed to a session or a verb is wrong."""


class InputNameError(InputError):
    """An input or output name is unknown, missing or given twice."""


class UnknownModelError(InputNameError):
    """No model of that name, or not that version, is served."""


class InputTypeError(InputError, TypeError):
    """An input has the wrong dtype."""


class InputShapeError(InputError):
    """An input has the wrong rank or extent, or holds a token id out of range."""


class ConfigError(InputError):
    """A configuration has an unknown field, or a field a value it cannot have."""


class DataError(InputError):
    """A data file is unreadable, empty or mislabelled; the message names file and line."""


class GraphError(EspalierError):
    """A pass left the graph in a state that its specification forbids."""


class EngineError(EspalierError):
    """The native engine failed while running."""


class TrainingError(EspalierError):
    """A training run cannot go on; the message names the step and the last checkpoint."""


class CheckpointError(TrainingError, OSError):
    """A checkpoint cannot be written or read; an earlier one, if any, is untouched."""


class ExportError(EspalierError):
    """An exported model failed its verification: zeros lost, other numbers, or a pruned layer that runs dense."""


class UnauthenticatedError(EspalierError):
    """A server does not know who asks: the token is missing or wrong."""


class ForbiddenError(EspalierError):
    """A server was not started so that it would do this, or a page of another origin asked for it."""


class RulesError(EspalierError):
    """The rules of a benchmark forbid what was asked for."""


class SchedulingError(EspalierError):
    """Work was not done for want of time or room."""


class QueueFullError(SchedulingError):
    """As much waits already as the queue may hold. ``retry_after``: seconds until there is likely to be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(SchedulingError):
    """An item's deadline passed before its batch began."""


class SchedulerClosedError(SchedulingError):
    """The scheduler takes no more work, or was closed before this item's turn."""


class MissingDependencyError(EspalierError, ImportError):
    """An optional package is needed; the message ends with the command that installs it."""
