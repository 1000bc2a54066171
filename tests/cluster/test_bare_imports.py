"""What runs on a bare GPU machine: torch, safetensors, numpy and the standard library are all that it needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.tiny import make_tiny

# Refuses every other package, as a machine does that lacks it. What the three import themselves is theirs, and is
# there once they are imported. The machine is measured by a small product: the released one takes half a minute here.
BARE = """
import runpy, sys
import numpy, safetensors.torch, torch

class Bare:
    allowed = {"cluster", "experts", "router", "torchgen", "functorch"} | set(sys.stdlib_module_names)
    allowed |= {name.partition(".")[0] for name in sys.modules}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed:
            raise ModuleNotFoundError(f"no module named {name!r} here", name=name)

sys.meta_path.insert(0, Bare())
import cluster.measure.machine
cluster.measure.machine.MATMUL_SHAPES = ((64, 64, 64),)
sys.argv = ["herd", *sys.argv[1:]]
runpy.run_module("cluster", run_name="__main__")
"""


def bare_herd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_the_local_bench_needs_torch_safetensors_and_numpy_only(tmp_path: Path) -> None:
    make_tiny("scout", tmp_path / "tiny")
    # End tokens are then the tokenizer's, which must be readable without its library.
    (tmp_path / "tiny" / "generation_config.json").unlink()
    done = bare_herd(
        *("bench", "engine", str(tmp_path / "tiny"), "--transport", "local", "--kv-memory", "8MiB"),
        *("--batch", "1,2", "--prompt", "8", "--output", "4", "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(one["transport"], one["batch"]) for one in results] == [("local", 1), ("local", 2)]
    assert all(one["decode_tokens_per_s"] > 0 for one in results)


@pytest.mark.parametrize(
    "arguments",
    [("serve", "FOLDER"), ("check", "FOLDER"), ("make-tiny", "guard", "FOLDER/new"), ("bench", "dispatch")],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_more_says_so_in_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = bare_herd(*(one.replace("FOLDER", str(tmp_path)) for one in arguments))
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"herd: this needs the package \w+, which is not installed\n", done.stderr), done.stderr
