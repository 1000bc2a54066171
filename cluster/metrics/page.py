"""The Prometheus page of a process: an HTTP listener of its own, that reads its numbers when it is asked.

A page may fail and serving goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from socketserver import ThreadingMixIn
from threading import Thread
from types import MappingProxyType
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.registry import Collector

from cluster.metrics.families import Families
from experts.errors import InvalidInput

Documents = Mapping[str, Callable[[], bytes]]
"""JSON documents by path, each made when it is asked for."""


class MetricsPage:
    """`/metrics` of one process, on the first free port of `ports` or on any. `families` is called per scrape.

    `documents` lie beside it. Raises InvalidInput when no port is free.
    """

    def __init__(
        self,
        families: Callable[[], Families],
        *,
        bind: str,
        ports: Sequence[int] | None = None,
        documents: Documents = MappingProxyType({}),
    ) -> None:
        registry = CollectorRegistry()
        registry.register(_Reader(families))
        ProcessCollector(registry=registry)
        self._server = _listen(_with_documents(make_wsgi_app(registry), documents), bind, ports)
        self.address = f"[{bind}]:{self._server.server_port}" if ":" in bind else f"{bind}:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, name="metrics-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Reader(Collector):
    def __init__(self, families: Callable[[], Families]) -> None:
        self._families = families

    def collect(self) -> Families:
        return self._families()

    def describe(self) -> Families:
        """Nothing is read before the first scrape: the parts may not be there yet."""
        return ()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10.0
    """A client that says nothing keeps no thread for longer."""

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


def _with_documents(metrics: WSGIApplication, documents: Documents) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        make = documents.get(environ.get("PATH_INFO", ""))
        if make is None:
            return metrics(environ, start_response)
        body = make()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return app


def _listen(app: WSGIApplication, bind: str, ports: Sequence[int] | None) -> WSGIServer:
    kind = _Server6 if ":" in bind else _Server
    for port in ports or [0]:
        try:
            server = kind((bind, port), _Handler)
        except OSError:
            continue
        server.set_app(app)
        return server
    raise InvalidInput("metrics-ports", f"{ports}", f"none of them is free on {bind}")
