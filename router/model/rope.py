"""Rotary positions and the temperature of NoPE layers: everything that depends on absolute position.

Computed per position in float32, as the reference does: no table sized by the longest context exists.
Shape letters: T tokens, D head dimension.
"""

from __future__ import annotations

import math

import torch

from experts.config import ModelConfig
from experts.rope_config import RopeScaling


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [D/2] radians per position of each pair, scaled as the config says."""
    dims = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequency = 1.0 / (config.rope_theta ** (dims / config.head_dim))
    return frequency if config.rope_scaling is None else _llama3(frequency, config.rope_scaling)


def _llama3(frequency: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths / factor, short ones untouched, a linear blend between (empty when low == high)."""
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    scaled = torch.where(wavelength > longest, frequency / scaling.factor, frequency)
    if scaling.high_freq_factor == scaling.low_freq_factor:
        return scaled
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = (1 - blend) * scaled / scaling.factor + blend * scaled
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, smooth, scaled)


def rotations(positions_T: torch.Tensor, inverse_frequency: torch.Tensor) -> torch.Tensor:
    """complex64 [T, 1, D/2]: the rotation of each pair at each position, ready to broadcast over heads."""
    angle = positions_T[:, None].float() * inverse_frequency
    return torch.polar(torch.ones_like(angle), angle)[:, None, :]


def rotate(x_TND: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs (x[2i], x[2i+1]) of every head, in float32."""
    pairs = torch.view_as_complex(x_TND.float().reshape(*x_TND.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x_TND.dtype)


def temperatures(positions_T: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """float32 [T, 1, 1]: the factor on queries of NoPE layers, 1 until position floor_scale − 1."""
    steps = torch.floor((positions_T.float() + 1.0) / config.floor_scale)
    return (torch.log1p(steps) * config.attn_scale + 1.0)[:, None, None]
