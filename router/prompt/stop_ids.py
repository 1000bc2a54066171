"""Which tokens end an answer by themselves: what the generation config names, else what config and tokenizer imply."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from experts.config import token_ids
from experts.errors import CheckpointError, InvalidInput
from experts.model_files import read_json
from router.prompt.tokenizer_files import special_ids

GENERATION_FILE = "generation_config.json"
END_TOKENS = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
"""How text, a message that has a successor, and a turn end in Llama 4."""


def default_stop_ids(model_dir: Path, config_ids: Iterable[int]) -> frozenset[int]:
    """Stop ids of a folder whose config.json names `config_ids`.

    As in transformers, a generation config that names any has the only word. Without one, Llama 4's end tokens count
    too, since many a config holds only its class's default, which ends nothing. Raises CheckpointError.
    """
    named = _generation_ids(model_dir)
    if named:
        return named
    ids = special_ids(model_dir)
    return frozenset(config_ids).union(ids[name] for name in END_TOKENS if name in ids)


def _generation_ids(model_dir: Path) -> frozenset[int]:
    config = read_json(model_dir / GENERATION_FILE) or {}
    try:
        return frozenset(token_ids("eos_token_id", config.get("eos_token_id")))
    except InvalidInput as error:
        raise CheckpointError(GENERATION_FILE, str(error)) from error
