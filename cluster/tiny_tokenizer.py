"""A small tokenizer in Llama 4's form, trained on text that comes with Python. No network, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 3072
"""All ids, control tokens included."""

CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
)
"""Llama 4's names, at the end of the vocabulary in this order."""

BOS, EOS, EOM, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>", "<|finetune_right_pad|>"

_LOWER_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?" + _LOWER_WORD + _CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?" + _UPPER_WORD + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How Llama 4 cuts text before merging (o200k's pattern)."""


@dataclass(frozen=True, kw_only=True)
class TinyTokenizer:
    """`json_text` is the content of tokenizer.json; `words` maps ids to the text of single-token words, each
    of which encodes to just that id when a space stands before it."""

    json_text: str
    control_ids: Mapping[str, int]
    words: Mapping[int, str]


def train_tokenizer() -> TinyTokenizer:
    """The same tokenizer every time on one version of Python and of the tokenizers library; about a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    control_ids = {name: VOCAB_SIZE - len(CONTROL_TOKENS) + index for index, name in enumerate(CONTROL_TOKENS)}
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, control_ids[BOS])]
            ),
        ]
    )
    assert all(tokenizer.token_to_id(name) == token_id for name, token_id in control_ids.items())
    # The library writes its vocabulary in hash order; sorted by id, equal tokenizers are equal files.
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    spec["model"]["vocab"] = dict(sorted(spec["model"]["vocab"].items(), key=lambda item: item[1]))
    json_text = json.dumps(spec, ensure_ascii=False, indent=2) + "\n"
    return TinyTokenizer(json_text=json_text, control_ids=control_ids, words=_words(tokenizer))


def _texts() -> Iterator[str]:
    """Python's own manual pages, in a fixed order."""
    for _, text in sorted(topics.topics.items()):
        yield text


def _words(tokenizer: Tokenizer) -> dict[int, str]:
    words = {}
    for token, token_id in sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]):
        word = token.removeprefix("Ġ")
        is_word = word != token and len(word) > 1 and word.isascii() and word.isalpha()
        if is_word and tokenizer.encode(" " + word, add_special_tokens=False).ids == [token_id]:
            words[token_id] = word
    return words
