"""What a decode step reads besides weights, keys and values: one buffer of a shape that a bucket of steps shares.

Shape letters: B rows, one token of one sequence each, M blocks of a table, b slots of a block, m = M · b visible slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """`batch` rows, each with tables of `num_blocks[0]` global and `num_blocks[1]` local blocks; 0 of a kind that no
    layer of the model has."""

    batch: int
    num_blocks: tuple[int, int]

    @property
    def size(self) -> int:
        """Numbers in the buffer."""
        return self.batch * (3 + sum(self.num_blocks))


class DecodeInputs:
    """int64 views of the one buffer `flat`, so that filling it is one copy.

    `ids_B` and `positions_B` are the rows' tokens, `live_B` is 1 for rows of sequences and 0 for those that fill the
    shape up, whose other numbers must be 0. `tables_BM[chunked]` are block tables, the local ones from the start of the
    current chunk; what stands behind the block of the row's own token is not looked at.
    """

    def __init__(self, shape: DecodeShape, device: torch.device) -> None:
        self.shape = shape
        self.flat = torch.zeros(shape.size, dtype=torch.int64, device=device)
        batch = shape.batch
        sizes = [batch, batch, batch, *(batch * count for count in shape.num_blocks)]
        self.ids_B, self.positions_B, self.live_B, *tables = torch.split(self.flat, sizes)
        self.tables_BM = tuple(table.view(batch, count) for table, count in zip(tables, shape.num_blocks, strict=True))


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the rows see in layers of one kind: `slots_M` [B · m] to gather, `mask_B11m` to add to their scores, and the
    slots `own_B` of their own tokens."""

    slots_M: torch.Tensor
    mask_B11m: torch.Tensor
    own_B: torch.Tensor


def sight(
    inputs: DecodeInputs,
    *,
    chunked: bool,
    chunk_size: int | None,
    block_size: int,
    blank_slot: int,
    scratch_slot: int,
    dtype: torch.dtype,
) -> Sight:
    """Follow the block tables of a kind.

    Slots that a row does not see are replaced by the blank one: a weight of zero times whatever number stands there
    would not be zero if that is none. Rows that fill the shape up see the blank slot and write to the scratch slot.
    """
    position_B1, live_B1 = inputs.positions_B[:, None], inputs.live_B[:, None] > 0
    first_B1 = position_B1 // chunk_size * chunk_size if chunked and chunk_size else torch.zeros_like(position_B1)
    last_B1 = position_B1 - first_B1
    offset_b = torch.arange(block_size, device=position_B1.device)
    slot_Bm = (inputs.tables_BM[chunked][:, :, None] * block_size + offset_b).flatten(1)
    is_seen_Bm = torch.arange(slot_Bm.shape[1], device=slot_Bm.device) <= last_B1
    mask_Bm = torch.zeros(slot_Bm.shape, dtype=dtype, device=slot_Bm.device).masked_fill(~is_seen_Bm, float("-inf"))
    return Sight(
        slots_M=slot_Bm.masked_fill(~(is_seen_Bm & live_B1), blank_slot).flatten(),
        mask_B11m=mask_Bm[:, None, None, :],
        own_B=slot_Bm.gather(1, last_B1).masked_fill(~live_B1, scratch_slot).squeeze(1),
    )
