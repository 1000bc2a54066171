"""What a request asks to be done to the model's logits before a token is chosen, greedy or not.

In this order: repetition penalty, frequency and presence penalty, logit bias, grammar mask, banned ids. All of it
depends on the request's parameters and its known tokens only, so an attempt on another router adjusts alike.
Shape letters: R adjusted rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router.engine.draw import Draw

_BANNED = float("-inf")
_LEAST_PENALTY = 1e-30
"""Smaller ones are taken as this: a logit divided by them would be infinite, and a row of those allows no token."""
_WORD_BITS = 32
_Ids = NDArray[np.int64]


def adjust(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Adjust float32 logits, one row for each draw, in place."""
    _penalise_repetition(logits_RV, draws)
    _penalise_output(logits_RV, draws)
    _add_bias(logits_RV, draws)
    _mask(logits_RV, draws)
    _ban(logits_RV, draws)


def _penalise_repetition(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    """As in transformers: logits of known tokens are divided if positive, else multiplied, once for each token."""
    rows = [row for row, draw in enumerate(draws) if draw.sampling.repetition_penalty != 1]
    if not rows:
        return
    known = [np.asarray(draws[row].known, dtype=np.int64) for row in rows]
    wanted = [max(draws[row].sampling.repetition_penalty, _LEAST_PENALTY) for row in rows]
    penalties = np.array(wanted, dtype=np.float32)
    penalty = _tensor(np.repeat(penalties, [len(ids) for ids in known]), logits_RV)
    cells = _tensor(_cells(logits_RV, rows, known), logits_RV)
    flat = logits_RV.view(-1)
    # A token that is known twice is written twice, with the same number.
    before = flat[cells]
    flat[cells] = torch.where(before > 0, before / penalty, before * penalty)


def _penalise_output(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    """As OpenAI defines them: for a token that was output c > 0 times, less frequency · c + presence."""
    rows = [row for row, draw in enumerate(draws) if draw.sampling.penalises_output]
    if not rows:
        return
    output = [np.asarray(draws[row].known[draws[row].num_prompt :], dtype=np.int64) for row in rows]
    cells, counts = np.unique(_cells(logits_RV, rows, output), return_counts=True)
    owner = cells // logits_RV.shape[-1]
    frequency = np.array([draw.sampling.frequency_penalty for draw in draws])
    presence = np.array([draw.sampling.presence_penalty for draw in draws])
    less = (frequency[owner] * counts + presence[owner]).astype(np.float32)
    logits_RV.view(-1)[_tensor(cells, logits_RV)] -= _tensor(less, logits_RV)


def _add_bias(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    rows = [row for row, draw in enumerate(draws) if draw.sampling.logit_bias]
    if not rows:
        return
    biases = [np.array(draws[row].sampling.logit_bias, dtype=np.float64) for row in rows]
    cells = _cells(logits_RV, rows, [bias[:, 0].astype(np.int64) for bias in biases])
    added = np.concatenate(biases)[:, 1].astype(np.float32)
    logits_RV.view(-1)[_tensor(cells, logits_RV)] += _tensor(added, logits_RV)


def _mask(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    rows = [row for row, draw in enumerate(draws) if draw.allowed is not None]
    if not rows:
        return
    words = torch.stack([draw.allowed for draw in draws if draw.allowed is not None]).to(logits_RV.device)
    assert words.dtype == torch.int32 and words.shape[-1] == -(-logits_RV.shape[-1] // _WORD_BITS), "a wrong mask"
    bits = (words.unsqueeze(-1) >> torch.arange(_WORD_BITS, dtype=torch.int32, device=words.device)) & 1
    refused_RV = bits.flatten(1)[:, : logits_RV.shape[-1]] == 0
    logits_RV[rows] = logits_RV[rows].masked_fill(refused_RV, _BANNED)


def _ban(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    rows = [row for row, draw in enumerate(draws) if draw.banned]
    if rows:
        banned = [np.array(draws[row].banned, dtype=np.int64) for row in rows]
        logits_RV.view(-1)[_tensor(_cells(logits_RV, rows, banned), logits_RV)] = _BANNED


def _cells(logits_RV: torch.Tensor, rows: Sequence[int], ids: Sequence[_Ids]) -> _Ids:
    """Positions in the flattened logits of `ids[i]` in row `rows[i]`, one row after the other."""
    starts = np.array(rows, dtype=np.int64) * logits_RV.shape[-1]
    return np.concatenate(ids) + np.repeat(starts, [len(one) for one in ids])


def _tensor(array: NDArray[Any], beside: torch.Tensor) -> torch.Tensor:
    """On the device of another tensor."""
    return torch.from_numpy(array).to(beside.device)
