"""Reads the trunk out of a checkpoint: every tensor of the text model but the routed experts."""

from __future__ import annotations

import torch

from experts.checkpoint import Checkpoint
from experts.config import ModelConfig
from experts.ffn import ExpertWeights
from router.model.weights import LayerWeights, TrunkWeights


def load_trunk(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> TrunkWeights:
    """Load the trunk in `dtype` to `device`. Raises CheckpointError naming a missing or misshapen tensor."""
    return _TrunkReader(checkpoint, config, dtype, device).trunk()


class _TrunkReader:
    """Knows the names and shapes of SPEC's tensor table."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._device = device

    def trunk(self) -> TrunkWeights:
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        embedding = self._read("model.embed_tokens.weight", shape)
        return TrunkWeights(
            embedding_VH=embedding,
            layers=tuple(self._layer(layer) for layer in range(config.num_layers)),
            norm_H=self._read("model.norm.weight", (config.hidden_size,)),
            head_VH=embedding if config.tie_word_embeddings else self._read("lm_head.weight", shape),
        )

    def _layer(self, layer: int) -> LayerWeights:
        config, name = self._config, f"model.layers.{layer}."
        hidden = config.hidden_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        is_moe = layer in config.moe_layers
        return LayerWeights(
            attention_norm_H=self._read(name + "input_layernorm.weight", (hidden,)),
            qkv_PH=torch.cat(
                [
                    self._read(name + "self_attn.q_proj.weight", (query, hidden)),
                    self._read(name + "self_attn.k_proj.weight", (key, hidden)),
                    self._read(name + "self_attn.v_proj.weight", (key, hidden)),
                ]
            ),
            out_HQ=self._read(name + "self_attn.o_proj.weight", (hidden, query)),
            ffn_norm_H=self._read(name + "post_attention_layernorm.weight", (hidden,)),
            gate_EH=self._read(name + "feed_forward.router.weight", (config.num_experts, hidden)) if is_moe else None,
            ffn=(
                self._ffn(name + "feed_forward.shared_expert.", config.expert_size)
                if is_moe
                else self._ffn(name + "feed_forward.", config.dense_size)
            ),
        )

    def _ffn(self, name: str, size: int) -> ExpertWeights:
        hidden = self._config.hidden_size
        gate = self._read(name + "gate_proj.weight", (size, hidden))
        up = self._read(name + "up_proj.weight", (size, hidden))
        return ExpertWeights(
            gate_up_FH=torch.cat([gate, up]), down_HF=self._read(name + "down_proj.weight", (hidden, size))
        )

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._checkpoint.tensor(self._config.tensor_prefix + name, shape)
        return tensor.to(device=self._device, dtype=self._dtype)
