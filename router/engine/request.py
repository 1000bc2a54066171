"""A request as the engine knows it: what was asked, what is known, what is computed. No torch, no clock.

Tokens known = prompt + emitted before + generated here; tokens computed = those whose keys and values are in the
cache. Each step lets computed catch up with known; when they meet, one token is sampled and known grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from experts.errors import InvalidInput
from experts.placement import ExpertKey
from router.engine.images import PlacedImage

MAX_REPETITION_PENALTY = 2.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 1024
GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: between two neighbouring logits nothing of the distribution would be left."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch their filters off.

    `repetition_penalty` 1, and 0 for the other penalties, change nothing; `logit_bias` holds (token id, what is added
    to its logit). `seed` is always set (the ingress draws missing ones): randomness is a function of (seed, position).
    `max_tokens` and `min_tokens` count output tokens of the whole request, over all attempts. `num_logprobs` is how
    many likely tokens are reported beside each chosen one; None reports no log probabilities at all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalises_output(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def penalises(self) -> bool:
        """Whether the known tokens matter for the next one."""
        return self.repetition_penalty != 1 or self.penalises_output

    @property
    def is_plain(self) -> bool:
        """Whether the largest logit is the answer whenever no id is banned."""
        return self.is_greedy and not self.penalises and not self.logit_bias

    def check(self, vocab_size: int) -> None:
        """Raises InvalidInput for what the sampler cannot follow: one bad row would fail a whole step."""
        _check_range("temperature", self.temperature, 0.0, math.inf)
        _check_range("top_k", self.top_k, 0, math.inf)
        _check_range("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, above=True)
        _check_range("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_range("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        if self.num_logprobs is not None:
            _check_range("logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size)
        _check_ids("logit_bias", [token for token, _ in self.logit_bias], MAX_BIASES, vocab_size)
        for token, bias in self.logit_bias:
            _check_range(f"logit_bias.{token}", bias, -MAX_BIAS, MAX_BIAS)


def _check_range(field: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """`above`: `low` itself is out. NaN is in no range, and infinity in none either."""
    if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
        upper = f" and at most {high:g}" if math.isfinite(high) else " and finite"
        raise InvalidInput(field, value, f"must be {'greater than' if above else 'at least'} {low:g}{upper}")


def _check_ids(field: str, ids: Sequence[int], most: int, vocab_size: int) -> None:
    if len(ids) > most or len(set(ids)) < len(ids):
        raise InvalidInput(field, len(ids), f"may name at most {most} tokens, each once")
    for token in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token < vocab_size:
            raise InvalidInput(field, token, f"token ids must be in 0 … {vocab_size - 1}")


class FinishReason(StrEnum):
    """Why a request ended. STOP: an end token; LENGTH: max_tokens or context; CANCELLED: the client left;
    ERROR: see the event's error."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities in the model's own distribution: of the chosen token, and of the likeliest
    ones as (token id, logprob), likeliest first, equal ones by ascending id."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One output token. `index` counts output tokens of the whole request from 0, over all attempts. `logprobs` are
    there if they were asked for."""

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None


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
    adapter_salt: str = ""
    """The same for whatever else changes the model's keys and values: what is not the base model has one of its own."""
    num_computed: int = 0
    phase: Phase = Phase.WAITING
    global_blocks: list[int] = field(default_factory=list)
    local_blocks: list[int] = field(default_factory=list)
    block_names: list[bytes] = field(default_factory=list, repr=False)
    """Names of the content of its full blocks, as far as the cache has asked for them."""
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
