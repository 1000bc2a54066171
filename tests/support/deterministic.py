"""Requests on a deterministic engine, step by step, with the logits behind every token kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compiled import same_bits
from expert_hosts import wait_until

from cluster.config import ServeSettings
from cluster.local import Model, _image_features, choose_products, load_local_experts, open_model
from experts.host import ExpertHost
from experts.placement import ClusterView, HostInfo, Placement
from experts.transport.base import Transport
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_server import serve_expert_host
from experts.transport.local import LocalTransport
from router.checkpoint import load_trunk
from router.dispatch import RemoteExperts
from router.engine.image_features import ImageFeatures
from router.engine.images import ImageInput, ImageRules, place_images
from router.engine.kv_cache import KVCache
from router.engine.kv_layout import KVLayout
from router.engine.request import Request, SamplingParams, TokenEvent, TokenLogprobs
from router.engine.runner import ModelRunner, StepOutcome
from router.engine.scheduler import Scheduler, SchedulerConfig, Step
from router.kernels.native import choose_attend
from router.kernels.sublayer import choose_attention
from router.model.decoder import Decoder, RoutedExperts, StepOutput

CPU = torch.device("cpu")
MAX_LEN = 256


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A prompt and what is wanted of it."""

    prompt: tuple[int, ...]
    seed: int
    num_output: int = 8
    images: tuple[ImageInput, ...] = ()


@dataclass
class Answer:
    """Tokens, what was reported of each, and the logits that each was chosen from."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def assert_same(found: Answer, expected: Answer) -> None:
    """To the last bit."""
    for position, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert same_bits(one, other), f"logits of output {position}: {(one != other).sum()} of {len(one)} differ"
    assert found.tokens == expected.tokens and found.logprobs == expected.logprobs


class RecordingRunner(ModelRunner):
    """Keeps the logits of sampled rows, by request, and counts tokens that are computed again."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.logits: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.recomputed = 0
        self._ends: Counter[str] = Counter()

    def run(self, step: Step) -> StepOutcome:
        for piece in step.pieces:
            name, end = piece.request.request_id, piece.start + piece.count
            self.recomputed += max(0, min(self._ends[name], end) - piece.start)
            self._ends[name] = max(self._ends[name], end)
        return super().run(step)

    def _sample(self, requests: Sequence[Request], output: StepOutput) -> dict[str, int | None]:
        for request, row in zip(requests, output.logits_SV, strict=True):
            self.logits[request.request_id].append(row.clone())
        return super()._sample(requests, output)


def open_deterministic(model_dir: Path, dtype: str) -> tuple[Model, ServeSettings]:
    return open_model(model_dir, dtype), ServeSettings(model_dir=model_dir, transport="local", deterministic=True)


def deterministic_decoder(model: Model, settings: ServeSettings, experts: RoutedExperts | None = None) -> Decoder:
    """As `cluster.local.build_engine` makes it."""
    arithmetic = choose_products(model, settings)
    trunk = load_trunk(model.checkpoint, model.config, model.dtype, CPU)
    routed = experts or load_local_experts(model, settings)
    attend = choose_attend(model.dtype, CPU, arithmetic)
    return Decoder(model.config, trunk, routed, arithmetic, attend, fuse=choose_attention)


class Desk:
    """Scheduler and runner on one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        budget: int = 1024,
        num_blocks: int = 200,
        block_size: int = 8,
        prefix_cache: bool = False,
        micro_batches: int = 1,
        images: ImageFeatures | None = None,
        rules: ImageRules | None = None,
    ) -> None:
        has_local, has_global = any(decoder.config.chunked_layers), not all(decoder.config.chunked_layers)
        layout = KVLayout(
            block_size=block_size,
            num_global_blocks=num_blocks if has_global else 0,
            num_local_blocks=num_blocks if has_local else 0,
            chunk_size=decoder.config.chunk_size,
            has_global=has_global,
            has_local=has_local,
        )
        bounds = SchedulerConfig(
            max_batch_tokens=budget, max_running=64, max_waiting=64, max_waiting_tokens=100_000, max_model_len=MAX_LEN,
            decode_stretch=float("inf"),
        )  # fmt: skip
        self.scheduler = Scheduler(KVCache(layout, prefix_cache=prefix_cache), bounds)
        self.runner = RecordingRunner(decoder, layout, eos_ids=(), micro_batches=micro_batches, images=images)
        self._rules = rules
        self._asked = 0

    def answer(self, asks: Sequence[Ask], later: Sequence[Ask] = ()) -> list[Answer]:
        """Answers to `asks`, all at the same time; one of `later` joins with every step."""
        answers = {self._submit(ask): Answer() for ask in asks}
        waiting = list(later)
        while self.scheduler.has_work:
            step = self.scheduler.schedule(0.0)
            outcome = self.runner.run(step)
            assert not outcome.lost and not outcome.failed
            for event in self.scheduler.update(step, outcome.sampled, outcome.lost, 0.0, outcome.logprobs):
                if isinstance(event, TokenEvent) and event.request_id in answers:
                    answers[event.request_id].tokens.append(event.token_id)
                    answers[event.request_id].logprobs.append(event.logprobs)
            if waiting:
                self._submit(waiting.pop())
        for name, answer in answers.items():
            answer.logits = self.runner.logits[name]
        return list(answers.values())

    def _submit(self, ask: Ask) -> str:
        self._asked += 1
        sampling = SamplingParams(
            temperature=0.9, top_p=0.95, top_k=40, seed=ask.seed, num_logprobs=3, max_tokens=ask.num_output,
            ignore_eos=True,
        )  # fmt: skip
        request = Request(
            request_id=str(self._asked),
            token_ids=list(ask.prompt),
            num_prompt=len(ask.prompt),
            sampling=sampling,
            deadline=1e9,
            arrival=0.0,
            images=place_images(list(ask.prompt), ask.images, self._rules),
        )
        self.scheduler.submit(request, 0.0)
        return request.request_id


@contextmanager
def experts_on_hosts(model: Model, settings: ServeSettings, num_hosts: int, transport: str) -> Iterator[RoutedExperts]:
    """All experts spread over hosts of this process, reached by function calls or over gRPC."""
    names = [f"host-{number}" for number in range(num_hosts)]
    keys = model.store(CPU).all_keys()
    replicas = {key: (names[(key[0] + key[1]) % num_hosts],) for key in keys}
    hosts = {name: ExpertHost(name, model.store(CPU), choose_products(model, settings)) for name in names}
    for key, (name,) in replicas.items():
        hosts[name].load(key)
    with ExitStack() as stack:
        linked, infos = _link(stack, model, hosts, transport)
        remote = RemoteExperts(linked)
        remote.connect(ClusterView(version=1, placement=Placement(epoch=1, replicas=replicas), hosts=infos))
        wait_until(lambda: linked.linked() == set(names), "all hosts are linked")
        yield remote
        linked.close()


def _link(
    stack: ExitStack, model: Model, hosts: Mapping[str, ExpertHost], transport: str
) -> tuple[Transport, dict[str, HostInfo]]:
    addresses = {name: name for name in hosts}
    if transport == "grpc":
        for name, host in hosts.items():
            server = serve_expert_host(host, terms=model.terms(), incarnation=1, bind="127.0.0.1")
            stack.callback(server.stop, 0)
            addresses[name] = server.address
    infos = {
        name: HostInfo(name=name, incarnation=1, address=address, state="ready") for name, address in addresses.items()
    }
    if transport == "grpc":
        return GrpcTransport(router_name="test", terms=model.terms()), infos
    return LocalTransport(hosts), infos


def deterministic_features(model: Model, settings: ServeSettings) -> ImageFeatures:
    """As `cluster.local.build_engine` makes them."""
    features = _image_features(model, settings)
    assert features is not None
    return features
