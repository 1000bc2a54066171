"""What the requests of a load ask: prompts and output lengths, all from a seed. Pure.

Every request draws from a generator of its own, so request i is the same whatever their number.
"""

from __future__ import annotations

import base64
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.load.settings import LoadSettings
from experts.errors import InvalidInput

_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face level
office door health person art war history party result change morning reason research girl guy moment air teacher force
"""
WORDS = tuple(_WORDS.split())
"""Common ones, which most vocabularies write as one token each."""

SPREAD = 0.7
"""Of the logarithm of mixed lengths: two thirds lie within a factor of two of the middle one."""
BOUND = 4
"""Mixed lengths are at most this many times the middle one, and at least the middle one divided by it."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What prompts are made of: ids of ordinary tokens, and how many words a token is worth in texts."""

    ids: Sequence[int]
    words_per_token: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: token ids, or a text with or without a PNG; and how many tokens its answer shall have."""

    prompt: list[int] | str
    max_tokens: int
    png: bytes | None = None


Draw = Callable[[random.Random, int], list[int]]
"""So many units of a prompt: token ids, or indices of words."""


def asks(
    settings: LoadSettings, vocabulary: Vocabulary, first: int, count: int, draw_png: Callable[[int], bytes]
) -> list[Ask]:
    """Requests `first` … `first + count - 1` of the load. `draw_png` makes a picture of a number.

    Raises InvalidInput when a skewed load wants experts that no token of `vocabulary` chooses.
    """
    draw = _units(settings, vocabulary)
    scale = vocabulary.words_per_token if settings.chat else 1.0
    prefixes: dict[int, list[int]] = {}
    made = []
    for index in range(first, first + count):
        generator = random.Random(f"request {settings.seed} {index}")
        num_prompt, num_output = _lengths(settings, generator)
        units: list[int] = []
        if settings.workload == "shared-prefix":
            group = index % settings.groups
            if group not in prefixes:
                shared = random.Random(f"prefix {settings.seed} {group}")
                prefixes[group] = draw(shared, _scaled(settings.prefix, scale))
            units += prefixes[group]
        units += draw(generator, _scaled(num_prompt, scale))
        prompt = " ".join(WORDS[unit] for unit in units) if settings.chat else units
        png = draw_png(index) if settings.workload == "images" else None
        made.append(Ask(prompt=prompt, max_tokens=num_output, png=png))
    return made


def body(settings: LoadSettings, model: str, ask: Ask) -> dict[str, Any]:
    """The JSON of a streamed, greedy request for exactly as many tokens as `ask` says, if the server can do that."""
    asked: dict[str, Any] = {"model": model}
    if settings.chat:
        asked["messages"] = [{"role": "user", "content": _content(ask)}]
    else:
        asked["prompt"] = ask.prompt
    asked |= {"max_tokens": ask.max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return asked if settings.plain else {**asked, "ignore_eos": True, "min_tokens": ask.max_tokens}


def safe_ids(vocab_size: int) -> range:
    """Ids that are ordinary tokens in common vocabularies, which keep special ones at either end."""
    return range(vocab_size // 16, vocab_size - vocab_size // 8)


def _content(ask: Ask) -> str | list[dict[str, Any]]:
    assert isinstance(ask.prompt, str)
    if ask.png is None:
        return ask.prompt
    url = f"data:image/png;base64,{base64.b64encode(ask.png).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ask.prompt}]


def _lengths(settings: LoadSettings, generator: random.Random) -> tuple[int, int]:
    if settings.workload != "mixed":
        return settings.prompt, settings.output
    return _spread(settings.prompt, generator), _spread(settings.output, generator)


def _spread(middle: int, generator: random.Random) -> int:
    drawn = middle * math.exp(generator.gauss(0.0, SPREAD))
    return max(1, round(min(max(drawn, middle / BOUND), middle * BOUND)))


def _scaled(num_tokens: int, scale: float) -> int:
    return max(1, round(num_tokens * scale))


def _units(settings: LoadSettings, vocabulary: Vocabulary) -> Draw:
    if settings.workload == "skewed":
        return _skewed(settings, vocabulary.ids)
    among = range(len(WORDS)) if settings.chat else vocabulary.ids
    return lambda generator, count: generator.choices(among, k=count)


def _skewed(settings: LoadSettings, ids: Sequence[int]) -> Draw:
    """Ids for a steerable checkpoint, where token t chooses expert t % experts: the expert of rank r has a share
    proportional to r ** -zipf. Which expert has which rank is drawn from the seed."""
    groups: list[list[int]] = [[] for _ in range(settings.experts)]
    for token in ids:
        groups[token % settings.experts].append(token)
    empty = [expert for expert, group in enumerate(groups) if not group]
    if empty:
        raise InvalidInput("experts", settings.experts, f"must be few enough: no token at hand chooses {empty[0]}")
    random.Random(f"ranks {settings.seed}").shuffle(groups)
    shares = list(itertools.accumulate(rank**-settings.zipf for rank in range(1, len(groups) + 1)))

    def draw(generator: random.Random, count: int) -> list[int]:
        return [generator.choice(group) for group in generator.choices(groups, cum_weights=shares, k=count)]

    return draw
