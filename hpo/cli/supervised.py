"""Which command lines have a supervisor, and what their worker does at its end (``hpo.night``).

A long command is carried out by a fork of the process that a person has started.  The exceptions: a worker (it has a
supervisor), the processes of torchrun (it watches them itself), a dry run and a help text.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LONG = ("search", "confirm", "transfer", "train", "evaluate", "compare", "resume")
SHORT = ("-h", "--help", "--dry-run")


def is_long(words: Sequence[str]) -> bool:
    """Whether a command line, the words after ``hpo``, can take hours."""
    return bool(words) and words[0] in LONG and not any(word in SHORT for word in words)


@contextlib.contextmanager
def as_worker_if_long() -> Iterator[None]:
    """The block is a command line.  If it is long, it runs in a worker, and this process ends with SystemExit."""
    if not is_long(sys.argv[1:]) or "RANK" in os.environ or not hasattr(os, "fork"):
        yield
        return
    from hpo.night import EXIT, VARIABLE, in_a_worker

    if VARIABLE in os.environ:
        yield
        return
    words, worker = in_a_worker(sys.argv[1:], _send)
    sys.argv[1:] = words
    try:
        yield
    except SystemExit as end:
        worker.report(EXIT, code=end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    finally:
        worker.flush()


def _send(wanted: Mapping[str, Any], event: str, root: Path, text: str) -> None:
    from hpo.study import resume_words, send_beside

    send_beside(wanted, event, f"{resume_words(root)}: {event}", text)
