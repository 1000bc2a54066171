"""Routed experts over a transport against the same experts in this process, with hosts that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from reference import random_model, save
from stepping import Stepper, load_decoder

from experts.arithmetic import Arithmetic, PlainArithmetic, TiledArithmetic
from experts.checkpoint import Checkpoint
from experts.config import ModelConfig, load_config
from experts.host import ExpertHost
from experts.placement import ClusterView, HostInfo, Placement
from experts.transport.local import FaultyLocalTransport
from experts.weights import ExpertStore
from router.dispatch import RemoteExperts
from router.failover.state import Policy
from router.local_experts import LocalExperts
from router.model.decoder import run
from router.routed import Routing

NUM_EXPERTS, HIDDEN, LAYERS = 6, 16, 3
PATIENT, HASTY = Policy(), Policy(base_s=0.05, per_row_s=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {
        "vocab_size": 50, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 12, "intermediate_size_mlp": 12,
        "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "attention_chunk_size": 8, "floor_scale": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    return save(random_model(fields, seed=3), tmp_path_factory.mktemp("model"))


class Cluster:
    """Hosts in this process: expert e of every layer on hosts e mod H and, with two replicas, e + 1 mod H."""

    def __init__(
        self,
        folder: Path,
        num_hosts: int,
        num_replicas: int,
        policy: Policy = PATIENT,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self.arithmetic = arithmetic or PlainArithmetic()
        self.config: ModelConfig = load_config(folder)
        self.store = ExpertStore(Checkpoint(folder), self.config, torch.float32)
        names = [f"host-{number}" for number in range(num_hosts)]
        self.hosts = {name: ExpertHost(name, self.store, self.arithmetic) for name in names}
        replicas = {
            key: tuple(names[(key[1] + replica) % num_hosts] for replica in range(num_replicas))
            for key in self.store.all_keys()
        }
        for key, holders in replicas.items():
            for name in holders:
                self.hosts[name].load(key)
        self.transport = FaultyLocalTransport(self.hosts)
        self.remote = RemoteExperts(self.transport, policy)
        infos = {name: HostInfo(name=name, incarnation=1, address=name) for name in names}
        self.remote.connect(ClusterView(version=1, placement=Placement(epoch=1, replicas=replicas), hosts=infos))

    def local(self) -> LocalExperts:
        return LocalExperts({key: self.store.load(*key) for key in self.store.all_keys()}, self.arithmetic)


def random_rows(num_rows: int, seed: int, choices: Sequence[int] | None = None) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(num_rows, HIDDEN, generator=generator)
    wanted = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in range(num_rows)])
    expert_TK = wanted.sort(-1).values if choices is None else torch.tensor([[c] for c in choices])
    return x_TH, Routing(expert_TK=expert_TK, score_TK=torch.rand(expert_TK.shape, generator=generator))


@pytest.mark.parametrize(("num_hosts", "num_replicas"), [(1, 1), (2, 1), (3, 2), (4, 3), (6, 6)])
def test_equals_local_bit_for_bit(folder: Path, num_hosts: int, num_replicas: int) -> None:
    cluster = Cluster(folder, num_hosts, num_replicas)
    for layer, num_rows in [(0, 1), (1, 7), (2, 40)]:
        x_TH, routing = random_rows(num_rows, seed=num_rows)
        theirs = cluster.local().dispatch(layer, x_TH, routing).combine()
        ours = cluster.remote.dispatch(layer, x_TH, routing).combine()
        assert ours.lost == {}
        assert torch.equal(ours.y_TH, theirs.y_TH)


def test_rows_land_on_the_host_that_the_placement_names(folder: Path) -> None:
    cluster = Cluster(folder, 2, 1)
    x_TH, routing = random_rows(5, seed=1, choices=[0, 2, 4, 4, 1])
    cluster.remote.dispatch(1, x_TH, routing).combine()
    assert [host.rows_total for host in cluster.hosts.values()] == [4, 1]
    assert cluster.remote.stats.shipments == 2
    assert cluster.remote.stats.rows_sent == 5


def test_a_lost_host_loses_only_its_rows(folder: Path) -> None:
    cluster = Cluster(folder, 2, 1)
    cluster.transport.lose("host-1")
    x_TH, routing = random_rows(4, seed=1, choices=[0, 3, 2, 5])
    combined = cluster.remote.dispatch(2, x_TH, routing).combine()
    assert combined.lost == {1: ((2, 3),), 3: ((2, 5),)}
    expected = cluster.local().dispatch(2, x_TH, routing).combine().y_TH
    assert torch.equal(combined.y_TH[[0, 2]], expected[[0, 2]])
    assert not cluster.remote.available(frozenset({(2, 3)}))
    assert cluster.remote.available(frozenset({(2, 0), (2, 4)}))
    cluster.transport.restore("host-1")
    assert cluster.remote.available(frozenset({(2, 3)}))
    assert torch.equal(cluster.remote.dispatch(2, x_TH, routing).combine().y_TH, expected)


def test_another_replica_answers_for_a_host_that_does_not_hold_what_it_should(folder: Path) -> None:
    cluster = Cluster(folder, 3, 2)
    for layer in range(LAYERS):
        cluster.hosts["host-0"].evict((layer, 0))
    x_TH, routing = random_rows(30, seed=2)
    ours = cluster.remote.dispatch(0, x_TH, routing).combine()
    assert ours.lost == {}
    assert cluster.remote.stats.failures == {"NotHosted": 1}
    assert torch.equal(ours.y_TH, cluster.local().dispatch(0, x_TH, routing).combine().y_TH)


def test_a_stalled_host_is_left_alone_until_it_answers(folder: Path) -> None:
    cluster = Cluster(folder, 2, 1, HASTY)
    cluster.transport.stall("host-0")
    x_TH, routing = random_rows(2, seed=4, choices=[0, 1])
    assert set(cluster.remote.dispatch(0, x_TH, routing).combine().lost) == {0}
    shipments = cluster.remote.stats.shipments
    assert set(cluster.remote.dispatch(0, x_TH, routing).combine().lost) == {0}
    assert cluster.remote.stats.shipments == shipments + 1, "only host-1 is asked the second time"
    cluster.transport.restore("host-0")
    assert cluster.remote.dispatch(0, x_TH, routing).combine().lost == {}


def test_a_stalled_replica_is_hedged_and_then_left_alone(folder: Path) -> None:
    cluster = Cluster(folder, 3, 2)
    x_TH, routing = random_rows(30, seed=2)
    expected = cluster.local().dispatch(0, x_TH, routing).combine().y_TH
    for _ in range(20):
        cluster.remote.dispatch(0, x_TH, routing).combine()
    cluster.transport.stall("host-0")
    for _ in range(3):
        ours = cluster.remote.dispatch(0, x_TH, routing).combine()
        assert ours.lost == {}
        assert torch.equal(ours.y_TH, expected)
    stats = cluster.remote.stats
    assert stats.hosts["host-0"] in ("suspect", "fenced")
    assert ("host-0", stats.hosts["host-0"]) in stats.entered_at
    assert stats.resends > 0
    assert stats.failovers["slow"] + stats.failovers["fenced"] > 0
    assert sum(stats.round_trips[0].counts) == stats.dispatches
    assert stats.decisions > stats.dispatches


def test_a_new_placement_counts_from_the_next_step_on(folder: Path) -> None:
    cluster = Cluster(folder, 2, 1)
    cluster.remote.begin_step()
    for layer in range(LAYERS):
        cluster.hosts["host-1"].load((layer, 0))
    infos = {name: HostInfo(name=name, incarnation=1, address=name) for name in cluster.hosts}
    moved = {key: ("host-1",) for key in cluster.store.all_keys() if key[1] in (0, 1)}
    cluster.remote.connect(ClusterView(version=2, placement=Placement(epoch=2, replicas=moved), hosts=infos))
    x_TH, routing = random_rows(1, seed=3, choices=[0])
    cluster.remote.dispatch(0, x_TH, routing).combine()
    assert [host.rows_total for host in cluster.hosts.values()] == [1, 0]
    assert cluster.remote.stats.epoch == 1
    cluster.remote.begin_step()
    cluster.remote.dispatch(0, x_TH, routing).combine()
    assert [host.rows_total for host in cluster.hosts.values()] == [1, 1]
    assert cluster.remote.stats.epoch == 2


def test_rows_of_one_expert_over_several_hosts_are_the_same_bits(folder: Path) -> None:
    """With products in tiles, no row knows which rows are beside it."""
    cluster = Cluster(folder, 3, 3, arithmetic=TiledArithmetic((HIDDEN,)))
    x_TH, routing = random_rows(700, seed=9, choices=[4] * 700)
    ours = cluster.remote.dispatch(1, x_TH, routing).combine()
    assert cluster.remote.stats.shipments == 3, "many rows are worth a second read of the weights"
    assert torch.equal(ours.y_TH, cluster.local().dispatch(1, x_TH, routing).combine().y_TH)


def test_two_dispatches_under_way_do_not_mix(folder: Path) -> None:
    cluster = Cluster(folder, 3, 2)
    (x_TH, routing), (z_TH, other) = random_rows(9, seed=5), random_rows(4, seed=6)
    first = cluster.remote.dispatch(0, x_TH, routing)
    second = cluster.remote.dispatch(2, z_TH, other)
    local = cluster.local()
    assert torch.equal(second.combine().y_TH, local.dispatch(2, z_TH, other).combine().y_TH)
    assert torch.equal(first.combine().y_TH, local.dispatch(0, x_TH, routing).combine().y_TH)


def test_the_decoder_drops_requests_with_lost_rows_and_finishes_the_others(folder: Path) -> None:
    """Whatever leaves the step in whatever layer, what stays is as if it had been alone with its like."""
    generator = torch.Generator().manual_seed(8)
    sequences = [torch.randint(0, 50, (length,), generator=generator).tolist() for length in (1, 3, 5, 2, 8, 1, 4)]
    whole = Stepper(load_decoder(folder), sequences).step(dict.fromkeys(range(7), 8))
    assert not whole.lost
    cluster = Cluster(folder, 6, 1)
    stepper = Stepper(load_decoder(folder, experts=cluster.remote), sequences)
    cluster.transport.lose("host-2")
    output = stepper.step(dict.fromkeys(range(7), 8))
    assert output.lost
    assert output.samples
    assert set(output.lost) | set(output.samples) == set(range(7))
    assert all(expert == 2 for missing in output.lost.values() for _, expert in missing)
    for logits, sample in zip(output.logits_SV, output.samples, strict=True):
        torch.testing.assert_close(logits, whole.logits_SV[sample], atol=1e-5, rtol=0)
    cluster.transport.restore("host-2")
    left = sorted(output.lost)
    retried = stepper.step(dict.fromkeys(left, 8))
    assert not retried.lost
    for logits, row in zip(retried.logits_SV, left, strict=True):
        torch.testing.assert_close(logits, whole.logits_SV[row], atol=1e-5, rtol=0)


def test_interleaved_forwards_equal_forwards_alone(folder: Path) -> None:
    cluster = Cluster(folder, 2, 1)
    decoder = load_decoder(folder, experts=cluster.remote)
    steppers = [Stepper(decoder, [[5, 6, 7]]), Stepper(decoder, [[9, 8]])]
    alone = [stepper.step({0: 8}).logits_SV for stepper in steppers]
    again = [Stepper(decoder, [[5, 6, 7]]), Stepper(decoder, [[9, 8]])]
    together = run(*(decoder.forward(stepper.pack({0: 8}), stepper.store) for stepper in again))
    for expected, output in zip(alone, together, strict=True):
        assert torch.equal(output.logits_SV, expected)


def test_hosts_that_are_lost_together_lose_their_rows_and_nothing_breaks(folder: Path) -> None:
    """One look at the links ends both shipments, and with the second the dispatch."""
    cluster = Cluster(folder, 2, 1)
    cluster.transport.stall("host-0")
    cluster.transport.stall("host-1")
    x_TH, routing = random_rows(2, seed=1, choices=[0, 1])
    pending = cluster.remote.dispatch(0, x_TH, routing)
    cluster.transport.lose("host-0")
    cluster.transport.lose("host-1")
    assert pending.combine().lost == {0: ((0, 0),), 1: ((0, 1),)}
    assert cluster.remote.stats.rows_lost == 2


def test_who_only_asks_what_is_available_learns_of_a_new_life_and_of_the_epoch(folder: Path) -> None:
    cluster = Cluster(folder, num_hosts=2, num_replicas=1)
    assert cluster.remote.available(frozenset())
    assert cluster.remote.stats.hosts == {"host-0": "up", "host-1": "up"}
    cluster.transport.lose("host-1")
    assert cluster.remote.available(frozenset())
    assert cluster.remote.stats.hosts["host-1"] == "dead"
    cluster.transport.restore("host-1")
    infos = {
        name: HostInfo(name=name, incarnation=2 if name == "host-1" else 1, address=name) for name in cluster.hosts
    }
    placement = Placement(epoch=7)
    cluster.remote.connect(ClusterView(version=2, placement=placement, hosts=infos))
    assert cluster.remote.available(frozenset())
    assert (cluster.remote.stats.hosts["host-1"], cluster.remote.stats.epoch) == ("up", 7)
