"""How processes of ours open channels to each other and listen: with TLS, each end proving who it is, or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from experts.tls import TLS_NAME, Identity

Options = Sequence[tuple[str, Any]]


def open_channel(address: str, options: Options, tls: Identity | None) -> grpc.Channel:
    """A channel to `address` ("host:port")."""
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, _for_channels(tls), options=[*options, _NAME])


def open_aio_channel(address: str, options: Options, tls: Identity | None) -> grpc.aio.Channel:
    """The same for an event loop."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, _for_channels(tls), options=[*options, _NAME])


def listen(server: grpc.Server | grpc.aio.Server, address: str, tls: Identity | None) -> int:
    """Let `server` listen at `address`; returns the port. Raises RuntimeError when it is taken."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _for_servers(tls))


def explain(details: str, tls: Identity | None) -> str:
    """Why no connection came about, in words that tell what to look at; `details` are gRPC's."""
    if "failed to connect" not in details:
        return details
    if tls is not None:
        return f"{details}; with TLS, each end wants to see a certificate of its tls-ca, in date"
    return f"{details}; perhaps it wants TLS" if "Socket closed" in details else details


_NAME = ("grpc.ssl_target_name_override", TLS_NAME)


def _for_channels(tls: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)


def _for_servers(tls: Identity) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(tls.key, tls.cert)], tls.ca, require_client_auth=True)
