"""The requests of the OpenAI API that we answer: their fields, types, limits and rules.

Knows nothing of HTTP, of the model's vocabulary or of its context. Types are strict: "5" is no number, true no integer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    PlainValidator,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from experts.errors import InvalidInput
from router.api.data_url import Upload
from router.api.errors import Missing, Unsupported
from router.api.fields import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    UNSUPPORTED_MESSAGE,
    UNSUPPORTED_PICTURE,
    UNSUPPORTED_STREAM_OPTIONS,
    Neutral,
    check_spelling,
    check_supported,
)
from router.api.logit_bias import Biases, parse_logit_bias
from router.engine.request import MAX_LOGPROBS, MAX_PENALTY, MAX_REPETITION_PENALTY, MAX_STOP_TOKEN_IDS

MAX_MESSAGES = 2048
MAX_PARTS = 128
MAX_PROMPTS = 128
MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_N = 16
MAX_CHOICES = 128
"""Of one request: its prompts times n."""
MAX_COUNT = 2**31 - 1

_Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
_Request = TypeVar("_Request", bound="RequestModel")


class RequestModel(BaseModel):
    """A JSON object of a request; null members count as absent, unknown ones are ignored."""

    # Unknown fields are dropped here; `fields` has looked at them before.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def _stop_list(value: object) -> object:
    if not isinstance(value, str | list):
        raise InvalidInput("", value, f"must be a string or a list of at most {MAX_STOPS} strings")
    return [value] if isinstance(value, str) else value


def _stop_string(value: str) -> str:
    if not 0 < len(value.encode("utf-8")) <= MAX_STOP_BYTES:
        raise InvalidInput("", value, f"must have 1 to {MAX_STOP_BYTES} bytes")
    return value


def _detail(value: object) -> object:
    if value == "low":
        raise Unsupported("", value)
    return value


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "~text"
    return "~parts" if isinstance(value, list) else None


def _prompts(value: object) -> list[tuple[str, str | list[int]]]:
    """The four forms of `prompt` made one: (path of the prompt, its text or token ids) for each choice."""
    if isinstance(value, str):
        return [("prompt", value)]
    if not isinstance(value, list) or not value:
        raise InvalidInput("", value, "must be a string, a list of strings, of token ids or of lists of token ids")
    if not isinstance(value[0], str | list):
        return [("prompt", checked_token_ids("", value))]
    if len(value) > MAX_PROMPTS:
        raise InvalidInput("", f"{len(value)} prompts", f"may have at most {MAX_PROMPTS} prompts")
    return [(f"prompt[{i}]", _prompt_of(f"[{i}]", item, type(value[0]))) for i, item in enumerate(value)]


def _prompt_of(path: str, value: object, kind: type) -> str | list[int]:
    if kind is str and isinstance(value, str):
        return value
    if kind is list and isinstance(value, list) and value:
        return checked_token_ids(path, value)
    raise InvalidInput(path, value, "must be a string" if kind is str else "must be a list of token ids, not empty")


def checked_token_ids(path: str, ids: list[Any]) -> list[int]:
    # By hand: the validator would collect one error per bad element of a list of any length.
    for i, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise InvalidInput(f"{path}[{i}]", token, "must be a token id, an integer from 0")
    return ids


class Member(RequestModel):
    """An object inside a request. Its fields are looked at as the request's own are."""

    unsupported: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        check_supported(value, cls.unsupported)
        check_spelling(value, {*cls.model_fields, *cls.unsupported})
        return _without_nulls(value)


class TextPart(RequestModel):
    """Text as one part of a message's content."""

    type: Literal["text"]
    text: str

    def for_template(self) -> dict[str, str]:
        return {"type": "text", "text": self.text}


class ImageUrl(Member):
    """Where the picture is: in the URL itself. `detail` "low" would ask for fewer tiles than the model expects."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    unsupported = UNSUPPORTED_PICTURE

    detail: Annotated[Literal["auto", "high"], BeforeValidator(_detail)] = "auto"
    url: Annotated[Upload, PlainValidator(Upload)]


class ImagePart(RequestModel):
    """A picture as one part of a message's content."""

    type: Literal["image_url"]
    image_url: ImageUrl

    def for_template(self) -> dict[str, str]:
        return {"type": "image"}


_PARTS = ("text", "image_url")
"""Kinds of parts. Each has its content in the field of its name."""
_PART_RULE = "must be 'text' or 'image_url'"
_OTHER_PARTS = (
    *("input_audio", "file", "video_url", "audio_url", "refusal", "input_image", "image", "input_text", "input_file"),
    *("image_embeds", "audio_embeds", "image_pil", "video", "audio"),
)
"""Kinds that other servers take."""


def _known_part(value: Any) -> Any:
    """Raises InvalidInput for a part of a kind that we do not take, with the content of two kinds, or with members that
    would be lost."""
    if not isinstance(value, dict) or "type" not in value:
        return value
    kind = value["type"]
    if kind in _OTHER_PARTS:
        raise Unsupported("type", kind, f"{_PART_RULE}; others are not supported by this server yet")
    if kind not in _PARTS:
        raise InvalidInput("type", kind, _PART_RULE)
    for other in _PARTS:
        if other != kind and value.get(other) is not None:
            raise InvalidInput(other, f"a part of type {kind}", f"must not stand in a part of type {kind}")
    check_supported(value, UNSUPPORTED_PICTURE)
    check_spelling(value, {"type", *_PARTS, *UNSUPPORTED_PICTURE})
    return _without_nulls(value)


def _part_kind(value: object) -> str:
    return "~image" if isinstance(value, dict) and value.get("type") == "image_url" else "~text"


_Part = Annotated[
    Annotated[TextPart, Tag("~text")] | Annotated[ImagePart, Tag("~image")],
    Discriminator(_part_kind),
    BeforeValidator(_known_part),
]
_Content = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[_Part], Field(min_length=1, max_length=MAX_PARTS), Tag("~parts")],
    Discriminator(
        _content_kind,
        custom_error_type="content",
        custom_error_message="must be a string or a list of text and image parts",
    ),
]


class Message(RequestModel):
    """One message of a conversation. "developer" is OpenAI's newer word for "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("role") in ("tool", "function", "ipython"):
            raise Unsupported("role", value["role"], "tool messages are not supported by this server yet")
        check_supported(value, UNSUPPORTED_MESSAGE)
        return _without_nulls(value)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": [part.for_template() for part in self.content]}


class StreamOptions(Member):
    """What a stream carries besides the answer."""

    unsupported = UNSUPPORTED_STREAM_OPTIONS

    include_usage: bool = False


class GenerationRequest(RequestModel):
    """What both kinds of request share: the model and how to choose tokens. None is "as the server decides"."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MAX_REPETITION_PENALTY)] | None = None
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: Annotated[Biases, PlainValidator(parse_logit_bias)] = ()
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    best_of: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[
        list[Annotated[str, AfterValidator(_stop_string)]], Field(max_length=MAX_STOPS), BeforeValidator(_stop_list)
    ] = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)] = []
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=128, pattern=r"^[\x20-\x7e]*$")] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]*$")] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def output_limit(self) -> int | None:
        """Output tokens asked for, by the older name or the newer, None if not said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likely tokens to report beside each chosen one; None if no log probabilities are asked for."""
        return None

    @model_validator(mode="after")
    def _one_limit(self) -> GenerationRequest:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidInput("max_tokens", old, f"must equal max_completion_tokens, {new}, when both are set")
        return self

    @model_validator(mode="after")
    def _agree(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options", self.stream_options.model_dump(), "needs stream to be true")
        if self.output_limit is not None and self.min_tokens > self.output_limit:
            raise InvalidInput("min_tokens", self.min_tokens, f"must be at most max_tokens, {self.output_limit}")
        if self.best_of is not None and self.best_of != self.n:
            rule = f"must equal n, {self.n}: choosing among more answers is not supported by this server yet"
            raise Unsupported("best_of", self.best_of, rule)
        return self


class Conversation(RequestModel):
    """What a chat template makes a prompt of."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def uploads(self) -> list[tuple[str, Upload]]:
        """The pictures of all messages in their order, each with its path in the request."""
        return [
            (f"messages[{i}].content[{j}].image_url.url", part.image_url.url)
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]


class ChatCompletionRequest(Conversation, GenerationRequest):
    """`POST /v1/chat/completions`."""

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _top_of_something(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs", self.top_logprobs, "needs logprobs to be true")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `n` choices for each of `prompts`: (path in the request, text or token ids)."""

    prompts: Annotated[list[tuple[str, str | list[int]]], PlainValidator(_prompts), Field(alias="prompt")]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _bounded(self) -> CompletionRequest:
        if self.n * len(self.prompts) > MAX_CHOICES:
            raise InvalidInput(
                "n", self.n, f"may ask for at most {MAX_CHOICES} choices, here of {len(self.prompts)} prompts"
            )
        if self.echo and self.logprobs is not None:
            rule = "with echo, log probabilities of the prompt, is not supported by this server yet"
            raise Unsupported("logprobs", self.logprobs, rule)
        return self


def parse_chat(document: Mapping[str, Any]) -> ChatCompletionRequest:
    """A chat request from its JSON object. Raises InvalidInput for the first thing that is wrong."""
    return parse_request(ChatCompletionRequest, document, UNSUPPORTED_CHAT)


def parse_completion(document: Mapping[str, Any]) -> CompletionRequest:
    """A completion request from its JSON object. Raises InvalidInput for the first thing that is wrong."""
    return parse_request(CompletionRequest, document, UNSUPPORTED_COMPLETION)


def parse_request(kind: type[_Request], document: Mapping[str, Any], unsupported: Neutral) -> _Request:
    """A request of `kind` from its JSON object. Raises InvalidInput for the first thing that is wrong."""
    ours = {field.alias or name for name, field in kind.model_fields.items()}
    check_spelling(document, ours | unsupported.keys())
    check_supported(document, unsupported)
    try:
        return kind.model_validate(_without_nulls(document))
    except ValidationError as error:
        raise _first_error(error) from None


def _without_nulls(document: Mapping[str, Any]) -> dict[str, Any]:
    """Null and absent mean the same everywhere in this API; clients send either."""
    return {name: value for name, value in document.items() if value is not None}


def _first_error(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False)[0]
    path = _path(first["loc"])
    ours = first.get("ctx", {}).get("error")
    if isinstance(ours, InvalidInput):
        kind = Unsupported if isinstance(ours, Unsupported) else InvalidInput
        return kind(_join(path, ours.field), ours.value, ours.rule)
    if first["type"] == "missing":
        return Missing(path)
    return InvalidInput(path, first["input"], _rule(first))


def _path(loc: tuple[int | str, ...]) -> str:
    """messages[0].content, as OpenAI writes it. Names with a tilde are branches of a union, not of the request."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("~"):
            path = _join(path, step)
    return path


def _join(path: str, name: str) -> str:
    return path + name if not path or not name or name.startswith("[") else f"{path}.{name}"


_RULES = {
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    "literal_error": "must be one of {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must be visible ASCII",
}


def _rule(error: ErrorDetails) -> str:
    if error["type"] == "content":
        return error["msg"]
    # Other texts of the validator may name classes, so only its numbers are used.
    return _RULES.get(error["type"], "is not valid").format(**error.get("ctx", {}))
