"""The identity by which processes of one cluster know each other: a certificate, its key, and the CA of all of them.

Processes have no names that a certificate could bear (they come and go on any node), so every certificate bears the
one name `TLS_NAME`, and the CA must be the cluster's own: who has a certificate of it belongs to the cluster.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from experts.errors import InvalidInput

TLS_NAME = "herd"
"""The DNS name that the certificates of all processes bear."""
ALL_THREE_RULE = "must be given with the other two of tls-cert, tls-key and tls-ca"
ROWS_RULE = "must be a loopback address, unless tls-cert, tls-key and tls-ca are given, or insecure-rows"
"""Rows are what a request is made of: who reads them on their way reads it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """PEM texts: the certificate (and what leads from it to the CA), its key, the CA's certificate."""

    cert: bytes = field(repr=False)
    key: bytes = field(repr=False)
    ca: bytes = field(repr=False)


def load_identity(cert: str, key: str, ca: str) -> Identity | None:
    """What the three files hold; None where none is named.

    Raises InvalidInput naming the file when one cannot be read, or another process with the same files would refuse
    this one: wrong key or CA, expired, without the name.
    """
    if not cert and not key and not ca:
        return None
    identity = Identity(cert=_read("tls-cert", cert), key=_read("tls-key", key), ca=_read("tls-ca", ca))
    _greet_itself(_context("server", cert, key, ca), _context("client", cert, key, ca), cert)
    return identity


def is_loopback(address: str) -> bool:
    """Whether what is sent to `address` (without a port) stays on this machine."""
    try:
        ip = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return address == "localhost"
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def _read(name: str, path: str) -> bytes:
    if not path:
        raise InvalidInput(name, path, ALL_THREE_RULE)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(name, path, f"must be a file that can be read: {error.strerror}") from None


def _context(side: str, cert: str, key: str, ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        # Never asks for the passphrase of a key that has one.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInput("tls-key", key, f"must be the key of {cert}, without a passphrase: {error}") from None
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise InvalidInput("tls-ca", ca, f"must be a certificate in PEM: {error}") from None
    return context


def _greet_itself(server: ssl.SSLContext, client: ssl.SSLContext, cert: str) -> None:
    """A handshake in memory between two ends of the same identity."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=TLS_NAME),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        while ends:
            for end in tuple(ends):
                try:
                    end.do_handshake()
                    ends.remove(end)
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        rule = f"must be a certificate of tls-ca for the name {TLS_NAME!r}: {error.verify_message}"
        raise InvalidInput("tls-cert", cert, rule) from None
    except ssl.SSLError as error:
        raise InvalidInput("tls-cert", cert, f"must serve for both ends of a connection: {error.reason}") from None
