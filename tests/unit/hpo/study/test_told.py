"""What Optuna is told and what is shown: below zero they differ, and every choice follows what is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from evaluation.score.formula import CLIPPED, SIGNED, Formula
from hpo.study.config import find_study, read_study
from hpo.study.folder import IDENTITY, StudyFolder
from hpo.study.result import INFEASIBLE, Result, infeasible_value, objective_values
from hpo.study.sections import BELOW_ZERO, FOLLOWING, LIKENESS, SCORE
from hpo.study.standing import history, objective_of, rank, score_of, standing
from hpo.study.storage import create_study, open_study
from hpo.study.table import study_table
from hpo.study.unchanged import as_begun, check_unchanged
from hpo.terminal.live import trial_line
from hpo.terminal.status import status_table
from tests.tiny_search import (
    Recorder,
    SearchLimits,
    draw_images,
    make_search,
    tiny_bench,
    tiny_study,
)
from trainer.errors import ConfigError

RESULT = Result(
    number=3, state="complete", value=0.0, se=0.02, reason="", message="", config_sha256="", lora="",
    lora_sha256="", prompt_following=0.9, likeness=-0.05, clip_t=0.2, clip_i=0.3, n_images=8, steps=10,
    skipped_steps=0, train_seconds=1.0, score_seconds=1.0, remedy="", time_utc="", objective=-0.029,
    objective_se=0.01, below_zero=SIGNED,
)  # fmt: skip


def old(result: Result) -> Result:
    """As it is read from a file of an earlier version, which has none of the three fields."""
    return dataclasses.replace(result, objective=None, objective_se=None, below_zero=CLIPPED)


def test_the_sampler_is_told_the_objective_and_the_score_is_shown() -> None:
    assert objective_values(RESULT, (SCORE,)) == [-0.029]
    assert objective_values(RESULT, (FOLLOWING, LIKENESS)) == [0.9, pytest.approx(-0.05 / 1.05)]
    assert objective_values(old(RESULT), (SCORE,)) == [0.0]
    assert objective_values(old(RESULT), (FOLLOWING, LIKENESS)) == [0.9, 0.0]
    told = [
        objective_values(dataclasses.replace(r, state=INFEASIBLE), (SCORE,)) for r in (RESULT, old(RESULT))
    ]
    assert told == [[-1.0], [-0.1]] == [[infeasible_value(form)] for form in (SIGNED, CLIPPED)]


def test_a_search_tells_and_stores_the_objective_beside_the_score(tmp_path: Path) -> None:
    """The arithmetic scorer sees no likeness in what a tiny base draws, so most trials score 0."""
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"))
    view = Recorder()
    make_search(bench, SearchLimits(5), view).run()
    trials = open_study(bench.folder).get_trials(deepcopy=False)
    assert [t.value for t in trials] == [result.objective for result in view.results]
    below = [t for t in trials if t.value is not None and t.value < 0]
    assert below, [t.value for t in trials]
    for t in below:
        assert score_of(t) == 0 == t.user_attrs["score"] and objective_of(t) == t.value
        assert t.user_attrs["objective_se"] > 0
    assert len({t.value for t in below}) == len(below), "all scored 0, none told the same"
    now = standing(open_study(bench.folder), 5)
    assert now.best is not None and now.best[0] == max(trials, key=rank).number
    points, rows = history(open_study(bench.folder), bench.study, bench.folder, bench.anchors)
    assert [p.value for p in points] == [t.value for t in trials]
    assert min(row.value for row in rows.values()) == 0
    assert len({p.per_prompt for p in points}) == len(points), "prompts are compared below 0, too"
    assert open_study(bench.folder).metric_names == ["objective"]


def told(study: optuna.Study, *objectives: float) -> None:
    for value in objectives:
        trial = study.ask()
        for name, figure in (("score", max(0.0, value)), ("objective", value), ("se", 0.01)):
            trial.set_user_attr(name, figure)
        trial.set_user_attr("outcome", "complete")
        study.tell(trial, value)


def test_the_best_of_trials_that_all_score_zero_is_the_best_by_objective(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    told(study, -0.06, -0.02, -0.04)
    now = standing(study, 3)
    assert now.best == (1, 0.0, 0.01) and study.best_trial.number == 1
    console = Console(record=True, width=100)
    console.print(status_table(study_table(study, StudyFolder(tmp_path)), 100)[0])
    shown = console.export_text()
    assert "1*" in shown and shown.count("0.000 ±") == 3 and "-0.0" not in shown
    line = trial_line(RESULT, now)
    assert "score=0.0000" in line and "objective=-0.0290" in line
    tiny = trial_line(dataclasses.replace(RESULT, objective=-0.00001), now)
    assert "objective=0.0000" in tiny  # not -0.0000


def test_a_study_begun_before_keeps_its_clipped_values() -> None:
    new = read_study(find_study(None, "mini-sd15"))
    assert new.score.below_zero == SIGNED and new.frozen()[BELOW_ZERO] == SIGNED
    limits = {"limits": json.dumps(new.limits.as_dict())}
    assert as_begun(new, None) is new and as_begun(new, new.frozen() | limits) == new
    before = {name: value for name, value in new.frozen().items() if name != BELOW_ZERO}
    begun = as_begun(new, before | limits)
    assert (
        begun.score == Formula() and begun.frozen() == before and "below_zero" not in begun.sections["score"]
    )
    check_unchanged(before, begun.frozen(), "old")
    with pytest.raises(ConfigError, match="below_zero: was not set, is now signed"):
        check_unchanged(before, new.frozen(), "old")


def test_a_study_begun_when_clip_judged_likeness_by_default_keeps_it() -> None:
    new = read_study(find_study(None, "sd15"))
    limits = {"limits": json.dumps(new.limits.as_dict())}
    clip, dino = "ViT-B-32:laion2b_s34b_b79k 0123456789abcdef", "facebook/dinov2-small fedcba9876543210"
    facts = new.frozen() | limits | {"scorer": clip}
    assert new.study.likeness == "", "the default of the base"
    begun = as_begun(new, facts | {"likeness": clip})
    assert begun.study.likeness == begun.sections["study"]["likeness"] == "clip"
    style = "style of ViT-B-32:laion2b_s34b_b79k 99999999ffffffff"
    assert as_begun(new, facts | {"likeness": style}).study.likeness == "clip"
    assert as_begun(new, facts | {"likeness": dino}) == new
    own = read_study(find_study(None, "sd15"), sets=["study.likeness=someone/dino"])
    assert as_begun(own, facts | {"likeness": clip}) == own, "what the file names is checked, not replaced"


def test_a_study_can_be_told_clipped_values_and_does_not_change_later(tmp_path: Path) -> None:
    clipped = read_study(find_study(None, "mini-sd15"), sets=["score.below_zero=clipped"])
    assert clipped.score == Formula() and BELOW_ZERO not in clipped.frozen()
    study = create_study(StudyFolder(tmp_path), tiny_study().frozen())
    with pytest.raises(ConfigError, match="below_zero: was signed, is now not set"):
        check_unchanged(
            study.user_attrs[IDENTITY], tiny_study({"score": {"below_zero": "clipped"}}).frozen(), "new"
        )
    with pytest.raises(ConfigError, match="below_zero"):
        read_study(find_study(None, "mini-sd15"), sets=["score.below_zero=half"])
