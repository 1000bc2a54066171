"""The threads that OpenMP keeps for each thread that computed with it."""

from __future__ import annotations

from experts.kernels.native import load_norms

PAUSE_HARD = 2
"""`omp_pause_hard` of OpenMP 5.0."""


def release_helpers() -> None:
    """Let those of the calling thread end, if it is not to compute any more. As soon as a process has more of them than
    there are CPUs, all of them sleep between two pieces of work, which the thread that computes now then waits for."""
    # Found by way of a library of ours, it is that of the OpenMP that the process really uses.
    pause = getattr(load_norms(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(PAUSE_HARD)
