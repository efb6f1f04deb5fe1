"""``hpo search`` with several workers: processes of the same command, one on each device.

Owns what the command itself does then: it starts and watches the workers, shows them, and says how it ended.  It loads
nothing and touches no GPU.  The workers agree through the study as commands in several terminals do; what is done once
(``--enqueue``, ``--fork-from``) is done by the leading worker before the others start.  Does not own the processes
(``hpo.night``), the choice of devices (``hpo.machine``) or the view (``hpo.terminal``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.night import Launch, Post, Supervisor
from hpo.study import FAILED, HUNG, IDENTITY, INVOCATION, RESTARTED, StudyFolder, Use, Work, begun_study, tell
from hpo.terminal import BEGUN, LINE, LOADED, RESULT, STUDY_LINE, Stop, WorkersView, workers_view
from trainer.errors import Interrupted, ToolError

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.search.session import SearchRequest

WORKERS = "workers"  # the folder of their logs


@dataclass
class Crew:
    """Tells the view and the record of the command what the supervisor says."""

    folder: StudyFolder
    view: WorkersView
    use: Use
    work: Work
    max_hours: float | None
    begun_at: float | None = None  # time.monotonic

    def on_start(self, post: Post) -> None:
        self.view.starts(post.number, leads=post.leads)

    def on_report(self, post: Post, report: Mapping[str, Any]) -> None:
        if report.get("event") == BEGUN:
            self.use.begun = self.work.begun = True
            self.begun_at = self.begun_at or time.monotonic()
        if report.get("event") == LINE and str(report.get("text")).startswith(STUDY_LINE):
            self.work.says = str(report["text"])
        self.view.shows(post.number, report)

    def on_hang(self, post: Post) -> None:
        assert post.process is not None
        text = f"{post.words} hangs: no progress for {post.pulse.silent_words}; process {post.process.pid} is ended"
        self.view.say(f"warning: {text}")
        tell(HUNG, f"{self.folder.words}: {HUNG}", text, self.view.say)

    def on_pause(self, post: Post, seconds: float) -> None:
        self.view.rests(post.number, "starts again", seconds)
        text = f"{post.words} died: {post.why}; it starts again in {seconds:g} s"
        self.view.say(f"{text} ({post.log})")
        tell(RESTARTED, f"{self.folder.words}: {RESTARTED}", text, self.view.say)

    def on_error(self, post: Post) -> None:
        self.view.rests(post.number, "has ended with an error")
        self.view.say(f"{post.words} has ended with an error; the others save and end")

    def on_out(self, post: Post) -> None:
        self.view.rests(post.number, "is left out")
        self.view.say(f"warning: {post.words} is left out: {post.why} ({post.log})")

    def on_done(self, post: Post) -> None:
        self.view.rests(post.number, "has no more to do")

    def until(self) -> float | None:
        """When no more trials may begin (``time.monotonic``), for workers that start again under --max-hours."""
        if self.max_hours is None or self.begun_at is None:
            return None
        return self.begun_at + 3600 * self.max_hours


def search_with(
    devices: Sequence[str],
    launch: Launch,
    request: SearchRequest,
    folder: StudyFolder,
    use: Use,
    work: Work,
    console: Console,
    known: Sequence[str],
) -> None:
    """Run the search with a worker on each device, to its end.

    ``known``: lines that were shown already; the workers say them too.  Raises Interrupted if the user stopped it, the
    error of a worker that concerns all of them, or WorkersFailed if none can go on.
    """
    view = workers_view(console, folder.name, devices)
    view.know(known)
    begun = begun_study(folder)
    use.made_study = begun is None or IDENTITY not in begun.user_attrs
    view.say(_opening(devices, folder))
    crew = Crew(folder, view, use, work, request.max_hours)
    command = INVOCATION.get()
    supervisor = Supervisor(
        devices,
        launch,
        folder.root / WORKERS,
        crew,
        opens=BEGUN if request.enqueue or request.fork_from else LOADED,
        finishes=lambda report: report.get("event") == RESULT and report.get("state") != FAILED,
        began=command.began if command is not None else None,
        until=crew.until,
    )
    try:
        with Stop(view.on_ask) as stop, view:
            finished = supervisor.run(stop)
    except ToolError:
        if any(post.starts > 1 for post in supervisor.posts):
            use.begun = True  # a worker died before the first trial: its log says why
        raise
    if not finished:
        use.begun = True  # so that hpo resume finds it
        if view.last_study:
            view.say(view.last_study)
        raise stop.mark(
            Interrupted(
                "all workers have saved and ended",
                f"run the same command again to resume; results so far: hpo status {folder.words}",
            )
        )
    for line in view.last_end:
        view.say(line)


def _opening(devices: Sequence[str], folder: StudyFolder) -> str:
    on = "on the CPU" if set(devices) == {"cpu"} else f"on {', '.join(devices)}"
    return f"{len(devices)} workers {on}; their output is in {folder.root / WORKERS}"
