"""The largest values of rows in one order that nothing disturbs: descending, equal values by ascending column.

`torch.topk` says nothing about equal values, and what it does with them changes with k; logits in bfloat16 are often
equal. Shape letters: S rows, V columns, K columns kept.
"""

from __future__ import annotations

import torch


def largest(values_SV: torch.Tensor, count: int) -> torch.Tensor:
    """Column numbers of the `count` largest values of each row, int64 [S, K] with K = min(count, V).

    The first columns of a row do not depend on `count`. No value may be NaN.
    """
    if count >= values_SV.shape[-1]:
        return values_SV.sort(dim=-1, descending=True, stable=True).indices
    least_S1 = values_SV.topk(count, dim=-1).values[:, -1:]
    kept_SV = values_SV >= least_S1
    too_many = (kept_SV.sum(dim=-1) > count).nonzero().flatten()
    if len(too_many):
        kept_SV[too_many] = _first_of_equals(values_SV[too_many], least_S1[too_many], count)
    columns_SK = kept_SV.nonzero()[:, 1].view(-1, count)
    order_SK = values_SV.gather(-1, columns_SK).sort(dim=-1, descending=True, stable=True).indices
    return columns_SK.gather(-1, order_SK)


def _first_of_equals(values_SV: torch.Tensor, least_S1: torch.Tensor, count: int) -> torch.Tensor:
    """Which columns are kept when not all that equal the least value are: those that come first."""
    above_SV, equal_SV = values_SV > least_S1, values_SV == least_S1
    room_S1 = count - above_SV.sum(dim=-1, keepdim=True)
    return above_SV | (equal_SV & (equal_SV.cumsum(dim=-1) <= room_S1))
