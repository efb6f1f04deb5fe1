"""One call of ``hpo search`` on the tiny bench: everything is real but the loading of models."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tomlkit
from rich.console import Console

import hpo.search.workbench
from evaluation.score.anchors import Anchors
from hpo.confirm.within import confirm_within
from hpo.search.session import SearchRequest, search
from hpo.search.workbench import Workbench
from hpo.study.config import Inputs
from hpo.study.folder import StudyFolder
from tests.tiny_search import STUDY, tiny_bench
from trainer.files import write_atomic


def run_session(
    root: Path,
    data: Path,
    trials: int | None = 1,
    loaded: Callable[[Workbench], None] = lambda bench: None,
    guarded: bool = False,
    loads: Callable[[Inputs], None] = lambda inputs: None,
    console: Console | None = None,
    **words: Any,
) -> str:
    """The command for the study at ``root``; what it printed, if not on ``console``.  ``loaded`` is called once
    everything is loaded, ``loads`` before, with what is to be loaded.

    With ``hours``, it goes on with the confirmation.

    A random base follows no prompt, so its anchors cannot be told apart: only ``guarded`` minds that.
    """

    def load(inputs: Inputs, study: Any, folder: StudyFolder, say: Any) -> Workbench:
        loads(inputs)
        bench = tiny_bench(folder.root, data, study)
        loaded(bench)
        return bench

    definition = root.parent.parent / "tiny.toml"
    write_atomic(definition, tomlkit.dumps(STUDY))  # two processes may call this at once
    screen, original, guard = io.StringIO(), hpo.search.workbench.load, Anchors.require_separable
    hpo.search.workbench.load = load
    if not guarded:
        Anchors.require_separable = lambda anchors: None  # type: ignore[method-assign]
    try:
        request = SearchRequest(
            Inputs("tiny", data, class_word="figure"),
            trials,
            study=str(definition),
            name=root.name,
            runs=root.parent,
            **words,
        )
        shown = console or Console(file=screen, width=200)
        search(request, shown, partial(confirm_within, console=shown))
    finally:
        hpo.search.workbench.load = original
        Anchors.require_separable = guard  # type: ignore[method-assign]
    return screen.getvalue()
