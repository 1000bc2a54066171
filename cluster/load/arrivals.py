"""When the requests of an open loop come. Pure."""

from __future__ import annotations

import math
import random


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests come, ascending, the first at 0.

    Gaps are gamma distributed with mean 1 / rate and shape `burstiness`, so that their coefficient of variation is
    burstiness ** -0.5: 1 is a Poisson process, more is steadier, less comes in bursts. An infinite rate: all at 0.
    """
    if math.isinf(rate):
        return [0.0] * count
    generator = random.Random(f"arrivals {seed}")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += generator.gammavariate(burstiness, 1 / (rate * burstiness))
    return times
