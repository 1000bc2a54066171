"""The largest values of rows in one order that nothing disturbs: descending, equal values by ascending index.

`torch.topk` says nothing about equal values, and what it does with them changes with k; logits in bfloat16 are often
equal. Shape letters: S rows, V columns, K columns kept.
"""

from __future__ import annotations

import torch

_LOW_BITS = (1 << 32) - 1


def largest(values_SV: torch.Tensor, count: int) -> torch.Tensor:
    """Column numbers of the `count` largest values of each row, int64 [S, K] with K = min(count, V).

    The first columns of a row do not depend on `count`. `values_SV` is float32; rows with NaN give any columns.
    """
    num_columns = values_SV.shape[-1]
    keys_SV = _keys(values_SV)
    if count < num_columns:
        keys_SK = keys_SV.topk(count, dim=-1).values
    else:
        keys_SK = keys_SV.sort(dim=-1, descending=True).values
    return _LOW_BITS - (keys_SK & _LOW_BITS)


def _keys(values_SV: torch.Tensor) -> torch.Tensor:
    """Distinct integers that are ordered as the values are, and equal values by descending column."""
    # Adding zero makes -0.0, which equals 0.0, look like it. The bits of negative floats grow downwards.
    bits_SV = (values_SV + 0.0).view(torch.int32)
    ordered_SV = bits_SV ^ ((bits_SV >> 31) & 0x7FFFFFFF)
    column_V = torch.arange(values_SV.shape[-1], device=values_SV.device)
    return (ordered_SV.to(torch.int64) << 32) + (_LOW_BITS - column_V)
