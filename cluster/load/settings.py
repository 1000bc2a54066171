"""What one measured load is: where, how much, in what shape. Checked; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from experts.errors import InvalidInput

WORKLOADS = ("text", "shared-prefix", "mixed", "images", "skewed")
BOUNDS = ("ttft", "tpot", "e2el")
MAX_REQUESTS = 1_000_000
MAX_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What `herd bench serve` was asked for. Lengths in tokens, `goodput` bounds in milliseconds.

    Without `request_rate` (requests/s, inf for all at once) `concurrency` requests are kept under way: a closed loop.
    With it requests come when they come, with gamma distributed gaps whose shape is `burstiness` (1: Poisson; less:
    burstier), and one that finds `max_in_flight` others under way is not sent but counted. `plain` leaves out what
    only some servers know (ignore_eos, min_tokens). Raises InvalidInput.
    """

    url: str
    model: str = ""
    concurrency: int = 8
    request_rate: float | None = None
    burstiness: float = 1.0
    max_in_flight: int = 1024
    requests: int = 64
    warmup: int = 1
    prompt: int = 128
    output: int = 64
    workload: str = "text"
    prefix: int = 1024
    groups: int = 4
    zipf: float = 1.5
    experts: int = 8
    image_size: str = "336x336"
    chat: bool = False
    plain: bool = False
    vocab_size: int | None = None
    goodput: dict[str, float] = field(default_factory=dict)
    timeout_s: float = 600.0
    seed: int = 0
    api_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        if self.workload not in WORKLOADS:
            raise InvalidInput("workload", self.workload, f"must be one of {', '.join(WORKLOADS)}")
        if self.workload == "images" and not self.chat:
            raise InvalidInput("completions", self.workload, "does not go with images, which are shown in chats")
        if self.workload == "skewed" and self.chat:
            raise InvalidInput("chat", self.workload, "does not go with skewed, whose prompts are token ids")
        for name, low, high in _COUNTS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInput(name.replace("_", "-"), value, f"must be between {low} and {high}")
        for name, least, most in _MEASURES:
            measure = getattr(self, name)
            if not (measure is None or least <= measure <= most or (name == "request_rate" and measure == math.inf)):
                raise InvalidInput(name.replace("_", "-"), measure, f"must be between {least:g} and {most:g}")
        if self.vocab_size is not None and self.vocab_size < 64:
            raise InvalidInput("vocab-size", self.vocab_size, "must be at least 64")
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise InvalidInput("api-key", "…", "must be printable ASCII")
        self.image_sides()

    @property
    def base_url(self) -> str:
        """The URL without the "/v1" that OpenAI's clients want and without a slash at the end."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def image_sides(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, _, height = self.image_size.partition("x")
        if not (width.isdecimal() and height.isdecimal() and 1 <= int(width) <= 4096 and 1 <= int(height) <= 4096):
            raise InvalidInput("image-size", self.image_size, "must be WIDTHxHEIGHT, each between 1 and 4096")
        return int(width), int(height)


_COUNTS = (
    ("concurrency", 1, 1 << 16),
    ("max_in_flight", 1, 1 << 16),
    ("requests", 1, MAX_REQUESTS),
    ("warmup", 0, 1000),
    ("prompt", 1, MAX_TOKENS),
    ("output", 1, MAX_TOKENS),
    ("prefix", 1, MAX_TOKENS),
    ("groups", 1, MAX_REQUESTS),
    ("experts", 1, 1 << 16),
    ("seed", 0, 2**63 - 1),
)
_MEASURES = (
    ("request_rate", 1e-6, 1e6),
    ("burstiness", 1e-3, 1e3),
    ("zipf", 1e-3, 100.0),
    ("timeout_s", 1e-3, 1e6),
)
"""Far beyond what anybody measures, and near enough that no arithmetic overflows."""


def load_settings(given: Mapping[str, Any]) -> LoadSettings:
    """Settings from the command line's options, those that were given. Raises InvalidInput."""
    values = dict(given)
    if "concurrency" in values and "request_rate" in values:
        raise InvalidInput("concurrency", values["concurrency"], "does not go with request-rate")
    for name in ("burstiness", "max_in_flight"):
        if name in values and "request_rate" not in values:
            raise InvalidInput(name.replace("_", "-"), values[name], "goes with request-rate alone")
    if "goodput" in values:
        values["goodput"] = parse_goodput(values["goodput"])
    in_completions = values.pop("completions", False)
    values.setdefault("chat", values.get("workload") == "images" and not in_completions)
    return LoadSettings(**values)


def check_url(url: str) -> None:
    """Raises InvalidInput unless `url` is an http or https URL with a host and at most a path."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.query or parts.fragment or parts.username is not None:
        raise InvalidInput("url", url, "must be like http://127.0.0.1:8000")


def parse_goodput(text: str) -> dict[str, float]:
    """Bounds in milliseconds out of "ttft:200,tpot:50,e2el:5000", any of the three. Raises InvalidInput."""
    bounds: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        name, _, number = part.partition(":")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if name not in BOUNDS or name in bounds or not 0 < bound < math.inf:
            raise InvalidInput("goodput", text, "must be like ttft:200,tpot:50,e2el:5000 (milliseconds)")
        bounds[name] = bound
    if not bounds:
        raise InvalidInput("goodput", text, "must be like ttft:200,tpot:50,e2el:5000 (milliseconds)")
    return bounds
