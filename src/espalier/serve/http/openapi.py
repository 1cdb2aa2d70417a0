"""The OpenAPI description, made of the operations and the types of their bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

import espalier
from espalier.serve import schema
from espalier.serve.http.endpoint import Handler

_JSON = "application/json"
_REFERENCES = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)\}")
_TEXT_RESPONSES = {"metrics": "text/plain", "page": "text/html", "docs": "text/html"}
_ERRORS = {
    "400": "The request is wrong; the message says where", "401": "The token is missing or wrong",
    "403": "The server was not started to do this", "404": "No such model", "408": "The body came too slowly",
    "413": "The body is too large", "415": "An unknown Content-Encoding",
    "429": "Too much waits; Retry-After says when to try again", "500": "A bug; the server's log says more",
    "503": "The server is shutting down or not ready", "504": "No answer in time",
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An address: its method, its handler, and the types of its bodies. ``name`` is its label in the metrics."""

    name: str
    method: str
    paths: tuple[str, ...]
    handler: Handler
    summary: str
    request: type | None = None
    response: Any = None
    tag: str = "server"


def describe(operations: Sequence[Operation], *, secured: bool) -> dict[str, Any]:
    """The whole description, as JSON's values."""
    kinds: list[Any] = [schema.Failure, schema.OpenAIFailure]
    kinds += [kind for operation in operations for kind in (operation.request, operation.response) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCES)
    bodies = dict(zip(map(repr, kinds), schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in operations:
        for place, path in enumerate(operation.paths):
            described = _operation(operation, path, bodies)
            described["operationId"] = operation.name + ("-version" if place else "")
            paths.setdefault(path, {})[operation.method.lower()] = described
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Espalier", "version": espalier.__version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if secured:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found


def _operation(operation: Operation, path: str, bodies: dict[str, Any]) -> dict[str, Any]:
    response = bodies[repr(operation.response)] if operation.response is not None else {}
    failure = schema.OpenAIFailure if operation.tag == "OpenAI" else schema.Failure
    failed = {_JSON: {"schema": bodies[repr(failure)]}}
    content: dict[str, Any] = {_TEXT_RESPONSES.get(operation.name, _JSON): {"schema": response}}
    if operation.name == "infer":
        content["application/octet-stream"] = {"schema": {}}
    found: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {"200": {"description": operation.summary, "content": content}}
        | {code: {"description": text, "content": failed} for code, text in _ERRORS.items()},
    }
    names = _PARAMETER.findall(path)
    if names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.request is not None:
        found["requestBody"] = {"required": True, "content": {_JSON: {"schema": bodies[repr(operation.request)]}}}
    return found
