"""``hpo search`` with several workers: how this command line starts more of itself, and what one of those does.

Does not own their supervision (``hpo.night``) or the search (``hpo.search``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.night import Launch, Supervised
    from hpo.search import SearchRequest


def role_taken() -> Supervised | None:
    """This process as one of several workers; None if a person started it, or if it is the only worker.  Light: no
    library is loaded."""
    import os

    from hpo.night import VARIABLE, WATCHED, taken_role

    if VARIABLE in os.environ:
        WATCHED.set(taken_role())
    worker = WATCHED.get()
    return None if worker is None or worker.role.alone else worker


def launching(screen: Console) -> Callable[[Sequence[str]], Launch] | None:
    """(more words) → what starts a worker: this command line again, as wide as this terminal.  None if this is not a
    command line (a library)."""
    from hpo.study import INVOCATION, NOTIFY_VARIABLE, joined_urls

    command = INVOCATION.get()
    if command is None:
        return None
    words = command.unnotified
    urls = {NOTIFY_VARIABLE: joined_urls(command.urls)} if command.urls else {}

    def launch(more: Sequence[str]) -> Launch:
        from hpo.night import by_command

        return by_command((*words, *more), {"COLUMNS": str(screen.width), **urls})

    return launch


def as_worker(worker: Supervised, request: SearchRequest) -> tuple[SearchRequest, Console]:
    """The request and the console of a worker.

    --enqueue is left to the worker that leads.  --fork-from is not: a study that has taken over its trials says so, and
    until then it decides what is searched.
    """
    from hpo.machine import ASSIGNED, WORKERS
    from hpo.study import INVOCATION
    from hpo.terminal import reporting_console

    role, command = worker.role, INVOCATION.get()
    ASSIGNED.set(role.device)
    WORKERS.set(role.workers)
    if command is not None:
        began = command.began if role.began is None else role.began
        INVOCATION.set(replace(command, is_worker=True, began=began))
    own = replace(request, launch=None, ask=None, report=worker.report, until=role.until)
    if not role.leads:
        own = replace(own, enqueue=None)
    return own, reporting_console(worker.report)
