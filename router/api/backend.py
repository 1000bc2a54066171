"""What the HTTP layer needs from the rest: a backend that generates tokens, and text to token ids and back.

Knows nothing of HTTP, of how tokens travel or of who computes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from router.engine.images import ImageInput
from router.engine.request import Event, SamplingParams


class EventStream(Protocol):
    """The events of one request, for one reader. An async generator is one.

    Any number of `TokenEvent` with indices 0, 1, 2, ... then exactly one `FinishEvent`, then the end. `aclose`
    cancels the request everywhere within a step; after the end it does nothing. Whoever opened the stream closes it.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None: ...


class Backend(Protocol):
    """Generates tokens. The ingress sees all routers as one of these."""

    def submit(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        deadline: float,
        images: Sequence[ImageInput] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> EventStream:
        """Start one request under a `request_id` never used before. `deadline` is a `time.monotonic()` instant.

        `images` belong to the patch tokens of the prompt, in order. A lower `priority` goes first; cached prefixes are
        shared between requests of the same `cache_salt`. Tokens carry log probabilities if `sampling` asks for them.

        Raises Overloaded, InvalidInput or RouterLost before the first event, here or at the first `__anext__`.
        By the deadline the stream has ended, with a `FinishEvent` of reason ERROR if there was no answer.
        """
        ...

    def ready(self) -> bool:
        """Whether at least one router is ready and every expert has a replica."""
        ...

    def max_model_len(self) -> int:
        """Tokens that prompt and answer may have together; 0 while no router has said so."""
        ...


class Detokenizer(Protocol):
    """The text of one answer, made as its tokens come. Special tokens have no text."""

    def push(self, token_id: int) -> str:
        """Text that this token completes: whole characters only, so it may be empty."""
        ...

    def finish(self) -> str:
        """Text still held back; nothing is pushed after it."""
        ...


class Tokenizer(Protocol):
    """Raw text to token ids and back. Called from several threads at once."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 ... vocab_size - 1."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt, the begin-of-text token included."""
        ...

    def encode_pieces(self, text: str) -> list[int]:
        """Ids of `text` alone."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens by their names."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token as the vocabulary writes it."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to an answer; empty for special tokens and ids without a token."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one answer."""
        ...


class ChatTemplate(Protocol):
    """A conversation to token ids. Called from several threads at once."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
        images: Sequence[Sequence[int]] = (),
    ) -> list[int]:
        """Ids of the whole conversation. A message is {"role", "content"}, its content a string or parts.

        A part is {"type": "text", "text"} or {"type": "image"}; `images` are the ids of each of the latter.
        Raises InvalidInput for what the template refuses.
        """
        ...
