"""Requests as they arrive: OpenAI's chat completions, checked field by field.

A field that is not known is refused, so that nothing a client asks for is silently left out.
"""

import difflib
import reprlib
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from clvr_jax.backends.protocol import MAX_LOGPROBS
from clvr_jax.serving.errors import ApiError, invalid


def _nothing(value: Any) -> Any:
    if value is None or value is False or value in ([], {}, "none"):
        return value
    raise ValueError("this is not supported; leave it out")


def _parts(value: Any) -> Any:
    if value is None:
        return []
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Unsupported = Annotated[Any, AfterValidator(_nothing)]
Unread = Any  # accepted because it changes nothing


# every problem of a body is collected, at 600 bytes each: without bounds on their number, two
# megabytes of small mistakes become a gigabyte
_MAX_FIELDS = 100


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _is_of_sane_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"there are {len(value)} fields; none has more than {_MAX_FIELDS}")
        return value


class ImageUrl(_Strict):
    """A picture as a data URL; `detail` changes nothing, the model's own resolution holds."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(_Strict):
    """A text or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[ImageUrl | None, BeforeValidator(_url)] = None

    @pydantic.model_validator(mode="after")
    def _is_what_it_says(self) -> "ContentPart":
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type} has the field {self.type} and no {other}")
        return self


_Parts = Annotated[
    list[ContentPart], Field(max_length=1000, fail_fast=True), BeforeValidator(_parts)
]


class ChatMessage(_Strict):
    """One message; what a client sends back of our own replies is taken as well."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Parts = []
    name: Unread = None
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None

    @pydantic.model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.role != "assistant" and not self.content:
            raise ValueError(f"a {self.role} message needs content")
        return self


class StreamOptions(_Strict):
    """What a stream sends besides text."""

    include_usage: bool | None = None
    include_obfuscation: Unsupported = None


class JsonSchema(_Strict):
    """A schema under a name; it is always followed strictly."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    """What form the reply has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @pydantic.model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given where type is json_schema, and only there")
        return self


_Text = Annotated[str, Field(min_length=1)]
_Stop = Annotated[list[_Text], Field(max_length=16, fail_fast=True), BeforeValidator(_list)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    # extensions that other servers have as well
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    guided_grammar: str | None = None
    # of no effect here
    user: Unread = None
    metadata: Unread = None
    store: Unread = None
    service_tier: Unread = None
    safety_identifier: Unread = None
    prompt_cache_key: Unread = None
    prompt_cache_retention: Unread = None
    parallel_tool_calls: Unread = None
    # of effect elsewhere
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    logit_bias: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.stream and (self.n or 1) > 1:
            raise ValueError("n above 1 cannot be streamed; send n requests")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


# which model holds the fields at a path, list positions left out
_AT = {
    (): ChatRequest,
    ("messages",): ChatMessage,
    ("messages", "content"): ContentPart,
    ("messages", "content", "image_url"): ImageUrl,
    ("stream_options",): StreamOptions,
    ("response_format",): ResponseFormat,
    ("response_format", "json_schema"): JsonSchema,
}


def parse(body: bytes) -> ChatRequest:
    """Return the request that a body holds.

    Raises:
      ApiError: 400 with the path of the first field that is wrong.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: pydantic.ValidationError) -> ApiError:
    problems = error.errors(include_url=False)
    first = problems[0]
    where, kind = first["loc"], first["type"]
    steps = (f"[{at}]" if isinstance(at, int) else f".{at[:80]}" for at in where)
    path = "".join(steps).lstrip(".")
    text = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if kind == "json_invalid":
        return invalid(f"the body is no JSON: {text.removeprefix('Invalid JSON: ')}")
    if kind == "extra_forbidden":
        fields = _AT[tuple(at for at in where[:-1] if isinstance(at, str))].model_fields
        names = sorted(field.alias or name for name, field in fields.items())
        near = difflib.get_close_matches(str(where[-1])[:80], names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        return invalid(f"unknown field {path}; {hint}{more}", path, "unknown_field")
    if kind == "missing":
        return invalid(f"{path} is missing{more}", path, "missing_field")
    given = "" if kind == "value_error" else f", not {reprlib.repr(first['input'])}"
    return invalid(f"{path or 'the body'}: {text}{given}{more}", path or None, "invalid_value")
