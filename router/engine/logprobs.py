"""Log probabilities of chosen tokens and of the likeliest ones beside them.

They are of the model's own distribution: the log-softmax of its logits before penalties, bias, masks and temperature,
as vLLM reports them by default. Shape letters: R rows, V vocabulary, K tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from router.engine.largest import largest
from router.engine.request import SamplingParams, TokenLogprobs


def logprobs(
    logits_SV: torch.Tensor, params: Sequence[SamplingParams], tokens: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """What each row asks for; None where it asks for nothing or has no token. Rows that do not ask cost nothing."""
    found: list[TokenLogprobs | None] = [None] * len(params)
    rows = [row for row, one in enumerate(params) if one.num_logprobs is not None and tokens[row] is not None]
    if not rows:
        return found
    logits_RV = logits_SV[rows].float()
    logprob_RV = torch.log_softmax(logits_RV, dim=-1)
    counts = [params[row].num_logprobs or 0 for row in rows]
    chosen_R1 = torch.tensor([[tokens[row]] for row in rows], device=logits_SV.device)
    ids_RK = torch.cat([chosen_R1, largest(logits_RV, max(counts))], dim=-1) if any(counts) else chosen_R1
    all_ids, all_logprobs = ids_RK.tolist(), logprob_RV.gather(-1, ids_RK).tolist()
    for row, count, ids, numbers in zip(rows, counts, all_ids, all_logprobs, strict=True):
        top = tuple(zip(ids[1 : count + 1], numbers[1 : count + 1], strict=True))
        found[row] = TokenLogprobs(logprob=numbers[0], top=top)
    return found
