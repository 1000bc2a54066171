"""Field names of the OpenAI API and its dialects: which are ours, which change nothing, which must be refused.

A field that would change the answer is never ignored in silence, and neither is a misspelt one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from experts.errors import InvalidInput
from router.api.errors import Unsupported

MAX_UNKNOWN_FIELDS = 32

Neutral = Mapping[str, tuple[object, ...]]
"""Field → values, besides null, that ask for nothing."""

_PICTURES: dict[str, tuple[object, ...]] = {
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "multi_modal_data": ({},),
    "images": ([],),
}
"""Other ways to cut pictures, and other places for them than a message's content."""

_COMMON: dict[str, tuple[object, ...]] = {
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "structural_tag": (),
    "grammar": ("",),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "stream_interval": (1,),
    **_PICTURES,
}

UNSUPPORTED_CHAT: Neutral = MappingProxyType(
    _COMMON
    | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"], []),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "moderation": (),
        "chat_template": (),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "prompt": (),
        "suffix": ("",),
        "prompt_embeds": (),
        # The template writes them.
        "add_special_tokens": (False,),
    }
)

UNSUPPORTED_COMPLETION: Neutral = MappingProxyType(
    _COMMON
    | {
        "suffix": ("",),
        "prompt_embeds": (),
        "add_special_tokens": (True,),
        "messages": ([],),
        "top_logprobs": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "chat_template": (),
        "chat_template_kwargs": ({},),
    }
)

UNSUPPORTED_TOKENIZE_TEXT: Neutral = MappingProxyType({"truncate_prompt_tokens": (), **_PICTURES})

UNSUPPORTED_TOKENIZE_CHAT: Neutral = MappingProxyType(
    {
        "tools": ([],),
        "documents": ([],),
        "chat_template": (),
        "continue_final_message": (False,),
        # The template writes them.
        "add_special_tokens": (False,),
        "truncate_prompt_tokens": (),
        **_PICTURES,
    }
)

UNSUPPORTED_MESSAGE: Neutral = MappingProxyType(
    {"tool_calls": ([],), "function_call": (), "audio": (), "refusal": (), "images": ([],)}
)
# Words of other servers for how a picture is cut, beside its URL or within.
UNSUPPORTED_PICTURE: Neutral = MappingProxyType(
    {"max_pixels": (), "min_pixels": (), "max_dynamic_patch": (), "min_dynamic_patch": (), "max_patches": ()}
    | {"resized_height": (), "resized_width": (), "mm_processor_kwargs": ({},), "media_io_kwargs": ({},)}
)
UNSUPPORTED_STREAM_OPTIONS: Neutral = MappingProxyType({"continuous_usage_stats": (False,)})

PASSIVE = frozenset(
    {"annotations", "include_obfuscation", "metadata", "models", "name", "parallel_tool_calls"}
    | {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "request_id"}
    | {"safety_identifier", "service_tier", "session_id", "store"}
)
"""Accepted without effect: none of them changes the text of an answer."""


def check_supported(document: Mapping[str, Any], unsupported: Neutral, where: str = "") -> None:
    """Refuse fields of one object that ask for what we cannot do; `where` is its path with a final dot, or empty."""
    for name, value in document.items():
        # Fields that constrain the output, in the spelling of older vLLM: new ones may appear at any time.
        neutral = () if name.startswith("guided_") else unsupported.get(name)
        if neutral is not None and value is not None and not _is_one_of(value, neutral):
            raise Unsupported(where + name, value)


def check_spelling(document: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
    """Refuse unknown fields that look like a slip of the pen; other unknown fields pass."""
    known = PASSIVE.union(known)
    unknown = [name for name in document if name not in known]
    if len(unknown) > MAX_UNKNOWN_FIELDS:
        raise InvalidInput(where + "*", len(unknown), f"may have at most {MAX_UNKNOWN_FIELDS} unknown fields")
    for name in unknown:
        meant = near_miss(name, known)
        if meant is not None:
            raise InvalidInput(where + name, document[name], f"is not a field; did you mean {meant}?")


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    # Python says True == 1; JSON does not.
    return any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral)


def near_miss(name: str, known: Iterable[str]) -> str | None:
    """The known field that `name` most likely misspells: other case or separators, or one or two slips."""
    if len(name) > 64:
        return None
    plain = _plain(name)
    for candidate in sorted(known):
        if plain == _plain(candidate):
            return candidate
        # Short names (top_k, top_p, top_a) are one letter apart on purpose.
        allowed = 0 if len(candidate) < 6 else 1 if len(candidate) < 9 else 2
        if abs(len(name) - len(candidate)) <= allowed and _slips(name, candidate) <= allowed:
            return candidate
    return None


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _slips(a: str, b: str) -> int:
    """Edit distance where swapping two neighbours counts once."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        older, before, row = before, row, [i]
        for j in range(1, len(b) + 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                best = min(best, older[j - 2] + 1)
            row.append(best)
    return row[-1]
