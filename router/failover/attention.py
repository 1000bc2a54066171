"""The time that a router has had eyes for its hosts. It may itself be stopped, starved or busy: such time counts for
nobody's lateness.
"""

from __future__ import annotations

SLACK_S = 0.01
"""Looking this much later than was meant is ordinary."""
GRACE_S = 0.005
"""After a pause of the router's own, answers get this long to come in before anybody is judged."""
PAUSE_S = 0.1
"""A pause as long as this spoils measurements."""


class Attention:
    """Turns the monotonic clock into time in which the router was there to see answers: `now - forgiven`."""

    __slots__ = ("_looked_at", "forgiven", "pauses")

    def __init__(self) -> None:
        self.forgiven = 0.0
        self.pauses = 0
        """Number of long pauses so far."""
        self._looked_at = float("-inf")

    def at(self, now: float) -> float:
        return now - self.forgiven

    def look(self, until: float, now: float) -> None:
        """The shell has looked until `now` and had meant to look until `until`."""
        since, self._looked_at = self._looked_at, now
        if since == float("-inf"):
            return
        meant = max(0.0, until - since)
        away = now - since - meant
        if away <= SLACK_S:
            return
        # Of the time that was meant something is left, so that there is another look before a verdict; less every
        # time, so that there is a verdict even where every look comes late.
        left = min(GRACE_S, meant / 2) if meant > GRACE_S / 8 else 0.0
        self.forgiven += away + left if meant else away - SLACK_S
        if away > PAUSE_S:
            self.pauses += 1
