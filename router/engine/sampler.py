"""Chooses tokens from logits, all rows at once. Randomness is a function of (seed, position) and of nothing else.

Shape letters: S sampled rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.engine.request import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one row needs to be sampled: its parameters, the position its token will take, and ids it may not be."""

    sampling: SamplingParams
    position: int
    banned: tuple[int, ...] = ()


def sample(logits_SV: torch.Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token id per row, None where no token can be chosen: all are banned, or the logits are no numbers.

    Temperature 0 takes the largest logit; ties go to the smallest id.
    """
    logits_SV = logits_SV.float().cpu()
    for row, draw in enumerate(draws):
        if draw.banned:
            logits_SV[row, list(draw.banned)] = float("-inf")
    largest, chosen = logits_SV.max(dim=-1)
    hot = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if hot:
        chosen[hot] = _draw(logits_SV[hot], [draws[row] for row in hot])
    possible = torch.isfinite(largest).tolist()
    return [token if fine else None for token, fine in zip(chosen.tolist(), possible, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random: the first 53 bits of a hash of (seed, position)."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _draw(logits_SV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Temperature, then top-k, then top-p, then the inverse of the cumulative distribution at `uniform`.

    Tokens are walked from the likeliest down, so a filter only shortens the walk.
    """
    temperature = torch.tensor([[draw.sampling.temperature] for draw in draws], dtype=torch.float32)
    sorted_SV, order_SV = torch.sort(logits_SV / temperature, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_SV.shape[-1])
    top_k = torch.tensor([[draw.sampling.top_k or logits_SV.shape[-1]] for draw in draws])
    sorted_SV = sorted_SV.masked_fill(rank_V >= top_k, float("-inf"))
    probability_SV = torch.softmax(sorted_SV, dim=-1, dtype=torch.float64)
    before_SV = probability_SV.cumsum(dim=-1) - probability_SV
    top_p = torch.tensor([[draw.sampling.top_p] for draw in draws], dtype=torch.float64)
    # The likeliest token always stays; another stays while those before it do not yet reach top_p.
    probability_SV = probability_SV.masked_fill((before_SV >= top_p) & (rank_V > 0), 0.0)
    cumulative_SV = probability_SV.cumsum(dim=-1)
    u = torch.tensor([[uniform(draw.sampling.seed, draw.position)] for draw in draws], dtype=torch.float64)
    # Where no token is possible (all banned, or no numbers) none is kept; such a row must not fail its neighbours.
    last_kept = ((probability_SV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    walk = torch.searchsorted(cumulative_SV, u * cumulative_SV[:, -1:], right=True)
    return order_SV.gather(-1, torch.minimum(walk, last_kept)).squeeze(-1)
