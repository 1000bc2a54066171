"""What both ends of a link between router and host must agree on. Knows nothing of how they tell each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LINK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class LinkTerms:
    """`checkpoint_digest` names the exact weights; rows have `hidden_size` numbers of `dtype`."""

    checkpoint_digest: str
    dtype: torch.dtype
    hidden_size: int

    def __post_init__(self) -> None:
        assert self.dtype in LINK_DTYPES, self.dtype
        assert self.hidden_size > 0, self.hidden_size

    def num_bytes(self, num_rows: int) -> int:
        """Bytes of `num_rows` rows."""
        return num_rows * self.hidden_size * self.dtype.itemsize
