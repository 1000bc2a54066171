"""What is usual on a link: a high quantile of the latest samples in constant memory."""

from __future__ import annotations

WINDOW = 100
ENOUGH = 16
"""With fewer samples nothing is usual yet."""


class Usual:
    """Follows the 99th percentile as the second largest of a hundred samples, of this hundred or of the one before.

    One odd sample in a hundred changes nothing; what was usual is forgotten after two hundred.
    """

    __slots__ = ("_before", "_count", "_largest", "_second")

    def __init__(self) -> None:
        self._before = 0.0
        self._largest = 0.0
        self._second = 0.0
        self._count = 0

    def add(self, sample: float) -> bool:
        """Whether it is time to look at `p99` anew."""
        if sample > self._second:
            if sample > self._largest:
                self._second, self._largest = self._largest, sample
            else:
                self._second = sample
        self._count += 1
        if self._count == WINDOW:
            self._before = self._second
            self._largest = self._second = 0.0
            self._count = 0
            return True
        return not self._before and self._count == ENOUGH

    @property
    def p99(self) -> float | None:
        """None as long as too few samples came."""
        if not self._before and self._count < ENOUGH:
            return None
        return max(self._before, self._second)
