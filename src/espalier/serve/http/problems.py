"""From exceptions to answers."""

from __future__ import annotations

from starlette.responses import Response

from espalier.serve import schema, status


class HttpError(Exception):
    """An answer that only HTTP knows."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: Exception) -> int:
    """The HTTP status of an exception."""
    return error.code if isinstance(error, HttpError) else status.status_of(error).http


def response_to(error: Exception, *, openai: bool = False) -> Response:
    """The answer to a request that failed, in the protocol's form or in OpenAI's."""
    code = code_of(error)
    message = str(error) if isinstance(error, HttpError) else status.explain(error)
    headers = {}
    wait = status.retry_after(error)
    if wait is not None:
        headers["retry-after"] = str(wait)
    if code == 401:
        headers["www-authenticate"] = "Bearer"
    body: schema.OpenAIFailure | schema.Failure = schema.Failure(message)
    if openai:
        kind = "invalid_request_error" if code < 500 and code != 429 else "server_error"
        body = schema.OpenAIFailure(schema.OpenAIProblem(message, kind, code="rate_limit" if code == 429 else None))
    return Response(schema.encode(body), code, headers, "application/json")
