"""Certificates for tests, made by the command `openssl`."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from experts.tls import TLS_NAME, Identity

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the command openssl is not installed")


@dataclass(frozen=True, kw_only=True)
class Files:
    cert: str
    key: str
    ca: str

    def identity(self) -> Identity:
        """What they hold, whether it is of any use or not."""
        return Identity(cert=_read(self.cert), key=_read(self.key), ca=_read(self.ca))


class Authority:
    """A CA whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.cert = folder / "ca.pem"
        self._openssl("req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA")

    def issue(self, file: str, *, name: str = TLS_NAME, days: int = 1) -> Files:
        """A certificate for `name` that ends `days` from now; a negative number makes one that has ended."""
        request = ("req", *_NEW_KEY, "-keyout", f"{file}.key", "-out", f"{file}.csr", "-subj", f"/CN={file}")
        self._openssl(*request, "-addext", f"subjectAltName=DNS:{name}")
        sign = ("x509", "-req", "-in", f"{file}.csr", "-out", f"{file}.pem", "-copy_extensions", "copy")
        self._openssl(*sign, "-CA", "ca.pem", "-CAkey", "ca.key", "-days", str(days))
        return Files(cert=f"{self._folder / file}.pem", key=f"{self._folder / file}.key", ca=str(self.cert))

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
