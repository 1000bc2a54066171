"""Request bodies: bytes to one JSON object, bounded before memory is taken. Knows no field of any request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NoReturn

from experts.errors import InvalidInput
from router.api.json_values import JsonReader, refuse_unfit

MAX_DEPTH = 32
MAX_NODES = 250_000
WINDOW_BYTES = 1 << 18
"""So much of a body is looked at together; what that takes besides is of this size, not of the body's."""
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in `body`, in UTF-8. Raises InvalidInput naming what is wrong with it, and "body" or the path of
    the value that no field could take.

    Empties a bytearray: a large body should not be in memory as bytes, as text and as values.
    """
    _check_shape(body)
    has_surrogates = _SURROGATE_ESCAPE.search(body) is not None
    reader = JsonReader()
    document = reader.read(_text(body))
    if not isinstance(document, dict):
        raise InvalidInput("body", document, "must be a JSON object")
    if has_surrogates:
        _check_surrogates(document)
    if reader.found_unfit:
        refuse_unfit(document)
    return document


def _check_shape(body: bytes | bytearray) -> None:
    """Depth and number of nodes, counted outside of strings, by passes that run at the speed of memory.

    The parser itself would build the whole document first. Brackets and commas outside of strings bound the nodes.
    """
    num_nodes = num_quotes = depth = 0
    for bare in _windows(body):
        inside = num_quotes % 2
        num_quotes += bare.count(b'"')
        if num_quotes > 4 * MAX_NODES:
            _refuse_nodes()
        outside = b"".join(bare.split(b'"')[inside::2])
        num_nodes += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        if num_nodes > MAX_NODES:
            _refuse_nodes()
        for bracket in _BRACKET.finditer(outside):
            depth += 1 if bracket.group() in b"[{" else -1
            if depth > MAX_DEPTH:
                raise InvalidInput("body", f"more than {MAX_DEPTH} levels", f"may be nested at most {MAX_DEPTH} levels")


def _windows(body: bytes | bytearray) -> Iterator[bytes]:
    """`body` piece by piece, without escaped backslashes and quotes: what quotes are left begin and end strings."""
    start = 0
    while start < len(body):
        window = bytes(memoryview(body)[start : start + WINDOW_BYTES])
        start += len(window)
        bare = window.replace(rb"\\", b"")
        if bare.endswith(b"\\") and body[start : start + 1] in (b'"', b"\\"):
            # The pair that the window's end cut.
            start += 1
            bare = bare[:-1]
        yield bare.replace(rb"\"", b"")


def _refuse_nodes() -> NoReturn:
    raise InvalidInput("body", f"more than {MAX_NODES} values", f"may hold at most {MAX_NODES} values")


def _text(body: bytes | bytearray) -> str:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("body", "other bytes", "must be UTF-8") from None
    if isinstance(body, bytearray):
        body.clear()
    return text


def _check_surrogates(document: dict[str, Any]) -> None:
    """Escapes such as "\\ud800" without their other half make strings that no encoder takes."""
    for text in _strings(document):
        try:
            # Long strings are ASCII, and need no copy to know it.
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise InvalidInput("body", half, "strings may not hold half of a surrogate pair") from None


def _strings(value: object) -> Iterator[str]:
    """All strings in a JSON value, names of fields too. Its depth is bounded before."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
