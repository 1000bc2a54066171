"""What else generation_config.json may wish for: fields that would change answers are refused, harmless ones are named.

The fields are those of transformers' GenerationConfig that its decoding of one answer looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from experts.errors import CheckpointError
from experts.fields import is_int
from experts.findings import shown
from router.api.schema import MAX_COUNT

FILE = "generation_config.json"

# Field → values, besides null, that wish for nothing.
_REFUSED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "diversity_penalty": (0,),
        "penalty_alpha": (0,),
        "dola_layers": (),
        "typical_p": (1,),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "top_h": (),
        "encoder_repetition_penalty": (1,),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "bad_words_ids": ([],),
        "force_words_ids": ([],),
        "constraints": ([],),
        "sequence_bias": ({}, []),
        "suppress_tokens": ([],),
        "begin_suppress_tokens": ([],),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "forced_decoder_ids": ([],),
        "exponential_decay_length_penalty": (),
        "guidance_scale": (1,),
        "watermarking_config": (),
        "token_healing": (False,),
        "stop_strings": ([],),
        "min_length": (0,),
        "min_new_tokens": (0,),
    }
)
_NAMED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        # The class's default, which nobody wished for.
        "max_length": (20,),
        "max_time": (),
        "num_return_sequences": (1,),
    }
)


def check_wishes(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(field, what is to be said of it) for fields that are set and have no effect. Raises CheckpointError for the
    first that would change what is answered."""
    if not isinstance(config.get("do_sample"), bool | None):
        raise CheckpointError(f"{FILE}: do_sample", f"must be true or false, is {config['do_sample']!r:.80}")
    for name, neutral in _REFUSED.items():
        if not _is_neutral(config.get(name), neutral):
            problem = f"is {config[name]!r:.80}, which this server cannot follow; remove the field to serve without it"
            raise CheckpointError(f"{FILE}: {name}", problem)
    return tuple(
        (name, f"is {config[name]!r:.80} and has no effect here: requests and the context bound answers")
        for name, neutral in _NAMED.items()
        if not _is_neutral(config.get(name), neutral)
    )


def number(config: Mapping[str, Any], name: str, default: float, *, low: float, high: float) -> float:
    """A number of the config, `default` where it is null or absent. Raises CheckpointError outside of low … high."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(f"{FILE}: {name}", f"must be a number in {low} … {high}, is {shown(value)}")
    return float(value)


def count(config: Mapping[str, Any], name: str) -> int:
    """A whole number ≥ 0 of the config, 0 where it is null or absent. Raises CheckpointError."""
    value = config.get(name)
    if value is None:
        return 0
    if not is_int(value) or not 0 <= value <= MAX_COUNT:
        raise CheckpointError(f"{FILE}: {name}", f"must be an integer in 0 … {MAX_COUNT}, is {shown(value)}")
    return int(value)


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    # Python says True == 1; JSON does not.
    return value is None or any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in neutral)
