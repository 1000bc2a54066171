"""JSON objects out of files that nobody vouches for: bounded, and without what Python's parser lets pass."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experts.findings import shown

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Escapes that may be half of a character."""


@dataclass(frozen=True, kw_only=True)
class JsonObject:
    """`faults` are pairs of (expected, found). Of a repeated name, `members` has the last value."""

    members: Mapping[str, Any]
    faults: tuple[tuple[str, str], ...] = ()


def parse_strictly(raw: bytes) -> JsonObject:
    """The JSON object in `raw`, in UTF-8. With faults that leave nothing to read, it has no members."""
    faults: list[tuple[str, str]] = []
    try:
        text = raw.decode("utf-8")
        value = _parse(text, faults)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return JsonObject(members={}, faults=(("texts of whole characters", "a lone surrogate"),))
    except UnicodeDecodeError:
        return JsonObject(members={}, faults=(("JSON in UTF-8", "other bytes"),))
    except json.JSONDecodeError as error:
        found = f"{error.msg.lower()}, line {error.lineno} column {error.colno}"
        return JsonObject(members={}, faults=(("JSON", found),))
    except (ValueError, RecursionError):
        return JsonObject(members={}, faults=(("JSON", "numbers too long or nesting too deep"),))
    if not isinstance(value, dict):
        return JsonObject(members={}, faults=(("a JSON object", type(value).__name__),))
    return JsonObject(members=value, faults=tuple(dict.fromkeys(faults)))


def _parse(text: str, faults: list[tuple[str, str]]) -> Any:
    """Any JSON value. Names that repeat and numbers that are none are added to `faults`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            name, count = Counter(name for name, _ in pairs).most_common(1)[0]
            faults.append(("each name once in an object", f"{shown(name)} {count} times"))
        return members

    def no_constant(name: str) -> None:
        faults.append(("finite numbers", name))

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            faults.append(("finite numbers", shown(digits)))
        return number

    return json.loads(
        text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite, parse_int=_integer
    )


def _integer(digits: str) -> int | float:
    """Readers in other languages keep the sign, as a float's."""
    return -0.0 if digits == "-0" else int(digits)
