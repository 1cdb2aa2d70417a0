"""The JSON bodies of all endpoints. Decoding checks them, and the OpenAPI page is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from espalier.errors import InputError

T = TypeVar("T")

Parameters = dict[str, bool | int | float | str]
Text = Annotated[str, Meta(min_length=1)]
Texts = Text | Annotated[list[Text], Meta(min_length=1)]


def decode(kind: type[T], body: bytes | memoryview) -> T:
    """A body as a checked object. Raises InputError, which says where and what was expected."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"the request is not as described in /openapi.json: {error}") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the request is not JSON: {error}") from error


encode = msgspec.json.Encoder().encode


# ---- Open Inference Protocol -----------------------------------------------------------------------------------------


class InferInput(Struct):
    """``data``: values, flat or nested; absent where the tensor follows in binary."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = field(default_factory=dict)
    data: Any = None


class RequestedOutput(Struct):
    """An output to return."""

    name: str
    parameters: Parameters = field(default_factory=dict)


class InferRequest(Struct):
    """``outputs``: all for none."""

    inputs: list[InferInput]
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    outputs: list[RequestedOutput] = field(default_factory=list)


class InferOutput(Struct, omit_defaults=True):
    """``data``: flat values; absent where the tensor follows in binary."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = field(default_factory=dict)
    data: list[Any] | None = None


class InferResponse(Struct, omit_defaults=True):
    """``id`` is the request's."""

    model_name: str
    model_version: str
    outputs: list[InferOutput]
    id: str = ""


class ServerMetadata(Struct):
    """``extensions``: what is served beyond the protocol's core."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Struct):
    """An extent of -1 may be anything."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct):
    """A model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class IndexEntry(Struct):
    """``state``: READY or UNAVAILABLE."""

    name: str
    version: str
    state: str
    reason: str


class Failure(Struct):
    """What went wrong, what was expected, what to do."""

    error: str


# ---- OpenAI ----------------------------------------------------------------------------------------------------------


class EmbeddingsRequest(Struct):
    """``input``: a text, texts, a sequence of token ids, or several."""

    input: Text | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class Embedding(Struct):
    """``embedding``: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Usage(Struct):
    """Tokens computed."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Struct):
    """One embedding per input, in order."""

    data: list[Embedding]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


class ModelCard(Struct):
    """A model, as OpenAI lists them."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "espalier"


class ModelList(Struct):
    """All models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class OpenAIProblem(Struct):
    """The inside of :class:`OpenAIFailure`."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIFailure(Struct):
    """What went wrong, in OpenAI's form."""

    error: OpenAIProblem


# ---- tasks -----------------------------------------------------------------------------------------------------------


class AskedQuestion(Struct):
    """A question about a context."""

    question: Text
    context: Text


class AnswerRequest(Struct):
    """``model`` may be left out when only one does the task."""

    questions: Annotated[list[AskedQuestion], Meta(min_length=1)]
    model: str | None = None


class AnswerResponse(Struct):
    """``answers``: the best-scoring part of each context."""

    model: str
    answers: list[str]


class TextsRequest(Struct):
    """``input``: a text or texts. ``model`` may be left out when only one does the task."""

    input: Texts
    model: str | None = None


class LabelScore(Struct):
    """``score``: between 0 and 1."""

    label: str
    score: float


class ClassifyResponse(Struct):
    """``data``: for each text its labels, the likeliest first."""

    model: str
    data: list[list[LabelScore]]


class TokenLabel(Struct):
    """The characters ``start`` to ``end`` of the text."""

    start: int
    end: int
    text: str
    label: str
    score: float


class TokensResponse(Struct):
    """``data``: for each text its tokens."""

    model: str
    data: list[list[TokenLabel]]
