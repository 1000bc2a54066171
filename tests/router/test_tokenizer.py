"""The tokenizer against the tokenizers library and transformers, on text and ids drawn at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cluster.tiny_tokenizer import BOS, CONTROL_TOKENS, EOT, train_tokenizer
from experts.errors import CheckpointError, InvalidInput
from router.prompt.tokenizer import Tokenizer

SPEC: dict[str, Any] = json.loads(train_tokenizer().json_text)
# Behind the control tokens: an ordinary added token, and a control token that nobody marked as special.
ORDINARY, UNMARKED = "added word", "<|unmarked|>"
SPEC["added_tokens"] += [
    {**SPEC["added_tokens"][-1], "id": 3072, "content": UNMARKED, "special": False},
    {**SPEC["added_tokens"][-1], "id": 3073, "content": ORDINARY, "special": False},
]
# Both spellings that transformers has for the name of a special token.
BOS_ENTRY = {"__type": "AddedToken", "content": BOS, "lstrip": False, "normalized": False, "rstrip": False}
CONFIG = {"bos_token": BOS_ENTRY, "eos_token": EOT, "tokenizer_class": "PreTrainedTokenizerFast"}


def write_folder(folder: Path, spec: object = SPEC, config: object = CONFIG) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def library(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


# transformers would take an unmarked control token for what it names even in plain text.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60).filter(lambda text: UNMARKED not in text)
PARTS = ["the", " class", "\n\n", "  ", "é", "日本", "👩‍👧", ORDINARY, *CONTROL_TOKENS[:6], "<|", "|>", "<|eo"]
WORDS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@settings(deadline=None, max_examples=200)
@given(text=TEXT | WORDS)
def test_text_is_encoded_as_transformers_encodes_plain_text(
    ours: Tokenizer, reference: PreTrainedTokenizerFast, text: str
) -> None:
    expected = reference(text, split_special_tokens=True)["input_ids"]
    assert ours.encode(text) == expected
    assert ours.encode_pieces(text) == expected[1:]
    assert expected[0] == ours.special_ids[BOS]


@settings(deadline=None, max_examples=100)
@given(text=TEXT.filter(lambda text: not any(name in text for name in CONTROL_TOKENS)))
def test_text_without_control_tokens_is_encoded_as_transformers_does_by_default(
    ours: Tokenizer, reference: PreTrainedTokenizerFast, text: str
) -> None:
    assert ours.encode(text) == reference(text)["input_ids"]


@pytest.mark.parametrize("name", [*CONTROL_TOKENS, UNMARKED])
def test_a_control_token_in_text_stays_text(ours: Tokenizer, name: str) -> None:
    for text in (name, f"a{name}b", name + name):
        ids = ours.encode_pieces(text)
        assert not set(ids) & set(ours.special_ids.values())
        assert b"".join(map(ours.token_bytes, ids)).decode() == text


def test_an_ordinary_added_token_keeps_its_id(ours: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    assert ours.encode_pieces(f"an {ORDINARY}!") == reference(f"an {ORDINARY}!")["input_ids"][1:]
    assert 3073 in ours.encode_pieces(f"an {ORDINARY}!")
    assert ours.token_bytes(3073) == ORDINARY.encode()


def test_members(ours: Tokenizer) -> None:
    assert ours.vocab_size == 3074
    assert ours.bos_token == BOS
    assert ours.eos_token == EOT
    assert dict(ours.named_specials) == {"bos_token": BOS, "eos_token": EOT}
    assert set(ours.special_ids) == {*CONTROL_TOKENS, UNMARKED}
    assert ours.special_ids[UNMARKED] == 3072
    assert [ours.token_bytes(token_id) for token_id in (-1, 3074, 10**12)] == [b"", b"", b""]


def test_the_folder_need_not_name_special_tokens(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, None)


def test_the_file_decides_what_is_added_around_a_prompt(tmp_path: Path) -> None:
    write_folder(tmp_path, {**SPEC, "post_processor": None})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("the class") == tokenizer.encode_pieces("the class")


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    write_folder(tmp_path, {**SPEC, "truncation": truncation})
    assert len(Tokenizer.from_folder(tmp_path).encode("one two three four five six")) > 6


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 3073), max_size=40))
def test_decoding_piece_by_piece_equals_decoding_at_once(
    ours: Tokenizer, library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    stream = ours.detokenizer()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == library.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 255) | st.sampled_from([3057, 3062]), max_size=12))
def test_broken_characters_decode_as_the_library_decodes_them(
    ours: Tokenizer, library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    stream = ours.detokenizer()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == library.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=60))
def test_no_piece_ever_holds_part_of_a_character(ours: Tokenizer, text: str) -> None:
    stream = ours.detokenizer()
    pieces = [stream.push(token_id) for token_id in ours.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_a_stream_that_breaks_off_inside_a_character_says_so(ours: Tokenizer) -> None:
    first, *_ = ours.encode_pieces("日")
    assert len("日".encode()) > len(ours.token_bytes(first)), "the tiny vocabulary spells this character in bytes"
    stream = ours.detokenizer()
    assert stream.push(first) == ""
    assert stream.push(99_999) == ""
    assert stream.finish() == "\ufffd"


def test_lone_surrogates_are_the_users_mistake(ours: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="text: must be valid Unicode"):
        ours.encode("half an emoji: \ud83d")


def test_an_absent_file_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^tokenizer\.json: is not in the model folder, and neither is tokenizer\.model$"
    ):
        Tokenizer.from_folder(tmp_path)


DAMAGED = {
    "empty": "",
    "cut": json.dumps(SPEC)[:-200],
    "not-utf8": "\ud800",
    "deep": "[" * 100_000,
    "list": "[]",
    "bare": "{}",
    "name-twice": json.dumps(SPEC).replace("{", '{"version": "0", ', 1),
    "half-a-character": json.dumps({**SPEC, "note": "\ud800"}),
    "nan": json.dumps({**SPEC, "note": float("nan")}),
    "model-incomplete": json.dumps({**SPEC, "model": {"type": "BPE"}}),
    "added-number": json.dumps({**SPEC, "added_tokens": [1]}),
    "added-incomplete": json.dumps({**SPEC, "added_tokens": [{"id": 3072}]}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: ") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{'bos_token': 1}")
    with pytest.raises(CheckpointError, match=r"^tokenizer_config\.json: "):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"decoder": None},
        {"decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
    ids=["no-decoder", "metaspace", "whitespace", "no-pre-tokenizer"],
)
def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_folder(tmp_path, {**SPEC, **change})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: must be byte-level"):
        Tokenizer.from_folder(tmp_path)


def test_added_tokens_with_impossible_ids_are_refused(tmp_path: Path) -> None:
    moved = [{**token, "id": token["id"] + 100} for token in SPEC["added_tokens"]]
    write_folder(tmp_path, {**SPEC, "added_tokens": moved})
    with pytest.raises(CheckpointError, match="cannot have id"):
        Tokenizer.from_folder(tmp_path)
