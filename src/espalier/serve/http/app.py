"""The HTTP application: every address, and what answers there."""

from __future__ import annotations

from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from espalier.serve import metrics, schema
from espalier.serve.http.endpoint import Call, Endpoint
from espalier.serve.http.guard import Guard
from espalier.serve.http.openapi import Operation, describe
from espalier.serve.http.problems import HttpError, response_to
from espalier.serve.http.tasks import Tasks
from espalier.serve.http.v2 import OpenInference
from espalier.serve.service import Service

# Everything is in the page itself; nothing is ever loaded from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def operations(service: Service) -> list[Operation]:
    """Everything that is served."""
    v2, tasks, pages = OpenInference(service), Tasks(service), Pages(service)
    model = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")

    def of_model(suffix: str = "") -> tuple[str, ...]:
        return tuple(path + suffix for path in model)

    oip, ai, task, server = "Open Inference Protocol", "OpenAI", "tasks", "server"
    text, texts = schema.TextsRequest, "a text or texts"
    return [
        Operation("live", "GET", ("/v2/health/live",), v2.live, "Whether the process answers", tag=oip),
        Operation("ready", "GET", ("/v2/health/ready",), v2.ready, "Whether to send requests here", tag=oip),
        Operation("metadata", "GET", ("/v2",), v2.metadata, "The server", None, schema.ServerMetadata, oip),
        Operation("model", "GET", of_model(), v2.model_metadata, "A model", None, schema.ModelMetadata, oip),
        Operation("model-ready", "GET", of_model("/ready"), v2.model_ready, "Whether a model is served", tag=oip),
        Operation(
            "infer", "POST", of_model("/infer"), v2.infer, "Run a model", schema.InferRequest, schema.InferResponse, oip
        ),
        Operation(
            "index", "POST", ("/v2/repository/index",), v2.index, "All models", None, list[schema.IndexEntry], oip
        ),
        Operation("load", "POST", ("/v2/repository/models/{name}/load",), v2.load, "Load a model", tag=oip),
        Operation("unload", "POST", ("/v2/repository/models/{name}/unload",), v2.unload, "Unload a model", tag=oip),
        Operation("models", "GET", ("/v1/models",), tasks.models, "All models", None, schema.ModelList, ai),
        Operation(
            "embeddings", "POST", ("/v1/embeddings",), tasks.embeddings, f"Vectors of {texts}",
            schema.EmbeddingsRequest, schema.EmbeddingsResponse, ai,
        ),
        Operation(
            "answer", "POST", ("/v1/question-answering",), tasks.answer, "Answers to questions",
            schema.AnswerRequest, schema.AnswerResponse, task,
        ),
        Operation(
            "classify", "POST", ("/v1/classification",), tasks.classify, f"Labels of {texts}",
            text, schema.ClassifyResponse, task,
        ),
        Operation(
            "tokens", "POST", ("/v1/token-classification",), tasks.tokens, f"Labels of the tokens of {texts}",
            text, schema.TokensResponse, task,
        ),
        Operation("status", "GET", ("/status",), pages.status, "What the status page shows", tag=server),
        Operation("metrics", "GET", ("/metrics",), pages.metrics, "Metrics for Prometheus", tag=server),
        Operation("openapi", "GET", ("/openapi.json",), pages.openapi, "This description", tag=server),
        Operation("page", "GET", ("/",), pages.home, "The status page", tag=server),
        Operation("docs", "GET", ("/docs",), pages.docs, "This description, to read", tag=server),
    ]  # fmt: skip


def create_app(service: Service) -> ASGIApp:
    """The application. The service is started and ended by whoever runs it."""
    routes = []
    for operation in sorted(operations(service), key=lambda one: one.request is None):  # work first: found sooner
        endpoint = Endpoint(service, operation.name, operation.handler, openai=operation.tag == "OpenAI")
        routes += [Route(path, endpoint, methods=[operation.method]) for path in operation.paths]
    handlers: Any = {404: _unknown_address, 405: _wrong_method}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), service.config.token)


class Pages:
    """What a person, or Prometheus, looks at."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._description: bytes | None = None

    async def status(self, call: Call) -> Response:
        """The state of everything, as JSON."""
        return Response(schema.encode(self._service.describe()), media_type="application/json")

    async def metrics(self, call: Call) -> Response:
        """Prometheus's text."""
        return Response(self._service.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

    async def openapi(self, call: Call) -> Response:
        """The OpenAPI description."""
        if self._description is None:
            self._description = schema.encode(
                describe(operations(self._service), secured=bool(self._service.config.token))
            )
        return Response(self._description, media_type="application/json")

    async def home(self, call: Call) -> Response:
        """The status page."""
        return _page("status.html")

    async def docs(self, call: Call) -> Response:
        """The description, for people."""
        return _page("docs.html")


def _page(name: str) -> Response:
    text = (resources.files("espalier.serve.http") / "pages" / name).read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"content-security-policy": _POLICY, "x-frame-options": "DENY"})


async def _unknown_address(request: Request, error: Exception) -> Response:
    return response_to(HttpError(404, "there is nothing at this address; see /docs"))


async def _wrong_method(request: Request, error: Exception) -> Response:
    response = response_to(HttpError(405, f"{request.method} is not answered at this address; see /docs"))
    response.headers["allow"] = (getattr(error, "headers", None) or {}).get("Allow", "")
    return response
