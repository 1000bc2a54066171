"""Who proves to belong to the cluster is linked, nobody else; and rows do not leave the machine by accident."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Files, needs_openssl
from expert_hosts import ask, assert_answers, make_host, make_shipment, make_terms, soon, wait_until

from experts.errors import HostLost, InvalidInput
from experts.placement import HostInfo
from experts.tls import TLS_NAME, is_loopback, load_identity
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_link import Reconnect
from experts.transport.grpc_options import METHOD, SERVICE
from experts.transport.grpc_server import ExpertHostServer, serve_expert_host
from experts.wire.codec import encode_hello

FIRST = (1, 0)
LOCALHOST = "127.0.0.1"
WANTED = "each end wants to see a certificate of its tls-ca, in date"
ELSEWHERE = ["0.0.0.0", "::", "10.0.0.7", "192.168.1.1", "gate.example", "", "127.0.0.1.example"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def ours(authority: Authority) -> Files:
    return authority.issue("ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Authority(tmp_path_factory.mktemp("tls") / "theirs").issue("theirs")


@pytest.fixture
def serve() -> Iterator[Callable[..., ExpertHostServer]]:
    servers: list[ExpertHostServer] = []

    def start(**options: Any) -> ExpertHostServer:
        defaults = {"terms": make_terms(), "incarnation": 1, "bind": LOCALHOST, "max_streams": 4}
        servers.append(serve_expert_host(make_host("a", [FIRST]), **{**defaults, **options}))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(grace=0)


@pytest.fixture
def link() -> Iterator[Callable[..., GrpcTransport]]:
    transports: list[GrpcTransport] = []

    def start(address: str, **options: Any) -> GrpcTransport:
        fast = Reconnect(first_s=0.01, longest_s=0.05)
        transports.append(GrpcTransport(router_name="router", terms=make_terms(), reconnect=fast, **options))
        transports[-1].connect({"a": HostInfo(name="a", incarnation=1, address=address)})
        return transports[-1]

    yield start
    for transport in transports:
        transport.close()


Serve = Callable[..., ExpertHostServer]
LinkTo = Callable[..., GrpcTransport]


def assert_serves(transport: GrpcTransport) -> None:
    wait_until(lambda: transport.linked() == {"a"}, "the link")
    shipment = make_shipment({FIRST: 2})
    assert_answers(shipment, ask(transport, "a", shipment, soon()))


def assert_refused(transport: GrpcTransport, caplog: pytest.LogCaptureFixture, told: str) -> None:
    wait_until(lambda: "link to host a at" in caplog.text and told in caplog.text, f"the log tells {told!r}")
    assert transport.linked() == frozenset()
    assert isinstance(ask(transport, "a", make_shipment({FIRST: 1}), soon()), HostLost)


# Links


@needs_openssl
def test_ends_of_one_authority_serve_each_other(authority: Authority, ours: Files, serve: Serve, link: LinkTo) -> None:
    server = serve(tls=load_identity(ours.cert, ours.key, ours.ca))
    assert_serves(link(server.address, tls=load_identity(ours.cert, ours.key, ours.ca)))
    another = authority.issue("another")
    assert_serves(link(server.address, tls=load_identity(another.cert, another.key, another.ca)))


@needs_openssl
def test_a_router_without_tls_is_refused(
    ours: Files, serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(tls=ours.identity())
    assert_refused(link(server.address), caplog, "perhaps it wants TLS")
    assert_serves(link(server.address, tls=ours.identity()))


@needs_openssl
def test_a_host_without_tls_is_refused(
    ours: Files, serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture
) -> None:
    assert_refused(link(serve().address, tls=ours.identity()), caplog, WANTED)


@needs_openssl
def test_a_router_of_another_authority_is_refused(
    ours: Files, theirs: Files, serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture
) -> None:
    # It trusts the host; the host does not trust it.
    stranger = replace(theirs.identity(), ca=ours.identity().ca)
    assert_refused(link(serve(tls=ours.identity()).address, tls=stranger), caplog, WANTED)


@needs_openssl
def test_a_host_of_another_authority_is_refused(
    ours: Files, theirs: Files, serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = replace(theirs.identity(), ca=ours.identity().ca)
    assert_refused(link(serve(tls=stranger).address, tls=ours.identity()), caplog, "CERTIFICATE_VERIFY_FAILED")


@needs_openssl
def test_a_host_of_another_name_is_refused(
    authority: Authority, ours: Files, serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = authority.issue("named", name="example.org").identity()
    assert_refused(link(serve(tls=stranger).address, tls=ours.identity()), caplog, WANTED)


@needs_openssl
@pytest.mark.parametrize("expired_side", ["router", "host"])
def test_an_expired_certificate_is_refused(
    authority: Authority,
    ours: Files,
    serve: Serve,
    link: LinkTo,
    caplog: pytest.LogCaptureFixture,
    expired_side: str,
) -> None:
    good, expired = ours.identity(), authority.issue(f"expired-{expired_side}", days=-1).identity()
    router, host = (expired, good) if expired_side == "router" else (good, expired)
    assert_refused(link(serve(tls=host).address, tls=router), caplog, WANTED)


@needs_openssl
def test_who_shows_no_certificate_is_refused(ours: Files, serve: Serve) -> None:
    server = serve(tls=ours.identity())
    credentials = grpc.ssl_channel_credentials(ours.identity().ca)
    options = [("grpc.ssl_target_name_override", TLS_NAME)]
    with grpc.secure_channel(server.address, credentials, options=options) as channel:
        answers = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([encode_hello(make_terms(), "stranger")]))
        with pytest.raises(grpc.RpcError) as refusal:
            next(answers)
    assert isinstance(refusal.value, grpc.Call) and refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.num_links == 0


# Identities


@needs_openssl
def test_an_identity_never_shows_its_key(ours: Files) -> None:
    assert "PRIVATE" not in repr(load_identity(ours.cert, ours.key, ours.ca))


def test_no_files_are_no_identity() -> None:
    assert load_identity("", "", "") is None


@needs_openssl
def test_files_of_no_use_are_refused_by_name(authority: Authority, ours: Files, theirs: Files, tmp_path: Path) -> None:
    expired, named = authority.issue("expired", days=-1), authority.issue("other-name", name="example.org")
    empty = tmp_path / "empty"
    empty.touch()
    for cert, key, ca, told in [
        ("", ours.key, ours.ca, "tls-cert: must be given with the other two"),
        (ours.cert, ours.key, "", "tls-ca: must be given with the other two"),
        (f"{tmp_path}/none", ours.key, ours.ca, "tls-cert: must be a file that can be read: No such file"),
        (str(tmp_path), ours.key, ours.ca, "tls-cert: must be a file that can be read: Is a directory"),
        (ours.cert, theirs.key, ours.ca, "tls-key: must be the key of"),
        (ours.cert, str(empty), ours.ca, "tls-key: must be the key of"),
        (ours.cert, ours.key, ours.key, "tls-ca: must be a certificate in PEM"),
        (ours.cert, ours.key, theirs.ca, "tls-cert: must be a certificate of tls-ca for the name 'herd'"),
        (expired.cert, expired.key, expired.ca, "certificate has expired"),
        (named.cert, named.key, named.ca, "not valid for 'herd'"),
    ]:
        with pytest.raises(InvalidInput) as refusal:
            load_identity(cert, key, ca)
        assert told in str(refusal.value)


# Without TLS


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"])
def test_addresses_of_this_machine(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "10.0.0.7", "192.168.1.1", "gate.example", "", "127.0.0.1.example"]
)
def test_addresses_of_others(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "10.0.0.7"])
def test_a_host_does_not_listen_to_other_machines_by_accident(serve: Serve, bind: str) -> None:
    with pytest.raises(InvalidInput, match="host-bind: must be a loopback address, unless tls-cert"):
        serve(bind=bind)


def test_a_host_listens_to_other_machines_when_told_so(serve: Serve, link: LinkTo) -> None:
    server = serve(bind="0.0.0.0", insecure=True)
    assert_serves(link(f"{LOCALHOST}:{server.port}"))


@needs_openssl
def test_a_host_listens_to_other_machines_with_tls(ours: Files, serve: Serve, link: LinkTo) -> None:
    server = serve(bind="0.0.0.0", tls=ours.identity())
    assert_serves(link(f"{LOCALHOST}:{server.port}", tls=ours.identity()))


def test_rows_are_not_sent_to_other_machines_by_accident(link: LinkTo, caplog: pytest.LogCaptureFixture) -> None:
    transport = link("198.51.100.1:7100")
    assert_refused(transport, caplog, "its address must be a loopback address, unless tls-cert")
