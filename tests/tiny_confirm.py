"""A finished tiny study, and ``hpo confirm`` on it: everything is real but the loading of models."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import hpo.confirm.run
import hpo.search.workbench
from hpo.confirm.outcome import Confirmed
from hpo.confirm.wanted import ConfirmRequest
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import Workbench, write_definition
from hpo.study.config import Inputs
from hpo.study.folder import StudyFolder
from hpo.terminal.live import PlainView
from tests.tiny_search import make_search, tiny_bench


def searched_study(root: Path, data: Path, trials: int = 3) -> StudyFolder:
    """A finished search."""
    bench = tiny_bench(root, data)
    make_search(bench, SearchLimits(trials)).run()
    write_definition(bench, bench.facts())
    return bench.folder


def run_confirm(
    source: StudyFolder,
    data: Path,
    change: Callable[[PlainView], None] = lambda view: None,
    loaded: Callable[[Workbench], None] = lambda bench: None,
    **words: Any,
) -> tuple[Confirmed | None, str]:
    """The command on a study; what it found and printed.  ``change`` may interfere with its view."""

    def load(inputs: Inputs, study: Any, folder: StudyFolder, say: Any) -> Workbench:
        assert inputs == Inputs("tiny", data)
        bench = tiny_bench(folder.root, data, study)
        loaded(bench)
        return bench

    def make_view(*given: Any) -> PlainView:
        view = view_before(*given)
        change(view)
        return view

    screen, before, view_before = io.StringIO(), hpo.search.workbench.load, hpo.terminal.live.make_view
    hpo.search.workbench.load, hpo.terminal.live.make_view = load, make_view
    try:
        request = ConfirmRequest(source.name, runs=source.root.parent, **{"top": 2, **words})
        found = hpo.confirm.run.confirm(request, Console(file=screen, width=160), lambda: True)
    finally:
        hpo.search.workbench.load, hpo.terminal.live.make_view = before, view_before
    return found, screen.getvalue()


def check_confirmation(folder: StudyFolder, runs: int) -> dict[tuple[int, int], float]:
    """What must hold of a finished confirmation, whatever happened to its processes: (of, seed) → score."""
    from hpo.study.folder import read_json
    from hpo.study.storage import open_study

    found = open_study(folder).get_trials(deepcopy=False)
    assert [t.number for t in found] == list(range(len(found)))
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert len(complete) == len(found) == runs
    scores = {(t.params["of"], t.params["train_seed"]): t.value for t in complete}
    assert len(scores) == runs
    for t in complete:
        params, result = read_json(folder.trial(t.number).params), read_json(folder.trial(t.number).result)
        assert params is not None and result is not None
        assert params["suggested"] == t.params and result["objective"] == t.value
        assert len([k for k in t.system_attrs if k.startswith("artifacts:")]) == 1
        assert not folder.trial(t.number).checkpoints.exists()
    assert not list(folder.root.rglob(".tmp-*"))
    return scores  # type: ignore[return-value]
