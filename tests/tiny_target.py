"""A finished tiny search, and ``hpo transfer`` with target trials: everything is real but the loading of models."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import hpo.search.workbench
import hpo.transfer.command
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import Workbench, write_definition
from hpo.study.folder import StudyFolder
from hpo.study.storage import open_study
from hpo.terminal.live import PlainView
from hpo.transfer.command import TransferRequest
from tests.tiny_search import make_search, tiny_bench, tiny_study

SEARCHED = {"train": {"text_encoder_lr": 5e-4}, "space": {"max_train_epochs": {"low": 1, "high": 2}}}


def searched_source(root: Path, data: Path, trials: int = 6) -> StudyFolder:
    """A finished search whose stored base is mini-sd15."""
    bench = dataclasses.replace(tiny_bench(root, data, tiny_study(SEARCHED)), base_spec="mini-sd15")
    make_search(bench, SearchLimits(trials=trials)).run()
    write_definition(bench, bench.facts())
    return bench.folder


def run_transfer(
    source: StudyFolder,
    data: Path,
    trials: int = 4,
    change: Callable[[PlainView], None] = lambda view: None,
    **words: Any,
) -> str:
    """The command on a study; what it printed.  ``change`` may interfere with its view."""

    def load(inputs: Any, study: Any, folder: StudyFolder, say: Any) -> Workbench:
        return tiny_bench(folder.root, data, study)

    def make_view(*given: Any) -> PlainView:
        view = view_before(*given)
        change(view)
        return view

    screen, before, view_before = io.StringIO(), hpo.search.workbench.load, hpo.terminal.live.make_view
    hpo.search.workbench.load, hpo.terminal.live.make_view = load, make_view
    try:
        request = TransferRequest(
            "mini-sdxl", source.name, trials=trials, runs=source.root.parent, anyway=True, **words
        )
        hpo.transfer.command.run(request, Console(file=screen, width=200))
    finally:
        hpo.search.workbench.load, hpo.terminal.live.make_view = before, view_before
    return screen.getvalue()


def target_of(source: StudyFolder) -> StudyFolder:
    return StudyFolder(source.root.with_name(f"{source.name}__mini-sdxl"))


def target_trials(source: StudyFolder) -> list[tuple[int, str, dict[str, Any], float | None]]:
    """Number, state, parameters and value of every target trial."""
    trials = open_study(target_of(source)).get_trials(deepcopy=False)
    return [(t.number, t.state.name, dict(t.params), t.value) for t in trials]
