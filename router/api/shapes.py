"""The JSON of OpenAI's responses, whole and in chunks, and its framing as server-sent events. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from router.api.logprobs import ScoredToken, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

# Line ends to readers that split by Unicode's rules; JSON may hold them unescaped.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One finished answer; `tokens` are there if their log probabilities were asked for."""

    text: str
    finish: str
    tokens: Sequence[ScoredToken] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a whole request, over all its choices."""

    num_prompt_tokens: int
    num_output_tokens: int

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
        }


class Shape(Protocol):
    """One kind of response: the whole body, or the chunks that stream it."""

    @property
    def usage_asked(self) -> bool:
        """Whether a stream ends with the usage."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]: ...

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks sent before any text."""
        ...

    def text(self, index: int, text: str, tokens: Sequence[ScoredToken] = ()) -> dict[str, Any]: ...

    def finish(self, index: int, finish: str) -> dict[str, Any]: ...

    def usage(self, usage: Usage) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What all chunks of one response share. With `usage_asked`, chunks say that usage comes later. A whole response
    has log probabilities, be they of no token, exactly when they were asked for; a chunk when it has tokens."""

    answer_id: str
    created: int
    model: str
    usage_asked: bool = False
    logprobs_asked: bool = False

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices}

    def _chunk(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body(kind, choices)
        return {**body, "usage": None} if self.usage_asked else body


class ChatShape(_Frame):
    """`chat.completion` and its chunks."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        bodies = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.tokens) if self.logprobs_asked else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._body("chat.completion", bodies), "usage": usage.body()}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""}, None) for index in range(num_choices)]

    def text(self, index: int, text: str, tokens: Sequence[ScoredToken] = ()) -> dict[str, Any]:
        return self._delta(index, {"content": text}, None, chat_logprobs(tokens) if tokens else None)

    def finish(self, index: int, finish: str) -> dict[str, Any]:
        return self._delta(index, {}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._body("chat.completion.chunk", []), "usage": usage.body()}

    def _delta(
        self, index: int, delta: dict[str, str], finish: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._chunk("chat.completion.chunk", [choice])


class CompletionShape(_Frame):
    """`text_completion`, the same object whole and in chunks."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        bodies = [
            self._choice(
                index,
                choice.text,
                choice.finish,
                completion_logprobs(choice.tokens) if self.logprobs_asked else None,
            )
            for index, choice in enumerate(choices)
        ]
        return {**self._body("text_completion", bodies), "usage": usage.body()}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        return []

    def text(self, index: int, text: str, tokens: Sequence[ScoredToken] = ()) -> dict[str, Any]:
        logprobs = completion_logprobs(tokens) if tokens else None
        return self._chunk("text_completion", [self._choice(index, text, None, logprobs)])

    def finish(self, index: int, finish: str) -> dict[str, Any]:
        return self._chunk("text_completion", [self._choice(index, "", finish)])

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._body("text_completion", []), "usage": usage.body()}

    def _choice(
        self, index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def encode(body: object) -> bytes:
    """JSON in UTF-8, on one line by anybody's rules."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS).encode("utf-8")


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"
