"""How many settings the trials can decide, which to fix, and that the printed ``--set`` values do just that."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.search.budget import ORDER, budget_lines, carried, fixing, order_table, place, to_fix
from hpo.study.config import SHIPPED, StudyConfig, build_study, read_study

ROOT = Path(__file__).resolve().parents[4]


def shipped(name: str, sets: tuple[str, ...] = ()) -> StudyConfig:
    return read_study(SHIPPED / f"{name}.toml", sets=sets)


@pytest.mark.parametrize(("trials", "settings"), [(1, 1), (9, 1), (10, 2), (29, 5), (30, 6), (60, 12)])
def test_five_trials_decide_about_a_setting(trials: int, settings: int) -> None:
    assert carried(trials) == settings


def test_thirty_trials_of_the_default_study_keep_the_six_of_the_small_one() -> None:
    study = shipped("sd15-character")
    (line,) = budget_lines(study, 30)
    words = shlex.split(line.partition("hpo search NAME … ")[2])
    assert words[::2] == ["--set"] * 6
    fixed = build_study("t", study.sections, sets=words[1::2])
    assert {p.name for p in fixed.space} == {p.name for p in shipped("sd15-character-small").space}
    assert fixed.config(fixed.baseline) == study.config(study.baseline), "fixed as in trial 0"
    assert line.startswith(
        "this study searches 12 settings, but 30 trials are enough for about 6 (rule of thumb: 5 trials for each "
        "setting); to fix the 6 that usually matter least"
    )
    assert budget_lines(study, 60) == budget_lines(shipped("sd15-character-small"), 30) == []


@pytest.mark.parametrize("name", sorted(p.stem for p in SHIPPED.glob("*.toml")))
@pytest.mark.parametrize("trials", [5, 11, 20, 45])
def test_the_advised_values_leave_as_many_settings_as_the_trials_can_decide(name: str, trials: int) -> None:
    study = shipped(name)
    fixed = build_study("t", study.sections, sets=fixing(study, to_fix(study, trials)))
    assert len(fixed.space) == min(len(study.space), carried(trials))
    one, other = (s.config(s.baseline).with_values({"max_train_epochs": 1}) for s in (fixed, study))
    assert one == other
    assert next(iter(fixed.space)).name == "learning_rate"


@pytest.mark.parametrize(
    ("sets", "value"),
    [
        (("baseline.lr_scheduler=constant",), "lr_warmup_steps=0"),  # without effect in trial 0
        (("baseline.min_snr_gamma=0",), "min_snr_gamma=0"),  # off
        (("baseline.noise_offset=0.05",), "noise_offset=0.05"),
    ],
)
def test_a_value_of_trial_0_can_be_written_back(sets: tuple[str, ...], value: str) -> None:
    study = shipped("sd15-character", sets)
    advised = fixing(study, to_fix(study, 30))
    assert value in advised
    assert len(build_study("t", study.sections, sets=advised).space) == 6


def test_restarts_are_fixed_with_their_cycles() -> None:
    study = shipped(
        "sd15-character", ("baseline.lr_scheduler=cosine_with_restarts", "baseline.lr_scheduler_num_cycles=2")
    )
    assert fixing(study, ("lr_scheduler",)) == (
        "lr_scheduler=cosine_with_restarts",
        "lr_scheduler_num_cycles=2",
    )
    assert fixing(shipped("sd15-character"), ("lr_scheduler",)) == ("lr_scheduler=cosine",)


def test_a_setting_that_is_in_no_list_is_fixed_after_those_that_matter_little() -> None:
    study = shipped("sd15-character", ("weight_decay={low=0.0, high=0.1}", "baseline.weight_decay=0.01"))
    names = to_fix(study, 5)
    assert (
        names.index("gradient_accumulation_steps") < names.index("weight_decay") < names.index("lr_scheduler")
    )
    assert to_fix(replace(study), 5) == names and place("learning_rate") == 0


def test_the_docs_show_the_order_with_its_reasons() -> None:
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert order_table() in text
    assert all(why for _, why in ORDER)
