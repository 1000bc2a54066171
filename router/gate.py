"""The gate of an MoE layer: which experts each token wants, and how strongly. Knows nothing of where experts live.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch

from router.routed import Routing


def gate(logits_TE: torch.Tensor, experts_per_token: int) -> Routing:
    """Top-k of the gate's logits; each chosen expert's score is its own sigmoid, taken in float32.

    Choices of a token are put in ascending expert order, so that whoever sums them does so in one fixed order.
    """
    value_TK, expert_TK = torch.topk(logits_TE, experts_per_token, dim=-1)
    if experts_per_token > 1:
        expert_TK, order_TK = torch.sort(expert_TK, dim=-1)
        value_TK = value_TK.gather(-1, order_TK)
    score_TK = torch.sigmoid(value_TK.float()).to(logits_TE.dtype)
    return Routing(expert_TK=expert_TK, score_TK=score_TK)
