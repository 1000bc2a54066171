"""Draws one token of each row by temperature, min-p, top-k and top-p, in this order, as vLLM does.

A row is drawn alike whatever rows are beside it: sums run along one row in the order of its own numbers, and over a
width that is its own affair. Shape letters: R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from router.engine.largest import largest
from router.engine.request import SamplingParams

NUCLEUS_GUESS = 1024
"""Candidates among which a top-p without top-k is looked for before the whole vocabulary is sorted."""
LEAST_WIDTH = 64

_Draw = Callable[[torch.Tensor, Sequence[SamplingParams], torch.Tensor, int], torch.Tensor]
"""(scaled logits, parameters, uniforms, number of candidates) → token ids."""


def draw_tokens(logits_RV: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> torch.Tensor:
    """One token id for each row of float32 logits, int64 [R]. The largest logit of every row is finite.

    `uniforms` are in [0, 1). The kept tokens are walked in the order of their ids, each as far as it is likely, until
    the uniform share of the way is gone. So rounding that swaps two nearly equal logits rarely changes a token.
    """
    scaled_RV = _scaled(logits_RV, params)
    uniform_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device).unsqueeze(-1)
    chosen_R = torch.zeros(len(params), dtype=torch.int64, device=logits_RV.device)
    for (draw, width), rows in _groups(params, logits_RV.shape[-1]).items():
        chosen_R[rows] = draw(scaled_RV[rows], [params[row] for row in rows], uniform_R1[rows], width)
    return chosen_R


def _scaled(logits_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logits after temperature and min-p; the largest is 0."""
    device = logits_RV.device
    # Bounded, because an impossible token over an infinite temperature would be no number.
    temperature_R1 = torch.tensor([[min(one.temperature, 1e30)] for one in params], device=device)
    # From the largest down, so that a small temperature overflows to nothing worse than impossible.
    scaled_RV = (logits_RV - logits_RV.max(dim=-1, keepdim=True).values) / temperature_R1
    if any(one.min_p for one in params):
        least = [[math.log(one.min_p) if one.min_p else -math.inf] for one in params]
        least_R1 = torch.tensor(least, dtype=torch.float32, device=device)
        scaled_RV.masked_fill_(scaled_RV < least_R1, -math.inf)
    return scaled_RV


def _groups(params: Sequence[SamplingParams], vocab_size: int) -> dict[tuple[_Draw, int], list[int]]:
    """Rows by how they are drawn and from how many candidates."""
    groups: dict[tuple[_Draw, int], list[int]] = defaultdict(list)
    for row, one in enumerate(params):
        if 0 < one.top_k < vocab_size:
            # Rounded up, so that a batch of many different k is a few groups.
            width = max(LEAST_WIDTH, 1 << (one.top_k - 1).bit_length())
            groups[_draw_top_k, min(width, vocab_size)].append(row)
        elif one.top_p < 1:
            groups[_draw_top_p, min(NUCLEUS_GUESS, vocab_size)].append(row)
        else:
            groups[_draw_any, vocab_size].append(row)
    return groups


def _draw_any(
    scaled_RV: torch.Tensor, params: Sequence[SamplingParams], uniform_R1: torch.Tensor, width: int
) -> torch.Tensor:
    return _walk(torch.softmax(scaled_RV, dim=-1), uniform_R1)


def _draw_top_k(
    scaled_RV: torch.Tensor, params: Sequence[SamplingParams], uniform_R1: torch.Tensor, width: int
) -> torch.Tensor:
    """Top-p, if any, is a share of what top-k leaves."""
    ids_RK = largest(scaled_RV, width)
    top_k_R1 = torch.tensor([[one.top_k] for one in params], device=scaled_RV.device)
    outside_RK = torch.arange(width, device=scaled_RV.device) >= top_k_R1
    probability_RK = torch.softmax(scaled_RV.gather(-1, ids_RK).masked_fill(outside_RK, -math.inf), dim=-1)
    kept_RK, _ = _nucleus(probability_RK, params)
    return _walk_by_id(ids_RK, kept_RK, uniform_R1)


def _draw_top_p(
    scaled_RV: torch.Tensor, params: Sequence[SamplingParams], uniform_R1: torch.Tensor, width: int
) -> torch.Tensor:
    """From the `width` likeliest tokens, or from all where those do not reach a row's top-p."""
    ids_RK = largest(scaled_RV, width)
    kept_RK, short_R = _nucleus(torch.softmax(scaled_RV, dim=-1).gather(-1, ids_RK), params)
    chosen_R = _walk_by_id(ids_RK, kept_RK, uniform_R1)
    short = short_R.nonzero().flatten().tolist() if width < scaled_RV.shape[-1] else []
    if short:
        group = [params[row] for row in short]
        chosen_R[short] = _draw_top_p(scaled_RV[short], group, uniform_R1[short], scaled_RV.shape[-1])
    return chosen_R


def _nucleus(probability_RK: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities of the tokens that top-p keeps, 0 for others; rows whose candidates do not reach it).

    Likeliest first. The first always stays; another stays while those before it do not yet reach top-p.
    """
    top_p_R1 = torch.tensor([[one.top_p] for one in params], dtype=torch.float64, device=probability_RK.device)
    cumulative_RK = probability_RK.cumsum(dim=-1, dtype=torch.float64)
    before_RK = torch.cat([torch.zeros_like(cumulative_RK[:, :1]), cumulative_RK[:, :-1]], dim=-1)
    kept_RK = (before_RK < top_p_R1) | (top_p_R1 >= 1)
    return probability_RK.where(kept_RK, 0.0), cumulative_RK[:, -1] < top_p_R1.squeeze(-1)


def _walk_by_id(ids_RK: torch.Tensor, weights_RK: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The id at which the walk over candidates, in the order of their ids, ends."""
    in_order_RK, order_RK = ids_RK.sort(dim=-1)
    column_R = _walk(weights_RK.gather(-1, order_RK), uniform_R1)
    return in_order_RK.gather(-1, column_R.unsqueeze(-1)).squeeze(-1)


def _walk(weights_RK: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The column of each row at which the sum of weights passes a share of their total; its weight is not 0."""
    cumulative_RK = weights_RK.cumsum(dim=-1, dtype=torch.float64)
    total_R1 = cumulative_RK[:, -1:].contiguous()
    # A product that rounds up to the total would walk past the last token.
    share_R1 = torch.minimum(uniform_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RK, share_R1, right=True).squeeze(-1)
