"""What both ends of a gRPC link must share to fit each other: the method's name and the settings."""

from __future__ import annotations

SERVICE = "herd.expert.v1.ExpertHostService"
METHOD = "Exchange"
WEIGHTS_METHOD = "Weights"

Options = list[tuple[str, int]]

# A silent peer behind a broken network is given up after their sum; a stopped one is noticed much earlier, by the
# deadlines of its shipments.
_PING_EVERY_MS = 20_000
_PING_TIMEOUT_MS = 10_000
_CONNECT_TIMEOUT_MS = 2_000
_FIRST_BACKOFF_MS, _LAST_BACKOFF_MS = 100, 1_000

RECONNECT: Options = [
    # gRPC waits up to two minutes between attempts, and 20 s for one.
    ("grpc.initial_reconnect_backoff_ms", _FIRST_BACKOFF_MS),
    ("grpc.max_reconnect_backoff_ms", _LAST_BACKOFF_MS),
    # By its name something else, but it bounds one attempt to connect, handshake and all.
    ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
]
"""How channels find their peer again."""


def client_options(max_message_bytes: int) -> Options:
    """For a channel that carries one link. A link re-connects with a new channel."""
    return [
        *_common(max_message_bytes),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", 0),
        # Channels to one address would share a connection and its back-off.
        ("grpc.use_local_subchannel_pool", 1),
        *RECONNECT,
    ]


def server_options(max_message_bytes: int) -> Options:
    """For a listener. A taken port is an error, not a port shared by two processes."""
    return [
        *_common(max_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    ]


def _common(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", _PING_EVERY_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
    ]
