"""The vocabulary in Meta's `tokenizer.model`: a file of ranks, through tiktoken, and Llama 4's special tokens.

The file holds ordinary tokens only; the special ones follow them by their names and order alone.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import tiktoken

from experts.errors import CheckpointError
from experts.model_files import read_file, why

MAX_FILE_BYTES = 64 << 20
MAX_PIECE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
"""Longest runs of space, or of anything else, that tiktoken is given: longer ones overflow its stack."""

NUM_SPECIALS = 2048

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
        self.special_ids: Mapping[str, int] = MappingProxyType(
            {name: len(tokens) + index for index, name in enumerate(special_names())}
        )
        self.hidden_ids = frozenset(self.special_ids.values())
        self.named: Mapping[str, str] = MappingProxyType(
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad|>"}
        )
        self.vocab_size = len(tokens) + NUM_SPECIALS
        self._bos_id = self.special_ids["<|begin_of_text|>"]

    @classmethod
    def from_file(cls, path: Path) -> RankVocabulary:
        """Raises CheckpointError naming the file, and the line where there is one to blame."""
        return cls(_read_tokens(path))

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


def special_names() -> list[str]:
    """Names of Llama 4's special tokens in the order of their ids."""
    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    names += ["header_start", "header_end", "eom", "eot", "step", *_reserved("text_post_train_", 0, 6)]
    # Two of the reserved tokens became Python's.
    names += ["python_start", "python_end", "finetune_right_pad", *_reserved("text_post_train_", 8, 69)]
    names += ["image_start", "image_end", *_reserved("vision_", 0, 2), "tile_x_separator", "tile_y_separator"]
    names += [*_reserved("vision_", 2, 6), "image", *_reserved("vision_", 6, 7), "patch"]
    names += [*_reserved("vision_", 7, 1048), *_reserved("reasoning_", 0, 8)]
    names += ["reasoning_thinking_start", "reasoning_thinking_end", *_reserved("", 0, 904)]
    assert len(names) == NUM_SPECIALS
    return [f"<|{name}|>" for name in names]


def _reserved(family: str, first: int, end: int) -> list[str]:
    return [f"{family}reserved_special_token_{number}" for number in range(first, end)]


def _read_tokens(path: Path) -> list[bytes]:
    """Tokens in the order of their ranks."""
    try:
        lines = read_file(path, MAX_FILE_BYTES).splitlines()
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {why(error)}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if line:
            token, rank = _parse_line(line, f"{path.name}, line {number}")
            if ranks.setdefault(token, rank) != rank:
                raise CheckpointError(f"{path.name}, line {number}", "repeats a token with another rank")
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(path.name, "must rank its tokens 0, 1, 2, … without a gap or a repetition")
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise CheckpointError(path.name, f"must have a token for each byte; {len(missing)} bytes have none")
    return tokens


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    try:
        encoded, rank = line.split()
        if len(rank) > 9 or not rank.isdigit():
            raise ValueError(rank)
        token = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error):
        raise CheckpointError(where, "must be a token in base64 and its rank") from None
    if not token:
        raise CheckpointError(where, "must not be an empty token")
    return token, int(rank)
