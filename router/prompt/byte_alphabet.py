"""GPT-2's byte alphabet, in which byte-level tokenizers write their tokens: one visible character for each byte."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Printable Latin-1 stands for itself, the other bytes for characters from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(0x100)).difference(_PRINTABLE))

BYTE_OF_CHAR: Mapping[str, int] = MappingProxyType(
    {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + index): byte for index, byte in enumerate(_OTHERS)}
)


def to_bytes(token: str) -> bytes:
    """The bytes of a token in the alphabet. A token with characters outside of it is meant literally."""
    if any(char not in BYTE_OF_CHAR for char in token):
        return token.encode()
    return bytes(BYTE_OF_CHAR[char] for char in token)


def to_chars(token: bytes) -> str:
    """A token in the alphabet, for people and for clients that know it from elsewhere."""
    return "".join(_CHAR_OF_BYTE[byte] for byte in token)


_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
