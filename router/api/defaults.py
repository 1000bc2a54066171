"""How tokens are chosen when a request does not say: the checkpoint's generation config and the rest of the context.

Turns a request into sampling parameters; numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experts.errors import CheckpointError, ContextOverflow, InvalidInput
from router.api.schema import GenerationRequest
from router.engine.request import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: dividing logits by them overflows."""
SEED_MASK = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ServingDefaults:
    """What a checkpoint wishes. `max_new_tokens` None is the rest of the context, `top_k` 0 keeps all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    eos_token_ids: frozenset[int] = frozenset()

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any] | None, eos_token_ids: frozenset[int] = frozenset()
    ) -> ServingDefaults:
        """From the contents of generation_config.json, None if there is no such file.

        `eos_token_ids` are the model's, wherever they are named. As in transformers, a config that does not say
        `do_sample` is greedy. Raises CheckpointError.
        """
        if config is None:
            return cls(eos_token_ids=eos_token_ids)
        temperature = _number(config, "temperature", 1.0, low=0.0)
        return cls(
            temperature=temperature if config.get("do_sample") is True else 0.0,
            top_p=_number(config, "top_p", 1.0, low=0.0, high=1.0) or 1.0,
            top_k=int(_number(config, "top_k", 0, low=0)),
            max_new_tokens=int(_number(config, "max_new_tokens", 0, low=0)) or None,
            eos_token_ids=eos_token_ids,
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
        seed=draw_seed() if request.seed is None else request.seed & SEED_MASK,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(dict.fromkeys(request.stop_token_ids)),
    )


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


def _number(config: Mapping[str, Any], name: str, default: float, *, low: float, high: float = float("inf")) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(f"generation_config.json: {name}", f"must be a number in {low} … {high}, is {value!r}")
    return value
