"""Pictures and text through the front door, over any model and number of hosts, judged by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from picture_questions import check_alone_and_in_a_crowd
from serving import Judge, serving

from cluster.tiny import make_tiny

# The ordinary run asks the same of the cluster in test_serve.py.
pytestmark = [pytest.mark.cluster, pytest.mark.soak]


@pytest.mark.parametrize(
    ("kind", "hosts"), [("scout", 1), ("scout", 3), ("maverick", 1), ("maverick", 3), ("guard", 1)]
)
def test_pictures_alone_and_in_a_mixed_crowd(tmp_path: Path, kind: str, hosts: int) -> None:
    folder = tmp_path / f"tiny-{kind}"
    make_tiny(kind, folder, seed=4)
    judge = Judge(folder)
    with serving(folder, tmp_path / "state", "--hosts", str(hosts), "--kv-memory", "128MiB") as cluster:
        check_alone_and_in_a_crowd(cluster, folder, judge)
    assert judge.accepted <= 2
