"""What can be said about settings before anything is started: better one clear line now than a trace out of an actor.

Reads tables, never weights.
"""

from __future__ import annotations

import socket

from cluster.config import ServeSettings
from cluster.controller_process import plan_target
from cluster.local import open_model, plan_kv
from experts.errors import CheckpointError, InvalidInput
from router.prompt.chat import ChatTemplate
from router.prompt.tokenizer import Tokenizer


def check_model(settings: ServeSettings) -> None:
    """Open the folder as routers, hosts and ingresses will. Raises CheckpointError and InvalidInput."""
    if not settings.model_dir.is_dir():
        raise InvalidInput("MODEL_DIR", str(settings.model_dir), "must be an existing folder")
    try:
        model = open_model(settings.model_dir, settings.dtype)
        ChatTemplate.from_folder(settings.model_dir, Tokenizer.from_folder(settings.model_dir))
    except OSError as error:
        raise CheckpointError(str(settings.model_dir), f"cannot be read: {error.strerror}") from None
    plan_kv(model, settings)
    plan_target(settings)


def check_ray_answers(settings: ServeSettings) -> None:
    """Raises InvalidInput when nobody listens at the Ray address: Ray itself would try for minutes."""
    address = settings.ray_address or ""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or "/" in host or not port.isdigit():
        raise InvalidInput("ray-address", address, "must be auto or ip:port")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, OverflowError):
        raise InvalidInput("ray-address", address, "must be the address of a running Ray cluster") from None


def check_port_is_free(settings: ServeSettings) -> None:
    """Raises InvalidInput when somebody already listens on the HTTP port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise InvalidInput("host", settings.host, "must be an address of this machine") from None
    except OSError as error:
        rule = f"must be free to listen on {settings.host}: {error.strerror}"
        raise InvalidInput("port", settings.port, rule) from None
