"""Records work as CUDA graphs: what is launched kernel by kernel once is launched at one go from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

NUM_WARM_UPS = 2
"""Libraries choose kernels and take workspaces at their first calls, which must not be recorded."""

_Result = TypeVar("_Result")


class GraphRecorder:
    """A `Recorder`. All graphs share one pool of memory, so they must be replayed one after another, and results are
    good until the next replay. Belongs to the thread that runs steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, works: Sequence[Callable[[], _Result]]) -> list[Callable[[], _Result]]:
        self._warm_up(works)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return [self._capture(work) for work in works]

    def _warm_up(self, works: Sequence[Callable[[], _Result]]) -> None:
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                for work in works:
                    work()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _capture(self, work: Callable[[], _Result]) -> Callable[[], _Result]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (metrics, loading) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()

        def replay() -> _Result:
            graph.replay()
            return result

        return replay
