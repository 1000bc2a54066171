"""Rotary position settings of a configuration, in both spellings; knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from experts.fields import Fields


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of type "llama3": long wavelengths are divided by `factor`, a band between is smoothed."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


def parse_rope(fields: Fields, *, default_theta: float, max_position: int) -> tuple[float, RopeScaling | None]:
    """θ and scaling, from `rope_parameters` (v5) or `rope_theta` + `rope_scaling` (v4, which wins where both stand).

    `max_position` is what llama3 scaling takes for a missing original length. Raises InvalidInput.
    """
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    rope = scaling if scaling.raw else parameters
    theta = rope.positive("rope_theta", fields.positive("rope_theta", default_theta))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.error("partial_rotary_factor", "must be 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.error("rope_type", "must be default or llama3")
    return theta, RopeScaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_position=rope.integer("original_max_position_embeddings", max_position),
    )
