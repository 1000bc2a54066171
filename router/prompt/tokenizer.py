"""Text to token ids and back for a model folder. Knows nothing of messages, HTTP or models.

Text is always plain: a special token's name inside it is spelled in ordinary tokens, never turned into its id.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from experts.errors import CheckpointError, InvalidInput
from experts.model_files import read_json
from router.prompt.byte_alphabet import to_chars
from router.prompt.tokenizer_files import (
    CONFIG_FILE,
    RANKS_FILE,
    SPECIAL_MAP_FILE,
    TOKENIZER_FILE,
    read_ranks,
)
from router.prompt.tokenizer_json import JsonVocabulary
from router.prompt.tokenizer_tiktoken import RankVocabulary

NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Vocabulary(Protocol):
    """What one kind of tokenizer file knows. Immutable and safe to use from several threads.

    `special_ids` maps the text of every control token to its id. `hidden_ids` are the tokens that answers do not
    show. `named` are the texts of special tokens by role ("bos_token"), as far as the file itself names them.
    """

    special_ids: Mapping[str, int]
    hidden_ids: frozenset[int]
    named: Mapping[str, str]
    vocab_size: int

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of plain `text`, which is valid Unicode; what a prompt begins with is added if asked for."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token that is not hidden; empty where an id below `vocab_size` has no token."""
        ...


class Tokenizer:
    """A byte-level BPE tokenizer and what its folder says about it. Immutable; share it between requests.

    `special_ids` maps the text of every control token to its id: tokens marked special, and any added token of
    the shape `<|...|>`, which a user's text must not be able to forge either.
    `bos_token` and `eos_token` are texts as in tokenizer_config.json, or None; `named_specials` has all it names.
    `vocab_size` is the highest id plus one. `file` is the name of the file that it was read from.
    """

    def __init__(self, vocabulary: Vocabulary, named_specials: Mapping[str, str], *, file: str) -> None:
        """`named_specials` wins over what the vocabulary names. Raises CheckpointError."""
        self.file = file
        self.special_ids: Mapping[str, int] = MappingProxyType(dict(vocabulary.special_ids))
        self.named_specials: Mapping[str, str] = MappingProxyType({**vocabulary.named, **named_specials})
        self.bos_token = self.named_specials.get("bos_token")
        self.eos_token = self.named_specials.get("eos_token")
        self.vocab_size = vocabulary.vocab_size
        self._vocabulary = vocabulary
        self._hidden_texts = {
            token_id: text for text, token_id in vocabulary.special_ids.items() if token_id in vocabulary.hidden_ids
        }
        self._bytes: dict[int, bytes] = {}
        self._require_plain_specials()

    @classmethod
    def from_folder(cls, model_dir: Path) -> Tokenizer:
        """Read `tokenizer.json`, else Meta's `tokenizer.model`, and what the folder says of special tokens.

        Raises CheckpointError when a file is absent, damaged or not a byte-level tokenizer.
        """
        named = _named_specials(read_json(model_dir / SPECIAL_MAP_FILE) or {})
        named |= _named_specials(read_json(model_dir / CONFIG_FILE) or {})
        spec = read_json(model_dir / TOKENIZER_FILE)
        if spec is not None:
            return cls(JsonVocabulary(spec, file=TOKENIZER_FILE), named, file=TOKENIZER_FILE)
        if (model_dir / RANKS_FILE).exists():
            return cls(RankVocabulary(read_ranks(model_dir / RANKS_FILE)), named, file=RANKS_FILE)
        raise CheckpointError(TOKENIZER_FILE, f"is not in the model folder, and neither is {RANKS_FILE}")

    def encode(self, text: str) -> list[int]:
        """Ids of plain `text` as a completion prompt: what the files say comes first is added (Llama 4: BOS).

        Raises InvalidInput("text") for text that is not Unicode, as does `encode_pieces`.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_pieces(self, text: str) -> list[int]:
        """Ids of plain `text` as a part of something longer: nothing is added around it."""
        return self._encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` stands for; empty for special tokens and ids outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            if not 0 <= token_id < self.vocab_size:
                return b""
            is_hidden = token_id in self._vocabulary.hidden_ids
            known = self._bytes[token_id] = b"" if is_hidden else self._vocabulary.token_bytes(token_id)
        return known

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`, special tokens by their names."""
        shown = (self._hidden_texts.get(token_id, "").encode() or self.token_bytes(token_id) for token_id in token_ids)
        return b"".join(shown).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """One token as vocabularies write it: a special token's name, or its bytes in GPT-2's alphabet."""
        return self._hidden_texts.get(token_id) or to_chars(self.token_bytes(token_id))

    def detokenizer(self) -> Detokenizer:
        """A decoder for one output stream."""
        return Detokenizer(self)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidInput("text", text, "must be valid Unicode without lone surrogates") from error
        return self._vocabulary.encode(text, add_special_tokens=add_special_tokens)

    def _require_plain_specials(self) -> None:
        control = frozenset(self.special_ids.values())
        for name in self.special_ids:
            if not control.isdisjoint(self.encode_pieces(name)):
                raise CheckpointError(self.file, f"cannot spell special token {name!r} in ordinary tokens")


class Detokenizer:
    """Decodes one stream of token ids, a token at a time, without ever splitting a character.

    All pieces joined equal the tokenizer's own decoding of all ids with special tokens left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty for special tokens and inside a character."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left at the end: a replacement character when the stream broke off inside a character."""
        return self._utf8.decode(b"", final=True)


def _named_specials(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its kind; each is a text or a mapping with the text under `content`."""
    found = {}
    for name in NAMED_SPECIALS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found
