"""The ingress's side of the internal stream: streams of tokens that outlive their routers.

Owns the links and the clock; every decision about a request is made by `router.resume`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass

from experts.errors import InvalidInput
from experts.placement import RouterInfo
from experts.tls import Identity
from router.affinity import affinity_key
from router.engine.images import ImageInput, ImageRules
from router.engine.request import Event, SamplingParams
from router.grpc_link import Call, Link
from router.resume import (
    Begun,
    Broken,
    Candidate,
    End,
    Fail,
    Next,
    Open,
    Refused,
    ResumeEvent,
    ResumePolicy,
    Resumption,
    Stopped,
    Wait,
    Woke,
    step,
)
from router.wire.codec import MAX_MESSAGE_BYTES, encode_submit

SILENCE_S = 0.5


class RouterPool:
    """Streams of tokens from whichever routers the cluster view names.

    A router is out of favour from the moment a call on it breaks, or it says nothing for `silence_s` (routers beat
    several times in that time), until it beats again. A router's own verdict at the deadline (which expert was missing,
    say) is waited for `expiry_grace_s`. `image_rules` tell which images a prompt begins with, so that requests that
    begin alike go to the same router.

    The pool belongs to the event loop that first calls `submit`; `connect` and `running` may be called from any
    thread, and before that.
    """

    def __init__(
        self,
        *,
        policy: ResumePolicy | None = None,
        image_rules: ImageRules | None = None,
        silence_s: float = SILENCE_S,
        probe_interval_s: float = 0.25,
        expiry_grace_s: float = 1.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        tls: Identity | None = None,
    ) -> None:
        self._policy = policy or ResumePolicy()
        self._image_rules = image_rules
        self._silence_s = silence_s
        self._probe_interval_s = probe_interval_s
        self._expiry_grace_s = expiry_grace_s
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._lock = threading.Lock()
        self._view: Mapping[str, RouterInfo] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: dict[str, Link] = {}
        self._changed = asyncio.Event()
        self._closed = False
        self._draining = False

    def connect(self, routers: Mapping[str, RouterInfo], *, draining: bool = False) -> None:
        """Make `routers` the routers to choose from; those in another state than "ready" get no new requests.

        One whose address changed gets a new link. A link that is no longer named closes when its requests are over.
        `draining`: no other routers will come, so that a request which finds none of these left ends.
        """
        with self._lock:
            self._view = dict(routers)
            self._draining = draining
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._apply_view)

    def running(self) -> dict[str, int]:
        """How many requests of this ingress each router of the view has now."""
        return {link.name: link.in_flight for link in list(self._links.values())}

    async def submit(
        self,
        *,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        deadline: float,
        images: Sequence[ImageInput] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[Event, None]:
        """Tokens 0, 1, 2, ... of the request and one FinishEvent, whatever happens to routers meanwhile.

        `images` belong to the patch tokens of the prompt; every router that gets the request gets them. A lower
        `priority` goes first; cached prefixes are shared between requests of the same `cache_salt`, and prompts that
        begin alike under one prefer one router. `deadline` is a `time.monotonic()` instant. Raises Overloaded (every
        router is full), InvalidInput or ContextOverflow, all of them before the first event only. Closing the iterator
        (`aclose`, or cancelling the task that reads it) ends the decoding at once. FinishEvents made here have the code
        "router_unavailable", "deadline_exceeded" or "invalid_input".
        """
        self._attach()
        state = Resumption(
            request_id=request_id,
            sampling=sampling,
            deadline=deadline,
            affinity=affinity_key(prompt_ids, images, self._image_rules, cache_salt),
            policy=self._policy,
        )
        asked = _Asked(prompt_ids=prompt_ids, images=images, priority=priority, cache_salt=cache_salt)
        attempts = _Attempts(self, state, asked)
        event: ResumeEvent = Begun()
        try:
            while True:
                # Taken before the decision, so that no change is missed while the client takes its tokens.
                changed = self._changed
                if self._closed:
                    event = Stopped()
                decision = step(state, event, self._candidates(), time.monotonic())
                for token in decision.tokens:
                    yield token
                if isinstance(decision.then, End):
                    attempts.drop()
                    yield decision.then.finish
                    return
                if isinstance(decision.then, Wait) and self._is_over():
                    event = Stopped()
                    continue
                event = await attempts.carry_out(decision.then, changed)
        finally:
            attempts.drop()

    async def aclose(self) -> None:
        """Close all links. Requests in progress end with "router_unavailable"."""
        self._closed = True
        links = list(self._links.values())
        self._links.clear()
        for link in links:
            await link.aclose()
        self._notify()

    def open(self, then: Open, state: Resumption, asked: _Asked) -> Call | ResumeEvent:
        """Begin the call that `then` asks for, or say why that is not possible."""
        link = self._links.get(then.router)
        if link is None:
            return Broken(problem=f"router {then.router} left")
        left_s = max(state.deadline - time.monotonic(), 0.0)
        message = encode_submit(
            request_id=state.request_id,
            attempt=then.attempt,
            prompt_ids=asked.prompt_ids,
            emitted_ids=then.emitted_ids,
            sampling=state.sampling,
            timeout_s=left_s,
            images=asked.images,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
        )
        if message.ByteSize() > self._max_message_bytes:
            rule = f"the prompt and its images must fit into a message of {self._max_message_bytes} bytes"
            return Refused(error=InvalidInput("messages", len(asked.prompt_ids), rule))
        return link.open(message, left_s + self._expiry_grace_s)

    async def read(self, call: Call) -> ResumeEvent:
        """The next event of `call`."""
        return await call.read()

    def _is_over(self) -> bool:
        """Whether waiting for a router is in vain."""
        return self._closed or (self._draining and not self._links)

    def _candidates(self) -> list[Candidate]:
        return [
            Candidate(name=link.name, in_flight=link.in_flight)
            for link in self._links.values()
            if link.ready and link.well
        ]

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._loop in (None, loop), "a pool belongs to one event loop"
        if self._loop is None:
            with self._lock:
                self._loop = loop
            self._apply_view()

    def _apply_view(self) -> None:
        if self._closed:
            return
        with self._lock:
            view = self._view
        for name, link in list(self._links.items()):
            if name not in view or view[name].address != link.address:
                self._links.pop(name).retire()
        for name, router in view.items():
            link = self._links.get(name) or self._links.setdefault(name, self._new_link(router))
            link.ready = router.state == "ready"
        self._notify()

    def _new_link(self, router: RouterInfo) -> Link:
        return Link(
            name=router.name,
            address=router.address,
            silence_s=self._silence_s,
            probe_interval_s=self._probe_interval_s,
            max_message_bytes=self._max_message_bytes,
            on_change=self._notify,
            tls=self._tls,
        )

    def _notify(self) -> None:
        """Wake all requests that wait for a router."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What every router that gets the request is told of it."""

    prompt_ids: Sequence[int]
    images: Sequence[ImageInput]
    priority: int
    cache_salt: str


class _Attempts:
    """Carries out what `step` decided for one request; holds at most one call."""

    def __init__(self, pool: RouterPool, state: Resumption, asked: _Asked) -> None:
        self._pool = pool
        self._state = state
        self._asked = asked
        self._call: Call | None = None

    async def carry_out(self, then: Next, changed: asyncio.Event) -> ResumeEvent:
        """Do it, and return what comes of it. `changed` is set when the routers change."""
        if isinstance(then, Open | Wait | Fail):
            self.drop()
        if isinstance(then, Fail):
            raise then.error
        if isinstance(then, Wait):
            return await _wait(changed, then.until)
        if isinstance(then, Open):
            call = self._pool.open(then, self._state, self._asked)
            if not isinstance(call, Call):
                return call
            self._call = call
        assert self._call is not None, "nothing to read"
        return await self._pool.read(self._call)

    def drop(self) -> None:
        """Close the call, if any."""
        if self._call is not None:
            self._call.close()
            self._call = None


async def _wait(changed: asyncio.Event, until: float) -> Woke:
    try:
        async with asyncio.timeout(until - time.monotonic()):
            await changed.wait()
    except TimeoutError:
        pass
    return Woke()
