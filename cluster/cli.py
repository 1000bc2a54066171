"""The command `herd`: parses, calls, and turns errors into one line and an exit code.

Imports only the standard library until it knows what to do, so that `--help` is instant and what needs no Ray runs
without it. The only place that reads the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.console import Signals

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for what the user can mend in the command, 1 for anything else."""
    # Huge pages for large tensors, in this process and all that it starts: reading weights in pages of 4 KiB took
    # a step of one token a fifth longer. Torch looks once, before its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from cluster.version import herd_version

    parser = _parser(herd_version())
    options = parser.parse_args(argv)
    from experts.errors import CheckpointError, HerdError, InvalidInput

    try:
        return int(options.run(options))
    except (InvalidInput, CheckpointError) as error:
        print(f"herd: {error}", file=sys.stderr)
        return BAD_INPUT
    except HerdError as error:
        print(f"herd: {error}", file=sys.stderr)
        return FAILED
    except ModuleNotFoundError as error:
        if _is_ours(error.name):
            raise
        print(f"herd: this needs the package {error.name}, which is not installed", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Somebody like `head` has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED


def _is_ours(module: str | None) -> bool:
    return (module or "cluster").partition(".")[0] in ("cluster", "router", "experts")


def _parser(version: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="herd", description="Serves the Llama 4 family, its experts in processes of their own."
    )
    parser.add_argument("--version", action="version", version=f"herd {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands.add_parser("serve", help="serve a model folder over HTTP"))
    _add_check(commands.add_parser("check", help="say whether a model folder can be served; reads no weights"))
    _add_status(commands.add_parser("status", help="show the processes of a running cluster"))
    _add_placing(commands)
    _add_drill(commands.add_parser("drill", help="break a running cluster on purpose, and judge what its users saw"))
    _add_make_tiny(commands.add_parser("make-tiny", help="write a tiny checkpoint with random weights"))
    _add_demo(commands.add_parser("demo", help="serve a tiny checkpoint, ask it, kill a host, ask again"))
    _add_bench(commands.add_parser("bench", help="measure a server, the engine alone, or the links"))
    _add_simulate(commands.add_parser("simulate", help="a cluster that is not there: its faults, or its placements"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_serve)
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder with config.json and safetensors files")
    add = parser.add_argument_group("cluster").add_argument
    add("--hosts", metavar="N", help="expert hosts (1)")
    add("--max-hosts", metavar="M", help="let the load add hosts, up to M, and drain them again, down to --hosts (off)")
    add("--replicas", metavar="R", help="hosts that hold each expert (1)")
    add(
        "--no-rebalance",
        dest="rebalance",
        action="store_const",
        const=False,
        help="leave experts where they are, whatever their load; herd plan and herd move still move them",
    )
    add("--rebalance", action="store_const", const=True, help="move and replicate experts by their load (the default)")
    add("--extra-slots", metavar="N", help="room on every host for N more experts of each layer (0)")
    add("--routers", metavar="M", help="routers (1)")
    add("--ingresses", metavar="N", help="processes that answer HTTP, all on one port (2)")
    add("--transport", help="grpc: experts on hosts; local: experts inside each router (grpc)")
    add("--device", help="cpu or cuda, for routers and hosts (cpu)")
    add("--ray-address", metavar="ADDRESS", help="join this Ray cluster instead of starting one")
    add("--name", help="name of the cluster, of its Ray actors and its Serve application (herd)")
    add = parser.add_argument_group("HTTP").add_argument
    add("--host", metavar="ADDRESS", help="address to listen on (127.0.0.1)")
    add("--port", metavar="PORT", help="port to listen on (8000)")
    add("--served-model-name", metavar="NAME", help="what clients call the model (the folder's name)")
    add("--request-timeout-s", metavar="S", help="seconds that a request may take (600)")
    add = parser.add_argument_group("model and memory").add_argument
    add("--dtype", help="auto, float32, bfloat16 or float16 (auto: the checkpoint's)")
    add("--max-model-len", metavar="T", help="tokens of prompt and answer together (what the KV memory holds)")
    add("--kv-memory", metavar="SIZE", help="KV cache of a router, such as 512MiB (2GiB)")
    add(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_const",
        const=False,
        help="share no beginnings of prompts",
    )
    add("--max-batch-tokens", metavar="T", help="tokens that one step computes at most (1024)")
    add("--decode-stretch", metavar="X", help="how much longer prompts may make steps of running streams (2.0; inf)")
    add("--max-running", metavar="N", help="requests that run at a time on one router (64)")
    add("--max-waiting", metavar="N", help="requests that wait on one router before others are refused (256)")
    add("--deterministic", action="store_true", help="answers do not depend, to the bit, on batch, hosts or transport")
    add = parser.add_argument_group("ports and addresses inside the cluster").add_argument
    add("--host-ports", metavar="A-B", help="ports that expert hosts listen on (any)")
    add("--host-bind", metavar="ADDRESS", help="address that expert hosts listen on (the node's)")
    add("--host-advertise", metavar="ADDRESS[:A-B]", help="where routers reach expert hosts (where they listen)")
    add("--router-ports", metavar="A-B", help="ports that routers listen on for ingresses (any)")
    add("--control-port", metavar="PORT", help="port that the controller listens on (any)")
    add("--metrics-ports", metavar="A-B", help="ports of the processes' /metrics pages (any)")
    add("--targets-file", metavar="FILE", help="keep a list of those pages there, for Prometheus's file_sd")
    add("--prometheus", metavar="URL", help="read the load from this server (the controller asks all pages itself)")
    _add_tls(add)
    add("--insecure-rows", action="store_true", help="let rows travel between machines without TLS")


def _add_tls(add: Callable[..., object]) -> None:
    add("--tls-cert", metavar="FILE", help="certificate of the cluster's processes, in PEM (no TLS)")
    add("--tls-key", metavar="FILE", help="its key")
    add("--tls-ca", metavar="FILE", help="certificate of the CA that all of them have theirs from")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_check)
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="folder to look at")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_status)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--control", metavar="ADDRESS", help="the controller's ip:port (default: the newest that runs)")
    _add_tls(parser.add_argument)


def _add_placing(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from cluster.place import options

    def where(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--control", metavar="ADDRESS", help="the controller's ip:port (the newest that runs)")
        _add_tls(parser.add_argument)

    options.add_plan(commands.add_parser("plan", help="plan where experts should be, and say why"), where)
    options.add_move(commands.add_parser("move", help="move an expert to another host"), where)
    options.add_drain(commands.add_parser("drain", help="empty a host and end it"), where)
    options.add_scale(commands.add_parser("scale", help="add hosts to a running cluster, or drain some"), where)
    options.add_apply(commands.add_parser("apply", help="bring experts where a plan says"), where)
    options.add_rollback(commands.add_parser("rollback", help="undo the last plan, or all since an epoch"), where)
    options.add_trace(commands.add_parser("trace", help="record the load of experts"), where)


def _add_make_tiny(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_make_tiny)
    parser.add_argument("kind", choices=("scout", "maverick", "guard"))
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    parser.add_argument("--shards", type=int, default=2, help="number of weight files (2)")
    parser.add_argument("--steerable", action="store_true", help="let groups of tokens choose experts")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_demo)


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    faults = kinds.add_parser("faults", help="faults drawn by seeds, on virtual time and a faulty network")
    faults.set_defaults(run=_simulate_faults)
    faults.add_argument("--seeds", metavar="A-B", default="0-199", help="seeds to run, or a single one (0-199)")
    faults.add_argument("--verbose", action="store_true", help="print everything that happens")
    from cluster.simulate_placement.options import add_placement

    add_placement(kinds.add_parser("placement", help="what the planner does with a load, over time"))


def _add_bench(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    engine = kinds.add_parser("engine", help="prefill and decode speed of one router")
    engine.set_defaults(run=_bench_engine)
    add = engine.add_argument
    add("model_dir", metavar="MODEL_DIR", help="folder with config.json and safetensors files")
    add("--batch", metavar="N,…", default="1,8,32", help="requests at a time (1,8,32)")
    add("--prompt", metavar="T,…", default="128", help="tokens of each prompt (128)")
    add("--output", metavar="T", default=64, type=int, help="tokens of each answer (64)")
    add("--transport", help="local: experts in this process; grpc: on host processes (grpc)")
    add("--hosts", metavar="N", help="expert hosts (1)")
    add("--device", help="cpu or cuda, for this process and the hosts (cpu)")
    add("--dtype", help="auto, float32, bfloat16 or float16 (auto: the checkpoint's)")
    add("--kv-memory", metavar="SIZE", help="KV cache, such as 512MiB (2GiB)")
    add("--max-batch-tokens", metavar="T", help="tokens that one step computes at most (1024)")
    add("--deterministic", action="store_true", help="measure what `herd serve --deterministic` runs")
    add("--json", metavar="FILE", help="write the results there as JSON, too; -: only that, to standard output")
    _add_bench_serve(kinds.add_parser("serve", help="load on any OpenAI-compatible server, seen by its clients"))
    loop = kinds.add_parser("loop", help="the engine, experts in this process, under a closed loop of clients")
    loop.set_defaults(run=_bench_loop)
    add = loop.add_argument
    add("model_dir", metavar="MODEL_DIR", help="folder with config.json and safetensors files")
    add("--concurrency", metavar="N", default=16, type=int, help="clients (16)")
    add("--requests", metavar="N", default=64, type=int, help="requests of all clients together (64)")
    add("--prompt", metavar="T", default=128, type=int, help="tokens of each prompt (128)")
    add("--output", metavar="T", default=64, type=int, help="tokens of each answer (64)")
    add("--json", metavar="FILE", help="as above")
    context = kinds.add_parser("context", help="a very long prompt on a tiny model, compared with a reference")
    context.set_defaults(run=_bench_context)
    context.add_argument("--tokens", metavar="T", default=1_000_000, type=int, help="length of the prompt (1000000)")
    context.add_argument("--json", metavar="FILE", help="as above")
    _add_bench_shift(kinds.add_parser("shift", help="a cluster that serves a steerable model, while its load shifts"))
    plan = kinds.add_parser("plan", help="how long the planner takes, and the control loop in simulation")
    plan.set_defaults(run=_bench_plan)
    plan.add_argument("--json", metavar="FILE", help="as above")
    dispatch = kinds.add_parser("dispatch", help="round trip of a block of rows, beside a bare gRPC echo")
    dispatch.set_defaults(run=_bench_dispatch)
    dispatch.add_argument("--hidden", metavar="H,…", default="1024,5120", help="widths of a row (1024,5120)")
    dispatch.add_argument("--json", metavar="FILE", help="as above")
    decisions = kinds.add_parser("decisions", help="what deciding where rows go costs while all is well")
    decisions.set_defaults(run=_bench_decisions)
    add = decisions.add_argument
    add("model_dir", metavar="MODEL_DIR", help="folder with config.json and safetensors files")
    add("--batch", metavar="N,…", default="1,16", help="requests at a time (1,16)")
    add("--hosts", metavar="N", default="4", help="expert hosts (4)")
    add("--replicas", metavar="N", default="2", help="hosts of each expert (2)")
    add("--json", metavar="FILE", help="as above")


def _add_bench_shift(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_bench_shift)
    add = parser.add_argument
    add("--control", metavar="ADDRESS", help="the controller's ip:port (default: the newest that runs)")
    add("--streams", metavar="N", type=int, default=10, help="streams at a time (10)")
    add("--hot", metavar="E", type=int, default=2, help="experts that they choose (2)")
    add("--output", metavar="T", type=int, default=40, help="tokens of each answer (40)")
    add("--before", metavar="S", dest="before_s", type=float, default=40.0, help="seconds before the shift (40)")
    add("--after", metavar="S", dest="after_s", type=float, default=30.0, help="and after it (30)")
    add("--seed", metavar="S", type=int, default=0, help="of experts and prompts (0)")
    add("--json", metavar="FILE", help="as above")


def _add_drill(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_drill)
    hosts = "kill-host, hang-host, slow-host, partition, kill-replicas"
    others = "kill-router, hang-router, kill-controller, kill-ingress"
    parser.add_argument("drill", metavar="DRILL,…", help=f"all, or some of {hosts}, {others}")
    parser.add_argument("--control", metavar="ADDRESS", help="the controller's ip:port (default: the newest that runs)")
    parser.add_argument("--streams", metavar="N", type=int, default=16, help="streams at a time (16)")
    parser.add_argument("--output", metavar="T", type=int, default=64, help="tokens of each answer (64)")
    parser.add_argument("--times", metavar="N", type=int, default=1, help="faults of each drill (1)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of prompts, victims and moments (0)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the verdicts there as JSON, too; -: only that, to standard output"
    )


def _add_bench_serve(parser: argparse.ArgumentParser) -> None:
    # What is not given is left out, so that the defaults are those of LoadSettings alone.
    parser.argument_default = argparse.SUPPRESS
    parser.set_defaults(run=_bench_serve)
    add = parser.add_argument_group("server").add_argument
    add("--url", required=True, help="such as http://127.0.0.1:8000")
    add("--model", metavar="NAME", help="what the server calls the model (the first of its /v1/models)")
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add("--plain", action="store_true", help="leave out ignore_eos and min_tokens, for servers that refuse them")
    add("--timeout-s", metavar="S", type=float, help="seconds that a request may take (600)")
    add = parser.add_argument_group("how much").add_argument
    add("--requests", metavar="N", type=int, help="requests in all (64)")
    add("--warmup", metavar="N", type=int, help="requests before those, not measured (1)")
    add("--concurrency", metavar="N", type=int, help="requests under way at a time: a closed loop (8)")
    add("--request-rate", metavar="R", type=float, help="instead: requests/s, come what may; inf: all at once")
    add(
        "--burstiness",
        metavar="B",
        type=float,
        help="shape of their gaps: 1 is Poisson, less is burstier (1)",
    )
    add("--max-in-flight", metavar="N", type=int, help="of an open loop; what comes beyond is counted, not sent (1024)")
    add = parser.add_argument_group("what is asked").add_argument
    add("--workload", metavar="KIND", help="text, shared-prefix, mixed, images or skewed (text)")
    add("--prompt", metavar="T", type=int, help="tokens of each prompt, after a shared prefix (128)")
    add("--output", metavar="T", type=int, help="tokens of each answer (64)")
    add("--prefix", metavar="T", type=int, help="shared-prefix: tokens of each shared prefix (1024)")
    add("--groups", metavar="K", type=int, help="shared-prefix: number of shared prefixes (4)")
    add("--image-size", metavar="WxH", help="images: pixels of each picture (336x336)")
    add("--experts", metavar="E", type=int, help="skewed: experts per layer of the steerable checkpoint (8)")
    add("--zipf", metavar="S", type=float, help="skewed: the expert of rank r gets a share of r to the power -S (1.5)")
    add("--vocab-size", metavar="V", type=int, help="draw token ids below this (from what /tokenize says)")
    add("--seed", metavar="S", type=int, help="of prompts and arrivals (0)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="ask in chats (default for images)")
    kind.add_argument("--completions", action="store_true", help="complete prompts of token ids (default)")
    add = parser.add_argument_group("result").add_argument
    add("--goodput", metavar="BOUNDS", help="count answers within ttft:MS,tpot:MS,e2el:MS, any of them")
    add("--json", metavar="FILE", default=None, help="write results and setup there; -: only that, to standard output")


def _serve(options: argparse.Namespace) -> int:
    from cluster.console import Signals, Stopped

    # Before the imports of torch and Ray, which take seconds.
    with Signals() as signals:
        try:
            return _serve_until(signals, options)
        except Stopped:
            print("herd: stopped")
            return 0


def _serve_until(signals: Signals, options: argparse.Namespace) -> int:
    from cluster.config import parse_settings
    from cluster.preflight import check_identity, check_model, check_port_is_free, check_ray_answers
    from cluster.run_file import state_dirs

    given = {name: value for name, value in vars(options).items() if name != "run"}
    settings = parse_settings(given)
    check_identity(settings)
    check_model(settings)
    signals.check()
    if settings.ray_address is None:
        check_port_is_free(settings)
    else:
        check_ray_answers(settings)
    from cluster.on_ray.launch import launch

    signals.check()
    return launch(settings, state_dirs(os.environ)[0], signals)


def _check(options: argparse.Namespace) -> int:
    from cluster.check import check_folder
    from cluster.check_report import as_json, as_text

    report = check_folder(options.model_dir)
    name = options.model_dir.resolve().name
    print(json.dumps(as_json(report, name), indent=2) if options.json else as_text(report, name))
    return 0 if report.is_fit else FAILED


def _status(options: argparse.Namespace) -> int:
    from cluster.run_file import state_dirs
    from cluster.show import as_json, as_text, find_status

    files = (options.tls_cert or "", options.tls_key or "", options.tls_ca or "")
    status = find_status(options.control, state_dirs(os.environ), files)
    print(json.dumps(as_json(status), indent=2) if options.json else as_text(status))
    return 0


def _drill(options: argparse.Namespace) -> int:
    from cluster.drill.command import parse_kinds, run_drills
    from cluster.run_file import state_dirs

    asked = {name: getattr(options, name) for name in ("streams", "output", "times", "seed")}
    return run_drills(parse_kinds(options.drill), options.control, state_dirs(os.environ), asked, options.json)


def _make_tiny(options: argparse.Namespace) -> int:
    from cluster.tiny import make_tiny

    make_tiny(options.kind, options.folder, seed=options.seed, shards=options.shards, steerable=options.steerable)
    print(f"herd: {options.folder} holds a tiny {options.kind} with random weights")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from cluster.demo import run_demo

    return run_demo()


def _simulate_faults(options: argparse.Namespace) -> int:
    from cluster.simulate.run import parse_seeds, print_runs

    return FAILED if print_runs(parse_seeds(options.seeds), verbose=options.verbose) else 0


def _bench_engine(options: argparse.Namespace) -> int:
    from cluster.config import parse_counts, parse_settings
    from cluster.measure.engine import bench_engine
    from cluster.measure.report import print_results
    from cluster.result_file import check_result_file

    check_result_file(options.json)
    ours = ("run", "batch", "prompt", "output", "json")
    settings = parse_settings({name: value for name, value in vars(options).items() if name not in ours})
    batches, prompts = parse_counts("batch", options.batch), parse_counts("prompt", options.prompt)
    print_results(bench_engine(settings, batches, prompts, options.output), options.json)
    return 0


def _bench_serve(options: argparse.Namespace) -> int:
    from cluster.load.bench import bench_serve
    from cluster.load.settings import load_settings
    from cluster.run_file import state_dirs

    given = {name: value for name, value in vars(options).items() if name not in ("run", "json")}
    return bench_serve(load_settings(given), options.json, state_dirs(os.environ))


def _bench_loop(options: argparse.Namespace) -> int:
    from cluster.config import parse_settings
    from cluster.measure.closed_loop import bench_loop
    from cluster.measure.report import print_results
    from cluster.result_file import check_result_file
    from experts.errors import InvalidInput

    check_result_file(options.json)
    for name in ("concurrency", "requests", "prompt", "output"):
        if getattr(options, name) < 1:
            raise InvalidInput(name, getattr(options, name), "must be at least 1")
    settings = parse_settings({"model_dir": options.model_dir, "transport": "local"})
    result = bench_loop(settings, options.concurrency, options.requests, options.prompt, options.output)
    print_results([result], options.json)
    return 0


def _bench_context(options: argparse.Namespace) -> int:
    from cluster.measure.long_context import bench_context
    from cluster.measure.report import print_results
    from cluster.result_file import check_result_file
    from experts.errors import InvalidInput

    check_result_file(options.json)
    if not 64 <= options.tokens <= 10_000_000:
        raise InvalidInput("tokens", options.tokens, "must be between 64 and 10000000")
    print_results([bench_context(options.tokens)], options.json)
    return 0


def _bench_plan(options: argparse.Namespace) -> int:
    from cluster.measure.planning import bench_loop_speed, bench_plans
    from cluster.measure.report import print_results
    from cluster.result_file import check_result_file

    check_result_file(options.json)
    print_results(bench_plans(), options.json)
    if options.json is None:
        print_results(bench_loop_speed())
    return 0


def _bench_shift(options: argparse.Namespace) -> int:
    from cluster.drill.command import run_shift
    from cluster.result_file import check_result_file
    from cluster.run_file import state_dirs

    check_result_file(options.json)
    asked = {name: value for name, value in vars(options).items() if name not in ("run", "control", "json")}
    return run_shift(options.control, state_dirs(os.environ), asked, options.json)


def _bench_dispatch(options: argparse.Namespace) -> int:
    from cluster.config import parse_counts
    from cluster.measure.dispatch import bench_dispatch
    from cluster.measure.report import print_results
    from cluster.result_file import check_result_file

    check_result_file(options.json)
    print_results(bench_dispatch(parse_counts("hidden", options.hidden)), options.json)
    return 0


def _bench_decisions(options: argparse.Namespace) -> int:
    from cluster.config import parse_counts, parse_settings
    from cluster.measure.decisions import bench_decisions
    from cluster.measure.report import print_results
    from cluster.result_file import check_result_file

    check_result_file(options.json)
    settings = parse_settings({name: getattr(options, name) for name in ("model_dir", "hosts", "replicas")})
    print_results(bench_decisions(settings, parse_counts("batch", options.batch)), options.json)
    return 0
