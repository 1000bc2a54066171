"""Reads the trunk out of a checkpoint, and the vision tower: every tensor but those of the routed experts."""

from __future__ import annotations

import torch

from experts.checkpoint import Checkpoint
from experts.config import ModelConfig
from experts.ffn import ExpertWeights
from experts.tensor_names import EMBEDDING, HEAD, expected_tensors, optional_tensors
from router.model.vision import Affine, VisionLayerWeights, VisionWeights
from router.model.weights import LayerWeights, TrunkWeights


def load_trunk(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> TrunkWeights:
    """Load the trunk in `dtype` to `device`. Raises CheckpointError naming a missing or misshapen tensor."""
    reader = _Reader(checkpoint, config, dtype, device)
    embedding = reader.text(EMBEDDING)
    return TrunkWeights(
        embedding_VH=embedding,
        layers=tuple(_layer(reader, layer, layer in config.moe_layers) for layer in range(config.num_layers)),
        norm_H=reader.text("model.norm.weight"),
        head_VH=_head(reader, embedding),
    )


def _head(reader: _Reader, embedding_VH: torch.Tensor) -> torch.Tensor:
    """The head of the file, which may differ from an embedding that the config ties it to; else that embedding."""
    if not reader.has_text(HEAD):
        return embedding_VH
    head_VH = reader.text(HEAD)
    # Equal ones share their memory.
    return embedding_VH if torch.equal(head_VH, embedding_VH) else head_VH


def load_vision(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> VisionWeights:
    """Load the vision tower of a config that has one. Raises CheckpointError naming a missing or misshapen tensor."""
    assert config.vision is not None, "a text-only model has no vision tower"
    reader = _Reader(checkpoint, config, dtype, device)
    return VisionWeights(
        patch_WX=reader.plain("vision_model.patch_embedding.linear.weight"),
        class_W=reader.plain("vision_model.class_embedding"),
        position_TW=reader.plain("vision_model.positional_embedding_vlm"),
        norm_before=_affine(reader, "vision_model.layernorm_pre"),
        layers=tuple(_vision_layer(reader, layer) for layer in range(config.vision.num_layers)),
        norm_after=_affine(reader, "vision_model.layernorm_post"),
        adapter_in_BF=reader.plain("vision_model.vision_adapter.mlp.fc1.weight"),
        adapter_out_BB=reader.plain("vision_model.vision_adapter.mlp.fc2.weight"),
        projector_HB=reader.plain("multi_modal_projector.linear_1.weight"),
    )


class _Reader:
    """Reads tensors in the shapes that the config promises."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        # What may be absent is not looked for.
        found = {name: shape for name, shape in optional_tensors(config).items() if name in checkpoint}
        self._shapes = {**expected_tensors(config), **found}
        self._prefix = config.tensor_prefix
        self._dtype = dtype
        self._device = device

    def has_text(self, name: str) -> bool:
        """Whether `text` may be asked for a tensor."""
        return self._prefix + name in self._shapes

    def text(self, name: str) -> torch.Tensor:
        """A tensor of the text model, whose names have a prefix in a multimodal checkpoint."""
        return self.plain(self._prefix + name)

    def plain(self, name: str) -> torch.Tensor:
        """A tensor by its whole name."""
        return self._checkpoint.tensor(name, self._shapes[name]).to(device=self._device, dtype=self._dtype)


def _layer(reader: _Reader, layer: int, is_moe: bool) -> LayerWeights:
    name = f"model.layers.{layer}."
    projections = [reader.text(f"{name}self_attn.{part}_proj.weight") for part in "qkv"]
    return LayerWeights(
        attention_norm_H=reader.text(name + "input_layernorm.weight"),
        qkv_PH=torch.cat(projections),
        out_HQ=reader.text(name + "self_attn.o_proj.weight"),
        ffn_norm_H=reader.text(name + "post_attention_layernorm.weight"),
        gate_EH=reader.text(name + "feed_forward.router.weight") if is_moe else None,
        ffn=_ffn(reader, name + ("feed_forward.shared_expert." if is_moe else "feed_forward.")),
    )


def _ffn(reader: _Reader, name: str) -> ExpertWeights:
    gate, up = reader.text(name + "gate_proj.weight"), reader.text(name + "up_proj.weight")
    return ExpertWeights(gate_up_FH=torch.cat([gate, up]), down_HF=reader.text(name + "down_proj.weight"))


def _vision_layer(reader: _Reader, layer: int) -> VisionLayerWeights:
    name = f"vision_model.model.layers.{layer}."
    parts = [_affine(reader, f"{name}self_attn.{part}_proj") for part in "qkv"]
    return VisionLayerWeights(
        attention_norm=_affine(reader, name + "input_layernorm"),
        qkv=Affine(weight=torch.cat([part.weight for part in parts]), bias=torch.cat([part.bias for part in parts])),
        out=_affine(reader, name + "self_attn.o_proj"),
        mlp_norm=_affine(reader, name + "post_attention_layernorm"),
        up=_affine(reader, name + "mlp.fc1"),
        down=_affine(reader, name + "mlp.fc2"),
    )


def _affine(reader: _Reader, name: str) -> Affine:
    return Affine(weight=reader.plain(name + ".weight"), bias=reader.plain(name + ".bias"))
