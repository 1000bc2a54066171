"""The sampler as its documentation tells it: one row at a time, in plain Python, for the fast one to be judged by."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from router.engine.draw import Draw
from router.engine.request import TokenLogprobs
from router.engine.sampler import uniform

SLACK = 1e-6
"""How near a draw may come to the border between two tokens before either of them is right."""


def adjusted(logits: list[float], draw: Draw) -> list[float]:
    """Penalties, bias, mask, bans; in float32, step by step."""
    sampling, f32 = draw.sampling, np.float32
    out = [f32(logit) for logit in logits]
    if sampling.repetition_penalty != 1:
        penalty = f32(sampling.repetition_penalty)
        for token in set(draw.known):
            out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token, count in Counter(draw.known[draw.num_prompt :]).items():
        out[token] -= f32(sampling.frequency_penalty * count + sampling.presence_penalty)
    for token, bias in sampling.logit_bias:
        out[token] += f32(bias)
    for token in range(len(out)):
        if draw.allowed is not None and not (int(draw.allowed[token // 32]) >> (token % 32)) & 1:
            out[token] = f32("-inf")
    for token in draw.banned:
        out[token] = f32("-inf")
    return [float(logit) for logit in out]


def kept(logits: list[float], draw: Draw, slack: float = 0.0) -> dict[int, float]:
    """Weights of the tokens that the filters leave; `slack` makes top-p reach a little further or less far."""
    sampling = draw.sampling
    scaled = [float(np.float32(np.float32(logit - max(logits)) / np.float32(sampling.temperature))) for logit in logits]
    least = float(np.float32(math.log(sampling.min_p))) if sampling.min_p else -math.inf
    likely = [token for token in range(len(scaled)) if scaled[token] >= least and scaled[token] > -math.inf]
    likely.sort(key=lambda token: (-scaled[token], token))
    if sampling.top_k:
        likely = likely[: sampling.top_k]
    total = sum(math.exp(scaled[token]) for token in likely)
    reached, left = 0.0, {}
    for token in likely:
        if left and sampling.top_p < 1 and reached >= sampling.top_p + slack:
            break
        left[token] = math.exp(scaled[token]) / total
        reached += left[token]
    return left


def acceptable(logits: list[float], draw: Draw) -> set[int | None]:
    """Tokens that may be drawn: one, or the neighbours of a border where rounding decides."""
    logits = adjusted(logits, draw)
    best = max(logits)
    if not math.isfinite(best):
        return {None}
    if draw.sampling.is_greedy:
        return {logits.index(best)}
    share = uniform(draw.sampling.seed, draw.position)
    found: set[int | None] = set()
    for slack in (-SLACK, 0.0, SLACK):
        weights = kept(logits, draw, slack)
        total = sum(weights.values())
        for near in (share - SLACK, share, share + SLACK):
            found.add(_walk(sorted(weights.items()), near * total))
    return found


def _walk(weights: list[tuple[int, float]], share: float) -> int:
    passed = 0.0
    for token, weight in weights:
        passed += weight
        if passed > share:
            return token
    return weights[-1][0]


def logprobs(logits: list[float], token: int, count: int) -> TokenLogprobs:
    """Of the logits as they came."""
    best = max(logits)
    total = best + math.log(sum(math.exp(logit - best) for logit in logits))
    order = sorted(range(len(logits)), key=lambda other: (-logits[other], other))
    return TokenLogprobs(
        logprob=logits[token] - total, top=tuple((other, logits[other] - total) for other in order[:count])
    )
