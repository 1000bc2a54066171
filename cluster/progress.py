"""Progress on an output: a bar where somebody watches a terminal, else a plain line per step."""

from __future__ import annotations

from typing import TextIO

BAR_WIDTH = 30
STEPS = 10
"""Lines per phase where there is no terminal."""


class Progress:
    """Shows phases, each with a count and a total."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._last: tuple[str, int] = ("", -1)
        self._line_is_open = False

    def show(self, phase: str, count: int, total: int) -> None:
        """`count` of `total` in `phase`; repeating what is shown already shows nothing."""
        scale = BAR_WIDTH if self._is_terminal else STEPS
        step = scale if total == 0 else scale * count // total
        if (phase, step) == self._last:
            return
        changed_phase = phase != self._last[0]
        self._last = (phase, step)
        text = f"{phase}: {count} of {total}"
        if not self._is_terminal:
            print(f"herd: {text}", file=self._out, flush=True)
            return
        if changed_phase:
            self.end()
        bar = "#" * step + "." * (BAR_WIDTH - step)
        self._out.write(f"\rherd: [{bar}] {text}")
        self._out.flush()
        self._line_is_open = True

    def end(self) -> None:
        """Leave the bar's line."""
        if self._line_is_open:
            self._out.write("\n")
            self._out.flush()
            self._line_is_open = False
