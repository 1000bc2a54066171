"""The files of a model folder that say how text becomes tokens, read without any tokenizer's library.

Meta's `tokenizer.model` holds ordinary tokens only; Llama 4's special ones follow them by their names and order alone.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experts.errors import CheckpointError
from experts.model_files import read_file, read_json, why

TOKENIZER_FILE = "tokenizer.json"
RANKS_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_MAP_FILE = "special_tokens_map.json"
MAX_FILE_BYTES = 64 << 20
NUM_SPECIALS = 2048

_LOOKS_SPECIAL = re.compile(r"<\|.*\|>", re.DOTALL)


def special_ids(model_dir: Path) -> dict[str, int]:
    """Ids of control tokens by text, of whichever file a tokenizer would be made from; empty without any.

    Raises CheckpointError; that the rest of the file makes a tokenizer is not looked at.
    """
    spec = read_json(model_dir / TOKENIZER_FILE)
    if spec is not None:
        try:
            return control_ids(spec.get("added_tokens") or ())
        except (KeyError, TypeError) as error:
            raise CheckpointError(TOKENIZER_FILE, f"has a field of the wrong kind ({error})") from error
    if (model_dir / RANKS_FILE).exists():
        return specials_after(len(read_ranks(model_dir / RANKS_FILE)))
    return {}


def control_ids(added_tokens: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Ids by text of the control tokens among those that a tokenizer.json adds."""
    return {token["content"]: token["id"] for token in added_tokens if is_control(token)}


def is_control(token: Mapping[str, Any]) -> bool:
    """Tokens marked special, and those of the shape `<|...|>`."""
    return bool(token["special"]) or _LOOKS_SPECIAL.fullmatch(token["content"]) is not None


def specials_after(num_tokens: int) -> dict[str, int]:
    """Ids by text of Llama 4's special tokens behind so many ordinary ones."""
    return {name: num_tokens + index for index, name in enumerate(special_names())}


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


def read_ranks(path: Path) -> list[bytes]:
    """Ordinary tokens in the order of their ranks. Raises CheckpointError naming the file, and the line where there is
    one to blame."""
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
