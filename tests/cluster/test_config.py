"""Settings: what is accepted, what is refused by name, and what a process may use."""

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import _parser
from cluster.config import ServeSettings, parse_ports, parse_settings, parse_size
from cluster.local import choose_block_size
from cluster.topology import Role, advertised_host, max_connections, needs
from experts.errors import InvalidInput


def test_the_command_line_and_a_yaml_say_the_same() -> None:
    from_texts = parse_settings(
        {"model_dir": "/m/tiny", "hosts": "2", "kv-memory": "64MiB", "host-ports": "7100-7105", "max-model-len": None}
    )
    from_yaml = parse_settings({"model_dir": "/m/tiny", "hosts": 2, "kv_memory": 64 << 20, "host_ports": "7100 - 7105"})
    assert from_texts == from_yaml
    assert from_texts.max_model_len is None
    assert from_texts.model_name == "tiny"
    assert from_texts.host_names == ("host-0", "host-1")


def test_sharing_prefixes_can_be_switched_off() -> None:
    assert parse_settings({"model_dir": "/m"}).prefix_cache
    assert not parse_settings({"model_dir": "/m", "prefix_cache": False}).prefix_cache
    options = vars(_parser("0").parse_args(["serve", "/m", "--no-prefix-cache"]))
    assert not parse_settings({name: value for name, value in options.items() if name != "run"}).prefix_cache


@pytest.mark.parametrize(
    ("chunk_size", "block_size"),
    [(None, 64), (8192, 64), (64, 64), (32, 32), (96, 48), (100, 50), (16, 16), (7, 64), (131, 64), (12, 12)],
)
def test_blocks_fit_chunks_where_they_can(chunk_size: int | None, block_size: int) -> None:
    assert choose_block_size(chunk_size) == block_size


@pytest.mark.parametrize(
    ("given_values", "field", "rule"),
    [
        ({"hosts": 0}, "hosts", "between 1"),
        ({"hosts": "two"}, "hosts", "integer"),
        ({"hosts": True}, "hosts", "integer"),
        ({"hosts": 2, "replicas": 3}, "replicas", "between 1 and 2"),
        ({"routers": 0}, "routers", "between"),
        ({"port": 70000}, "port", "65535"),
        ({"transport": "carrier-pigeon"}, "transport", "grpc, local"),
        ({"dtype": "int4"}, "dtype", "bfloat16"),
        ({"device": "tpu"}, "device", "cuda"),
        ({"max_model_len": 1}, "max-model-len", "between 2"),
        ({"kv_memory": "lots"}, "kv-memory", "size"),
        ({"kv_memory": 10}, "kv-memory", "between"),
        ({"host_ports": "9-5"}, "host-ports", "A ≤ B"),
        ({"host_ports": "7100-7100", "hosts": 2}, "host-ports", "at least 2"),
        ({"host_advertise": "proxy:1-2"}, "host-advertise", "as many as host-ports"),
        ({"request_timeout_s": 0}, "request-timeout-s", "more than 0"),
        ({"request_timeout_s": "nan"}, "request-timeout-s", "more than 0"),
        ({"name": "a b"}, "name", "letters"),
        ({"served_model_name": 3}, "served-model-name", "text"),
        ({"hostz": 3}, "hostz", "is not a setting"),
        ({"model_dir": ""}, "model_dir", "folder"),
        ({"prefix_cache": "false"}, "prefix-cache", "true or false"),
        ({"prefix_cache": 1}, "prefix-cache", "true or false"),
        ({"tls_cert": "/c.pem", "tls_key": "/k.pem"}, "tls-ca", "with the other two"),
        ({"tls_ca": "/c.pem"}, "tls-cert", "with the other two"),
        ({"tls_ca": 3}, "tls-ca", "text"),
        ({"insecure_rows": "yes"}, "insecure-rows", "true or false"),
        ({"host_bind": "0.0.0.0"}, "host-bind", "loopback address, unless tls-cert"),
        ({"host_advertise": "gate.example"}, "host-advertise", "loopback address, unless tls-cert"),
        ({"host_bind": "127.0.0.1", "node_address": "10.0.0.7"}, "node-address", "loopback address, unless"),
    ],
)
def test_bad_values_are_refused_by_name(given_values: dict[str, object], field: str, rule: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_settings({"model_dir": "/m", **given_values})
    assert caught.value.field == field
    assert rule in caught.value.rule


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(InvalidInput):
        parse_settings({})


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in fields(ServeSettings)]),
        st.none() | st.integers() | st.text(max_size=8) | st.floats() | st.booleans() | st.lists(st.integers()),
    )
)
def test_any_values_give_settings_or_a_named_error(raw: dict[str, object]) -> None:
    try:
        parsed = parse_settings(raw)
    except InvalidInput:
        return
    assert isinstance(parsed, ServeSettings)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("2GB", 2 << 30), ("1.5 G", 3 << 29), ("64mib", 64 << 20), ("7", 7), ("7B", 7), (9, 9)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size("kv-memory", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 lot", None, True, "1e3", "9" * 400])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(InvalidInput):
        parse_size("kv-memory", text)


def test_port_ranges() -> None:
    assert parse_ports("p", "7100-7102") == range(7100, 7103)
    assert parse_ports("p", "7100") == parse_ports("p", 7100) == range(7100, 7101)


def test_only_what_shapes_the_hosts_is_in_the_digest() -> None:
    base = ServeSettings(model_dir=Path("/m"), hosts=2)
    assert base.digest() == ServeSettings(model_dir=Path("/m"), hosts=2, port=9000, max_running=3).digest()
    assert base.digest() != ServeSettings(model_dir=Path("/m"), hosts=3).digest()
    assert base.digest() != ServeSettings(model_dir=Path("/n"), hosts=2).digest()


TLS = {"tls_cert": "c.pem", "tls_key": "k.pem", "tls_ca": "/ca.pem"}


@pytest.mark.parametrize(
    "allowing", [TLS, {"insecure_rows": True}, {"transport": "local"}], ids=["tls", "told", "none"]
)
def test_rows_travel_between_machines_only_when_guarded_or_told_so(allowing: dict[str, object]) -> None:
    elsewhere = {"host_bind": "0.0.0.0", "host_advertise": "gate.example", "node_address": "10.0.0.7"}
    parse_settings({"model_dir": "/m", **elsewhere, **allowing}).check_rows_on("10.0.0.8")
    with pytest.raises(InvalidInput, match="must be a loopback address"):
        parse_settings({"model_dir": "/m", **elsewhere})


def test_a_node_that_is_found_later_is_held_to_the_same_rule() -> None:
    at_home = parse_settings({"model_dir": "/m", "ray_address": "auto"})
    at_home.check_rows_on("127.0.0.1")
    with pytest.raises(InvalidInput, match=r"ray-address: must be a loopback address.*10\.0\.0\.8"):
        at_home.check_rows_on("10.0.0.8")
    proxied = parse_settings({"model_dir": "/m", "host_bind": "127.0.0.1", "host_advertise": "127.0.0.1"})
    proxied.check_rows_on("10.0.0.8")


def test_files_of_tls_are_the_same_from_any_folder() -> None:
    settings = parse_settings({"model_dir": "/m", **TLS})
    assert (settings.tls_cert, settings.tls_ca) == (str(Path("c.pem").absolute()), "/ca.pem")
    assert settings.has_tls and settings.digest() != parse_settings({"model_dir": "/m"}).digest()
    with pytest.raises(InvalidInput, match="tls-cert: must be a file that can be read"):
        settings.identity()


def test_advertised_addresses_stand_apart_from_bound_ones() -> None:
    plain = ServeSettings(model_dir=Path("/m"))
    assert advertised_host(plain, "10.0.0.7", 7100) == "10.0.0.7:7100"
    named = ServeSettings(model_dir=Path("/m"), host_bind="0.0.0.0", host_advertise="gate.example", insecure_rows=True)
    assert advertised_host(named, "10.0.0.7", 7100) == "gate.example:7100"
    proxied = ServeSettings(
        model_dir=Path("/m"), hosts=2, host_ports=range(7100, 7110), host_advertise="127.0.0.1:7200-7209"
    )
    assert advertised_host(proxied, "10.0.0.7", 7103) == "127.0.0.1:7203"


def test_only_a_process_that_computes_alone_gets_all_cores() -> None:
    alone = ServeSettings(model_dir=Path("/m"), transport="local")
    assert needs(alone, Role.ROUTER, num_cores=8).threads == 8
    assert needs(alone, Role.INGRESS, num_cores=8).threads == 1
    two = ServeSettings(model_dir=Path("/m"), transport="local", routers=2)
    assert needs(two, Role.ROUTER, num_cores=8).threads == 1
    remote = ServeSettings(model_dir=Path("/m"))
    assert {needs(remote, role, num_cores=8).threads for role in Role} == {1}
    assert {needs(remote, role).num_cpus for role in Role} == {0.0}


def test_accelerators_go_to_what_computes() -> None:
    cuda = ServeSettings(model_dir=Path("/m"), device="cuda")
    assert [needs(cuda, role).num_gpus for role in (Role.HOST, Role.ROUTER)] == [1.0, 1.0]
    assert [needs(cuda, role).num_gpus for role in (Role.CONTROLLER, Role.INGRESS)] == [0.0, 0.0]


def test_serve_lets_through_what_the_engines_take() -> None:
    settings = ServeSettings(model_dir=Path("/m"), routers=2, max_running=10, max_waiting=20)
    assert max_connections(settings) >= 60
