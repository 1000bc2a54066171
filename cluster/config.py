"""The settings of one cluster, from the command line or a Serve YAML, checked; knows no machine and no model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from experts.config import DTYPES
from experts.errors import InvalidInput
from experts.tls import ALL_THREE_RULE, ROWS_RULE, Identity, is_loopback, load_identity

LOOPBACK = "127.0.0.1"
TRANSPORTS = ("grpc", "local")
DEVICES = ("cpu", "cuda")
TLS_FILES = ("tls_cert", "tls_key", "tls_ca")
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?)(i?B)?", re.IGNORECASE)
_PORTS = re.compile(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `herd serve` was asked for. Sizes in bytes, times in seconds, port 0 means any free one.

    `ingresses` listen on one port, so that clients are answered when one of them dies.
    `hosts` and `replicas` count for transport "grpc"; with "local" every router holds all experts itself. With
    `max_hosts` the load decides how many hosts there are, from `hosts` up to so many.
    `rebalance` lets the load of experts decide where they are and how often; `extra_slots` is room for so many more
    experts of each layer on every host.
    `host_bind` is the address that expert hosts listen on, `host_advertise` the one that routers are told: an address,
    or "address:A-B" whose ports stand for those of `host_ports` one by one. Empty: the node's own address.
    `decode_stretch` bounds how many times as long a step of running streams gets by prompts beside it.
    `deterministic` makes answers the same bits whatever the batch, the hosts and the transport, and slower.
    `node_address` is where everything else listens; empty: what Ray calls the node. `state_dir` is the folder of
    run file and journal on the controller's machine. `tls_cert`, `tls_key` and `tls_ca` are PEM files, the same paths
    on every node, by which the processes know each other; without them rows stay on loopback addresses, unless
    `insecure_rows` lets them travel as they are. `prometheus` is the URL of a server that scrapes the cluster, to
    read its load from; empty: the controller reads the pages itself. `targets_file` is kept up to date for `file_sd`.
    """

    model_dir: Path
    hosts: int = 1
    max_hosts: int | None = None
    replicas: int = 1
    rebalance: bool = True
    extra_slots: int = 0
    routers: int = 1
    ingresses: int = 2
    host: str = "127.0.0.1"
    port: int = 8000
    transport: str = "grpc"
    served_model_name: str = ""
    dtype: str = "auto"
    device: str = "cpu"
    max_model_len: int | None = None
    kv_memory: int = 2 << 30
    prefix_cache: bool = True
    max_batch_tokens: int = 1024
    max_running: int = 64
    max_waiting: int = 256
    decode_stretch: float = 2.0
    deterministic: bool = False
    request_timeout_s: float = 600.0
    ray_address: str | None = None
    host_ports: range | None = None
    router_ports: range | None = None
    metrics_ports: range | None = None
    control_port: int = 0
    host_bind: str = ""
    host_advertise: str = ""
    name: str = "herd"
    state_dir: str = ""
    node_address: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    insecure_rows: bool = False
    prometheus: str = ""
    targets_file: str = ""

    def __post_init__(self) -> None:
        _between("hosts", self.hosts, 1, 4096)
        if self.max_hosts is not None:
            _between("max-hosts", self.max_hosts, self.hosts, 4096)
        _between("routers", self.routers, 1, 1024)
        _between("ingresses", self.ingresses, 1, 64)
        _between("replicas", self.replicas, 1, self.hosts)
        _between("extra-slots", self.extra_slots, 0, 4096)
        _between("port", self.port, 1, 65535)
        _between("control-port", self.control_port, 0, 65535)
        _between("max-batch-tokens", self.max_batch_tokens, 1, 1 << 20)
        _between("max-running", self.max_running, 1, 1 << 16)
        _between("max-waiting", self.max_waiting, 0, 1 << 20)
        _between("kv-memory", self.kv_memory, 1 << 16, 1 << 50)
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("dtype", self.dtype, ("auto", *DTYPES))
        _one_of("device", self.device, DEVICES)
        if self.max_model_len is not None:
            _between("max-model-len", self.max_model_len, 2, 1 << 31)
        if not self.decode_stretch >= 1:
            raise InvalidInput("decode-stretch", self.decode_stretch, "must be at least 1")
        if not 0 < self.request_timeout_s <= 86400:
            raise InvalidInput("request-timeout-s", self.request_timeout_s, "must be more than 0 and at most 86400")
        if not _NAME.fullmatch(self.name):
            raise InvalidInput("name", self.name, "must be letters, digits, '.', '_' or '-', at most 41")
        if self.prometheus:
            check_url("prometheus", self.prometheus)
        self._check_ports()
        for name in TLS_FILES:
            if self.has_tls and not getattr(self, name):
                raise InvalidInput(name.replace("_", "-"), "", ALL_THREE_RULE)
        self.check_rows_on(self.node_address or LOOPBACK)

    def check_rows_on(self, node_address: str) -> None:
        """Raises InvalidInput when rows would leave or reach hosts on the node of that address unguarded."""
        if not self.host_names or self.has_tls or self.insecure_rows:
            return
        given = "node-address" if self.node_address else "ray-address"
        for field, address in (("host-bind", self.host_bind), ("host-advertise", self.advertised()[0])):
            if not is_loopback(address or node_address):
                raise InvalidInput(field if address else given, address or node_address, ROWS_RULE)

    def _check_ports(self) -> None:
        if self.host_ports is not None:
            _at_least("host-ports", self.host_ports, self.max_hosts or self.hosts)
        if self.router_ports is not None:
            _at_least("router-ports", self.router_ports, self.routers)
        _, ports = self.advertised()
        if ports is not None and (self.host_ports is None or len(ports) != len(self.host_ports)):
            raise InvalidInput("host-advertise", self.host_advertise, "its ports must be as many as host-ports")

    @property
    def model_name(self) -> str:
        """What clients call the model: the name given, else the folder's."""
        return self.served_model_name or self.model_dir.name

    @property
    def has_tls(self) -> bool:
        """Whether the processes of the cluster prove to each other who they are."""
        return bool(self.tls_cert or self.tls_key or self.tls_ca)

    @property
    def host_names(self) -> tuple[str, ...]:
        """The names of the hosts; none where routers compute experts themselves."""
        return tuple(f"host-{index}" for index in range(self.hosts)) if self.transport == "grpc" else ()

    def advertised(self) -> tuple[str, range | None]:
        """`host_advertise` taken apart: address and ports."""
        address, colon, ports = self.host_advertise.rpartition(":")
        if not colon:
            return self.host_advertise, None
        return address, parse_ports("host-advertise", ports)

    def identity(self) -> Identity | None:
        """What the TLS files hold, read now; None without them. Raises InvalidInput."""
        return load_identity(self.tls_cert, self.tls_key, self.tls_ca)

    def digest(self) -> str:
        """Names what shapes the cluster's hosts: processes of settings with other digests do not fit together."""
        shaping = (
            "model_dir",
            "hosts",
            "replicas",
            "transport",
            "dtype",
            "device",
            "deterministic",
            "name",
            *TLS_FILES,
        )
        chosen = {field: value for field, value in asdict(self).items() if field in shaping}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:16]


def parse_settings(raw: Mapping[str, Any]) -> ServeSettings:
    """Settings from plain values, as a YAML or the command line has them; None means the default.

    Names are those of ServeSettings, with "-" or "_". Raises InvalidInput naming field, value and rule.
    """
    known = {field.name for field in fields(ServeSettings)}
    values: dict[str, Any] = {}
    for given, value in raw.items():
        name = str(given).replace("-", "_")
        if name not in known:
            raise InvalidInput(str(given), value, f"is not a setting; known are {', '.join(sorted(known))}")
        if value is not None:
            values[name] = _PARSERS.get(name, _text)(name if name == "model_dir" else name.replace("_", "-"), value)
    if "model_dir" not in values:
        raise InvalidInput("model_dir", None, "must name a folder")
    return ServeSettings(**values)


def check_url(field: str, value: str) -> None:
    """Raises InvalidInput unless `value` is where an HTTP server is: scheme, host, and maybe port and path."""
    try:
        parts = urlsplit(value)
        fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fit = False
    if not fit or not value.isascii() or not value.isprintable() or " " in value:
        raise InvalidInput(field, value, "must be a URL such as http://127.0.0.1:9090")
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidInput(field, value, "must have neither user, password, query nor fragment")


def parse_counts(field: str, text: str) -> list[int]:
    """Positive numbers out of "1,8,32"."""
    counts = text.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise InvalidInput(field, text, "must be positive numbers with commas between them")
    return [int(count) for count in counts]


def parse_size(field: str, value: object) -> int:
    """Bytes, from a number or a text such as "2GiB", "500 MB" or "1.5G" (1024-based with or without the "i")."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise InvalidInput(field, value, "must be a size such as 500MiB or 2GiB")
    return int(float(match[1]) * 2 ** _UNITS[match[2].upper()])


def parse_ports(field: str, value: object) -> range:
    """The ports of "A-B", both included, or of one number."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    match = _PORTS.fullmatch(value.strip()) if isinstance(value, str) else None
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise InvalidInput(field, value, "must be a range of ports A-B with 1 ≤ A ≤ B ≤ 65535")
    return range(first, last + 1)


def _integer(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidInput(field, value, "must be an integer")
    try:
        return int(value)
    except ValueError:
        raise InvalidInput(field, value, "must be an integer") from None


def _flag(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(field, value, "must be true or false")
    return value


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidInput(field, value, "must be a number")
    try:
        return float(value)
    except ValueError:
        raise InvalidInput(field, value, "must be a number") from None


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidInput(field, value, "must be a text")
    return value


def _folder(field: str, value: object) -> Path:
    text = str(value) if isinstance(value, Path) else _text(field, value)
    if not text or "\0" in text:
        raise InvalidInput(field, value, "must name a folder")
    return Path(text).absolute()


def _file(field: str, value: object) -> str:
    """Absolute, because the cluster's processes have other working folders."""
    text = str(value) if isinstance(value, Path) else _text(field, value)
    if "\0" in text:
        raise InvalidInput(field, value, "must name a file")
    return str(Path(text).absolute()) if text else ""


_PARSERS: dict[str, Callable[[str, object], Any]] = {
    **dict.fromkeys(("hosts", "max_hosts", "replicas", "extra_slots", "routers", "ingresses"), _integer),
    **dict.fromkeys(("port", "control_port", "max_model_len"), _integer),
    **dict.fromkeys(("max_batch_tokens", "max_running", "max_waiting"), _integer),
    **dict.fromkeys(("host_ports", "router_ports", "metrics_ports"), parse_ports),
    "deterministic": _flag,
    "model_dir": _folder,
    "kv_memory": parse_size,
    "prefix_cache": _flag,
    "rebalance": _flag,
    **dict.fromkeys((*TLS_FILES, "targets_file"), _file),
    "insecure_rows": _flag,
    "request_timeout_s": _number,
    "decode_stretch": _number,
}


def _between(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidInput(field, value, f"must be between {low} and {high}")


def _at_least(field: str, ports: range, count: int) -> None:
    if len(ports) < count:
        raise InvalidInput(field, f"{ports[0]}-{ports[-1]}", f"must be at least {count} ports")


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInput(field, value, f"must be one of {', '.join(allowed)}")
