"""Stop strings in a stream of text: what may be shown now, and when to end. Knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from experts.errors import InvalidInput


class StopStrings:
    """Finds the first stop string to be completed in text that comes in pieces of any size.

    The stream ends with the character that completes a stop string; if it completes several, the longest counts.
    So the answer does not depend on how the text was cut, and text shown never contains a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: no empty string among them; without any, all text passes. Raises InvalidInput("stop")."""
        if any(not stop for stop in stops):
            raise InvalidInput("stop", list(stops), "stop strings must not be empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string just completed or None).

        The stop string and what follows it are never shown. After a match, nothing more comes out.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            end, start = min(ends)
            self._held, self._matched = "", text[start:end]
            return text[:start], self._matched
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def finish(self) -> str:
        """Text still held back when the stream ends without a match."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of `text` that more text could turn into a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for num in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-num:]) for stop in self._stops):
                return num
        return 0
