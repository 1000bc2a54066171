"""`logit_bias` of a request: from OpenAI's object of token ids in strings to pairs. Knows no vocabulary."""

from __future__ import annotations

from experts.errors import InvalidInput
from router.engine.request import MAX_BIAS, MAX_BIASES

Biases = tuple[tuple[int, float], ...]
"""(token id, what is added to its logit), each id once."""

_MAX_DIGITS = 10


def parse_logit_bias(value: object) -> Biases:
    """Raises InvalidInput, its field the key that is wrong, empty for the whole."""
    if value == []:
        # What PHP's clients make of an empty object.
        return ()
    if not isinstance(value, dict):
        raise InvalidInput("", value, "must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise InvalidInput("", f"{len(value)} entries", f"may have at most {MAX_BIASES} entries")
    return tuple((_token_id(key), _bias(key, bias)) for key, bias in value.items())


def _token_id(key: str) -> int:
    # One spelling for each id, so that no two keys can mean the same.
    if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_DIGITS and str(int(key)) == key):
        raise InvalidInput(key[:_MAX_DIGITS], key, "keys must be token ids, integers from 0 without leading zeros")
    return int(key)


def _bias(key: str, bias: object) -> float:
    # NaN fails the comparison.
    if isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= MAX_BIAS:
        return float(bias)
    raise InvalidInput(key, bias, f"must be a number in {-MAX_BIAS:g} … {MAX_BIAS:g}")
