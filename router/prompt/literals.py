"""Keeps special-token text in users' strings from becoming special tokens on its way through a chat template.

Such text is swapped for private characters, which no trimming, cutting or JSON encoding takes apart, and comes back
after the template's own special tokens have been found. Knows nothing of templates or tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from experts.errors import InvalidInput

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Literals:
    """The swap for one rendering. `protect` what users wrote, render, `split`, then `restore` each text part."""

    def __init__(self, specials: SpecialTexts, values: Iterable[Any], template: str) -> None:
        """`values`: all JSON-like values that `protect` will get; `template`: the template's source."""
        texts = [text for value in values for text in _strings(value)]
        found = dict.fromkeys(risk for text in texts for _, risk in specials.split_risky(text) if risk)
        self._specials = specials
        self._private = dict(zip(found, _unused_characters(texts, template, len(found)), strict=True))
        back = {char: text for text, char in self._private.items()}
        # A template may ask tojson for ASCII only; then the private character arrives escaped.
        back |= {_json_escape(char): text for char, text in back.items()}
        self._back = back
        self._pattern = re.compile(_any_of(frozenset(back)))

    def protect(self, value: Any) -> Any:
        """A copy of the JSON-like `value` whose strings, and keys of mappings, hold no special-token text."""
        if not self._private:
            return value
        if isinstance(value, str):
            parts = self._specials.split_risky(value)
            return "".join(before + self._private.get(risk, "") for before, risk in parts)
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """`text` with what users wrote in the place of private characters."""
        return self._pattern.sub(lambda match: self._back[match.group()], text)


class SpecialTexts:
    """The special tokens' texts of a tokenizer, and where they (or the start of one) occur in a text."""

    def __init__(self, texts: Iterable[str]) -> None:
        known = frozenset(texts)
        self._whole = re.compile(_any_of(known))
        self._starts = frozenset(text[:end] for text in known for end in range(1, len(text)))
        self._longest_start = max(map(len, self._starts), default=0)

    def split(self, text: str) -> Iterator[tuple[str, str]]:
        """Pairs (text before, special token's text); the last pair has an empty second member."""
        position = 0
        for match in self._whole.finditer(text):
            yield text[position : match.start()], match.group()
            position = match.end()
        yield text[position:], ""

    def split_risky(self, text: str) -> Iterator[tuple[str, str]]:
        """As `split`, and the start of a special token at the end of `text` counts as one.

        A template may join two strings with nothing between, and the second may hold the rest of the token. Space
        after such a start does not count, since a template may trim it.
        """
        for before, special in self.split(text):
            if special:
                yield before, special
            else:
                end = len(before.rstrip())
                start = self._open_end(before[:end])
                yield before[: end - len(start)], start
                yield before[end:], ""

    def _open_end(self, text: str) -> str:
        """The longest start of a special token that `text` ends with."""
        for length in range(min(self._longest_start, len(text)), 0, -1):
            if text[-length:] in self._starts:
                return text[-length:]
        return ""


def _any_of(texts: frozenset[str]) -> str:
    """A pattern for the longest of `texts` that begins at a place; the tokenizer, too, prefers the longest.

    Common beginnings are tried once: checkpoints have thousands of special tokens that begin with `<|`.
    """
    if not texts:
        return "(?!)"
    shared = _common_beginning(min(texts), max(texts))
    rests = {text[len(shared) :] for text in texts}
    branches: dict[str, set[str]] = {}
    for rest in rests - {""}:
        branches.setdefault(rest[0], set()).add(rest)
    if not branches:
        return re.escape(shared)
    rest_pattern = "|".join(_any_of(frozenset(group)) for _, group in sorted(branches.items()))
    return f"{re.escape(shared)}(?:{rest_pattern}){'?' if '' in rests else ''}"


def _common_beginning(first: str, last: str) -> str:
    """What `first`, `last` and so all texts between them in sorted order begin with."""
    length = 0
    while length < len(first) and first[length] == last[length]:
        length += 1
    return first[:length]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _unused_characters(texts: list[str], template: str, num: int) -> list[str]:
    """`num` private-use characters that occur neither in `texts` nor in `template`, escaped or not."""
    if num == 0:
        return []
    all_text = "\n".join((*texts, template))
    used = set(all_text)
    free = []
    for code in (code for block in _PRIVATE_USE for code in block):
        char = chr(code)
        if char not in used and _json_escape(char) not in all_text:
            free.append(char)
            if len(free) == num:
                return free
    raise InvalidInput("messages", num, "use too many private-use characters beside special-token text")


def _json_escape(char: str) -> str:
    return json.dumps(char)[1:-1]
