"""The process that a person has started, and its worker: real forks, where the work is a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

SCRIPT = """
import os, signal, sys
from pathlib import Path
from hpo.cli.supervised import as_worker_if_long
from hpo.night import WATCHED, answered, begins, restarts
from hpo.night.supervise import Supervisor
restarts.PAUSES = (0.0, 0.0, 0.0)
marker = Path("marker")
sys.argv = ["hpo", "train"]
{before}
with as_worker_if_long():
    first = not marker.exists()
    marker.touch()
{work}
    raise SystemExit(0)
"""
DIES_ONCE = """
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
"""


class Command:
    def __init__(self, here: Path) -> None:
        self.here = here

    def words(self, work: str, before: str = "") -> list[str]:
        return [sys.executable, "-c", SCRIPT.format(before=before, work=work)]

    @property
    def place(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(self, work: str, before: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(work, before),
            cwd=self.here,
            env=self.place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def test_a_supervisor_that_stands_still_holds_up_no_work(command: Command) -> None:
    done = command.run("""
    os.kill(os.getppid(), signal.SIGSTOP)
    for number in range(3000):
        WATCHED.get().report("progress", dropped=True, text="x" * 100)
    os.kill(os.getppid(), signal.SIGCONT)
    print("worked")
""")
    assert (done.returncode, done.stdout) == (0, "worked\n"), done.stderr


@pytest.mark.parametrize("told", ["", "signal.signal(signal.SIGHUP, signal.SIG_IGN)"])
def test_a_worker_that_starts_when_the_terminal_is_gone_writes_to_the_log(
    command: Command, told: str
) -> None:
    near, far = os.openpty()
    work = (
        """
    begins(Path("."), ["train"], os.getcwd())
    WATCHED.get().flush()
    while first and os.isatty(1):
        pass
"""
        + DIES_ONCE
        + """
    print("went on")
"""
    )
    before = f"os.close(os.open(os.ttyname(0), os.O_RDWR))\n{told}"  # becomes the controlling terminal
    process = subprocess.Popen(
        command.words(work, before),
        cwd=command.here,
        env=command.place,
        stdin=far,
        stdout=far,
        stderr=far,
        start_new_session=True,
    )
    os.close(far)
    while not (command.here / "marker").exists():
        assert process.poll() is None
    os.close(near)
    assert process.wait(60) == 0
    log = (command.here / "output.log").read_text()
    assert "killed by SIGKILL; it goes on in" in log and "went on" in log


def test_what_was_answered_after_the_work_began_is_not_asked_again(command: Command) -> None:
    done = command.run(
        """
    if first:
        begins(Path("."), ["train", "file"], os.getcwd())
        answered("--class", "figure")
        answered("--yes")
        WATCHED.get().flush()
"""
        + DIES_ONCE
        + """
    print(sys.argv[1:])
"""
    )
    assert done.returncode == 0
    assert done.stdout == "['train', 'file', '--class', 'figure', '--yes']\n"


def test_a_crash_after_the_end_is_no_failure(command: Command) -> None:
    done = command.run("""
    import atexit
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_crash_at_the_start_has_the_exit_code_of_a_shell(command: Command) -> None:
    done = command.run("""
    answered()  # it has asked, and would have to ask again
    WATCHED.get().flush()
    os.kill(os.getpid(), signal.SIGSEGV)
""")
    assert done.returncode == 128 + signal.SIGSEGV
    assert "killed by SIGSEGV while it started" in done.stderr


def test_who_ignores_the_end_of_children_gets_the_exit_code_as_well(command: Command) -> None:
    done = command.run("    raise SystemExit(3)", "signal.signal(signal.SIGCHLD, signal.SIG_IGN)")
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_stop_before_a_worker_starts_is_a_stop(command: Command, name: str, code: int) -> None:
    before = f"""
goes_on, told = Supervisor._goes_on, []
def goes(supervisor):
    if not told:
        told.append(os.kill(os.getpid(), signal.{name}))
    return goes_on(supervisor)
Supervisor._goes_on = goes
"""
    done = command.run("    print('worked')", before)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_stop_in_the_first_moment_of_a_worker_is_not_lost(command: Command) -> None:
    before = """
fork = os.fork
def forks():
    pid = fork()
    if not pid:
        os.kill(os.getpid(), signal.SIGTERM)
    return pid
os.fork = forks
"""
    done = command.run("    print('worked')", before)
    assert (done.returncode, done.stdout) == (75, "")


def test_what_forks_show_at_the_terminal_is_counted(tmp_path: Path) -> None:
    near, far = os.openpty()
    script = """
import os
from pathlib import Path
from hpo.night.output import Output
output = Output(lambda: None)
if pid := os.fork():
    os.waitpid(pid, 0)
    Path("shown").write_text(str(output.shown))
else:
    print("x" * 99)
"""
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=far,
        stdout=far,
        stderr=far,
        timeout=60,
        check=True,
    )
    os.close(far)
    os.close(near)
    assert (tmp_path / "shown").read_text() == "100"
