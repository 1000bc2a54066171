"""The version of the installed distribution."""

from __future__ import annotations

import importlib.metadata

DISTRIBUTION = "herd-serve"


def herd_version() -> str:
    """As in pyproject.toml; "0+unknown" where the packages run without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
