"""Typed access to a JSON object of a config file; knows the types of values and nothing of what they mean."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from experts.errors import InvalidInput

MAX_INTEGER = 2**63 - 1
MAX_FLOAT = sys.float_info.max
"""JSON's integers have no end; one above this is no float."""
MAX_LAYERS = 10_000
"""Far above any model; lists as long as this are made before a file of weights is looked at."""


class Fields:
    """The fields of `raw`; a value of the wrong type is an InvalidInput with the field's full name, `where` first."""

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self.raw = raw
        self._where = where

    def get(self, name: str, default: Any = None) -> Any:
        return self.raw.get(name, default)

    def error(self, name: str, rule: str) -> InvalidInput:
        """For the caller to raise: the field's value breaks `rule`."""
        return InvalidInput(self._where + name, self.raw.get(name), rule)

    def integer(
        self, name: str, default: int, *, low: int = 1, high: int = MAX_INTEGER, null: int | None = None
    ) -> int:
        value = self.raw.get(name, default)
        if value is None and null is not None:
            return null
        if not is_int(value) or value < low:
            raise InvalidInput(self._where + name, value, f"must be an integer ≥ {low}")
        if value > high:
            raise InvalidInput(self._where + name, value, f"must be at most {high}")
        return int(value)

    def optional_integer(self, name: str, default: int) -> int | None:
        return None if self.raw.get(name, default) is None else self.integer(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_FLOAT:
            raise InvalidInput(self._where + name, value, "must be a finite number ≥ 0")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if value == 0:
            raise InvalidInput(self._where + name, value, "must be > 0")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise InvalidInput(self._where + name, value, "must be true or false")
        return value

    def switch(self, name: str, default: bool) -> bool:
        """A flag that some writers spell as a number; 0 and null are off."""
        value = self.raw.get(name, default)
        if value is not None and (not isinstance(value, int) or value < 0):
            raise InvalidInput(self._where + name, value, "must be true, false, an integer ≥ 0 or null")
        return bool(value)

    def nested(self, name: str) -> Fields:
        """The fields of an object; none where it is null or missing."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise InvalidInput(self._where + name, value, "must be an object or null")
        return Fields(value or {}, where=f"{self._where}{name}.")


def is_int(value: object) -> bool:
    """Whether it is a whole number; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
