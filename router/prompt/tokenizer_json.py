"""The vocabulary in a `tokenizer.json`, through the tokenizers library; control tokens are never found in text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import tokenizers

from experts.errors import CheckpointError
from router.prompt.byte_alphabet import to_bytes
from router.prompt.tokenizer_files import control_ids, is_control


class JsonVocabulary:
    """See `Vocabulary`. Decoding hides what the library hides, so a `<|...|>` not marked special stays visible."""

    def __init__(self, spec: Mapping[str, Any], *, file: str) -> None:
        """`spec` is the content of `file`. Raises CheckpointError when it is damaged or not byte-level."""
        try:
            _require_byte_level(spec, file)
            self._plain = _plain_tokenizer(spec, file)
            added = spec.get("added_tokens") or ()
            self.special_ids: Mapping[str, int] = MappingProxyType(control_ids(added))
            self.hidden_ids = frozenset(token["id"] for token in added if token["special"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(file, f"has a field of the wrong kind ({error})") from error
        self.named: Mapping[str, str] = MappingProxyType({})
        self.vocab_size = 1 + max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The file's post-processor adds its special tokens."""
        # A batch of one: it leaves other threads running, and places of tokens in the text are not worked out.
        batch = self._plain.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        token = self._plain.id_to_token(token_id)
        return b"" if token is None else to_bytes(token)


def _plain_tokenizer(spec: Mapping[str, Any], file: str) -> tokenizers.Tokenizer:
    """The tokenizer of `spec` that takes no text for a control token.

    Control tokens are switched off, not dropped: dropping them would renumber the added tokens behind them.
    """
    added = [{**token, "special": is_control(token)} for token in spec.get("added_tokens") or ()]
    plain_spec = {**spec, "added_tokens": added, "truncation": None, "padding": None}
    try:
        plain = tokenizers.Tokenizer.from_str(json.dumps(plain_spec))
    # The library raises plain Exception for every kind of damage.
    except Exception as error:
        raise CheckpointError(file, f"is refused by the tokenizers library ({error})") from error
    plain.encode_special_tokens = True
    for token in added:
        if plain.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(file, f"added token {token['content']!r} cannot have id {token['id']}")
    return plain


def _require_byte_level(spec: Mapping[str, Any], file: str) -> None:
    """Bytes of single tokens are known only when both directions go through the byte alphabet."""
    splits = _kinds(spec.get("pre_tokenizer"), "pretokenizers")
    joins = _kinds(spec.get("decoder"), "decoders")
    if "ByteLevel" not in splits or "ByteLevel" not in joins or set(joins) - {"ByteLevel", "Fuse"}:
        found = f"pre-tokenizer {' + '.join(splits) or 'none'}, decoder {' + '.join(joins) or 'none'}"
        raise CheckpointError(file, f"must be byte-level, as Llama 4's tokenizer is (found {found})")


def _kinds(part: Any, members: str) -> list[str]:
    """Type names of a component, a Sequence flattened."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") == "Sequence":
        return [kind for member in part.get(members) or () for kind in _kinds(member, members)]
    return [str(part.get("type"))]
