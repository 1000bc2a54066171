"""Chooses tokens from logits, all rows at once. Randomness is a function of (seed, position) and of nothing else.

Shape letters: S sampled rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from router.engine.adjustments import adjust
from router.engine.draw import Draw
from router.engine.filters import draw_tokens


def sample(logits_SV: torch.Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token id per row, None where no token can be chosen: none is allowed, or the logits are no numbers.

    Temperature 0 takes the largest logit; ties go to the smallest id. Leaves the logits as they are.
    """
    # For most batches this line is all: rows that ask for no more are not even made float32.
    largest_S, chosen_S = argmax(logits_SV)
    possible_S = torch.isfinite(largest_S)
    rows = [row for row, draw in enumerate(draws) if not draw.is_plain]
    if rows:
        chosen_S[rows], possible_S[rows] = _choose(logits_SV[rows].float(), [draws[row] for row in rows])
    return [token if fine else None for token, fine in zip(chosen_S.tolist(), possible_S.tolist(), strict=True)]


def argmax(logits_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit, and the first place where it stands; a row with a NaN has that as its largest."""
    if logits_SV.dtype is torch.bfloat16 and logits_SV.device.type == "cpu":
        largest_S = logits_SV.amax(dim=-1)
        if bool((largest_S > 0).all()):
            # Read as integers, positive numbers keep their order and negative ones stay below: numpy searches those
            # many times faster than torch does.
            return largest_S, torch.from_numpy(logits_SV.view(torch.int16).numpy().argmax(axis=-1))
    largest_S, chosen_S = logits_SV.max(dim=-1)
    return largest_S, chosen_S


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random: the first 53 bits of a hash of (seed, position)."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _choose(logits_SV: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids chosen, whether that was possible). Writes into the logits."""
    adjust(logits_SV, draws)
    largest_S, chosen_S = logits_SV.max(dim=-1)
    possible_S = torch.isfinite(largest_S)
    # A row without any possible token must not fail its neighbours.
    hot = [row for row, fine in enumerate(possible_S.tolist()) if fine and not draws[row].sampling.is_greedy]
    if hot:
        uniforms = [uniform(draws[row].sampling.seed, draws[row].position) for row in hot]
        chosen_S[hot] = draw_tokens(logits_SV[hot], [draws[row].sampling for row in hot], uniforms)
    return chosen_S, possible_S
