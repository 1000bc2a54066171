"""Reads the trunk out of a checkpoint, and the vision tower: every tensor but those of the routed experts."""

from __future__ import annotations

import torch

from experts.checkpoint import Checkpoint
from experts.config import ModelConfig
from experts.ffn import ExpertWeights
from experts.vision_config import NUM_CHANNELS, VisionConfig
from router.model.vision import Affine, VisionLayerWeights, VisionWeights
from router.model.weights import LayerWeights, TrunkWeights


def load_trunk(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> TrunkWeights:
    """Load the trunk in `dtype` to `device`. Raises CheckpointError naming a missing or misshapen tensor."""
    return _TrunkReader(checkpoint, config, dtype, device).trunk()


def load_vision(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> VisionWeights:
    """Load the vision tower of a config that has one. Raises CheckpointError naming a missing or misshapen tensor."""
    assert config.vision is not None, "a text-only model has no vision tower"
    return _VisionReader(checkpoint, config.vision, config.hidden_size, dtype, device).tower()


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


class _VisionReader:
    """Knows the names and shapes of the tower, which have no prefix."""

    def __init__(
        self, checkpoint: Checkpoint, config: VisionConfig, text_hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._text_hidden = text_hidden
        self._dtype = dtype
        self._device = device

    def tower(self) -> VisionWeights:
        config = self._config
        width, between = config.hidden_size, config.adapter_size
        adapter = "vision_model.vision_adapter.mlp."
        return VisionWeights(
            patch_WX=self._read(
                "vision_model.patch_embedding.linear.weight", (width, NUM_CHANNELS * config.patch_size**2)
            ),
            class_W=self._read("vision_model.class_embedding", (width,)),
            position_TW=self._read("vision_model.positional_embedding_vlm", (config.patches_per_side**2 + 1, width)),
            norm_before=self._affine("vision_model.layernorm_pre", (width,)),
            layers=tuple(self._layer(layer) for layer in range(config.num_layers)),
            norm_after=self._affine("vision_model.layernorm_post", (width,)),
            adapter_in_BF=self._read(adapter + "fc1.weight", (between, config.mlp_size)),
            adapter_out_BB=self._read(adapter + "fc2.weight", (between, between)),
            projector_HB=self._read("multi_modal_projector.linear_1.weight", (self._text_hidden, between)),
        )

    def _layer(self, layer: int) -> VisionLayerWeights:
        name = f"vision_model.model.layers.{layer}."
        width, size = self._config.hidden_size, self._config.mlp_size
        parts = [self._affine(f"{name}self_attn.{part}_proj", (width, width)) for part in "qkv"]
        return VisionLayerWeights(
            attention_norm=self._affine(name + "input_layernorm", (width,)),
            qkv=Affine(
                weight=torch.cat([part.weight for part in parts]), bias=torch.cat([part.bias for part in parts])
            ),
            out=self._affine(name + "self_attn.o_proj", (width, width)),
            mlp_norm=self._affine(name + "post_attention_layernorm", (width,)),
            up=self._affine(name + "mlp.fc1", (size, width)),
            down=self._affine(name + "mlp.fc2", (width, size)),
        )

    def _affine(self, name: str, shape: tuple[int, ...]) -> Affine:
        return Affine(weight=self._read(name + ".weight", shape), bias=self._read(name + ".bias", shape[:1]))

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.tensor(name, shape).to(device=self._device, dtype=self._dtype)
