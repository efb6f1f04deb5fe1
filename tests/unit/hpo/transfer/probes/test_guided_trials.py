"""Target trials of the design ``model``: which are made, what is stored, and what the command says and decides."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hpo.study.config import StudyConfig, build_study, find_study, read_study
from hpo.study.folder import StudyFolder, read_json
from hpo.study.standing import BASELINE, ROLE
from hpo.study.storage import open_study
from hpo.transfer.command import TransferRequest
from hpo.transfer.mapping import Transfer, make
from hpo.transfer.plan import DatasetFigures
from hpo.transfer.probes.candidates import Candidates
from hpo.transfer.probes.design import DEFAULT, Decision, Probe, ProbeScore, agreement
from hpo.transfer.probes.guided import MODEL, Guide, not_worth_it, shift_words
from hpo.transfer.probes.prior import Prior, SourceTrial, at_rates, decades, place, pool, read_trials
from hpo.transfer.probes.run import LADDER, Probing, begun_design, probe_folder, sections_of, usual_design
from hpo.transfer.probes.side import ShortRuns
from hpo.transfer.probes.surrogate import fit
from hpo.transfer.profile import read_profile
from hpo.transfer.rules import transfer
from hpo.transfer.source import SourceCandidate, TransferSource, read_source
from tests.tiny_target import run_transfer, searched_source, target_of, target_trials
from trainer.errors import ConfigError, Interrupted
from trainer.kohya.trainfile import read_train_file

SPACE = {
    "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
    "text_encoder_lr": {"low": 1e-5, "high": 1e-4},
    "lr_scheduler": {"choices": ["constant", "cosine", "cosine_with_restarts_3"]},
    "network_dim": {"low": 2, "high": 10},
}
BASE = {"learning_rate": 1e-4, "text_encoder_lr": 5e-5, "lr_scheduler": "cosine", "network_dim": 4}
STUDY = build_study("places", {"space": SPACE, "baseline": BASE})
WINNER = {**STUDY.baseline, **BASE}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, data: Path) -> StudyFolder:
    """A search of six trials with three target trials."""
    source = searched_source(tmp_path_factory.mktemp("guided") / "s", data)
    run_transfer(source, data, 3)
    return source


@pytest.fixture
def source(tmp_path: Path, begun: StudyFolder) -> StudyFolder:
    """A copy of both studies."""
    for folder in (begun, target_of(begun)):
        shutil.copytree(folder.root, tmp_path / folder.name)
    return StudyFolder(tmp_path / "s")


# Places


def test_a_factor_on_all_rates_moves_a_place_by_its_decades() -> None:
    """Also a rate that the space has on a linear scale; nothing else moves."""
    there = place(STUDY, at_rates(STUDY, WINNER, 10**0.5))
    moved_D = [b - a for a, b in zip(place(STUDY, WINNER), there, strict=True)]
    assert moved_D == pytest.approx([0.5 * d for d in decades(STUDY)], abs=1e-5)
    assert sorted(decades(STUDY))[-2:] == [pytest.approx(0.5), pytest.approx(1.0)]


def test_a_choice_has_a_number_for_each_option_and_what_is_outside_stays_near() -> None:
    """Two different choices are 1 apart; an unknown one has no number; a rank of 1,000 is not 100 spaces away."""
    one, other, unknown = (
        place(STUDY, {**WINNER, "lr_scheduler": name}) for name in ("cosine", "constant", "polynomial")
    )
    assert math.dist(one, other) == pytest.approx(1.0) and math.dist(one, unknown) == pytest.approx(0.5**0.5)
    assert max(place(STUDY, {**WINNER, "network_dim": 1000})) == 1.5


def test_the_pool_stays_within_a_decade_of_the_winners_rate_and_in_the_space_otherwise() -> None:
    every = list(pool(STUDY, WINNER, 7))
    assert every == list(pool(STUDY, WINNER, 7)) and every != list(pool(STUDY, WINNER, 8))
    assert all(1e-5 * 0.99 <= one["learning_rate"] <= 1e-3 * 1.01 for one in every)
    for p in STUDY.space:
        if p.name not in ("learning_rate", "text_encoder_lr"):
            assert all(p.domain.holds(one[p.name]) for one in every), p.name
    only_rates = [
        one
        for one in every
        if {k for k in one if one[k] != WINNER[k]} == {"learning_rate", "text_encoder_lr"}
    ]
    assert len(only_rates) >= 20
    assert len({one["lr_scheduler"] for one in every}) == 3


# The trials


def test_trials_are_the_transferred_the_usual_and_proposed_settings_as_whole_runs(begun: StudyFolder) -> None:
    target = target_of(begun)
    trials = open_study(target).get_trials()
    assert [t.user_attrs[ROLE].split(" (")[0] for t in trials] == [BASELINE, DEFAULT, "proposal 3"]
    stored = json.loads((target.root / "proposals.json").read_text())
    assert [one["values"] for one in stored["proposals"]] == [t.params for t in trials]
    assert [one["gain"] is None for one in stored["proposals"]] == [True, True, False]
    facts = read_json(target.facts)
    assert facts is not None and facts["facts"]["design"] == MODEL
    plan = read_train_file(begun.root / "transfer" / "mini-sdxl.toml").config
    first = read_json(target.trial(0).params)
    assert first is not None and first["train"]["max_train_epochs"] == plan.max_train_epochs
    assert first["train"]["lr_scheduler"] == plan.lr_scheduler, "not a beginning of a run"
    saved = json.loads((target.root / "probes.json").read_text())
    assert saved["design"] == MODEL and saved["fraction"] == 1.0
    assert not target.root.with_name(f"{target.name}-source").exists(), "nothing is run on the source again"


def test_the_source_study_is_not_changed_and_scores_are_not_mixed(begun: StudyFolder) -> None:
    assert len(open_study(begun).get_trials()) == 6
    assert len(open_study(target_of(begun)).get_trials()) == 3


def test_the_same_command_uses_what_is_there_and_more_trials_are_added(
    source: StudyFolder, data: Path
) -> None:
    before = target_trials(source)
    said = run_transfer(source, data, 3)
    assert "using 3 finished target trials" in said and target_trials(source) == before
    said = run_transfer(source, data, 4)
    assert target_trials(source)[:3] == before and len(target_trials(source)) == 4
    for words in (
        "target trial (transferred)",
        "decision: ",
        "the best learning_rate is about",
        "inconclusive",
    ):
        assert words in said


def test_stored_proposals_are_kept_whatever_the_model_would_propose_now(
    source: StudyFolder, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third trial, continued by a version that would choose others."""
    target, before = target_of(source), target_trials(source)
    shutil.rmtree(target.root)

    def stop(view: object) -> None:
        def should_stop() -> bool:
            return len(list(target.root.glob("trial_*"))) == 3

        view.asked_to_stop = None  # type: ignore[attr-defined]
        view.should_stop = should_stop  # type: ignore[attr-defined]

    with pytest.raises(Interrupted):
        run_transfer(source, data, 3, stop)
    monkeypatch.setattr(Guide, "_proposed", lambda self, outcomes: pytest.fail("it was stored"))
    run_transfer(source, data, 3)
    assert target_trials(source) == before


def test_a_search_that_went_on_meanwhile_changes_no_proposal(source: StudyFolder) -> None:
    prior = Prior.read(study_of(source), target_of(source).root)
    assert prior is not None
    assert len(prior.trials) == 6 and prior.trials == read_trials(source)
    fresh = Prior.of(study_of(source), source)
    assert fresh.surrogate.mean(fresh.surrogate.x_ND) == pytest.approx(
        prior.surrogate.mean(prior.surrogate.x_ND)
    )


def study_of(source: StudyFolder) -> StudyConfig:
    return build_study(source.name, sections_of(source))


# Which design


def test_few_trials_or_an_old_definition_fall_back_to_the_ladder(
    source: StudyFolder, data: Path, tmp_path: Path
) -> None:
    assert usual_design(read_source(source, anyway=True)) == (MODEL, "")
    facts = json.loads(source.facts.read_text())
    source.facts.write_text(json.dumps({**facts, "sections": None}))
    design, why = usual_design(read_source(source, anyway=True))
    assert design == LADDER and "earlier version" in why
    few = searched_source(tmp_path / "few" / "f", data, 2)
    design, why = usual_design(read_source(few, anyway=True))
    assert design == LADDER and "2 scored trials" in why
    with pytest.raises(ConfigError, match="2 scored trials"):
        run_transfer(few, data, 3, design=MODEL)


def test_begun_trials_of_either_kind_keep_their_folder_and_design(source: StudyFolder) -> None:
    done = make(read_source(source, anyway=True), read_profile("mini-sdxl"), None)
    target = target_of(source)
    assert probe_folder(done) == probe_folder(done, MODEL) == target and begun_design(target) == MODEL
    assert probe_folder(done, LADDER).name == f"{target.name}-2", "short runs are another study"
    facts = json.loads(target.facts.read_text())
    del facts["facts"]["design"]  # as begun before the design model was made
    target.facts.write_text(json.dumps(facts))
    assert probe_folder(done) == target and begun_design(target) == LADDER
    assert probe_folder(done, MODEL).name == f"{target.name}-2"


# The decision and its words


def guide_of(source: StudyFolder, budget: int = 3) -> Guide:
    done = make(read_source(source, anyway=True), read_profile("mini-sdxl"), None)
    folder, request = target_of(source), TransferRequest("mini-sdxl", trials=budget)
    probing = Probing(done, request, folder, MODEL, Console())
    prior = Prior.of(study_of(source), source)
    return Guide(Candidates(done), prior, folder.root, probing._runs(folder.name), folder.name, budget)


def scored(guide: Guide, *scores: float, se: float = 0.01) -> list[ProbeScore]:
    probes = [Probe(), *(Probe(one.role) for one in guide.placed[1:])]
    return [ProbeScore(probe, score, se) for probe, score in zip(probes, scores, strict=False)]


def test_a_clear_gain_becomes_the_settings_of_the_run_with_its_interval(source: StudyFolder) -> None:
    guide = guide_of(source)
    decision = guide.decide(scored(guide, 0.1, 0.0, 0.9))
    assert (
        decision.probe.candidate.startswith("proposal 3") and 0 < decision.low < decision.gain < decision.high
    )
    changed = guide.changed(decision)
    proposed = guide.placed[2].values
    assert changed["learning_rate"] == pytest.approx(proposed["learning_rate"])
    lines = guide.lines(scored(guide, 0.1, 0.0, 0.9), decision, "hpo search")
    assert any("by the model" in line and "95 % interval" in line for line in lines)
    assert "Gaussian process of 6 trials" in guide.evidence


def test_transferred_settings_stay_where_they_are_the_best(source: StudyFolder) -> None:
    guide = guide_of(source)
    decision = guide.decide(scored(guide, 0.5, 0.1, 0.2))
    assert decision.keeps and guide.changed(decision) == {} and "the best of 3 trials" in decision.reason
    assert guide.decide([]).keeps


def test_an_infeasible_trial_is_named_and_does_not_bend_the_model(source: StudyFolder) -> None:
    guide = guide_of(source)
    outcomes = scored(guide, 0.5, 0.1, -1.0)
    decision = guide.decide(outcomes)
    assert decision.keeps and guide.posterior(outcomes).observed.scores[2] == guide.prior.floor
    assert any("infeasible" in line for line in guide.lines(outcomes, decision, "hpo search"))


def test_a_transfer_that_does_not_pay_is_said_with_figures(source: StudyFolder) -> None:
    usual = [ProbeScore(Probe(), 0.1, 0.01), ProbeScore(Probe(DEFAULT), 0.5, 0.01)]
    won = Decision(Probe(DEFAULT), 0.4, 0.3, 0.5, "it gains")
    assert "0.4000 above" in (not_worth_it(usual, won, None) or "")
    assert not_worth_it(usual, Decision(Probe("proposal 3"), 0.5, 0.4, 0.6, "it gains"), None) is None
    opposite = agreement([float(n) for n in range(6)], [float(-n) for n in range(6)])
    kept = Decision(Probe(), 0.0, 0.0, 0.0, "kept")
    assert "opposite order (-1.00)" in (not_worth_it(usual[:1], kept, opposite) or "")
    guide = guide_of(source)
    outcomes = scored(guide, 0.1, 0.9, 0.2)
    lines = guide.lines(outcomes, guide.decide(outcomes), "hpo search --base mini-sdxl")
    assert lines[-1].endswith("a direct search is probably better: hpo search --base mini-sdxl")


def test_the_shift_is_a_factor_in_words() -> None:
    lower = shift_words((math.log10(1 / 1.8), -0.5, -0.1), 6)
    assert (
        "about 1.8 times lower than the rules say" in lower
        and "0.32 to 0.79 times" in lower
        and "6 trials" in lower
    )
    assert "2.0 times higher" in shift_words((math.log10(2), 0.1, 0.5), 4)
    assert "about what the rules say" in shift_words((0.01, -0.2, 0.2), 4)


def test_rates_on_the_target_are_exact_and_their_place_is_that_of_the_source(source: StudyFolder) -> None:
    """A rate of the source × the rule's factor, in two digits; the place is that of the rate which gives it."""
    guide = guide_of(source)
    mapped = guide.mapped(at_rates(guide.prior.study, guide.best, 0.5))
    assert mapped is not None
    config, spot = mapped
    exact = guide.best["learning_rate"] * 0.5
    assert config.learning_rate == pytest.approx(exact, rel=0.05)
    known = place(guide.prior.study, {**guide.best, "learning_rate": config.learning_rate})
    assert spot == pytest.approx(known)
    too_high = guide.mapped(at_rates(guide.prior.study, guide.best, 1e6))
    assert too_high is None


@pytest.mark.parametrize("name", ["sd15-character", "sd15-character-small", "sd15-style"])
def test_every_setting_of_a_shipped_search_has_a_place_on_sdxl(name: str, tmp_path: Path) -> None:
    """The target's study can be defined, with all settings that may be proposed, and starts with both known ones."""
    study, profile = read_study(find_study(name, "sd15")), read_profile("sdxl-16gb")
    trials = tuple(
        SourceTrial(
            number,
            {p.name: p.domain.from_unit(u) for p, u in zip(study.space, row, strict=True)},
            score,
            0.02,
        )
        for number, (*row, score) in enumerate(np.random.default_rng(3).random((12, len(study.space) + 1)))
    )
    rates = {"learning_rate": 1e-4} if "learning_rate" in trials[0].suggested else {}
    trials = (SourceTrial(0, {**trials[0].suggested, **rates}, 2.0, 0.02), *trials[1:])
    config = study.config(trials[0].suggested).with_values({"train_data_dir": str(tmp_path)})
    plan = transfer(config, DatasetFigures(images=25, samples=250), profile)
    best = SourceCandidate(0, config, 2.0, 0.02, {}, 2.0, 0.02)
    source = TransferSource(StudyFolder(tmp_path / "s"), "sd15", best, False, None, (), (best,), "")
    x_ND = np.array([place(study, t.suggested) for t in trials])
    prior = Prior(study, trials, fit(x_ND, [t.objective for t in trials], [t.se for t in trials]))
    runs = ShortRuns(250, {}, 1, "natural", preset=study.study.preset)
    guide = Guide(Candidates(Transfer(source, profile, plan)), prior, tmp_path, runs, "s__sdxl", 6)
    assert len(guide._pool) > 100 and [one.role for one in guide.placed] == ["transferred", DEFAULT]
    probe = guide.choose(scored(guide, 0.5, 0.2))
    assert probe is not None and guide.side.proposal(probe) == guide.placed[2].values
    for config, _ in guide._pool:
        assert config.pretrained_model_name_or_path == "sdxl" and config.resolution == 1024
        assert config.effective_batch_size <= 8
