"""The vocabulary in Meta's `tokenizer.model`: a file of ranks, through tiktoken, and Llama 4's special tokens.

The file holds ordinary tokens only; the special ones follow them by their names and order alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import tiktoken

from router.prompt.tokenizer_files import NUM_SPECIALS, specials_after

MAX_PIECE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
"""Longest runs of space, or of anything else, that tiktoken is given: longer ones overflow its stack."""

_WORD_START, _WORD_END = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT_FORM = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD_START}*{_WORD_END}+{_SHORT_FORM}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD_START}+{_WORD_END}*{_SHORT_FORM}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is cut before merging; o200k's pattern."""

_RUNS = re.compile(r"\s+|\S+")


class RankVocabulary:
    """See `Vocabulary`. Ordinary tokens are numbered by rank; Llama 4's 2,048 special tokens follow."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """`tokens` in the order of their ranks, all single bytes among them."""
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._tokens = tuple(tokens)
        self._encoding = tiktoken.Encoding("llama4", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.special_ids: Mapping[str, int] = MappingProxyType(specials_after(len(tokens)))
        self.hidden_ids = frozenset(self.special_ids.values())
        self.named: Mapping[str, str] = MappingProxyType(
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad|>"}
        )
        self.vocab_size = len(tokens) + NUM_SPECIALS
        self._bos_id = self.special_ids["<|begin_of_text|>"]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [self._bos_id] if add_special_tokens else []
        for piece in pieces(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id] if token_id < len(self._tokens) else b""


def pieces(text: str) -> Iterator[str]:
    """`text` cut where tiktoken needs it, as Meta cuts it: only extreme text has more than one piece."""
    for start in range(0, len(text), MAX_PIECE_CHARS):
        part = text[start : start + MAX_PIECE_CHARS]
        begin = 0
        for cut in _cuts(part):
            yield part[begin:cut]
            begin = cut
        yield part[begin:]


def _cuts(text: str) -> Iterator[int]:
    """Places inside runs that are too long, counted from each run's start."""
    if len(text) > MAX_RUN_CHARS:
        for run in _RUNS.finditer(text):
            yield from range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS)
