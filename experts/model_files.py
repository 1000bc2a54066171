"""Files of a model folder that are read whole: regular ones of bounded length, and the JSON objects in them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from experts.errors import CheckpointError
from experts.strict_json import parse_strictly

MAX_JSON_BYTES = 100_000_000
"""Several times a tokenizer of this family, which is the longest of them."""


def read_file(path: Path, max_bytes: int) -> bytes:
    """The file's content. Raises FileNotFoundError, or another OSError that says why it cannot be read."""
    # Opening a pipe would wait for its other end.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if about.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"more than {max_bytes} bytes")
        return file.read(max_bytes)


def read_text(path: Path, max_bytes: int) -> str | None:
    """The text in the file, None where there is none. Raises CheckpointError, which names the file alone."""
    try:
        return read_file(path, max_bytes).decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(path.name, "cannot be read: not a text in UTF-8") from error
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {why(error)}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file, None where there is none. Raises CheckpointError, which names the file alone."""
    try:
        content = parse_strictly(read_file(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {why(error)}") from error
    for expected, found in content.faults:
        raise CheckpointError(path.name, f"cannot be read as JSON: expected {expected}, found {found}")
    return dict(content.members)


def why(error: OSError) -> str:
    """What keeps a file from being read, without its path."""
    return error.strerror or type(error).__name__
