"""The root-mean-square norm."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Over the last dimension: statistics in float32, the product with `weight` after the cast back, as the reference
    does."""
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight
