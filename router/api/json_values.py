"""The JSON value in a text, read strictly. What no field can take stands in it as `Unfit`, so that it has a path.

Such are numbers that are none or too long, and names that stand twice in an object: of two readers, each might follow
another value.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from experts.errors import InvalidInput

MAX_DIGITS = 20
"""Of an integer. No field takes more than 64 bits; converting thousands of digits takes quadratic time."""
MAX_FLOAT_DIGITS = 400
MAX_SHOWN = 40


@dataclass(frozen=True, kw_only=True, repr=False)
class Unfit:
    """In the place of a value: what was `found` there, and the `rule` that it breaks."""

    found: str
    rule: str

    def __repr__(self) -> str:
        return repr(self.found)


class JsonReader:
    """Reads one text. `found_unfit` says whether to look for `Unfit` in what it read."""

    def __init__(self) -> None:
        self.found_unfit = False

    def read(self, text: str) -> object:
        """Raises InvalidInput("body") for what is no JSON. Its depth must be bounded before."""
        try:
            return json.loads(
                text,
                parse_constant=self._constant,
                parse_float=self._float,
                parse_int=self._integer,
                object_pairs_hook=self._object,
            )
        except json.JSONDecodeError as error:
            here = error.doc[max(0, error.pos - 15) : error.pos + 15]
            what = f"{error.msg.lower()}, line {error.lineno} column {error.colno}"
            raise InvalidInput("body", here, f"must be valid JSON: {what}") from None

    def _constant(self, name: str) -> Unfit:
        return self._unfit(name, "numbers must be finite")

    def _float(self, digits: str) -> float | Unfit:
        value = float(digits) if len(digits) <= MAX_FLOAT_DIGITS else math.inf
        return value if math.isfinite(value) else self._unfit(digits, "numbers must be finite")

    def _integer(self, digits: str) -> int | Unfit:
        if len(digits) > MAX_DIGITS:
            return self._unfit(digits, f"integers may have at most {MAX_DIGITS} characters")
        return int(digits)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name in members if counts[name] > 1)
            members[twice] = self._unfit("more than one value", "must stand once in its object")
        return members

    def _unfit(self, found: str, rule: str) -> Unfit:
        self.found_unfit = True
        return Unfit(found=found[:MAX_SHOWN], rule=rule)


def refuse_unfit(value: object, path: str = "") -> None:
    """Raises InvalidInput for the first `Unfit` in `value`, naming its path as OpenAI writes paths."""
    if isinstance(value, Unfit):
        raise InvalidInput(path or "body", value.found, value.rule)
    if isinstance(value, dict):
        for name, inner in value.items():
            shown = name[:MAX_SHOWN]
            refuse_unfit(inner, f"{path}.{shown}" if path else shown)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            refuse_unfit(inner, f"{path}[{index}]")
