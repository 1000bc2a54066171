"""How many shipments may be sent twice on mere suspicion."""

from __future__ import annotations

SHARE = 0.1
MOST_SAVED = 8.0


class HedgeBudget:
    """A bucket of tokens: a shipment earns a tenth of one, a hedge costs one; so at most every tenth is hedged."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = 0.0

    def earn(self, num_shipments: int) -> None:
        self._tokens = min(MOST_SAVED, self._tokens + SHARE * num_shipments)

    def spend(self, num_hedges: int) -> bool:
        """Pay for all of them; False, and nothing is paid, when they cannot all be afforded."""
        # Tenths do not add up to one exactly.
        if num_hedges > self._tokens + 1e-9:
            return False
        self._tokens = max(0.0, self._tokens - num_hedges)
        return True
