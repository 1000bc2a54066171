"""Text to token ids and back for a checkpoint's `tokenizer.json`. Knows nothing of messages, HTTP or models.

Text is always plain: a special token's name inside it is spelled in ordinary tokens, never turned into its id.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from experts.errors import CheckpointError, InvalidInput

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_MAP_FILE = "special_tokens_map.json"
NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_LOOKS_SPECIAL = re.compile(r"<\|.*\|>", re.DOTALL)


class Tokenizer:
    """A byte-level BPE tokenizer and what its folder says about it. Immutable; share it between requests.

    `special_ids` maps the text of every control token to its id: tokens marked special, and any added token of
    the shape `<|...|>`, which a user's text must not be able to forge either.
    `bos_token` and `eos_token` are texts as in tokenizer_config.json, or None; `named_specials` has all it names.
    `vocab_size` is the highest id plus one.
    """

    def __init__(self, spec: Mapping[str, Any], named_specials: Mapping[str, str]) -> None:
        _require_byte_level(spec)
        self._plain = _plain_tokenizer(spec)
        added = spec.get("added_tokens") or ()
        self.special_ids: Mapping[str, int] = MappingProxyType(
            {token["content"]: token["id"] for token in added if _is_control(token)}
        )
        # Decoding hides what the tokenizers library hides, so a `<|...|>` not marked special stays visible.
        self._hidden = frozenset(token["id"] for token in added if token["special"])
        self.named_specials: Mapping[str, str] = MappingProxyType(dict(named_specials))
        self.bos_token = named_specials.get("bos_token")
        self.eos_token = named_specials.get("eos_token")
        self.vocab_size = 1 + max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1)
        self._bytes: dict[int, bytes] = {}
        self._require_plain_specials()

    @classmethod
    def from_folder(cls, model_dir: Path) -> Tokenizer:
        """Read `tokenizer.json` (required) and what `tokenizer_config.json` says of special tokens, if present.

        Raises CheckpointError when a file is absent, damaged or not a byte-level tokenizer.
        """
        spec = read_json(model_dir / TOKENIZER_FILE)
        if spec is None:
            raise CheckpointError(TOKENIZER_FILE, "is not in the model folder")
        named = _named_specials(read_json(model_dir / SPECIAL_MAP_FILE) or {})
        named |= _named_specials(read_json(model_dir / CONFIG_FILE) or {})
        try:
            return cls(spec, named)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(TOKENIZER_FILE, f"has a field of the wrong kind ({error})") from error

    def encode(self, text: str) -> list[int]:
        """Ids of plain `text` as a completion prompt: the file's post-processor applies (Llama 4: BOS first).

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
            known = self._look_up_bytes(token_id)
            if 0 <= token_id < self.vocab_size:
                self._bytes[token_id] = known
        return known

    def detokenizer(self) -> Detokenizer:
        """A decoder for one output stream."""
        return Detokenizer(self)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._plain.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidInput("text", text, "must be valid Unicode without lone surrogates") from error
        return ids

    def _look_up_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size or token_id in self._hidden:
            return b""
        token = self._plain.id_to_token(token_id)
        if token is None:
            return b""
        alphabet = _byte_of_char()
        # An added token may hold characters outside the byte alphabet; then its text is meant literally.
        if any(char not in alphabet for char in token):
            return bytes(token.encode())
        return bytes(alphabet[char] for char in token)

    def _require_plain_specials(self) -> None:
        control = frozenset(self.special_ids.values())
        for name in self.special_ids:
            if not control.isdisjoint(self.encode_pieces(name)):
                raise CheckpointError(TOKENIZER_FILE, f"cannot spell special token {name!r} in ordinary tokens")


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


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file at `path`, or None when there is no such file.

    Raises CheckpointError, which names the file but not its folder.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path.name, f"cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(path.name, "must hold a JSON object")
    return content


def _is_control(token: Mapping[str, Any]) -> bool:
    return bool(token["special"]) or _LOOKS_SPECIAL.fullmatch(token["content"]) is not None


def _plain_tokenizer(spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of `spec` that takes no text for a control token.

    Control tokens are switched off, not dropped: dropping them would renumber the added tokens behind them.
    """
    added = [{**token, "special": _is_control(token)} for token in spec.get("added_tokens") or ()]
    plain_spec = {**spec, "added_tokens": added, "truncation": None, "padding": None}
    try:
        plain = tokenizers.Tokenizer.from_str(json.dumps(plain_spec))
    # The library raises plain Exception for every kind of damage.
    except Exception as error:
        raise CheckpointError(TOKENIZER_FILE, f"is refused by the tokenizers library ({error})") from error
    plain.encode_special_tokens = True
    for token in added:
        if plain.token_to_id(token["content"]) != token["id"]:
            problem = f"added token {token['content']!r} cannot have id {token['id']}"
            raise CheckpointError(TOKENIZER_FILE, problem)
    return plain


def _require_byte_level(spec: Mapping[str, Any]) -> None:
    """Bytes of single tokens are known only when both directions go through the byte alphabet."""
    splits = _kinds(spec.get("pre_tokenizer"), "pretokenizers")
    joins = _kinds(spec.get("decoder"), "decoders")
    if "ByteLevel" not in splits or "ByteLevel" not in joins or set(joins) - {"ByteLevel", "Fuse"}:
        found = f"pre-tokenizer {' + '.join(splits) or 'none'}, decoder {' + '.join(joins) or 'none'}"
        raise CheckpointError(TOKENIZER_FILE, f"must be byte-level, as Llama 4's tokenizer is (found {found})")


def _kinds(part: Any, members: str) -> list[str]:
    """Type names of a component, a Sequence flattened."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") == "Sequence":
        return [kind for member in part.get(members) or () for kind in _kinds(member, members)]
    return [str(part.get("type"))]


def _named_specials(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its kind; each is a text or a mapping with the text under `content`."""
    found = {}
    for name in NAMED_SPECIALS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


@lru_cache(maxsize=1)
def _byte_of_char() -> Mapping[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return MappingProxyType(alphabet)
