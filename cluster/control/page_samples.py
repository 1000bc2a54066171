"""Reads metrics pages: Prometheus's text format, as much of it as is wanted. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import NamedTuple

from cluster.control.prometheus_answer import number

_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"[ \t]*'
_SAMPLE = re.compile(
    r"(?P<metric>[a-zA-Z_:][a-zA-Z0-9_:]*)(?=[ \t{])[ \t]*"
    rf"(?:\{{[ \t]*(?P<labels>(?:{_LABEL},[ \t]*)*(?:{_LABEL})?)\}})?[ \t]*"
    r"(?P<value>[^\s{}]+)(?:[ \t]+-?\d{1,15})?"
)
_EACH = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")


class Sample(NamedTuple):
    """One number of a page; labels in the order of their names."""

    metric: str
    labels: tuple[tuple[str, str], ...]
    value: float


def parse_page(text: str, wanted: Set[str]) -> list[Sample]:
    """The samples of the `wanted` metrics. Raises ValueError when one of them cannot be read or is there twice."""
    samples = list(_samples(text, wanted))
    if len({(sample.metric, sample.labels) for sample in samples}) < len(samples):
        raise ValueError("a sample is there twice")
    return samples


def _samples(text: str, wanted: Set[str]) -> Iterator[Sample]:
    for line in text.split("\n"):
        line = line.strip(" \t\r")
        if line.startswith("#") or re.split(r"[\s{]", line, maxsplit=1)[0] not in wanted:
            continue
        match = _SAMPLE.fullmatch(line)
        if match is None:
            raise ValueError(f"{line[:100]!r} is no sample")
        yield Sample(match["metric"], _labels(match["labels"] or ""), number(match["value"]))


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    labels = [(name, _ESCAPED.sub(lambda one: "\n" if one[1] == "n" else one[1], value))
              for name, value in _EACH.findall(text)]  # fmt: skip
    if len({name for name, _ in labels}) < len(labels):
        raise ValueError("a label is there twice")
    return tuple(sorted(labels))
