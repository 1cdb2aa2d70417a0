"""What an exception means to a client, in both protocols."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from espalier.errors import (
    DeadlineError,
    ForbiddenError,
    InputError,
    ModelError,
    QueueFullError,
    SchedulerClosedError,
    UnauthenticatedError,
    UnknownModelError,
)

log = logging.getLogger("espalier.serve")


@dataclass(frozen=True)
class Status:
    """``http`` and ``grpc`` name the outcome; ``refusal`` says why work was not taken, "" where it was."""

    http: int
    grpc: str
    refusal: str = ""


_KNOWN: tuple[tuple[type[Exception], Status], ...] = (
    (UnknownModelError, Status(404, "NOT_FOUND")),
    (UnauthenticatedError, Status(401, "UNAUTHENTICATED", "unauthenticated")),
    (ForbiddenError, Status(403, "PERMISSION_DENIED", "forbidden")),
    (QueueFullError, Status(429, "RESOURCE_EXHAUSTED", "queue-full")),
    (DeadlineError, Status(504, "DEADLINE_EXCEEDED", "deadline")),
    (SchedulerClosedError, Status(503, "UNAVAILABLE", "draining")),
    (InputError, Status(400, "INVALID_ARGUMENT", "bad-input")),
    (ModelError, Status(400, "FAILED_PRECONDITION", "bad-model")),
)
_INTERNAL = Status(500, "INTERNAL")


def status_of(error: Exception) -> Status:
    """What the exception means; everything unforeseen is an internal error."""
    return next((status for kind, status in _KNOWN if isinstance(error, kind)), _INTERNAL)


def explain(error: Exception) -> str:
    """What a client is told. Internal errors go to the log instead: they may hold what is nobody's business."""
    if status_of(error) is not _INTERNAL:
        return str(error)
    log.error("internal error", exc_info=error)
    return "internal error; the server's log says more"


def retry_after(error: Exception) -> int | None:
    """Whole seconds after which to try again, None when that is no use."""
    if isinstance(error, QueueFullError):
        return max(1, math.ceil(error.retry_after))
    return 1 if isinstance(error, SchedulerClosedError) else None
