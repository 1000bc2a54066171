"""Generates the gRPC stubs from proto/ next to their users, or checks that the committed ones are the same."""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
USERS = {"expert": "experts/wire", "control": "experts/wire", "router": "router/wire"}
ENDINGS = {"python": "_pb2.py", "pyi": "_pb2.pyi", "grpc_python": "_pb2_grpc.py"}
MESSAGES = ("python", "pyi")
KINDS = {"expert": MESSAGES, "control": (*MESSAGES, "grpc_python"), "router": (*MESSAGES, "grpc_python")}


def generate(out: Path) -> None:
    """Write all stubs below `out`. Proto paths are mapped to the users' folders, which makes the imports right."""
    for name, folder in USERS.items():
        arguments = [
            f"-I{folder}={ROOT / 'proto'}",
            f"-I{resources.files('grpc_tools') / '_proto'}",
            *(f"--{kind}_out={out}" for kind in KINDS[name]),
            f"{folder}/{name}.proto",
        ]
        if protoc.main(["protoc", *arguments]) != 0:
            raise SystemExit(f"protoc failed on {name}.proto")


def differing() -> list[str]:
    """Names of committed stubs that are missing or not what proto/ generates."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        stubs = [f"{folder}/{name}{ENDINGS[kind]}" for name, folder in USERS.items() for kind in KINDS[name]]
        return [stub for stub in stubs if _read(ROOT / stub) != _read(Path(fresh) / stub)]


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
        return
    wrong = differing()
    if wrong:
        raise SystemExit("not what proto/ generates, run `make proto`: " + ", ".join(wrong))
    print("gRPC stubs: as generated")


if __name__ == "__main__":
    main()
