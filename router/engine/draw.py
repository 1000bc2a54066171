"""One row's wish to the sampler: what the request asked for, and what of the request the choice depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.engine.request import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one row needs to be sampled: its parameters, the position its token will take, and ids it may not be.

    `known` are the request's known tokens, its prompt (`num_prompt` of them) first; only penalties look at them.
    `allowed`, if given, is a grammar's mask: int32 [ceil(V / 32)], token t is allowed if bit t % 32 of word t // 32
    is set.
    """

    sampling: SamplingParams
    position: int
    banned: tuple[int, ...] = ()
    known: Sequence[int] = ()
    num_prompt: int = 0
    allowed: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the largest of the model's own logits is the answer."""
        return not self.banned and self.allowed is None and self.sampling.is_plain
