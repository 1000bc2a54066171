"""Request bodies: bytes to one JSON object, bounded before memory is taken. Knows no field of any request."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from experts.errors import InvalidInput

MAX_DEPTH = 32
MAX_NODES = 250_000
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, in UTF-8. Raises InvalidInput naming "body" and what is wrong with it."""
    _check_shape(body)
    document = _load(body)
    if not isinstance(document, dict):
        raise InvalidInput("body", document, "must be a JSON object")
    if _SURROGATE_ESCAPE.search(body):
        _check_surrogates(document)
    return document


def _check_shape(body: bytes) -> None:
    """Depth and number of nodes, counted outside of strings, by passes that run at the speed of memory.

    The parser itself would build the whole document first. Brackets and commas outside of strings bound the nodes.
    """
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if bare.count(b'"') > 4 * MAX_NODES:
        _refuse_nodes()
    outside = b"".join(bare.split(b'"')[::2])
    if outside.count(b",") + outside.count(b"[") + outside.count(b"{") > MAX_NODES:
        _refuse_nodes()
    depth = 0
    for bracket in _BRACKET.finditer(outside):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            raise InvalidInput("body", f"more than {MAX_DEPTH} levels", f"may be nested at most {MAX_DEPTH} levels")


def _refuse_nodes() -> NoReturn:
    raise InvalidInput("body", f"more than {MAX_NODES} values", f"may hold at most {MAX_NODES} values")


def _load(body: bytes) -> object:
    try:
        return json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded
        )
    except InvalidInput:
        raise
    except json.JSONDecodeError as error:
        here = error.doc[max(0, error.pos - 15) : error.pos + 15]
        what = f"{error.msg.lower()}, line {error.lineno} column {error.colno}"
        raise InvalidInput("body", here, f"must be valid JSON: {what}") from None
    except UnicodeDecodeError:
        raise InvalidInput("body", "other bytes", "must be UTF-8") from None


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidInput("body", name, "numbers must be finite")


def _finite(digits: str) -> float:
    value = float(digits) if len(digits) <= 400 else math.inf
    if not math.isfinite(value):
        raise InvalidInput("body", digits[:40], "numbers must be finite")
    return value


def _bounded(digits: str) -> int:
    # No field takes more than 64 bits; converting thousands of digits takes quadratic time.
    if len(digits) > 20:
        raise InvalidInput("body", digits[:40], "integers may have at most 20 characters")
    return int(digits)


def _check_surrogates(document: dict[str, Any]) -> None:
    """Escapes such as "\\ud800" without their other half make strings that no encoder takes."""
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InvalidInput("body", half, "strings may not hold half of a surrogate pair") from None
