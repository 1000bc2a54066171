"""How many bytes of request bodies an ingress holds at once, over all requests. Knows nothing of what is in them."""

from __future__ import annotations

from experts.errors import Overloaded

FREE_BYTES = 64 * 1024
"""So much of each body is not counted: large bodies, even ones that never end, keep no small one out."""
RETRY_S = 2.0


class BodyBudget:
    """Room for `max_bytes`, shared by the bodies of one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Held now."""

    def hold(self) -> HeldBody:
        """The place of one body, empty at first. Whoever takes it releases it."""
        return HeldBody(self)


class HeldBody:
    """The bytes that one request holds, from its body's arrival until its pictures are decoded."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def expect(self, length: int) -> None:
        """Take nothing yet: who announces much and sends little must not keep others out.

        Raises Overloaded when a body of `length` bytes would not find room now.
        """
        budget = self._budget
        if budget.num_bytes - self._num_bytes + _counted(length) > budget.max_bytes:
            raise Overloaded(f"{budget.num_bytes} bytes of other requests' bodies are being worked on", RETRY_S)

    def grow_to(self, length: int) -> None:
        """Hold `length` bytes in all. Raises Overloaded, and holds what it held, when there is no room for them."""
        self.expect(length)
        self._set(_counted(length))

    def release(self) -> None:
        """Hold nothing any more; may be called again."""
        self._set(0)

    def _set(self, num_bytes: int) -> None:
        self._budget.num_bytes += num_bytes - self._num_bytes
        self._num_bytes = num_bytes


def _counted(length: int) -> int:
    return max(0, length - FREE_BYTES)
