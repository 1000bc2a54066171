"""What travels between the decoder and whatever computes routed experts. Neither side knows the other.

Shape letters: T rows (tokens of a packed step), K experts per token, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.placement import ExpertKey


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The gate's choice for T tokens: `expert_TK` int64 expert indices, `score_TK` sigmoid scores in the model's
    dtype. Scores scale the expert's *input* row (Llama 4)."""

    expert_TK: torch.Tensor
    score_TK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The routed experts' sum per token, `y_TH` in the model's dtype.

    `lost` maps row indices whose experts were not available to the experts they wanted; those rows of `y_TH` are
    meaningless and must leave the step.
    """

    y_TH: torch.Tensor
    lost: dict[int, tuple[ExpertKey, ...]]
