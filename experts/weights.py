"""The expert store: one expert's weights out of a checkpoint, ready for the host's matmuls."""

from __future__ import annotations

import torch

from experts.checkpoint import Checkpoint
from experts.config import ModelConfig
from experts.ffn import ExpertWeights
from experts.placement import ExpertKey
from experts.stack import ExpertStack
from experts.tensor_names import expected_tensors


class ExpertStore:
    """Loads (layer, expert) in `dtype` to `device`. Stateless and safe to use from several threads."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._shapes = expected_tensors(config)
        self.dtype = dtype
        self.device = torch.device(device)

    def load(self, layer: int, expert: int) -> ExpertWeights:
        """Read one expert. Raises CheckpointError naming the tensor when it is missing or misshapen.

        The files hold [in, out] matrices of all experts of a layer; an expert is sliced out and turned to
        [out, in], which the matmul of few rows reads faster.
        """
        config = self._config
        assert layer in config.moe_layers, layer
        assert 0 <= expert < config.num_experts, expert
        prefix = f"{config.tensor_prefix}model.layers.{layer}.feed_forward.experts."
        gate_up_HF = self._row(prefix + "gate_up_proj", expert)
        down_FH = self._row(prefix + "down_proj", expert)
        return ExpertWeights(
            gate_up_FH=gate_up_HF.to(self.device, self.dtype).t().contiguous(),
            down_HF=down_FH.to(self.device, self.dtype).t().contiguous(),
        )

    def load_layer(self, layer: int) -> ExpertStack:
        """All experts of an MoE layer in two tensors. Raises CheckpointError as `load` does."""
        first = self.load(layer, 0)
        stack = ExpertStack.empty(self._config.num_experts, first)
        stack.put(0, first)
        for expert in range(1, self._config.num_experts):
            stack.put(expert, self.load(layer, expert))
        return stack

    def _row(self, name: str, index: int) -> torch.Tensor:
        return self._checkpoint.row(name, index, self._shapes[name])

    def all_keys(self) -> list[ExpertKey]:
        """Every (layer, expert) of the model, in order."""
        return [(layer, expert) for layer in self._config.moe_layers for expert in range(self._config.num_experts)]
