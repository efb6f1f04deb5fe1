"""The process that a person has started, when a long command has a single worker: it forks, and watches.

The worker is a fork made before any library is loaded, so it costs milliseconds.  It has the terminal: it asks, prints
and draws as if it were alone.  It has a session of its own, so that the signals of the terminal reach this process
alone, which hands them on:

    Ctrl-C              once: save and end, 130; twice: end at once
    SIGTERM, SIGUSR1    save and end, 75 (EX_TEMPFAIL: Slurm and systemd ask so; the same command goes on)
    SIGHUP              the terminal is gone: the work goes on, its output goes to output.log
    Ctrl-Z              the worker stands still as well

Does not own when a worker is started again or has hung (``hpo.night.supervise``).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from hpo.night.endings import Ending, WorkersFailed, needs_a_fresh_process, was_stopped
from hpo.night.output import LOG, Output
from hpo.night.post import Post, State
from hpo.night.process import IsWorker
from hpo.night.pulse import ANSWERED
from hpo.night.role import BEGINS, EXIT, NOTIFIES, Role, Supervised
from hpo.night.supervise import Supervisor
from hpo.night.watched import WATCHED
from trainer.errors import Interrupted, ToolError
from trainer.text import clean_text

KILLED = 128  # a shell's exit code for a process that a signal has ended is this and the signal's number
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Sends a message: what the worker has said about messages (``notifies``), the event, the folder of the work, the text.
Send = Callable[[Mapping[str, Any], str, Path, str], None]
RESTARTED, HUNG, FAILED = "restarted", "hung", "failed"  # events, by the names that --notify-on has


def in_a_worker(words: Sequence[str], send: Send) -> tuple[list[str], Supervised]:
    """In the worker, which is a fork: the words of the command line that it carries out, and its supervisor's pipe.

    The process that called this never returns from here: it ends with SystemExit once the command has ended.  It sends
    what no worker can: that one has hung, starts again, or that none can go on.
    """
    front = Front(list(words), send)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it gets no exit codes
    try:
        code = front.run()
    except IsWorker:
        assert front.worker is not None
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, lambda number, frame: front.output.leave_terminal())
        WATCHED.set(front.worker)
        signal.pthread_sigmask(signal.SIG_SETMASK, front.mask)
        return front.words, front.worker
    sys.exit(code)


class _Child:
    """A fork, with what ``hpo.night.process`` needs of ``subprocess.Popen``."""

    def __init__(self, pid: int, control: IO[bytes]) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = control
        self._code: int | None = None

    def poll(self) -> int | None:
        """The handler of a signal may call it in the middle of another call."""
        with contextlib.suppress(ChildProcessError):  # that call was first
            if self._code is None:
                end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if end is not None:
                    self._code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                    os.waitpid(self.pid, 0)
        return self._code


class Front:
    """``words``: of the command line that the next worker carries out.  ``mask``: of signals, which a worker restores
    once this process's handlers are no longer its own."""

    def __init__(self, words: list[str], send: Send) -> None:
        self.words = words
        self._send, self._wanted = send, dict[str, Any]()
        self.worker: Supervised | None = None  # in a worker, this process
        self.mask: set[int] = set()
        self.output = Output(lambda: self.root)
        self._command = words  # without what was answered
        self._cwd = ""
        self._answers: list[str] = []  # what was answered, as options
        self._name: str | None = None
        self._asked: int | None = None  # the signal that asked to stop
        self._begun = self._was_asked = False
        self._exit: int | None = None  # the exit code that the worker has said
        self._supervisor = Supervisor(
            ("",),
            self._launch,
            None,
            self,
            opens="",
            finishes=lambda report: False,
            judge=self._judge,
            stop_by=lambda: self._asked or signal.SIGTERM,
        )
        self._supervisor.posts[0].pulse.shown = lambda: self.output.shown

    @property
    def root(self) -> Path | None:
        """The folder of the work, once it is known."""
        return (self.worker and self.worker.root) or self._supervisor.root

    def run(self) -> int:
        """Until the command has ended; its exit code.  Raises IsWorker in a worker."""
        post = self._supervisor.posts[0]
        with self._signals():
            try:
                self._supervisor.run(lambda: self._asked is not None)
            except KeyboardInterrupt:
                return Interrupted.exit_code
            except ToolError as error:  # no worker can go on, or none can be started
                what = post.why if isinstance(error, WorkersFailed) else error.message
                self._say(f"error: {what}", f"next: {self._next()}")
                self._tell(FAILED, what)
                return error.exit_code
        return self._code(post)

    def _code(self, post: Post) -> int:
        """The exit code of the command; says what its worker could not say."""
        if post.starts == 0:  # asked to stop before a worker was there
            return self._stopped_by(self._asked)
        if post.code < 0 and self._exit is not None:  # it has died when everything was done
            return self._exit
        code, paused = post.code, post.state is State.PAUSING
        by = self._asked or (
            -code if was_stopped(code) else None
        )  # the worker may have been asked, not this process
        if code < 0 and by is None:
            self._say(
                f"error: {post.why} while it started", "hint: run it again; if it happens again: hpo doctor"
            )
            return KILLED - code
        if by is None or not (code < 0 or was_stopped(code) or paused):
            return code
        if code < 0 or paused:
            self._say("stopped; what was saved before is kept", f"next: {self._next()}")
        if self._asked is None and code > 0:
            return code
        return self._stopped_by(by)

    @staticmethod
    def _stopped_by(number: int | None) -> int:
        return Interrupted.exit_code if number == signal.SIGINT else Interrupted.TERMINATED

    def _next(self) -> str:
        root = self._supervisor.root
        return "the same command" if root is None else f"hpo resume {shlex.quote(os.path.relpath(root))}"

    def _judge(self, post: Post, code: int) -> Ending:
        """Errors that the worker has shown end the command.  What died without a word starts again, unless nothing had
        begun and it would have to ask again, or it is a fault of this tool that shows at once."""
        if needs_a_fresh_process(post.error):
            return Ending.AGAIN
        if code == 0 or self._exit is not None or was_stopped(code):
            return Ending.DONE
        if not self._begun and (code > 0 or self._was_asked or post.pulse.is_asking):
            return Ending.DONE
        return Ending.AGAIN

    # Starting a worker

    def _launch(self, role: Role, log: IO[bytes] | None) -> _Child:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.output.leave_if_gone()
        pid, self.mask = -1, signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            pid = os.fork()
        finally:
            if pid:  # a worker has the handlers of this process until it leaves its code
                signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        if pid:
            os.close(reading)
            return _Child(pid, os.fdopen(writing, "wb", buffering=0))
        os.close(writing)
        os.setsid()
        if self._supervisor.posts[0].starts > 1:
            nothing = os.open(os.devnull, os.O_RDONLY)  # nobody is there to ask at night
            os.dup2(nothing, 0)
            os.close(nothing)
        with contextlib.suppress(OSError):
            os.chdir(self._cwd or ".")
        reports = os.dup(role.reports)
        os.set_blocking(reports, False)
        self.worker = Supervised(Role(**{**vars(role), "reports": reports, "alone": True}), reading)
        raise IsWorker

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = list(STOPS)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self.output.leave_terminal()
            process = self._supervisor.posts[0].process
            if process is not None:
                process.send(number)
        elif self._asked is None:
            self._asked = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    # What happens to the worker

    def on_start(self, post: Post) -> None:
        self._exit = None

    def on_report(self, post: Post, report: Mapping[str, Any]) -> None:
        event = report.get("event")
        if event == BEGINS:
            self._begun, self._cwd = True, str(report["cwd"])
            self._supervisor.root = Path(report["root"])
            self.output.finds_log()
            self._command = list(map(str, report["words"]))
            self.words = self._with_answers(list(self._command))
        elif event == ANSWERED:
            self._was_asked = True
            self._answers += map(str, report.get("words", ()))
            self._name = report.get("name") or self._name
            self.words = self._with_answers(list(self._command))
        elif event == NOTIFIES:
            self._wanted = dict(report["wanted"])
        elif event == EXIT:
            self._exit = int(report["code"])

    def _with_answers(self, words: list[str]) -> list[str]:
        """The command line of a worker that cannot ask."""
        if self._name is not None and words[1:2] != [self._name]:
            words.insert(1, self._name)
        if self._answers and words[-len(self._answers) :] != self._answers:
            words += self._answers
        return words

    def on_hang(self, post: Post) -> None:
        assert post.process is not None
        text = f"no progress for {post.pulse.silent_words}: process {post.process.pid} is ended"
        self._say(f"warning: {text}")
        self._tell(HUNG, text)

    def on_pause(self, post: Post, seconds: float) -> None:
        text = f"{post.why}; it goes on in {seconds:g} s from where it was saved last"
        self._say(f"warning: {text}")
        self._tell(RESTARTED, text)

    def on_out(self, post: Post) -> None: ...

    def on_error(self, post: Post) -> None: ...

    def on_done(self, post: Post) -> None: ...

    def _tell(self, event: str, text: str) -> None:
        """Send a message, if the worker has said where to.  Nothing in it may end the command."""
        root = self._supervisor.root
        if self._wanted and root is not None:
            with contextlib.suppress(Exception):
                self._send(self._wanted, event, root, clean_text(text))

    def _say(self, *lines: str) -> None:
        """Print lines, wherever the worker's output goes.  What it drew may have hidden the cursor."""
        text = "".join(f"{clean_text(line)}\n" for line in lines).encode()
        try:
            os.write(2, (b"\x1b[?25h\n" if os.isatty(2) else b"") + text)
        except OSError:
            self.output.leave_terminal()
            if self._supervisor.root is not None:
                with contextlib.suppress(OSError), (self._supervisor.root / LOG).open("ab") as file:
                    file.write(text)
