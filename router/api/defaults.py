"""How tokens are chosen when a request does not say: the checkpoint's generation config and the rest of the context.

Turns a request into sampling parameters; numbers only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experts.errors import ContextOverflow, InvalidInput
from router.api.generation_config import check_wishes, count, number
from router.api.schema import GenerationRequest
from router.engine.request import GREEDY_BELOW, MAX_REPETITION_PENALTY, SamplingParams

SEED_MASK = 2**63 - 1
LEAST_PENALTY = 1e-6
"""What a generation config may ask for; 0 would divide by nothing."""
MAX_TEMPERATURE = 100.0
"""What a generation config may ask for; there is next to nothing left of the distribution long before."""


@dataclass(frozen=True, kw_only=True)
class ServingDefaults:
    """What a checkpoint wishes. `max_new_tokens` None is the rest of the context, `top_k` 0 keeps all tokens.

    `unfollowed` names the fields of its generation config that have no effect here, and what is to be said of them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    unfollowed: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any] | None, eos_token_ids: frozenset[int] = frozenset()
    ) -> ServingDefaults:
        """From the contents of generation_config.json, None if there is no such file.

        `eos_token_ids` are the model's, wherever they are named. As in transformers, a config that does not say
        `do_sample` is greedy. Raises CheckpointError, also for wishes that change answers and that we cannot follow.
        """
        if config is None:
            return cls(eos_token_ids=eos_token_ids)
        temperature = number(config, "temperature", 1.0, low=0.0, high=MAX_TEMPERATURE)
        return cls(
            temperature=temperature if config.get("do_sample") is True else 0.0,
            top_p=number(config, "top_p", 1.0, low=0.0, high=1.0) or 1.0,
            top_k=count(config, "top_k"),
            min_p=number(config, "min_p", 0.0, low=0.0, high=1.0),
            repetition_penalty=number(
                config, "repetition_penalty", 1.0, low=LEAST_PENALTY, high=MAX_REPETITION_PENALTY
            ),
            max_new_tokens=count(config, "max_new_tokens") or None,
            eos_token_ids=eos_token_ids,
            unfollowed=check_wishes(config),
        )


def to_sampling(
    request: GenerationRequest,
    defaults: ServingDefaults,
    num_prompt_tokens: int,
    max_model_len: int,
    draw_seed: Callable[[], int],
    field: str = "messages",
) -> SamplingParams:
    """Sampling parameters of one prompt of `num_prompt_tokens`, which the request holds in `field`.

    `draw_seed` gives a seed in 0 ... 2**63 - 1 when the request has none. Raises ContextOverflow when prompt and
    asked-for answer do not fit together, InvalidInput when min_tokens does not.
    """
    max_tokens = _max_tokens(request, defaults, num_prompt_tokens, max_model_len, field)
    if request.min_tokens > max_tokens:
        raise InvalidInput("min_tokens", request.min_tokens, f"must be at most max_tokens, here {max_tokens}")
    temperature = defaults.temperature if request.temperature is None else request.temperature
    top_k = defaults.top_k if request.top_k is None else request.top_k
    return SamplingParams(
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=max(top_k, 0),
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        repetition_penalty=(
            defaults.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
        ),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        seed=draw_seed() if request.seed is None else request.seed & SEED_MASK,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(dict.fromkeys(request.stop_token_ids)),
        num_logprobs=request.num_logprobs,
    )


def choice_seed(seed: int, number: int) -> int:
    """The seed of choice `number` of a prompt whose request has `seed`: a function of both, the first one's `seed`."""
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:choice:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & SEED_MASK


def _max_tokens(
    request: GenerationRequest, defaults: ServingDefaults, num_prompt_tokens: int, max_model_len: int, field: str
) -> int:
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextOverflow(num_prompt_tokens, request.output_limit or 0, max_model_len, field)
    asked = request.output_limit
    if asked is None:
        return min(room, defaults.max_new_tokens or room)
    if asked > room:
        raise ContextOverflow(num_prompt_tokens, asked, max_model_len, field)
    return asked
