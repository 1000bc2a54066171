"""The journal survives what a crash can do to a file."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.journal import JournalFile, decode, encode
from cluster.control.pack import pack
from cluster.control.state import Journal

TARGET = pack(layers=[1, 3], num_experts=4, hosts=["a", "b", "c"], num_replicas=2)
JOURNAL = Journal(
    digest="abc",
    term=3,
    epoch=17,
    port=4711,
    target=TARGET,
    replicas=dict(list(TARGET.items())[:5]),
    away=frozenset({"host-1"}),
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "j.json")
    assert file.read() is None
    file.write(JOURNAL)
    assert JournalFile(tmp_path / "j.json").read() == JOURNAL
    assert (tmp_path / "j.json").stat().st_mode & 0o777 == 0o600


def test_a_write_that_was_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "j.json")
    file.write(JOURNAL)
    (tmp_path / "j.json.new").write_text(json.dumps(encode(JOURNAL))[:50])
    assert file.read() == JOURNAL


@given(st.integers(0, 400))
@settings(deadline=None, max_examples=40)
def test_a_torn_file_is_set_aside(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    whole = json.dumps(encode(JOURNAL))
    path = folder / "j.json"
    path.write_text(whole[: min(length, len(whole) - 1)])
    assert JournalFile(path).read() is None
    assert not path.exists()
    assert (folder / "j.json.broken").exists()
    JournalFile(path).write(JOURNAL)
    assert JournalFile(path).read() == JOURNAL


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted(encode(JOURNAL))), json_values)
@settings(deadline=None, max_examples=150)
def test_nonsense_is_never_an_unnamed_error(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: object
) -> None:
    path = tmp_path_factory.mktemp("nonsense") / "j.json"
    path.write_text(json.dumps({**encode(JOURNAL), field: value}))
    JournalFile(path).read()


def test_bytes_that_are_no_text_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "j.json"
    path.write_bytes(b"\xff\xfe\x00garbage")
    assert JournalFile(path).read() is None


def test_replicas_of_unknown_hosts_are_refused() -> None:
    raw = encode(JOURNAL)
    raw["target"]["experts"][0][2] = [9]
    with pytest.raises(IndexError):
        decode(raw)


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "j.json")
    file.write(JOURNAL)
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []
