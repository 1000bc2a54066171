"""How products of rows and weights are computed: plainly, or so that bits depend on nothing but the row.

Torch only, no I/O. Shape letters: T rows, R rows grouped by expert, K inputs, N outputs, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from experts.ffn import ExpertWeights, expert_ffn

TILE_ROWS = 32
EVEN_ELEMENTS = 128
"""Elementwise functions of torch take this many elements at a time, and what is left over another way, whose last bit
may differ."""


class Arithmetic(Protocol):
    """Everything that is computed row by row. Results are in the dtype of the rows."""

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """x W^T, [T, N]."""
        ...

    def ffn(self, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
        """[R, H]: the first `counts[0]` rows through `experts[0]`, and so on. No count is 0."""
        ...

    def choose(
        self, x_TH: torch.Tensor, gate_EH: torch.Tensor, num_choices: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The gate's choice in one go: experts [T, K], ascending, and their scores; None: it is to be made of `linear`
        and torch."""
        ...

    def norm(self, x_TH: torch.Tensor, eps: float, weight_H: torch.Tensor) -> torch.Tensor:
        """The root-mean-square norm; see `rms_norm`."""
        ...

    def by_rows(
        self, function: Callable[..., tuple[torch.Tensor, ...]], *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`function` of tensors that have T rows each, giving tensors of T rows, row by row independent."""
        ...


class PlainArithmetic:
    """Torch's own products, the readable version of every other."""

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TK, weight_NK)

    def ffn(self, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
        parts = torch.split(rows_RH, list(counts))
        return torch.cat([expert_ffn(weights, part) for weights, part in zip(experts, parts, strict=True)])

    def choose(
        self, x_TH: torch.Tensor, gate_EH: torch.Tensor, num_choices: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def norm(self, x_TH: torch.Tensor, eps: float, weight_H: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TH, eps, weight_H)

    def by_rows(
        self, function: Callable[..., tuple[torch.Tensor, ...]], *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return function(*rows)


class TiledArithmetic:
    """Everything in tiles of a fixed number of rows, the last one filled up with zeros.

    Kernels sum in an order that depends on the number of rows, and on no other row: at one number of rows, a row's
    result is the same bits beside whatever it is computed. Needs one thread, since threads cut tiles anywhere.
    """

    def __init__(self, widths: Sequence[int] = ()) -> None:
        """`widths` are those of the rows that will come."""
        self.tile_rows = TILE_ROWS
        while any(_is_uneven(self.tile_rows * width) for width in widths):
            self.tile_rows *= 2

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        [y_TN] = self.by_rows(lambda x: (F.linear(x, weight_NK),), x_TK)
        return y_TN

    def ffn(self, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
        parts = torch.split(rows_RH, list(counts))
        return torch.cat(
            [self._ffn_of_one(weights, part) for weights, part in zip(experts, parts, strict=True)],
        )

    def choose(
        self, x_TH: torch.Tensor, gate_EH: torch.Tensor, num_choices: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def norm(self, x_TH: torch.Tensor, eps: float, weight_H: torch.Tensor) -> torch.Tensor:
        [y_TH] = self.by_rows(lambda x: (rms_norm(x, eps, weight_H),), x_TH)
        return y_TH

    def _ffn_of_one(self, weights: ExpertWeights, x_TH: torch.Tensor) -> torch.Tensor:
        [y_TH] = self.by_rows(lambda x: (expert_ffn(weights, x),), x_TH)
        return y_TH

    def by_rows(
        self, function: Callable[..., tuple[torch.Tensor, ...]], *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        num_rows, size = rows[0].shape[0], self.tile_rows
        tiles = [function(*(_tile(x, start, size) for x in rows)) for start in range(0, num_rows, size)]
        return tuple(torch.cat(parts)[:num_rows] for parts in zip(*tiles, strict=True))


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Over the last dimension: statistics in float32, the product with `weight` after the cast back, as the reference
    does."""
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def _is_uneven(num_elements: int) -> bool:
    # Few elements are all left over, and so all alike.
    return num_elements >= EVEN_ELEMENTS // 2 and num_elements % EVEN_ELEMENTS > 0


def _tile(x: torch.Tensor, start: int, size: int) -> torch.Tensor:
    # Contiguous, since kernels may go about other layouts in other ways.
    tile = x[start : start + size].contiguous()
    if tile.shape[0] == size:
        return tile
    filled = x.new_zeros((size, *x.shape[1:]))
    filled[: tile.shape[0]] = tile
    return filled
