"""A router with an engine that needs no model: its tokens are a function of all tokens before them.

Run as a program it serves until killed, and prints its address.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from experts.errors import ContextOverflow, Overloaded, RouterLost
from router.engine.images import ImageInput
from router.engine.request import Event, FinishEvent, FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from router.grpc_server import RouterServer

CONTEXT = 10_000
VOCAB_SIZE = 200_000
PATIENCE_S = 60.0
"""How long a test waits for what must come; long, so that only a mistake makes it end."""

Key = tuple[str, int]
"""(request id, attempt)."""


def next_token(known_ids: list[int]) -> int:
    return zlib.crc32(b"".join(token.to_bytes(4, "little") for token in known_ids)) % VOCAB_SIZE


def scored(request_id: str, index: int, token: int, num_top: int | None = None) -> TokenEvent:
    """The event of a token, with log probabilities that are a function of it if they are asked for."""
    logprobs = None
    if num_top is not None:
        top = tuple(((token + i) % VOCAB_SIZE, -token / 7 - i) for i in range(num_top))
        logprobs = TokenLogprobs(logprob=-token / 7, top=top)
    return TokenEvent(request_id=request_id, index=index, token_id=token, logprobs=logprobs)


def answer(prompt_ids: list[int], count: int) -> list[int]:
    """The tokens that any number of routers must send for this prompt."""
    known = list(prompt_ids)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(prompt_ids) :]


@dataclass(kw_only=True)
class Submission:
    """A request as it reached the engine."""

    known_ids: list[int]
    num_prompt: int
    sampling: SamplingParams
    deadline: float
    on_event: Callable[[Event], None] = field(repr=False)
    images: Sequence[ImageInput] = ()
    priority: int = 0
    cache_salt: str = ""

    @property
    def num_output(self) -> int:
        return len(self.known_ids) - self.num_prompt


class ScriptedEngine:
    """Gives every request a token per turn; a request that has `hold_at` output tokens waits until `release`."""

    def __init__(self, *, hold_at: int | None = None, max_requests: int = 1000) -> None:
        self.submitted: dict[Key, Submission] = {}
        self.cancelled: list[Key] = []
        self._hold_at = hold_at
        self._max_requests = max_requests
        self._live: dict[Key, Submission] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(
        self,
        request_id: str,
        attempt: int,
        prompt_ids: list[int],
        emitted_ids: list[int],
        sampling: SamplingParams,
        deadline: float,
        on_event: Callable[[Event], None],
        images: Sequence[ImageInput] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        sampling.check(VOCAB_SIZE)
        if len(prompt_ids) > CONTEXT:
            raise ContextOverflow(len(prompt_ids), sampling.max_tokens, CONTEXT)
        with self._changed:
            if self._stopped:
                raise RouterLost("this router is stopping")
            if len(self._live) >= self._max_requests:
                raise Overloaded("the scripted queue is full", 7.0)
            submission = Submission(
                known_ids=[*prompt_ids, *emitted_ids],
                num_prompt=len(prompt_ids),
                sampling=sampling,
                deadline=deadline,
                on_event=on_event,
                images=images,
                priority=priority,
                cache_salt=cache_salt,
            )
            self.submitted[request_id, attempt] = self._live[request_id, attempt] = submission
            self._changed.notify_all()

    def cancel(self, request_id: str, attempt: int) -> None:
        with self._changed:
            if self._live.pop((request_id, attempt), None) is not None:
                self.cancelled.append((request_id, attempt))
            self._changed.notify_all()

    def release(self) -> None:
        """Let all held requests go on to their ends."""
        with self._changed:
            self._hold_at = None
            self._changed.notify_all()

    def stop(self) -> None:
        """Give up all requests, as an engine does that stops."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(PATIENCE_S)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until `condition`, on this engine's fields, holds."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), (self.submitted, self.cancelled)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or any(map(self._may_go_on, self._live.values())))
                if self._stopped:
                    self._give_up()
                    return
                for key, submission in list(self._live.items()):
                    if self._may_go_on(submission):
                        self._turn(key, submission)

    def _may_go_on(self, submission: Submission) -> bool:
        return self._hold_at is None or submission.num_output < self._hold_at

    def _turn(self, key: Key, submission: Submission) -> None:
        if submission.num_output < submission.sampling.max_tokens:
            token = next_token(submission.known_ids)
            submission.on_event(scored(key[0], submission.num_output, token, submission.sampling.num_logprobs))
            submission.known_ids.append(token)
        if submission.num_output >= submission.sampling.max_tokens:
            del self._live[key]
            submission.on_event(FinishEvent(request_id=key[0], reason=FinishReason.LENGTH))

    def _give_up(self) -> None:
        for key, submission in self._live.items():
            finish = FinishEvent(request_id=key[0], reason=FinishReason.ERROR, code="router_unavailable")
            submission.on_event(finish)
        self._live.clear()


def main() -> None:
    server = RouterServer(ScriptedEngine(hold_at=int(sys.argv[1])), beat_s=0.05)
    server.start()
    print(server.address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
