"""A backend that plays a script, and a tokenizer and template simple enough to predict: one byte, one token."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.engine.images import ImageInput
from router.engine.request import Event, FinishEvent, FinishReason, SamplingParams, TokenEvent, TokenLogprobs

BOS = 256
EOS = 257
VOCAB_SIZE = 258

Step = int | str | bytes | asyncio.Event | Exception | FinishEvent
"""A token; the tokens of a text; wait; fail; finish."""


def stop() -> FinishEvent:
    return FinishEvent(request_id="", reason=FinishReason.STOP)


def length() -> FinishEvent:
    return FinishEvent(request_id="", reason=FinishReason.LENGTH)


def failure(code: str, message: str = "words of a router", retry_after_s: float = 0.0) -> FinishEvent:
    return FinishEvent(
        request_id="", reason=FinishReason.ERROR, code=code, message=message, retry_after_s=retry_after_s
    )


@dataclass(eq=False)
class Submission:
    """What was asked of the backend, and what came of it."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    deadline: float
    images: Sequence[ImageInput] = ()
    priority: int = 0
    cache_salt: str = ""
    num_sent: int = 0
    closed: bool = False

    @property
    def prompt(self) -> str:
        return bytes(token for token in self.prompt_ids if token < 256).decode()


class ScriptedBackend:
    """Plays `script(submission)` for each request. `events` streams are async generators, as RouterPool's are."""

    def __init__(self, script: Callable[[Submission], Sequence[Step]], max_model_len: int = 100_000) -> None:
        self.script = script
        self.submissions: list[Submission] = []
        self.is_ready = True
        self.length = max_model_len

    async def submit(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        deadline: float,
        images: Sequence[ImageInput] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[Event, None]:
        mine = Submission(request_id, prompt_ids, sampling, deadline, images, priority, cache_salt)
        self.submissions.append(mine)
        try:
            for step in self.script(mine):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step, FinishEvent):
                    yield step
                else:
                    for token in _tokens(step):
                        mine.num_sent += 1
                        logprobs = scores(token, sampling.num_logprobs)
                        yield TokenEvent(
                            request_id=request_id, index=mine.num_sent - 1, token_id=token, logprobs=logprobs
                        )
        finally:
            mine.closed = True

    def ready(self) -> bool:
        return self.is_ready

    def max_model_len(self) -> int:
        return self.length


def scores(token: int, num_top: int | None) -> TokenLogprobs | None:
    """Log probabilities as any number of routers would find them: the token first, its successors after it."""
    if num_top is None:
        return None
    top = tuple(((token + i) % VOCAB_SIZE, -(token + 1) / 64 - i) for i in range(num_top))
    return TokenLogprobs(logprob=-(token + 1) / 64, top=top)


def _tokens(step: int | str | bytes) -> Sequence[int]:
    if isinstance(step, int):
        return [step]
    return step.encode() if isinstance(step, str) else step


class ByteDetokenizer:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(bytes([token_id]) if token_id < 256 else b"")

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteTokenizer:
    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return [BOS, *text.encode()]

    def encode_pieces(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        names = {BOS: b"<bos>", EOS: b"<eos>"}
        return b"".join(names.get(token) or bytes([token]) for token in token_ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return {BOS: "<bos>", EOS: "<eos>"}.get(token_id) or chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def detokenizer(self) -> ByteDetokenizer:
        return ByteDetokenizer()


class PlainTemplate:
    """`role:text|` for each message, an image's ids in its place; remembers what it was given."""

    def __init__(self) -> None:
        self.kwargs: Mapping[str, Any] = {}
        self.messages: Sequence[Mapping[str, Any]] = []

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
        images: Sequence[Sequence[int]] = (),
    ) -> list[int]:
        self.kwargs, self.messages = kwargs or {}, messages
        ids, left = [BOS], iter(images)
        for message in messages:
            ids += f"{message['role']}:".encode()
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                ids += next(left) if part["type"] == "image" else part["text"].encode()
            ids += b"|"
        assert next(left, None) is None
        return [*ids, *(b"assistant:" if add_generation_prompt else b"")]
