"""`herd serve`: Ray, controller, application, progress, the URL; and at the end everything in reverse.

Owns the process's signals and its output. What it learns of the cluster it learns from the controller's status.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.config import ServeSettings
from cluster.console import INTERRUPTED, Signals, Stopped, output_to
from cluster.control.journal import JournalFile
from cluster.controller_process import http_url, journal_path
from cluster.on_ray.app import build_app
from cluster.on_ray.controller_actor import ensure_controller
from cluster.on_ray.find import ControllerFinder
from cluster.on_ray.own_ray import JoinedRay, OwnRay
from cluster.progress import Progress
from cluster.run_file import prepare_state_dir, run_file_path
from cluster.show import kv_line
from experts.errors import CheckpointError, ControllerUnreachable, HerdError, InvalidInput
from experts.grpc_control import ask_drain, ask_shutdown, fetch_status
from experts.reports import ClusterStatus

POLL_S = 0.2
STUCK_S = 20.0
"""A problem that lasts so long while nothing moves ends a start."""
HTTP_S = 15.0
DRAIN_S = 30.0
REPORTS_ARE_FRESH_S = 1.5
END_S = 60.0
LAST_WORDS_S = 5.0
WATCH_S = 1.0
BAD_INPUT, FAILED = 2, 1
LOOPBACK = "127.0.0.1"


log = logging.getLogger(__name__)


class StartFailed(HerdError):
    """The cluster did not come up."""


def launch(settings: ServeSettings, state_dir: Path, signals: Signals) -> int:
    """Serve until `signals` are asked to end; returns the exit code as the command line gives it.

    The settings are checked already. What Ray says goes to a file that is removed at a good end.
    """
    own = settings.ray_address is None
    settings = dataclasses.replace(
        settings, state_dir=str(prepare_state_dir(state_dir)), node_address=LOOPBACK if own else settings.node_address
    )
    log_path = state_dir / f"{settings.name}-{settings.port}.log"
    with output_to(log_path) as (out, errors):
        launcher = Launcher(settings, OwnRay() if own else JoinedRay(settings), out, log_path)
        signals.abandon = launcher.abandon
        try:
            launcher.run(signals)
        except HerdError as error:
            print(f"herd: {error}\nherd: what Ray said is in {log_path}", file=errors, flush=True)
            mendable = isinstance(error, InvalidInput | CheckpointError)
            return leave(BAD_INPUT if mendable else FAILED, launcher.forced)
    log_path.unlink(missing_ok=True)
    return leave(0, launcher.forced)


def leave(code: int, forced: bool) -> int:
    """`code`, or the end of the process with it right here."""
    if forced:
        sys.stdout.flush()
        os._exit(code)
    return code


class Launcher:
    """One life of `herd serve`."""

    def __init__(self, settings: ServeSettings, cluster_ray: OwnRay | JoinedRay, out: TextIO, log_path: Path) -> None:
        self._settings = settings
        self._ray = cluster_ray
        self._out = out
        self._log_path = log_path
        self._session = "none"
        self.forced = False
        """A thread hangs in Ray, which would keep the interpreter from ending or crash it on the way."""
        self._find = ControllerFinder(settings)
        self._tls = settings.identity()
        self._own_serve = True
        self._is_ours = True
        """What has our name is ours to take down."""

    def run(self, signals: Signals) -> None:
        """Start, serve until asked to stop, end. Raises HerdError when the start fails or Ray goes away."""
        try:
            signals.check()
            self._say(f"starting Ray{'' if self._settings.ray_address is None else ' (joining)'}")
            self._ray.start()
            signals.install()
            self._check_nodes()
            self._session = ray.get_runtime_context().get_session_name()
            self._start(signals)
            self._say(f"ready at {http_url(self._settings)} (model {self._settings.model_name}); Ctrl-C ends it")
            self._serve(signals)
            self._say("draining: no new requests, those running may finish")
            self._drain()
        except (Stopped, KeyboardInterrupt, SystemExit):
            self._say("stopped")
        finally:
            signals.ending()
            self._end()
        self._say("ended")

    def abandon(self) -> None:
        """End at once, from wherever this is called."""
        self._ray.abandon()
        self._remove_files()
        self._log_path.unlink(missing_ok=True)
        os._exit(INTERRUPTED)

    def _start(self, signals: Signals) -> None:
        self._check_name()
        ensure_controller(self._settings)
        signals.check()
        try:
            self._deploy()
        except (RayError, RayServeException) as error:
            raise StartFailed(_reason(str(error))) from error
        signals.check()
        progress = Progress(self._out)
        moved_at, last = time.monotonic(), ("", -1, -1)
        while not self._is_ready(status := self._status()):
            if status is not None:
                step = self._phase(status)
                progress.show(*step)
                moved_at, last = (moved_at, last) if step == last else (time.monotonic(), step)
                if status.problems and time.monotonic() - moved_at > STUCK_S:
                    raise StartFailed(status.problems[0])
            signals.check(POLL_S)
        progress.end()
        if status is not None:
            self._say(kv_line(status))
        self._check_http(signals)

    def _phase(self, status: ClusterStatus) -> tuple[str, int, int]:
        """What the start waits for now: its name, how much is there, how much shall be."""
        if status.replicas_held < status.replicas_wanted:
            return "loading experts", status.replicas_held, status.replicas_wanted
        return "starting routers", _num_ready(status), self._settings.routers

    def _check_nodes(self) -> None:
        """Raises InvalidInput when rows would travel unguarded between the nodes that are there by now."""
        addresses = [str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
        for address in [self._settings.node_address] if self._settings.node_address else addresses:
            self._settings.check_rows_on(address)

    def _check_name(self) -> None:
        """A cluster of this name that runs here already would be replaced, hosts and all."""
        name = self._settings.name
        self._own_serve = not _serve_is_running()
        if not self._own_serve and name in serve.status().applications:
            self._is_ours = False
            raise InvalidInput("name", name, "must not be that of an application that runs on this Ray already")

    def _deploy(self) -> None:
        """Hand the application to Serve, which goes on by itself."""
        settings = self._settings
        # Clients connect to the ingresses themselves: through Serve's proxy every token would make another hop.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        app = build_app(settings, ingress_node=str(ray.util.get_node_ip_address()))
        target = serve.RunTarget(app, name=settings.name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def _is_ready(self, status: ClusterStatus | None) -> bool:
        """Raises StartFailed when Serve has given up."""
        app = serve.status().applications.get(self._settings.name)
        if app is not None and app.status == "DEPLOY_FAILED":
            raise StartFailed(_reason("\n".join([app.message, *(part.message for part in app.deployments.values())])))
        if app is None or app.status != "RUNNING" or status is None:
            return False
        loaded = status.replicas_held == status.replicas_wanted
        return (
            loaded
            and _num_ready(status) >= self._settings.routers
            and len(status.ingresses) >= self._settings.ingresses
        )

    def _check_http(self, signals: Signals) -> None:
        """See an answer at the URL that we are about to print."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + HTTP_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), direct.open(f"{http_url(self._settings)}/ready", timeout=5):
                return
            signals.check(POLL_S)
        raise StartFailed(f"no answer at {http_url(self._settings)}")

    def _status(self) -> ClusterStatus | None:
        """The controller's status; None while it is away."""
        try:
            return fetch_status(self._find(), tls=self._tls)
        except ControllerUnreachable:
            return None

    def _drain(self) -> None:
        """Wait until no router has requests any more, at most `DRAIN_S`."""
        end = time.monotonic() + DRAIN_S
        if not self._ray.has_head():
            return
        with contextlib.suppress(ControllerUnreachable):
            ask_drain(self._find(), tls=self._tls)
            time.sleep(REPORTS_ARE_FRESH_S)
            while time.monotonic() < end:
                routers = fetch_status(self._find(), tls=self._tls).routers
                if not any(router.running or router.waiting for router in routers):
                    return
                time.sleep(POLL_S)

    def _serve(self, signals: Signals) -> None:
        """Wait for a signal. The cluster heals by itself; only Ray is beyond its means."""
        headed = True
        while not signals.asked.wait(WATCH_S):
            if not self._ray.is_alive():
                raise StartFailed("Ray has ended")
            if headed and not self._ray.has_head():
                headed = False
                self._ray.rest()
                self._say("Ray's head has died: requests are served on, but nothing that dies is replaced any more")

    def _end(self) -> None:
        """Take down what is up, whatever that is, in bounded time even when Ray does not answer any more."""
        steps = threading.Thread(target=self._end_in_order, name="end", daemon=True)
        steps.start()
        end = time.monotonic() + END_S
        while steps.is_alive() and self._ray.has_head() and time.monotonic() < end:
            steps.join(POLL_S)
        # Ray ends within the steps, too, so that they get a moment more once it has.
        steps.join(LAST_WORDS_S)
        self.forced = steps.is_alive()
        if self.forced:
            self._ray.abandon()
        self._remove_files()

    def _end_in_order(self) -> None:
        if ray.is_initialized() and self._is_ours:
            _attempt("deleting the application", lambda: serve.delete(self._settings.name))
            _attempt("ending the controller", self._end_controller)
            if self._own_serve:
                _attempt("ending Serve", serve.shutdown)
        self._ray.stop()

    def _end_controller(self) -> None:
        end = time.monotonic() + LAST_WORDS_S
        with contextlib.suppress(ControllerUnreachable):
            address = self._find()
            ask_shutdown(address, tls=self._tls)
            while time.monotonic() < end:
                fetch_status(address, timeout_s=1.0, tls=self._tls)
                time.sleep(0.1)

    def _remove_files(self) -> None:
        """The controller does it too, if it lives to the end. On another machine these are not its files."""
        folder = Path(self._settings.state_dir)
        run_file_path(folder, self._settings.name, self._settings.port).unlink(missing_ok=True)
        JournalFile(journal_path(folder, self._settings, self._session)).remove()

    def _say(self, text: str) -> None:
        print(f"herd: {text}", file=self._out, flush=True)


def _attempt(what: str, action: Callable[[], object]) -> None:
    """One step of the end: when it fails, the next ones are still due."""
    try:
        action()
    except Exception:
        log.exception("%s failed", what)


def _num_ready(status: ClusterStatus) -> int:
    return sum(router.state == "ready" for router in status.routers)


def _serve_is_running() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _reason(message: str) -> str:
    """Why a deployment failed: our own error out of the traces that Serve gives, else any error, else the last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if re.match(r"experts\.errors\.\w+: ", line)]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return (ours or errors or lines or ["the application could not be deployed"])[-1]
