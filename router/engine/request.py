"""A request as the engine knows it: what was asked, what is known, what is computed. No torch, no clock.

Tokens known = prompt + emitted before + generated here; tokens computed = those whose keys and values are in the
cache. Each step lets computed catch up with known; when they meet, one token is sampled and known grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from experts.placement import ExpertKey
from router.engine.images import PlacedImage


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch their filters off.

    `seed` is always set (the ingress draws missing ones): randomness is a function of (seed, position).
    `max_tokens` and `min_tokens` count output tokens of the whole request, over all attempts.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


class FinishReason(StrEnum):
    """Why a request ended. STOP: an end token; LENGTH: max_tokens or context; CANCELLED: the client left;
    ERROR: see the event's error."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One output token. `index` counts output tokens of the whole request from 0, over all attempts."""

    request_id: str
    index: int
    token_id: int


@dataclass(frozen=True, kw_only=True)
class FinishEvent:
    """The one terminal event of a request. `code` and `message` are set when `reason` is ERROR."""

    request_id: str
    reason: FinishReason
    code: str = ""
    message: str = ""
    retry_after_s: float = 0.0


Event = TokenEvent | FinishEvent


class Phase(StrEnum):
    """Where a request stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    DONE = "done"


@dataclass(kw_only=True, eq=False)
class Request:
    """State of one request on one router. `deadline` is a `time.monotonic()` instant.

    `token_ids` are the known tokens: `num_prompt` prompt tokens, then `num_emitted` tokens sent by earlier attempts,
    then tokens generated here.
    """

    request_id: str
    token_ids: list[int]
    num_prompt: int
    sampling: SamplingParams
    deadline: float
    arrival: float
    attempt: int = 0
    priority: int = 0
    """Lower goes first; equal ones go in order of arrival."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    num_computed: int = 0
    phase: Phase = Phase.WAITING
    global_blocks: list[int] = field(default_factory=list)
    local_blocks: list[int] = field(default_factory=list)
    images: tuple[PlacedImage, ...] = ()
    """Images of the prompt, in order."""
    missing: frozenset[ExpertKey] = frozenset()
    """Experts that were away when this request was parked."""

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def image_bytes(self) -> int:
        return sum(len(placed.image.pixels) for placed in self.images)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt
