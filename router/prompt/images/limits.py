"""How large pictures may be, and what decoding one may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """`max_bytes`, `max_pixels` and `max_side` bound one picture, the others of the first group all of a request.

    The longest side also bounds what resizing takes, since its first pass keeps the height. Decoding one picture may
    take `decode_s` of the processor's time and `memory_bytes`; `patience_s` is how long the clock may run meanwhile,
    on a machine that has other things to do. `num_workers` pictures are decoded at the same time, and `max_waiting`
    requests wait for that.
    """

    max_bytes: int = 20 << 20
    max_pixels: int = 64_000_000
    max_side: int = 1 << 17
    max_images: int = 8
    max_request_pixels: int = 256_000_000
    max_tiles: int = 136

    decode_s: float = 30.0
    patience_s: float = 120.0
    memory_bytes: int = 3 << 29
    num_workers: int = 2
    max_waiting: int = 64
