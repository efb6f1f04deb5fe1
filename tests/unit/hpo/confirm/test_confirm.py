"""Tests of ``hpo confirm``: the runs, the decision, the output and the written files."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from evaluation.score.statistics import prompt_draws
from hpo.confirm.outcome import (
    RESCORED,
    RETRAINED,
    RULE,
    ConfirmCandidate,
    Confirmed,
    Repeat,
    decide,
    expected_best,
    write_outcome,
)
from hpo.confirm.view import outcome_lines, outcome_table
from hpo.confirm.wanted import OF, TRAIN_SEED, ConfirmRequest, fresh_seed, source_of
from hpo.study.folder import StudyFolder, read_json
from hpo.study.storage import open_study
from hpo.terminal.confirmation import confirmed_lines, confirmed_trials
from tests.tiny_confirm import check_confirmation, run_confirm, searched_study
from trainer.config import TrainConfig
from trainer.data.dataset import read_dataset
from trainer.errors import ConfigError, DataError, MachineError, ModelFileError
from trainer.files import sha256_file

P = 24


def candidate(
    number: int,
    mean: float,
    *,
    seed: int = 0,
    images: int = 100,
    repeats: int = 2,
    noise: float = 0.02,
    **more: object,
) -> ConfirmCandidate:
    """A trial with score ``mean`` on 24 prompts.  All trials share the prompt difficulties."""
    difficulty = np.random.default_rng(99).normal(0, 0.2, P)
    rows = []
    for n in range(repeats):
        own = np.random.default_rng((number, n, seed)).normal(0, noise, P)
        scores_P = mean + difficulty - difficulty.mean() + own - own.mean() + (0.005 if n % 2 else -0.005)
        rows.append(
            Repeat(10 * number + n, n, float(scores_P.mean()), prompt_draws(P) @ scores_P / P, 60.0, images)
        )
    values = {"config": {"network_dim": 8}, "settings": {"learning_rate": 1e-3}, "search_se": 0.03, **more}
    return ConfirmCandidate(number, search_score=mean + 0.05, repeats=tuple(rows), **values)  # type: ignore[arg-type]


def decided(*candidates: ConfirmCandidate, trial0: int | None = 0, how: str = RETRAINED) -> Confirmed:
    found = decide(candidates, trial0, how)
    assert found is not None
    return found


def test_a_clearly_cheaper_trial_wins_only_if_it_is_equal_within_the_noise() -> None:
    found = decided(
        candidate(0, 0.30),
        candidate(4, 0.70, images=400),
        candidate(7, 0.699, images=100),
        candidate(9, 0.50, images=10),
    )
    assert found.winner == 7 and set(found.ties) == {4, 7} and found.beats_trial0
    assert [row.number for row in found.rows] == [4, 7, 9, 0]
    behind = found.won.behind
    assert behind is not None and behind.mean == pytest.approx(0.001) and behind.mean <= behind.se
    assert found.rows[0].behind is None
    over = found.won.over_trial0
    assert over is not None and over.low > 0.3 and over.mean == pytest.approx(0.399)
    assert decided(candidate(4, 0.70, images=400), candidate(7, 0.66, images=100), trial0=None).winner == 4


@pytest.mark.parametrize(("images", "winner"), [(400, 4), (390, 4), (321, 4), (320, 7)])
def test_a_trial_that_is_hardly_cheaper_does_not_replace_the_best_score(images: int, winner: int) -> None:
    """The same images with a smaller rank, or a few images less, are no reason to take the lower score."""
    found = decided(
        candidate(0, 0.3),
        candidate(4, 0.70, images=400, config={"network_dim": 32}),
        candidate(7, 0.699, images=images),
    )
    assert found.winner == winner and set(found.ties) == {4, 7}


def test_a_high_noise_does_not_hand_the_win_to_a_trial_that_is_probably_worse() -> None:
    """The old rule took the cheapest of all that no test could tell apart, however far behind it was."""
    found = decided(
        candidate(0, 0.60), candidate(4, 0.70, images=400), candidate(7, 0.66, images=1, noise=0.15, seed=3)
    )
    behind = found.row(7).behind
    assert behind is not None and behind.se < behind.mean and behind.low < 0
    assert found.winner == 4 and found.ties == (4,)


def test_nothing_beats_trial_0_is_said_and_a_cheaper_equal_may_still_win(tmp_path: Path) -> None:
    found = decided(candidate(0, 0.60), candidate(4, 0.601, images=400), candidate(7, 0.3))
    assert found.beats_trial0 is False and found.winner == 0 and 0 in found.ties
    source, target = StudyFolder(tmp_path / "x"), StudyFolder(tmp_path / "x__confirm")
    text = "\n".join(outcome_lines(found, source, target, kept=True))
    assert "nothing beats trial 0" in text
    assert decided(candidate(0, 0.60), candidate(4, 0.601, images=50)).winner == 4


@pytest.mark.parametrize("images", [100, 400])
def test_the_table_fits_80_columns_and_shows_what_the_rule_compares(tmp_path: Path, images: int) -> None:
    found = decided(
        candidate(0, 0.30, images=12_345),
        candidate(1004, 0.70, images=400),
        candidate(7, 0.699, images=images),
    )
    screen = Console(file=io.StringIO(), width=80, color_system=None)
    screen.print(outcome_table(found))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "…\n" not in text and all(len(line) <= 80 for line in text.splitlines())
    head, *rows = text.splitlines()
    assert head.split() == ["trial", "search", "confirmed", "95", "%", "behind", "best", "images", "time"]
    assert rows[0].split()[0] == "1004" and " 400 " in rows[0] and "12345" in rows[2]
    behind = found.row(7).behind
    assert behind is not None and f"{behind.mean:.3f} ± {behind.se:.3f}" in rows[1]
    assert [row.split()[-1] for row in rows[:2]] == (
        ["equal", "winner"] if images == 100 else ["winner", "equal"]
    )
    lines = "\n".join(outcome_lines(found, StudyFolder(tmp_path), StudyFolder(tmp_path), kept=True))
    assert ("sees 100 images instead of 400" in lines) == (images == 100)
    assert ("trial 7 is equal within the noise and not clearly cheaper" in lines) == (images == 400)


def test_shrinkage_is_that_of_the_selected_trials_alone() -> None:
    found = decided(candidate(0, 0.3), candidate(4, 0.7))
    assert found.shrinkage == pytest.approx(0.05)
    assert found.expected is None


@pytest.mark.parametrize(("by", "moved"), [(0.05, "fell by 0.0500"), (-0.02, "rose by 0.0200")])
def test_a_score_that_rose_is_not_said_to_have_fallen(tmp_path: Path, by: float, moved: str) -> None:
    chosen = dataclasses.replace(candidate(4, 0.7), search_score=0.7 + by)
    found = decide([candidate(0, 0.3), chosen], 0, RETRAINED, [0.75, 0.7, 0.66, 0.64, 0.3, 0.1], 0.02)
    assert found is not None and found.expected is not None
    folder = StudyFolder(tmp_path)
    (line,) = (x for x in outcome_lines(found, folder, folder, kept=True) if x.startswith("shrinkage"))
    assert f"the scores of the selected trials {moved} on average" in line and f"{found.expected:.4f}" in line
    assert write_outcome(folder, found, {})
    kept = read_json(folder.confirmed)
    assert kept is not None and (kept["shrinkage"], kept["expected"]) == (found.shrinkage, found.expected)
    assert confirmed_trials(folder) == (4, 0)


def test_what_the_searchs_best_is_worth_is_less_than_it_says() -> None:
    searched = [0.75, 0.70, 0.66, 0.64, 0.30, 0.10, 0.0, 0.0]
    quiet, noisy = (expected_best(searched, noise) for noise in (0.01, 0.04))
    assert quiet is not None and noisy is not None
    assert np.mean(searched[:4]) < noisy < quiet < 0.75
    assert expected_best([0.7, 0.6], 0.1) is None


def test_a_trial_that_is_infeasible_when_confirmed_cannot_win(tmp_path: Path) -> None:
    found = decided(candidate(0, 0.3), candidate(4, 0.9, trouble="diverged"), candidate(7, 0.5))
    assert found.winner == 7 and found.troubles == {4: "diverged"}
    source = StudyFolder(tmp_path / "x")
    assert "trial 4: infeasible in the confirmation: diverged" in outcome_lines(
        found, source, source, kept=True
    )
    assert decide([candidate(4, 0.9, trouble="diverged")], None, RETRAINED) is None


def test_without_a_score_of_trial_0_nothing_is_claimed_over_it(tmp_path: Path) -> None:
    found = decided(candidate(4, 0.7), candidate(7, 0.3), trial0=None)
    assert found.beats_trial0 is None and found.won.over_trial0 is None
    text = "\n".join(outcome_lines(found, StudyFolder(tmp_path), StudyFolder(tmp_path), kept=True))
    assert "it is unknown whether" in text and "nothing beats" not in text


def test_rescoring_does_not_replace_a_retrained_confirmation(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert write_outcome(folder, decided(candidate(0, 0.3), candidate(4, 0.7), how=RESCORED), {})
    assert write_outcome(folder, decided(candidate(0, 0.3), candidate(7, 0.7)), {})
    assert not write_outcome(folder, decided(candidate(0, 0.3), candidate(4, 0.7), how=RESCORED), {})
    assert read_json(folder.confirmed)["winner"] == 7  # type: ignore[index]
    folder.confirmed.write_text("{}")
    assert "damaged" in confirmed_lines(folder)[0]


def test_training_seeds_are_fresh_and_the_same_for_every_trial() -> None:
    seeds = [fresh_seed(42, n) for n in range(5)]
    assert len({42, *seeds}) == 6 and seeds == [fresh_seed(42, n) for n in range(5)]


def test_a_confirmation_leads_to_its_search_and_a_search_named_like_one_to_itself(tmp_path: Path) -> None:
    for name, facts in {"x": {}, "x__confirm": {"confirms": "x"}, "y__confirm": {}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.db").touch()
        (tmp_path / name / "study.json").write_text(json.dumps({"facts": facts}))
    found = [
        source_of(ConfirmRequest(name=name, runs=tmp_path)).name for name in ("x", "x__confirm", "y__confirm")
    ]
    assert found == ["x", "x", "y__confirm"]


# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> StudyFolder:
    return searched_study(tmp_path_factory.mktemp("search") / "study", data)


@pytest.fixture
def source(tmp_path: Path, finished: StudyFolder) -> StudyFolder:
    """A copy of the finished search in a separate runs folder."""
    shutil.copytree(finished.root, tmp_path / "runs" / "study")
    return StudyFolder(tmp_path / "runs" / "study")


def test_the_best_trials_and_trial_0_are_retrained_on_unseen_prompts(source: StudyFolder, data: Path) -> None:
    before = [(t.number, t.value, t.params) for t in open_study(source).get_trials(deepcopy=False)]
    outcome, said = run_confirm(source, data)
    assert outcome is not None
    lines = said.splitlines()
    assert (
        lines[0].startswith("cost: 6 trainings with new seeds, each with 3 confirmation images")
        and "based on the search" in lines[0]
    )
    target = StudyFolder(source.root.with_name("study__confirm"))
    scores = check_confirmation(target, 6)
    assert {of for of, _ in scores} == {0, 1, 2} and {s for _, s in scores} == {
        fresh_seed(7, 0),
        fresh_seed(7, 1),
    }
    prompts = {t.split("=")[0].strip() for t in target.prompts.read_text().splitlines() if "text" in t}
    assert prompts and target.prompts.read_text() != source.prompts.read_text()
    for trial in open_study(target).get_trials(deepcopy=False):
        params, of = read_json(target.trial(trial.number).params), trial.params[OF]
        searched_params = read_json(source.trial(of).params)
        assert params is not None and searched_params is not None
        differing = {k for k, v in params["train"].items() if v != searched_params["train"][k]}
        assert differing <= {"seed", "output_name"} and params["train"]["seed"] == trial.params[TRAIN_SEED]
        assert trial.user_attrs["role"] == ("baseline" if of == 0 else "confirms")
    # no score of either study is in the other
    assert before == [(t.number, t.value, t.params) for t in open_study(source).get_trials(deepcopy=False)]

    written = json.loads(source.confirmed.read_text())
    assert written["winner"] == outcome.winner and written["how"] == RETRAINED
    assert TrainConfig(**written["config"]).learning_rate == TrainConfig(**outcome.config).learning_rate
    assert written["score"] == outcome.won.score and len(written["interval"]) == 2
    assert written["trial0"]["number"] == 0 and set(written["ties"]) <= {0, 1, 2}
    assert "confirmed: trial" in said and "shrinkage: from search to confirmation" in said
    assert confirmed_lines(source)[0].startswith(f"confirmed (retrained): trial {outcome.winner}")

    again, said = run_confirm(source, data)  # nothing is left to do, and nothing changes
    assert said.startswith("all 6 runs are finished already") and RULE in said
    assert again is not None and again.rows == outcome.rows
    more, said = run_confirm(source, data, seeds=3)
    assert said.startswith("cost: 3 trainings") and more is not None
    check_confirmation(target, 9)


def test_the_images_that_a_training_sees_are_counted_as_before_the_search(
    source: StudyFolder, data: Path
) -> None:
    """Not as steps × batch: the last batch of a bucket is seldom full."""
    outcome, _ = run_confirm(source, data)
    assert outcome is not None
    held_out = (read_json(source.facts) or {})["references"]
    trained = len(read_dataset(data, TrainConfig()).items) - len(held_out)
    for row in outcome.rows:
        train = read_json(source.trial(row.number).params)["train"]
        assert row.trained_images == trained * train["max_train_epochs"]


def test_rescoring_trains_nothing_and_scores_the_very_files(source: StudyFolder, data: Path) -> None:
    outcome, said = run_confirm(source, data, rescore_only=True)
    assert outcome is not None and outcome.how == RESCORED and "training seed: not varied" in said
    target = StudyFolder(source.root.with_name("study__rescore"))
    assert len(check_confirmation(target, 3)) == 3
    for trial in open_study(target).get_trials(deepcopy=False):
        own, theirs = target.trial(trial.number), source.trial(trial.params[OF])
        assert sha256_file(own.lora) == sha256_file(theirs.lora) and not own.steps.exists()
    assert {row.trained_images > 0 for row in outcome.rows} == {True}


def test_rescoring_says_which_files_are_missing(source: StudyFolder, data: Path) -> None:
    source.trial(0).lora.unlink()
    outcome, said = run_confirm(source, data, rescore_only=True)
    assert "the LoRA files of trials 0 are missing" in said and outcome is not None
    assert outcome.beats_trial0 is None and {row.number for row in outcome.rows} == {1, 2}
    for number in (1, 2):
        source.trial(number).lora.unlink()
    with pytest.raises(DataError, match=r"the LoRA files of trials 0, .* are missing") as caught:
        run_confirm(source, data, rescore_only=True)
    assert "run without --rescore-only" in caught.value.hint


def test_a_lora_file_that_changed_since_the_search_is_not_rescored(source: StudyFolder, data: Path) -> None:
    source.trial(1).lora.write_bytes(source.trial(2).lora.read_bytes())
    with pytest.raises(ModelFileError, match="has changed since"):
        run_confirm(source, data, rescore_only=True)


def test_other_data_than_the_searchs_is_refused_and_leaves_nothing(source: StudyFolder, data: Path) -> None:
    def other(bench: object) -> None:
        bench.evaluator.scorer.sha = "1" * 64  # type: ignore[attr-defined]

    with pytest.raises(ConfigError, match="started with a different definition: scorer"):
        run_confirm(source, data, loaded=other)
    assert not source.root.with_name("study__confirm").exists() and not source.confirmed.exists()


@pytest.mark.parametrize(("name", "error", "text"), [
    ("confirmation.toml", ConfigError, "no confirmation set"), ("study.json", MachineError, "has no study definition"),
])  # fmt: skip
def test_a_study_that_lacks_what_is_needed_is_refused(
    source: StudyFolder, data: Path, name: str, error: type[Exception], text: str
) -> None:
    (source.root / name).unlink()
    with pytest.raises(error, match=text):
        run_confirm(source, data)
    assert not source.root.with_name("study__confirm").exists()


def test_a_study_with_trial_0_alone_has_nothing_to_confirm(tmp_path: Path, data: Path) -> None:
    source = searched_study(tmp_path / "runs" / "one", data, trials=1)
    with pytest.raises(ConfigError, match="no scored trial other than trial 0"):
        run_confirm(source, data)


def test_saying_no_to_the_cost_leaves_everything_as_it_was(source: StudyFolder, data: Path) -> None:
    from hpo.confirm.run import confirm
    from hpo.confirm.wanted import ConfirmRequest

    screen = Console(file=io.StringIO(), width=160)
    assert confirm(ConfirmRequest("study", runs=source.root.parent), screen, lambda: False) is None
    assert not source.root.with_name("study__confirm").exists()


def test_of_configurations_that_all_score_zero_the_order_is_that_of_the_objective() -> None:
    """Their scores are equal; what is told is not, and P(best), ties and order follow it."""
    found = decided(
        below_zero(candidate(0, 0.0), -0.06),
        below_zero(candidate(4, 0.0), -0.30),
        below_zero(candidate(7, 0.0), -0.01),
    )
    assert [row.number for row in found.rows] == [7, 0, 4]
    assert [row.score for row in found.rows] == [0.0] * 3 and 7 in found.ties
    assert 4 not in found.ties and found.rows[0].p_best > 0.9
    assert not found.beats_trial0, "nothing that scores 0 beats anything"


def below_zero(of: ConfirmCandidate, objective: float) -> ConfirmCandidate:
    """The candidate with this objective and the score 0; its draws keep their spread."""
    repeats = tuple(
        dataclasses.replace(
            r, score=0.0, objective=objective, draws_K=0.1 * (r.draws_K - r.draws_K.mean()) + objective
        )
        for r in of.repeats
    )
    return dataclasses.replace(of, repeats=repeats)
