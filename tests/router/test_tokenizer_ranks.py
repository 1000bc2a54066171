"""Meta's tokenizer.model: its vectors, its special tokens, its limits, and agreement with tokenizer.json."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tiny_tokenizer import BOS, CONTROL_TOKENS, train_tokenizer
from experts.errors import CheckpointError, InvalidInput
from router.prompt.byte_alphabet import to_bytes
from router.prompt.chat import ChatTemplate
from router.prompt.stop_ids import default_stop_ids
from router.prompt.tokenizer import Tokenizer
from router.prompt.tokenizer_files import special_names
from router.prompt.tokenizer_tiktoken import MAX_PIECE_CHARS, MAX_RUN_CHARS, pieces

SHARED = Path(os.environ.get("HERD_SHARED_DIR", Path(__file__).parents[3] / "shared")) / "llama4"
VECTORS: dict[str, Any] = (
    json.loads((SHARED / "tokenizer_vectors.json").read_text()) if (SHARED / "tokenizer_vectors.json").exists() else {}
)
needs_real_file = pytest.mark.skipif(
    not (VECTORS and (SHARED / "tokenizer.model").exists()), reason=f"no real tokenizer.model in {SHARED}"
)

SPEC: dict[str, Any] = json.loads(train_tokenizer().json_text)
NUM_RANKS = len(SPEC["model"]["vocab"]) - sum(name in SPEC["model"]["vocab"] for name in CONTROL_TOKENS)
RANKED = sorted(
    ((rank, to_bytes(token)) for token, rank in SPEC["model"]["vocab"].items() if token not in CONTROL_TOKENS)
)


def lines(tokens: list[tuple[int, bytes]] = RANKED) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in tokens]


def write_ranks(folder: Path, content: list[bytes] | None = None) -> Path:
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines() if content is None else content) + b"\n")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_ranks(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same vocabulary as tokenizer.json; its special tokens have other ids."""
    folder = tmp_path_factory.mktemp("twin")
    (folder / "tokenizer.json").write_text(json.dumps(SPEC))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.from_folder(SHARED)


# The real file


@needs_real_file
def test_vectors(real: Tokenizer) -> None:
    assert len(VECTORS["vectors"]) >= 19
    for vector in VECTORS["vectors"]:
        ids = real.encode_pieces(vector["text"])
        assert ids == vector["ids"], vector["text"]
        assert real.encode(vector["text"]) == [200000, *ids]
        assert real.decode(ids) == vector["text"]
        stream = real.detokenizer()
        assert "".join(map(stream.push, ids)) + stream.finish() == vector["text"]


@needs_real_file
def test_the_chat_vector_and_special_text_as_plain_text(real: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hi"},
    ]
    ids = [200000, 200005, 15651, 200006, 368, 4662, 583, 262, 19933, 43910, 200008, 200005, 1556, 200006, 368, 25181]
    ids += [200008, 200005, 140680, 200006, 368]
    assert ChatTemplate.from_folder(SHARED, real).render(messages) == ids
    assert VECTORS["chat"]["ids"] == ids
    assert real.encode_pieces("<|eot|>") == [40, 104, 81, 359, 159276]
    assert real.vocab_size == 202048


SPECIAL_IDS = {
    200000: "begin_of_text", 200001: "end_of_text", 200002: "fim_prefix", 200003: "fim_middle", 200004: "fim_suffix",
    200005: "header_start", 200006: "header_end", 200007: "eom", 200008: "eot", 200009: "step",
    200010: "text_post_train_reserved_special_token_0", 200015: "text_post_train_reserved_special_token_5",
    200016: "python_start", 200017: "python_end", 200018: "finetune_right_pad",
    200019: "text_post_train_reserved_special_token_8", 200079: "text_post_train_reserved_special_token_68",
    200080: "image_start", 200081: "image_end", 200082: "vision_reserved_special_token_0",
    200083: "vision_reserved_special_token_1", 200084: "tile_x_separator", 200085: "tile_y_separator",
    200086: "vision_reserved_special_token_2", 200089: "vision_reserved_special_token_5", 200090: "image",
    200091: "vision_reserved_special_token_6", 200092: "patch", 200093: "vision_reserved_special_token_7",
    201133: "vision_reserved_special_token_1047", 201134: "reasoning_reserved_special_token_0",
    201141: "reasoning_reserved_special_token_7", 201142: "reasoning_thinking_start",
    201143: "reasoning_thinking_end", 201144: "reserved_special_token_0", 202047: "reserved_special_token_903",
}  # fmt: skip


def test_special_tokens_stand_where_the_table_has_them() -> None:
    names = special_names()
    assert len(set(names)) == 2048
    for token_id, name in SPECIAL_IDS.items():
        assert names[token_id - 200000] == f"<|{name}|>"


# The twin in tokenizer.json

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
PARTS = [
    "the",
    " class",
    "\n\n",
    "  ",
    "\r\n",
    "\t",
    "é",
    "日本",
    "👩‍👧",
    "I'M",
    "x'll",
    "1234",
    " (",
    "://",
    *CONTROL_TOKENS[:4],
]
WORDS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=TEXT | WORDS)
def test_both_kinds_of_file_spell_text_alike(tiny: Tokenizer, twin: Tokenizer, text: str) -> None:
    ids = tiny.encode_pieces(text)
    assert ids == twin.encode_pieces(text)
    assert tiny.encode(text) == [tiny.special_ids[BOS], *ids]
    assert tiny.decode(ids) == twin.decode(ids) == text
    assert [tiny.token_bytes(token) for token in ids] == [twin.token_bytes(token) for token in ids]
    assert [tiny.token_text(token) for token in ids] == [twin.token_text(token) for token in ids]


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 255) | st.integers(0, NUM_RANKS + 2047), max_size=20))
def test_any_ids_decode_without_the_special_ones(tiny: Tokenizer, ids: list[int]) -> None:
    stream = tiny.detokenizer()
    plain = b"".join(RANKED[token][1] for token in ids if token < NUM_RANKS)
    assert "".join(map(stream.push, ids)) + stream.finish() == plain.decode("utf-8", "replace")


def test_members(tiny: Tokenizer) -> None:
    assert tiny.file == "tokenizer.model"
    assert tiny.vocab_size == NUM_RANKS + 2048
    assert (tiny.bos_token, tiny.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert set(tiny.special_ids) == set(special_names())
    assert tiny.special_ids["<|patch|>"] == NUM_RANKS + 92
    assert tiny.token_bytes(tiny.special_ids["<|eot|>"]) == b""
    assert tiny.token_text(tiny.special_ids["<|eot|>"]) == "<|eot|>"
    assert tiny.decode([tiny.special_ids["<|eot|>"], RANKED[300][0]]) == "<|eot|>" + RANKED[300][1].decode()
    assert tiny.token_text(tiny.vocab_size) == tiny.token_text(-1) == ""


@pytest.mark.parametrize("name", ["<|begin_of_text|>", "<|eot|>", "<|reserved_special_token_903|>"])
def test_a_special_token_in_text_stays_text(tiny: Tokenizer, name: str) -> None:
    ids = tiny.encode_pieces(f"a{name}b")
    assert max(ids) < NUM_RANKS
    assert tiny.decode(ids) == f"a{name}b"


def test_the_config_of_the_folder_names_other_specials(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|eot|>")


def test_tokenizer_json_wins_where_both_files_are(tmp_path: Path) -> None:
    write_ranks(tmp_path, [b"damaged"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(SPEC))
    assert Tokenizer.from_folder(tmp_path).vocab_size == NUM_RANKS + len(CONTROL_TOKENS)


def test_lone_surrogates_are_the_users_mistake(tiny: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="text: must be valid Unicode"):
        tiny.encode("half an emoji: \ud83d")


# Extreme text


def by_the_book(text: str) -> list[str]:
    """Cut one character at a time: at 400,000 characters, and inside runs of more than 25,000."""
    cut: list[str] = []
    for start in range(0, len(text), MAX_PIECE_CHARS):
        piece, run, run_is_space = "", 0, False
        for char in text[start : start + MAX_PIECE_CHARS]:
            run = run + 1 if char.isspace() == run_is_space else 1
            run_is_space = char.isspace()
            if run > MAX_RUN_CHARS:
                cut.append(piece)
                piece, run = "", 1
            piece += char
        cut.append(piece)
    return cut


EXTREME = [
    "a" * MAX_RUN_CHARS,
    "a" * (MAX_RUN_CHARS + 1),
    " " * 60_000,
    "\u2003" * 26_000,
    "ab " + "c" * 80_000 + "\n" * 50_001,
    "word " * 90_000,
    ("x" * 30_000 + " ") * 14,
    "a" * 399_999 + " " * 30_000,
    "\x1c" * 25_500 + "z",
]


@pytest.mark.parametrize("text", EXTREME, ids=range(len(EXTREME)))
def test_extreme_text_is_cut_and_encoded(tiny: Tokenizer, text: str) -> None:
    assert list(pieces(text)) == by_the_book(text)
    assert tiny.decode(tiny.encode_pieces(text)) == text


@pytest.mark.parametrize("text", ["", "hello  world", "word " * 10_000])
def test_ordinary_text_is_one_piece_at_most(text: str) -> None:
    assert "".join(pieces(text)) == text
    assert len(list(pieces(text))) <= 1


# Damage

DAMAGED = {
    "empty": ([], "a token for each byte"),
    "sentencepiece": ([b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00"], "must be a token in base64"),
    "no-rank": ([*lines()[:-1], lines()[-1].split()[0]], f"line {NUM_RANKS}: must be"),
    "not-base64": ([b"*** 0", *lines()[1:]], "line 1: must be"),
    "negative": ([lines()[0].split()[0] + b" -1", *lines()[1:]], "line 1: must be"),
    "float": ([lines()[0].split()[0] + b" 0.0", *lines()[1:]], "line 1: must be"),
    "long-number": ([lines()[0].split()[0] + b" " + b"9" * 5000, *lines()[1:]], "line 1: must be"),
    "empty-token": ([*lines(), b" %d" % NUM_RANKS], "must be"),
    "gap": ([*lines()[:300], *lines()[301:]], "without a gap"),
    "same-rank": ([*lines(), base64.b64encode(b"zzzzzz") + b" 300"], "without a gap or a repetition"),
    "same-token": ([*lines(), lines()[300].split()[0] + b" %d" % NUM_RANKS], "repeats a token"),
    "byte-missing": (lines([(rank, b"\xff\xff" + token if rank < 3 else token) for rank, token in RANKED]), "3 bytes"),
}


@pytest.mark.parametrize(("content", "problem"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused(tmp_path: Path, content: list[bytes], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        Tokenizer.from_folder(write_ranks(tmp_path, content))
    assert str(caught.value).startswith("tokenizer.model")
    assert str(tmp_path) not in str(caught.value)


# What else depends on it


def test_stop_ids(tmp_path: Path, tiny: Tokenizer) -> None:
    write_ranks(tmp_path)
    ends = {tiny.special_ids[name] for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>")}
    assert default_stop_ids(tmp_path, (2,)) == {2, *ends}
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"do_sample": True}))
    assert default_stop_ids(tmp_path, ()) == ends
    generation.write_text(json.dumps({"eos_token_id": 7}))
    assert default_stop_ids(tmp_path, (2,)) == {7}
    generation.write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert default_stop_ids(tmp_path, (2,)) == {7, 8}
    generation.write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        default_stop_ids(tmp_path, (2,))


def test_stop_ids_without_a_tokenizer_are_the_configs(tmp_path: Path) -> None:
    assert default_stop_ids(tmp_path, (2, 5)) == {2, 5}


def test_reading_a_rank_file_asks_no_network(tmp_path: Path) -> None:
    """A process in which every socket fails reads the file all the same."""
    write_ranks(tmp_path)
    code = (
        "import socket, sys; from pathlib import Path\n"
        "def refuse(*args, **kwargs): raise SystemExit('opened a socket')\n"
        "socket.socket = refuse; socket.getaddrinfo = refuse\n"
        "from router.prompt.tokenizer import Tokenizer\n"
        "print(len(Tokenizer.from_folder(Path(sys.argv[1])).encode('hello')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1
