"""Rotary position settings of a configuration, in both spellings; knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experts.fields import Fields

_KEYS = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"))
"""One of them at least is in every object of rotary parameters."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of type "llama3": long wavelengths are divided by `factor`, a band between is smoothed."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


def parse_rope(fields: Fields, *, default_theta: float, max_position: int) -> tuple[float, RopeScaling | None]:
    """θ and scaling, from `rope_parameters` (v5) or `rope_theta` + `rope_scaling` (v4, which wins where both stand).

    `max_position` is what llama3 scaling takes for a missing original length; one beside the object wins over the
    one inside. Raises InvalidInput.
    """
    name = "rope_scaling" if fields.nested("rope_scaling").raw else "rope_parameters"
    rope = fields.nested(name)
    if rope.raw and (_KEYS.isdisjoint(rope.raw) or any(isinstance(value, Mapping) for value in rope.raw.values())):
        raise fields.error(name, "must be one set of rotary parameters for all layers")
    theta = rope.positive("rope_theta", fields.positive("rope_theta", default_theta))
    part = rope if "partial_rotary_factor" in rope.raw else fields
    if part.number("partial_rotary_factor", 1.0) != 1.0:
        raise part.error("partial_rotary_factor", "must be 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.error("rope_type", "must be default or llama3")
    source = fields if "original_max_position_embeddings" in fields.raw else rope
    return theta, RopeScaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_position=source.integer("original_max_position_embeddings", max_position),
    )
