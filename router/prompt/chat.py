"""Chat messages to token ids through the checkpoint's own template. Knows nothing of HTTP, pixels or the engine.

Only the template writes special tokens; in all that users send, their names are plain text. Where it writes the
placeholder of an image, the caller's ids for that image go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from experts.errors import CheckpointError, InvalidInput
from router.prompt.images.tokens import PLACEHOLDER
from router.prompt.jinja_sandbox import CompiledTemplate
from router.prompt.literals import Literals, SpecialTexts
from router.prompt.template_files import TEMPLATE_FILE, find_template
from router.prompt.tokenizer import Tokenizer

MAX_KWARGS_DEPTH = 5
MAX_KWARGS_NODES = 128
MAX_KWARGS_BYTES = 16 * 1024
MAX_MESSAGES_DEPTH = 32
MAX_MESSAGES_NODES = 250_000

_OWN_NAMES = frozenset(
    ("messages", "add_generation_prompt", "tools", "documents", "chat_template", "tokenize", "self", "loop", "caller")
)

LLAMA4_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- raise_exception('tool calls need a chat template of the checkpoint') }}
    {%- endif %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim if loop.first and role == 'system' else message.content }}
    {%- else %}
        {%- for part in message.content or [] %}
            {%- if part.type == 'image' %}
                {{- '<|image|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception('content parts must be of type text or image') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""
"""Llama 4's message format for text and images, for checkpoints that bring no template."""


class ChatTemplate:
    """A checkpoint's chat template bound to its tokenizer. Immutable; share it between requests."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, where: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        """`where` names the template's file in errors; `now` is the clock that templates may ask for the date.

        Raises CheckpointError when the template cannot be compiled.
        """
        try:
            self._template = CompiledTemplate(source, now=now)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(where, f"line {error.lineno}: {error.message}") from error
        # What Jinja parses may still be nothing that Python compiles, or too deep or too large for either.
        except Exception as error:
            raise CheckpointError(where, f"cannot be compiled ({type(error).__name__}: {str(error)[:200]})") from error
        self._source = source
        self._tokenizer = tokenizer
        self._specials = SpecialTexts(tokenizer.special_ids)
        self._reserved = _OWN_NAMES | self._template.reserved | tokenizer.named_specials.keys()

    @classmethod
    def from_folder(cls, model_dir: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """The folder's own template (see `find_template`), else Llama 4's.

        Raises CheckpointError when it is damaged, or absent and the tokenizer lacks Llama 4's tokens.
        """
        found = find_template(model_dir)
        if found is not None:
            return cls(found.source, tokenizer, where=found.where)
        missing = {"<|header_start|>", "<|header_end|>", "<|eot|>"} - tokenizer.special_ids.keys()
        if missing:
            raise CheckpointError(TEMPLATE_FILE, f"is absent, and the tokenizer lacks {', '.join(sorted(missing))}")
        return cls(LLAMA4_TEMPLATE, tokenizer, where="built-in chat template")

    @property
    def is_built_in(self) -> bool:
        """Whether it is Llama 4's because the checkpoint brought none."""
        return self._source is LLAMA4_TEMPLATE

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
        images: Sequence[Sequence[int]] = (),
    ) -> list[int]:
        """Token ids of the conversation, BOS included if the template writes it.

        `messages` hold JSON values; members that are None count as absent. An image in them is a content part
        {"type": "image"}; the template writes a placeholder for it, and `images` are the ids that take the places
        of the placeholders, in order. `kwargs` are more variables for the template. Raises InvalidInput:
        "chat_template_kwargs" for names and sizes that are not allowed and where the template could render without
        them, "messages" for anything else that it refuses or cannot render, and when it writes more or fewer
        placeholders than there are images.
        """
        extra = self._checked_kwargs(kwargs or {})
        conversation = _checked_messages(messages)
        literals = Literals(self._specials, (conversation, extra), self._source)
        # The order matters: a checkpoint's BOS is no user's business, so kwargs come first and never win.
        variables = {
            **literals.protect(extra),
            **self._tokenizer.named_specials,
            "messages": literals.protect(conversation),
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            text = self._template.render(variables)
        # An expression of the template may raise anything; all of it is about what this request brought.
        except Exception as error:
            without = {name: value for name, value in variables.items() if name not in extra}
            if extra and self._can_render(without):
                raise InvalidInput("chat_template_kwargs", extra, _refusal(error, literals)) from error
            roles = [message.get("role") for message in conversation]
            raise InvalidInput("messages", roles, _refusal(error, literals)) from error
        return self._encode(text, literals, images)

    def _can_render(self, variables: Mapping[str, Any]) -> bool:
        try:
            self._template.render(variables)
        except Exception:
            return False
        return True

    def _encode(self, text: str, literals: Literals, images: Sequence[Sequence[int]]) -> list[int]:
        ids: list[int] = []
        num_placed = 0
        for before, special in self._specials.split(text):
            if before:
                ids += self._encode_plain(literals.restore(before))
            if special != PLACEHOLDER:
                ids += [self._tokenizer.special_ids[special]] if special else []
                continue
            ids += images[num_placed] if num_placed < len(images) else ()
            num_placed += 1
        if num_placed != len(images):
            rule = f"the chat template has places for {num_placed} images in them"
            raise InvalidInput("messages", f"{len(images)} images", rule)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode_pieces(text)
        except InvalidInput as error:
            raise InvalidInput("messages", error.value, error.rule) from error

    def _checked_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        field = "chat_template_kwargs"
        for name in kwargs:
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
                raise InvalidInput(field, name, "names must be identifiers that do not begin with an underscore")
            if name in self._reserved:
                raise InvalidInput(field, name, "must not replace a name of the template's own")
        plain: dict[str, Any] = _plain_json(dict(kwargs), field, MAX_KWARGS_DEPTH, MAX_KWARGS_NODES)
        try:
            size_bytes = len(json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise InvalidInput(field, "…", "numbers must have fewer digits") from error
        if size_bytes > MAX_KWARGS_BYTES:
            raise InvalidInput(field, size_bytes, f"must be at most {MAX_KWARGS_BYTES} bytes of JSON")
        return plain


def _refusal(error: Exception, literals: Literals) -> str:
    if isinstance(error, jinja2.TemplateError):
        return f"the chat template refuses them: {literals.restore(error.message or 'no reason given')[:300]}"
    return "the chat template cannot render them"


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    plain = _plain_json(list(messages), "messages", MAX_MESSAGES_DEPTH, MAX_MESSAGES_NODES)
    if not plain:
        raise InvalidInput("messages", plain, "must hold at least one message")
    for message in plain:
        if not isinstance(message, dict):
            raise InvalidInput("messages", message, "must each be an object")
    return [{name: item for name, item in message.items() if item is not None} for message in plain]


def _plain_json(value: Any, field: str, max_depth: int, max_nodes: int) -> Any:
    """A copy of `value` out of plain dict, list, str, int, float, bool and None, within bounds."""
    num_nodes = 0

    def copy(item: Any, depth: int) -> Any:
        nonlocal num_nodes
        num_nodes += 1
        if num_nodes > max_nodes:
            raise InvalidInput(field, num_nodes, f"must hold at most {max_nodes} values")
        if isinstance(item, str):
            # An enum's member would bring its class into the sandbox.
            return str.__str__(item)
        if item is None or isinstance(item, bool | int | float):
            return item
        if not isinstance(item, Mapping | list | tuple):
            raise InvalidInput(field, type(item).__name__, "must hold JSON values only")
        if depth == max_depth:
            raise InvalidInput(field, depth + 1, f"must nest at most {max_depth} deep")
        if isinstance(item, Mapping):
            return {str(key): copy(member, depth + 1) for key, member in item.items()}
        return [copy(member, depth + 1) for member in item]

    return copy(value, 0)
