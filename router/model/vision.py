"""The vision tower: tiles of pixels in, tokens of the text decoder out. Every tile is encoded on its own.

Knows nothing of images, prompts and files.
Shape letters: N tiles, C channels, S tile side, P patches of a tile, X numbers in a patch, T = P + 1 tokens with the
class token last, W tower width, A heads, D head dimension, F mlp size, M tokens per tile, B adapter width, H text
hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experts.vision_config import VisionConfig
from router.model.rope import rotate

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Weight and bias of a linear layer [out, in] and [out], or of a layer norm [W] and [W]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, NORM_EPS)


@dataclass(frozen=True, kw_only=True)
class VisionLayerWeights:
    """One block of the tower. `qkv` stacks the query, key and value projections."""

    attention_norm: Affine
    qkv: Affine
    out: Affine
    mlp_norm: Affine
    up: Affine
    down: Affine


@dataclass(frozen=True, kw_only=True)
class VisionWeights:
    """The tower, its adapter and the projector to the text decoder. `patch_WX` reads a patch laid out (C, y, x)."""

    patch_WX: torch.Tensor
    class_W: torch.Tensor
    position_TW: torch.Tensor
    norm_before: Affine
    layers: tuple[VisionLayerWeights, ...]
    norm_after: Affine
    adapter_in_BF: torch.Tensor
    adapter_out_BB: torch.Tensor
    projector_HB: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_WX.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_WX.device


def encode_tiles(pixels_NCSS: torch.Tensor, weights: VisionWeights, config: VisionConfig) -> torch.Tensor:
    """[N, M, H] tokens of normalised pixels (−1 … 1), in the weights' dtype and on their device."""
    x_NTW = add_class_token(embed_patches(pixels_NCSS, weights, config), weights)
    rotation = patch_rotations(config).to(weights.device)
    for layer in weights.layers:
        x_NTW = vision_block(x_NTW, layer, config, rotation)
    return F.linear(adapt(x_NTW, weights, config), weights.projector_HB)


def embed_patches(pixels_NCSS: torch.Tensor, weights: VisionWeights, config: VisionConfig) -> torch.Tensor:
    """[N, P, W]: the patches of each tile, row by row."""
    side, patch = config.patches_per_side, config.patch_size
    num_tiles, channels = pixels_NCSS.shape[:2]
    cut = pixels_NCSS.reshape(num_tiles, channels, side, patch, side, patch)
    patches_NPX = cut.permute(0, 2, 4, 1, 3, 5).reshape(num_tiles, side * side, channels * patch * patch)
    return F.linear(patches_NPX.to(weights.dtype), weights.patch_WX)


def add_class_token(patches_NPW: torch.Tensor, weights: VisionWeights) -> torch.Tensor:
    """[N, T, W]: the tower's input, the class token behind the patches."""
    class_N1W = weights.class_W.expand(patches_NPW.shape[0], 1, -1)
    return weights.norm_before.norm(torch.cat([patches_NPW, class_N1W], dim=1) + weights.position_TW)


def vision_block(
    x_NTW: torch.Tensor, layer: VisionLayerWeights, config: VisionConfig, rotation: torch.Tensor
) -> torch.Tensor:
    """One pre-norm block: every token of a tile attends to all of them."""
    x_NTW = x_NTW + _attention(layer.attention_norm.norm(x_NTW), layer, config, rotation)
    return x_NTW + layer.down.linear(F.gelu(layer.up.linear(layer.mlp_norm.norm(x_NTW))))


def _attention(
    x_NTW: torch.Tensor, layer: VisionLayerWeights, config: VisionConfig, rotation: torch.Tensor
) -> torch.Tensor:
    heads = layer.qkv.linear(x_NTW).view(*x_NTW.shape[:2], 3, config.num_heads, config.head_dim)
    query_NTAD, key_NTAD, value_NTAD = heads.unbind(2)
    mixed_NATD = F.scaled_dot_product_attention(
        rotate(query_NTAD, rotation).transpose(1, 2),
        rotate(key_NTAD, rotation).transpose(1, 2),
        value_NTAD.transpose(1, 2),
    )
    return layer.out.linear(mixed_NATD.transpose(1, 2).flatten(2))


def patch_rotations(config: VisionConfig) -> torch.Tensor:
    """complex64 [T, 1, D/2]: the first half of a head's pairs turns by the patch's column, the second by its row, both
    counted from 1; the class token does not turn."""
    side, half = config.patches_per_side, config.head_dim // 2
    frequency = 1.0 / (config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    patch = torch.arange(side * side)
    column, row = patch % side + 1, patch // side + 1
    angle = torch.cat([column[:, None] * frequency, row[:, None] * frequency], dim=1)
    angle = F.pad(angle, (0, 0, 0, 1))
    return torch.polar(torch.ones_like(angle), angle)[:, None, :]


def adapt(x_NTW: torch.Tensor, weights: VisionWeights, config: VisionConfig) -> torch.Tensor:
    """[N, M, B]: the tower's output without the class token, shuffled and passed through the adapter."""
    features_NPW = weights.norm_after.norm(x_NTW)[:, :-1]
    inner = F.gelu(F.linear(pixel_shuffle(features_NPW, config), weights.adapter_in_BF))
    # HF applies the activation after both layers of the adapter.
    return F.gelu(F.linear(inner, weights.adapter_out_BB))


def pixel_shuffle(features_NPW: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    """[N, M, F]: neighbouring patches side by side in one token, row by row inside it and among tokens."""
    num_tiles, _, width = features_NPW.shape
    near = config.shuffle
    side = config.patches_per_side // near
    grid = features_NPW.reshape(num_tiles, side, near, side, near, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(num_tiles, side * side, near * near * width)
