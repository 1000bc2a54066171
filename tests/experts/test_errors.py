"""Errors travel between processes whole: same class, same message, same parts."""

from __future__ import annotations

import copy

import pytest

from experts.errors import (
    CheckpointError,
    ContextOverflow,
    ControllerUnreachable,
    DeadlinePassed,
    ExpertUnavailable,
    HerdError,
    InvalidInput,
    NotHosted,
    Overloaded,
    RouterLost,
)


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("host-ports", range(5, 7), "one of them must be free"),
        ContextOverflow(9, 2, 8, "prompt"),
        CheckpointError("config.json", "the file is missing"),
        Overloaded("the queue is full", 2.5),
        ExpertUnavailable([(1, 2), (0, 3)]),
        RouterLost("gone"),
        ControllerUnreachable("127.0.0.1:9", "no answer"),
        DeadlinePassed("host-0", "late"),
        NotHosted("host-1", [(0, 1)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_copied_error_is_whole(error: HerdError) -> None:
    # `copy` takes an error apart and puts it together the way every carrier of Python objects does.
    again = copy.copy(error)
    assert again is not error
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
