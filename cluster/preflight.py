"""What can be said about settings before anything is started: better one clear line now than a trace out of an actor.

Reads tables, never weights.
"""

from __future__ import annotations

import socket

from cluster.check import check_folder
from cluster.check_report import require_fit
from cluster.config import ServeSettings
from cluster.controller_process import plan_target
from cluster.local import open_model, plan_kv
from experts.errors import CheckpointError, InvalidInput
from router.api.http_listener import listening_socket


def check_model(settings: ServeSettings) -> None:
    """What `herd check` says of the folder, then what the settings ask of it. Raises CheckpointError, InvalidInput."""
    require_fit(check_folder(settings.model_dir), settings.model_dir)
    try:
        model = open_model(settings.model_dir, settings.dtype)
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
    settings.check_rows_on(settings.node_address or host)
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, OverflowError):
        raise InvalidInput("ray-address", address, "must be the address of a running Ray cluster") from None


def check_identity(settings: ServeSettings) -> None:
    """Raises InvalidInput when the processes of the cluster would refuse each other."""
    settings.identity()


def check_port_is_free(settings: ServeSettings) -> None:
    """Raises InvalidInput when somebody already listens on the HTTP port."""
    listening_socket(settings.host, settings.port, shared=False).close()
