"""Random examples by the batch: one in the ordinary run, more of them in the long one."""

from __future__ import annotations

import pytest


def in_batches(count: int) -> pytest.MarkDecorator:
    """Run a hypothesis test, which takes its `batch`, `count` times; all but the first are soak tests."""
    longer = (pytest.param(batch, marks=pytest.mark.soak) for batch in range(1, count))
    return pytest.mark.parametrize("batch", [0, *longer])
