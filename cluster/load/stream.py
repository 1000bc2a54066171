"""One streamed answer as it arrives: bytes and instants in, the instants of its text and its token counts out. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

MAX_LINE_BYTES = 16 << 20
MAX_COUNT = 1 << 40
"""Of tokens. What a server says beyond is taken as nothing said: sums and rates would be worth nothing."""
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")


class RequestFailed(Exception):
    """A request has no full answer. `kind` is what such failures are counted under."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


@dataclass(kw_only=True, eq=False)
class AnswerStream:
    """Server-sent events of one answer. `times` are the instants of its pieces of text, each one or more tokens, and
    `texts` those pieces that are plain text.

    `prompt_tokens` and `output_tokens` are what the server's usage says, None without.
    """

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    done: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take in what arrived at `now`. Raises RequestFailed: "stream_error", "bad_event"."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise RequestFailed("bad_event", f"a line has more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:") and not self.done:
                self._take(line[5:].strip(), now)

    def end(self) -> None:
        """The connection ended well. Raises RequestFailed: "cut_off", "empty"."""
        if not self.done:
            raise RequestFailed("cut_off", f"the stream ended without [DONE], after {len(self.times)} chunks of text")
        if not self.times and not self.output_tokens:
            raise RequestFailed("empty", "the stream ended without any text")

    def _take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = _event(data)
        if event.get("error"):
            raise RequestFailed("stream_error", _message(event["error"]))
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.output_tokens = _count(usage.get("completion_tokens"), self.output_tokens)
        choices = event.get("choices")
        if isinstance(choices, list) and any(_has_text(choice) for choice in choices):
            self.times.append(now)
            self.texts += (text for choice in choices if isinstance(text := _text(choice), str))


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise RequestFailed("bad_event", f"not a JSON object: {data[:200].decode(errors='replace')}")
    return event


def _message(error: object) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _count(value: object, before: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT else before


def _text(choice: object) -> object:
    if not isinstance(choice, dict):
        return None
    delta = choice.get("delta")
    return choice.get("text") or (delta.get("content") if isinstance(delta, dict) else None)


def _has_text(choice: object) -> bool:
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    return bool(choice.get("text")) or (isinstance(delta, dict) and any(delta.get(name) for name in _TEXTS))
