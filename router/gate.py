"""The gate of an MoE layer: which experts each token wants, and how strongly. Knows nothing of where experts live.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch

from router.routed import Routing


def gate(logits_TE: torch.Tensor, experts_per_token: int) -> Routing:
    """Top-k of the gate's logits, the smaller expert of equals; each chosen expert's score is its own sigmoid, taken in
    float32. Equals are no rarity where logits have eight bits, and everybody who computes must choose alike.

    Choices of a token are put in ascending expert order, so that whoever sums them does so in one fixed order.
    """
    if experts_per_token == 1:
        value_TK, expert_TK = logits_TE.max(dim=-1, keepdim=True)
    else:
        order_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices
        expert_TK = order_TE[:, :experts_per_token].sort(dim=-1).values
        value_TK = logits_TE.gather(-1, expert_TK)
    score_TK = torch.sigmoid(value_TK.float()).to(logits_TE.dtype)
    return Routing(expert_TK=expert_TK, score_TK=score_TK)
