"""What a foreground command does with signals, with its output and with the processes below it."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.console import TWICE_S, Signals, Stopped
from cluster.processes import command, end_descendants, is_alive
from cluster.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_first_signal_asks_and_a_later_interrupt_abandons() -> None:
    abandoned: list[int] = []
    with Signals() as signals:
        signals.abandon = lambda: abandoned.append(1)
        signals.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            signals.check(5.0)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not abandoned, "an echo of the first one"
        time.sleep(TWICE_S + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not abandoned, "SIGTERM never means at once"
        os.kill(os.getpid(), signal.SIGINT)
        assert abandoned == [1]


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_noise_goes_to_the_file_and_our_words_to_the_real_output(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom cluster.console import output_to\n"
        "with output_to(Path(sys.argv[1])) as (out, errors):\n"
        "    print('noise'); os.write(2, b'deep noise\\n')\n"
        "    print('word', file=out); print('trouble', file=errors)\n"
        "print('after')"
    )
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("word\nafter\n", "trouble\n")
    assert sorted(log.read_text().split("\n")) == ["", "deep noise", "noise"]
    assert log.stat().st_mode & 0o777 == 0o600


def test_progress_without_a_terminal_is_a_line_per_step() -> None:
    out = io.StringIO()
    progress = Progress(out)
    for count in range(101):
        progress.show("loading", count, 100)
    progress.show("starting routers", 0, 0)
    lines = out.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[0] == "herd: loading: 0 of 100"
    assert "\r" not in out.getvalue()


def test_progress_on_a_terminal_is_one_line_per_phase() -> None:
    out = Terminal()
    progress = Progress(out)
    for count in range(101):
        progress.show("loading", count, 100)
    progress.show("starting routers", 1, 1)
    progress.end()
    assert out.getvalue().count("\n") == 2
    assert "100 of 100" in out.getvalue()


def test_processes_below_are_found_and_ended() -> None:
    """In a process of its own, which becomes the parent of orphans: a child dies and leaves a grandchild."""
    code = """
import os, subprocess, sys
from cluster.processes import adopt_orphans, descendants, end_descendants, is_alive

adopt_orphans()
inner = '''
import subprocess, sys
sleeper = [sys.executable, "-c", "import time; time.sleep(99)"]
print(subprocess.Popen(sleeper, stdout=subprocess.DEVNULL).pid)
'''
orphan = int(subprocess.run([sys.executable, "-c", inner], stdout=subprocess.PIPE, check=True).stdout)
assert orphan in descendants(os.getpid()), "it came to us"
end_descendants(os.getpid(), 0.0)
assert not is_alive(orphan)
assert descendants(os.getpid()) == []
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


def test_what_ends_by_itself_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        end_descendants(child.pid, 30.0)
        assert child.wait() == 0
    assert not is_alive(child.pid)
    assert command(child.pid) == ""
    assert command(os.getpid())
