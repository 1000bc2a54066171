"""Keys and values of every layer. Which slots belong to which request is decided elsewhere.

Shape letters: S slots, m visible keys, G key/value heads, D head dimension.
"""

from __future__ import annotations

import torch

from experts.config import ModelConfig
from router.model.spans import Runs

SPARE_SLOTS = 2


class KVStore:
    """A *slot* holds keys and values of one token; chunked layers have slots of their own, fewer than the others.

    Behind the slots of each kind are two more for rows that only fill a shape: a *blank* one, which holds zeros and is
    never written, and a *scratch* one, which is never read.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_global_slots: int,
        num_local_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._num_slots = (num_global_slots, num_local_slots)
        # Not zeroed: a slot is only read once it was written, and pages of a CPU's memory are taken when first touched.
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for chunked in config.chunked_layers:
            shape = (self._num_slots[chunked] + SPARE_SLOTS, config.num_kv_heads, config.head_dim)
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            for part in (keys, values):
                part[self.blank_slot(chunked)] = 0
            self._layers.append((keys, values))

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, G, D] of all slots."""
        return self._layers[layer]

    def blank_slot(self, chunked: bool) -> int:
        return self._num_slots[chunked]

    def scratch_slot(self, chunked: bool) -> int:
        return self._num_slots[chunked] + 1


def gather(layer_SGD: torch.Tensor, runs: Runs) -> torch.Tensor:
    """[m, G, D]: the slots of `runs` in their order; a view where they are one run."""
    parts = [layer_SGD[run.start : run.stop] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
