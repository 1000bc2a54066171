"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a change is judged by what it changed. `make soak` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Handing the tensors of tiny models to a second thread costs more than computing them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
