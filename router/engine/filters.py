"""Draws one token of each row by temperature, min-p, top-k and top-p, in this order, as vLLM does.

A row is drawn alike whatever rows are beside it: sums run along one row in the order of its own numbers, and what
depends on a width does not depend on other rows' widths. Shape letters: R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

from router.engine.largest import largest
from router.engine.request import SamplingParams

NUCLEUS_GUESS = 1024
"""Candidates among which a top-p without top-k is looked for before the whole vocabulary is sorted."""


def draw_tokens(logits_RV: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> torch.Tensor:
    """One token id for each row of float32 logits, int64 [R]; any id for rows whose largest logit is not finite.

    `uniforms` are in [0, 1). The kept tokens are walked in the order of their ids, each as far as it is likely, until
    the uniform share of the way is gone. So rounding that swaps two nearly equal logits rarely changes a token.
    """
    probability_RV, scaled_RV = _probabilities(logits_RV, params)
    uniform_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device).unsqueeze(-1)
    chosen_R = torch.zeros(len(params), dtype=torch.int64, device=logits_RV.device)
    for width, rows in _widths(params, logits_RV.shape[-1]).items():
        if width == 0:
            chosen_R[rows] = _walk(probability_RV[rows], uniform_R1[rows])
            continue
        group = [params[row] for row in rows]
        chosen_R[rows] = _draw_filtered(scaled_RV[rows], probability_RV[rows], group, uniform_R1[rows], width)
    return chosen_R


def _probabilities(logits_RV: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities in float64, scaled logits) after temperature and min-p; the largest scaled logit is 0."""
    device = logits_RV.device
    temperature_R1 = torch.tensor([[one.temperature] for one in params], dtype=torch.float32, device=device)
    # From the largest down, so that a small temperature overflows to nothing worse than impossible.
    scaled_RV = (logits_RV - logits_RV.max(dim=-1, keepdim=True).values) / temperature_R1
    if any(one.min_p for one in params):
        least = [[math.log(one.min_p) if one.min_p else -math.inf] for one in params]
        least_R1 = torch.tensor(least, dtype=torch.float32, device=device)
        scaled_RV = scaled_RV.masked_fill(scaled_RV < least_R1, -math.inf)
    return torch.softmax(scaled_RV, dim=-1, dtype=torch.float64), scaled_RV


def _widths(params: Sequence[SamplingParams], vocab_size: int) -> dict[int, list[int]]:
    """Rows by the number of candidates that they are drawn from; 0 is the whole vocabulary, unsorted."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, one in enumerate(params):
        if 0 < one.top_k < vocab_size:
            # Rounded up, so that a batch of many different k is a few groups.
            rows[min(max(64, 1 << (one.top_k - 1).bit_length()), vocab_size)].append(row)
        elif one.top_p < 1:
            rows[min(NUCLEUS_GUESS, vocab_size)].append(row)
        else:
            rows[0].append(row)
    return rows


def _draw_filtered(
    scaled_RV: torch.Tensor,
    probability_RV: torch.Tensor,
    params: Sequence[SamplingParams],
    uniform_R1: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Draw from the `width` likeliest tokens of each row, or from more where they do not reach its top-p."""
    ids_RK = largest(scaled_RV, width)
    kept_RK, short_R = _keep(probability_RV.gather(-1, ids_RK), params)
    in_order_RK, order_RK = ids_RK.sort(dim=-1)
    index_R1 = _walk(kept_RK.gather(-1, order_RK), uniform_R1).unsqueeze(-1)
    chosen_R = in_order_RK.gather(-1, index_R1).squeeze(-1)
    short = short_R.nonzero().flatten().tolist() if width < scaled_RV.shape[-1] else []
    if short:
        group, whole = [params[row] for row in short], scaled_RV.shape[-1]
        chosen_R[short] = _draw_filtered(scaled_RV[short], probability_RV[short], group, uniform_R1[short], whole)
    return chosen_R


def _keep(probability_RK: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities of tokens kept, 0 for others; rows that need more candidates to tell). Likeliest first."""
    device, width = probability_RK.device, probability_RK.shape[-1]
    top_k_R1 = torch.tensor([[min(one.top_k, width)] for one in params], device=device)
    top_p_R1 = torch.tensor([[one.top_p] for one in params], dtype=torch.float64, device=device)
    rank_K = torch.arange(width, device=device)
    cumulative_RK = probability_RK.cumsum(dim=-1)
    # Top-p is a share of what top-k leaves.
    left_R1 = cumulative_RK.gather(-1, (top_k_R1 - 1).clamp(min=0))
    limit_R1 = top_p_R1 * torch.where(top_k_R1 > 0, left_R1, 1.0)
    # The likeliest token always stays; another stays while those before it do not yet reach the limit.
    in_reach_RK = (cumulative_RK - probability_RK < limit_R1) | (rank_K == 0) | (top_p_R1 >= 1)
    kept_RK = in_reach_RK & ((rank_K < top_k_R1) | (top_k_R1 == 0))
    short_R = (top_k_R1 == 0).squeeze(-1) & (cumulative_RK[:, -1] < limit_R1.squeeze(-1))
    return probability_RK.where(kept_RK, 0.0), short_R


def _walk(weights_RK: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The column of each row at which the sum of weights passes a share of their total; its weight is not 0."""
    cumulative_RK = weights_RK.cumsum(dim=-1)
    total_R1 = cumulative_RK[:, -1:].contiguous()
    # A product that rounds up to the total would walk past the last token.
    share_R1 = torch.minimum(uniform_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    walked_R1 = torch.searchsorted(cumulative_RK, share_R1, right=True)
    # Where no token is possible none is found; such a row must not fail its neighbours.
    return walked_R1.clamp(max=weights_RK.shape[-1] - 1).squeeze(-1)
