"""The supervisor on real processes that are tiny scripts: who starts when, who starts again, and how all of it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from hpo.night import restarts
from hpo.night.endings import WorkersFailed
from hpo.night.post import Post, State
from hpo.night.process import Launch, Process
from hpo.night.role import Role
from hpo.night.supervise import Supervisor
from trainer.errors import ToolError
from trainer.files import read_records

ERROR = '{{"event": "error", "kind": "{kind}", "code": {code}, "message": "what", "hint": "todo", "commands": []}}'


def error(kind: str, code: int) -> str:
    return f"echo '{ERROR.format(kind=kind, code=code)}' > /dev/fd/$R; exit {code}"


def say(event: str) -> str:
    return f'echo \'{{"event": "{event}"}}\' > /dev/fd/$R'


DIE, WAIT = "kill -9 $$", "read word"  # until it is asked to stop, or its supervisor is gone


class Scripts:
    """What is started: for the worker ``number`` its next script, the last one again and again."""

    def __init__(self, **of: list[str]) -> None:
        self.of = {int(name.removeprefix("w")): scripts for name, scripts in of.items()}
        self.roles: list[Role] = []
        self.pids: list[int] = []

    def __call__(self, role: Role, log: IO[bytes] | None) -> subprocess.Popen[bytes]:
        scripts = self.of[role.number]
        started = sum(other.number == role.number for other in self.roles)
        self.roles.append(role)
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"R={role.reports}\n{scripts[min(started, len(scripts) - 1)]}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(role.reports,),
            start_new_session=True,
        )
        self.pids.append(process.pid)
        return process


class Told:
    """The words that a watch is told, in order."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.hook: Callable[[str], None] = lambda word: None

    def _note(self, word: str) -> None:
        self.words.append(word)
        self.hook(word)

    def on_start(self, post: Post) -> None:
        self._note(f"start {post.number}")

    def on_report(self, post: Post, report: Mapping[str, Any]) -> None:
        self._note(f"{report['event']} {post.number}")

    def on_hang(self, post: Post) -> None:
        self._note(f"hang {post.number}")

    def on_pause(self, post: Post, seconds: float) -> None:
        self._note(f"pause {post.number}")

    def on_out(self, post: Post) -> None:
        self._note(f"out {post.number}")

    def on_error(self, post: Post) -> None:
        self._note(f"error {post.number}")

    def on_done(self, post: Post) -> None:
        self._note(f"done {post.number}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(restarts, "PAUSES", (0.0, 0.0, 0.0))
    return Told()


def supervisor(told: Told, launch: Launch, logs: Path, workers: int = 2, **more: Any) -> Supervisor:
    return Supervisor(
        [f"cuda:{n}" for n in range(workers)],
        launch,
        logs,
        told,
        opens="loaded",
        finishes=lambda report: report["event"] == "result",
        **more,
    )


def never() -> bool:
    return False


def test_the_others_start_when_the_leader_has_loaded(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[say("loaded")], w2=["true"])
    assert supervisor(told, scripts, tmp_path).run(never)
    assert told.words.index("loaded 1") < told.words.index("start 2")
    assert [(role.leads, role.device, role.workers) for role in scripts.roles] == [
        (True, "cuda:0", 2),
        (False, "cuda:1", 2),
    ]


def test_a_leader_that_finds_nothing_to_do_starts_nobody(told: Told, tmp_path: Path) -> None:
    assert supervisor(told, Scripts(w1=["true"], w2=["true"]), tmp_path).run(never)
    assert told.words == ["start 1", "done 1"]


def test_a_worker_that_dies_is_started_three_times_and_then_left_out(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[f"{say('loaded')}; {WAIT}"], w2=[DIE])
    made = supervisor(told, scripts, tmp_path)
    told.hook = lambda word: made.posts[0].process.ask_to_stop() if word == "out 2" else None
    assert made.run(never)
    assert told.words.count("start 2") == 4 and told.words.count("pause 2") == 3
    assert told.words.count("out 2") == 1
    assert made.posts[1].why == ("it died 4 times without new progress, the last time: killed by SIGKILL")


def test_pauses_grow_and_a_finished_trial_forgets_earlier_deaths(told: Told, tmp_path: Path) -> None:
    rule = restarts.Restarts((5, 30, 120))
    assert [rule.died() for _ in range(3)] == [5, 30, 120]
    rule.progressed()
    assert [rule.died() for _ in range(4)] == [5, 30, 120, None]
    rule.progressed()
    assert [rule.died(in_trial=True) for _ in range(5)] == [5, 30, 120, 120, None]
    scripts = Scripts(w1=[DIE, DIE, f"{say('result')}; {DIE}", DIE, DIE, DIE])
    with pytest.raises(WorkersFailed):
        supervisor(told, scripts, tmp_path, 1).run(never)
    assert told.words.count("start 1") == 6  # two deaths, one with progress, three more


def test_a_lost_gpu_starts_again_and_one_that_is_in_use_does_not(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(
        w1=[say("loaded")], w2=[error("DeviceLost", 5), error("NoDevice", 5)], w3=[error("OutOfMemory", 6)]
    )
    assert supervisor(told, scripts, tmp_path, 3).run(never)
    assert told.words.count("start 2") == 2 and told.words.count("start 3") == 1
    assert {word for word in told.words if word.startswith("out")} == {"out 2", "out 3"}


def test_a_worker_that_somebody_stopped_stays_stopped(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[say("loaded")], w2=["kill -TERM $$"], w3=[error("Interrupted", 130)])
    assert supervisor(told, scripts, tmp_path, 3).run(never)
    assert told.words.count("start 2") == told.words.count("start 3") == 1


HANGS = 'echo \'{"event": "watch", "hang_seconds": 0.3}\' > /dev/fd/$R; ' + (
    'echo \'{"event": "reached", "what": "steps", "done": 1}\' > /dev/fd/$R'
)


def test_a_worker_without_progress_is_asked_then_killed_and_starts_again(told: Told, tmp_path: Path) -> None:
    """The first one hears SIGTERM, the second does not, the third is suspended and hears it when it is woken."""
    deaf = f"trap '' TERM; {HANGS}; while :; do sleep 0.05; done"
    scripts = Scripts(w1=[f"{HANGS}; {WAIT}", deaf, f"{HANGS}; kill -STOP $$; {WAIT}", "true"])
    made = supervisor(told, scripts, tmp_path / "logs", 1)
    assert made.run(never)
    assert told.words == ["start 1", "hang 1", "pause 1"] * 3 + ["start 1", "done 1"]
    rows = read_records(tmp_path / "night.jsonl")
    assert [row["reason"] for row in rows] == ["hang"] * 3 and rows[0]["restarts_in"] == 0.0
    assert all("no progress for" in row["why"] for row in rows)


def test_a_worker_that_ends_its_work_while_it_is_taken_for_hung_is_done(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[f"trap 'exit 0' TERM; {HANGS}; while :; do sleep 0.05; done"])
    assert supervisor(told, scripts, tmp_path / "logs", 1).run(never)
    assert told.words == ["start 1", "hang 1", "done 1"]


def test_a_worker_that_its_driver_keeps_is_left_alone_and_said(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that a test may do makes a process that survives SIGKILL; this one is only seen as one."""
    monkeypatch.setattr("hpo.night.supervise.STUCK_SECONDS", 0.1)
    scripts = Scripts(w1=[f"{HANGS}; {WAIT}"], w2=["true"])

    class Stuck:
        def __init__(self, process: subprocess.Popen[bytes]) -> None:
            self.pid, self.stdin, self.process = process.pid, process.stdin, process

        def poll(self) -> None:
            return None

    def launch(role: Role, log: IO[bytes] | None) -> Any:
        process = scripts(role, log)
        return Stuck(process) if role.number == 1 else process

    made = supervisor(told, launch, tmp_path / "logs")
    assert made.run(never), "the other worker has taken over"
    assert told.words == ["start 1", "hang 1", "out 1", "start 2", "done 2"]
    assert f"process {scripts.pids[0]} waits for its driver and cannot be ended" in made.posts[0].why


def test_a_death_is_noted_with_the_trial(told: Told, tmp_path: Path) -> None:
    record = tmp_path / "starts.jsonl"
    record.write_text("")
    works = f'echo \'{{"event": "works-on", "record": "{record}"}}\' > /dev/fd/$R'
    scripts = Scripts(w1=[f"{works}; kill -SEGV $$", "true"])
    assert supervisor(told, scripts, tmp_path / "logs", 1).run(never)
    (row,) = read_records(record)
    assert (row["event"], row["reason"], row["why"]) == ("died", "crash:SIGSEGV", "killed by SIGSEGV")


def test_when_one_is_left_out_those_that_were_done_take_its_trial(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[say("loaded"), "true"], w2=["sleep 0.3; " + error("NoDevice", 5)])
    assert supervisor(told, scripts, tmp_path).run(never)
    assert told.words[-2:] == ["start 1", "done 1"] and "out 2" in told.words


def test_without_any_worker_left_the_command_fails_and_says_why(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[error("NoDevice", 5)], w2=[error("NoDevice", 5)])
    with pytest.raises(
        WorkersFailed, match=r"none of the 2 workers can go on; worker 2 \(cuda:1\): what"
    ) as end:
        supervisor(told, scripts, tmp_path).run(never)
    assert end.value.exit_code == 5 and end.value.hint == "todo"
    assert [role.leads for role in scripts.roles] == [True, True]  # the second one leads after the first


def test_a_crash_names_the_last_line_of_its_log(told: Told, tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed, match="it ended with code 1: ValueError: no") as end:
        supervisor(told, Scripts(w1=["echo 'ValueError: no' >&2; exit 1"]), tmp_path, 1).run(never)
    assert end.value.hint == f"see {tmp_path / 'worker-1.log'}"
    assert (tmp_path / "worker-1.log").read_text().count("== ") == 4  # a heading for each start


def test_a_mistake_ends_all_once_with_its_own_message_and_code(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[f"{say('loaded')}; {WAIT}"], w2=[error("ConfigError", 2)])
    with pytest.raises(ToolError, match="what") as end:
        supervisor(told, scripts, tmp_path).run(never)
    assert (end.value.exit_code, end.value.hint) == (2, "todo")
    assert told.words[-2:] == ["error 2", "done 1"]


def test_a_request_to_stop_is_passed_on_once_and_waited_for(told: Told, tmp_path: Path) -> None:
    both = f"{say('at work')}; {WAIT}; {say('saved')}; read more; exit 3"  # a second word would end it with 0
    scripts = Scripts(w1=[f"{say('loaded')}; {both}"], w2=[both])
    made = supervisor(told, scripts, tmp_path)
    asked = threading.Event()
    saved: list[str] = []

    def hook(word: str) -> None:
        if word.startswith("at work"):
            saved.append(word)
            if len(saved) == 2:
                asked.set()
        if word.startswith("saved"):
            post = made.posts[int(word[-1]) - 1]
            post.process._running.stdin.close()  # type: ignore[union-attr]

    told.hook = hook
    assert not made.run(asked.is_set)
    assert {"saved 1", "saved 2"} <= set(told.words) and not [w for w in told.words if w.startswith("out")]


def test_a_second_ctrl_c_ends_workers_that_do_not_listen(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.night.supervise.GRACE_SECONDS", 0.1)
    scripts = Scripts(
        w1=[f"trap '' INT; {say('loaded')}; while :; do sleep 0.05; done"], w2=[f"{say('x')}; {WAIT}"]
    )

    def interrupt(word: str) -> None:
        if word == "x 2":
            raise KeyboardInterrupt

    told.hook = interrupt
    made = supervisor(told, scripts, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.run(never)
    codes = [post.process.ended() for post in made.posts if post.process]
    # the second one is asked by its pipe and then by the signal, whichever it sees first
    assert codes[0] == -signal.SIGKILL and codes[1] in (-signal.SIGINT, 0)


def test_reports_of_a_process_that_dies_at_once_are_not_lost(tmp_path: Path) -> None:
    scripts = Scripts(w1=[f"for i in 1 2 3; do {say('x')}; done; echo -n '{{\"half' > /dev/fd/$R; {DIE}"])
    process = Process(scripts, Role(1, 1, "cpu"), tmp_path / "log", "x")
    found: list[dict[str, Any]] = []
    while process.ended() is None:
        found += process.reports()
    found += process.reports()
    assert found == [{"event": "x"}] * 3
    process.forget()
    assert not [fd for fd in os.listdir("/proc/self/fd") if fd == str(process.reading)]


def test_a_restarted_worker_is_told_when_no_more_work_may_begin(told: Told, tmp_path: Path) -> None:
    scripts = Scripts(w1=[DIE, "true"])
    assert supervisor(told, scripts, tmp_path, 1, began=12.0, until=lambda: 34.0).run(never)
    assert [(role.began, role.until) for role in scripts.roles] == [(12.0, None), (None, 34.0)]
    assert State.DONE.value == "done"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_ctrl_z_suspends_the_workers_too_and_fg_lets_all_go_on(told: Told, tmp_path: Path) -> None:
    ready = tmp_path / "pid"
    scripts = Scripts(
        w1=[f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {ready}; while [ -e {ready} ]; do :; done"]
    )
    command = os.fork()
    if command == 0:
        os.setpgid(0, 0)  # as a shell does: a group that has lost its shell cannot be suspended
        supervisor(told, scripts, tmp_path, 1).run(never)
        os._exit(0)
    while not ready.exists():
        assert os.waitpid(command, os.WNOHANG) == (0, 0)
    worker = int(ready.read_text())
    os.kill(command, signal.SIGTSTP)
    _, status = os.waitpid(command, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    end = time.monotonic() + 20
    while state_of(worker) != "T":
        assert time.monotonic() < end
    ready.unlink()  # what it waits for
    os.kill(command, signal.SIGCONT)
    _, status = os.waitpid(command, 0)
    assert os.waitstatus_to_exitcode(status) == 0
