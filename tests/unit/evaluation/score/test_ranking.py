"""The recorded study: does the score rank LoRAs like the ground truth of the world? Computed from raw cosines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.score.statistics import lead, prompt_draws, spearman, spearman_rows
from tests import ranking
from tests.bench.bench_ranking import Recording, bench_in, proposals
from tests.places import ROOT
from tests.ranking import SEARCH, Measured, Recorded
from trainer.bases.miniature import subjects
from trainer.files import read_records


@pytest.fixture(scope="module")
def found() -> Recorded:
    return ranking.read()


def test_the_recording_is_whole(found: Recorded) -> None:
    search = found.on[SEARCH]
    assert len(found.trials) == 30 and {"base", "trial 0", "overfitted"} <= search.keys()
    assert set(found.on[ranking.CONFIRMATION]) == {*ranking.names(found.ranked[:8]), "trial 0"}
    for m in search.values():
        assert m.clip_t_PS.shape == (16, 2) and np.isfinite(m.clip_t_PS).all()
    texts = [m.prompts.texts for m in (search["base"], found.on[ranking.CONFIRMATION]["trial 0"])]
    assert not set(texts[0]) & set(texts[1])


def test_the_recording_can_be_made_again(tmp_path: Path) -> None:
    """Base, prompts, references, encoders and sampling of the bench are those of the recording."""
    bench = bench_in(tmp_path)
    rows = read_records(ranking.FILE)
    for which, prompts in Recording(bench, ranking.FILE).sets.items():
        (row,) = (row for row in rows if (row["name"], row["set"]) == ("anchors", which))
        identity = bench.evaluator.on(prompts).identity
        assert row["anchors"]["identity"] == identity
        assert prompts.image_count == len(row["prompts"]) * len(row["seeds"])
    (first,) = (row for row in rows if row["name"] == "random 0")
    assert first["suggested"] == pytest.approx(proposals(bench, 1)[0])


def test_parts_that_the_autoencoder_loses_are_not_asked_for(found: Recorded) -> None:
    assert [part for part, share in found.kept.items() if share >= ranking.KEPT] == ["body", "head", "ears"]
    picture = subjects.picture("character", 0, 0, 64)[0]
    assert list(found.kept) == list(subjects.parts_shown(picture, "character"))


@pytest.mark.parametrize("truth", ["strict", "graded"])
def test_the_score_ranks_as_the_ground_truth_does_and_clip_alone_does_not(
    found: Recorded, truth: str
) -> None:
    score = spearman(found.column("score"), found.column(truth))
    assert score.value >= 0.7 and score.low >= 0.5, score
    gain = lead(found.column("score"), found.column("clip_t"), found.column(truth))
    assert gain.low > 0, gain


def test_the_score_ranks_so_whichever_prompts_had_been_drawn(found: Recorded) -> None:
    """The same threshold, with resampled prompts instead of resampled configurations."""
    draws_KP = prompt_draws(16)[:200]
    scores_KN = np.stack([m.values(draws_KP) for m in found.trials], axis=1)
    weights_KP = draws_KP * found.trials[0].prompts.asks_P
    truth_KN = np.stack([weights_KP @ m.strict_PS.mean(1) / weights_KP.sum(1) for m in found.trials], axis=1)
    rho_K = spearman_rows(scores_KN, truth_KN)
    assert np.percentile(rho_K, 5) >= 0.5


def test_the_untrained_base_follows_prompts_and_has_no_likeness(found: Recorded) -> None:
    """Sampled with the trigger in its prompts; 1 and 0 within two standard errors."""
    base = found.on[SEARCH]["base"]
    t_K, i_K = base.parts(prompt_draws(16))
    t, i = (float(part[0]) for part in base.parts())
    assert t == pytest.approx(1.0, abs=max(0.02, 2 * float(t_K.std())))
    assert i == pytest.approx(0.0, abs=max(0.05, 2 * float(i_K.std())))
    assert base.score < found.ranked[0].score / 2


def test_an_overfitted_lora_is_ranked_below_the_best(found: Recorded) -> None:
    best, hot = found.ranked[0], found.on[SEARCH]["overfitted"]
    draws_KP = prompt_draws(16)
    assert np.percentile(best.values(draws_KP) - hot.values(draws_KP), 2.5) > 0


def test_the_best_of_few_prompts_is_optimistic_and_the_correction_is_nearer_to_its_worth(
    found: Recorded,
) -> None:
    rows = [ranking.optimism(found, size) for size in (1, 3, 7)]
    for row in rows:
        assert row.said > row.worth
        assert abs(row.expected - row.worth) < row.said - row.worth
    gaps = [row.said - row.worth for row in rows]
    assert gaps[0] > gaps[1] > gaps[2]


def test_what_the_search_chose_beats_trial_0_on_prompts_and_seeds_that_chose_nothing(found: Recorded) -> None:
    worths = {worth.name: worth for _, worth in ranking.confirmed(found)}
    zero = worths.pop("trial 0")
    draws_KP = prompt_draws(len(zero.clip_t_PS))
    gains = [np.percentile(w.values(draws_KP) - zero.values(draws_KP), 2.5) for w in worths.values()]
    assert len(gains) == 8 and min(gains) > 0


def test_the_noise_of_the_recorded_study_is_known(found: Recorded) -> None:
    noise = ranking.noise(found)
    assert noise.configurations == 15 and 0.01 < noise.detectable < 0.2
    assert noise.prompt > 0 and 0 <= noise.shared <= 1


def test_a_score_that_is_another_formula_would_be_noticed(
    found: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP alone instead of the composite fails the threshold, so the test above can fail."""
    monkeypatch.setattr(Measured, "score", property(lambda m: m.clip_t))
    assert spearman(found.column("score"), found.column("strict")).value < 0.5


def test_the_page_and_the_figure_show_this_recording(found: Recorded) -> None:
    docs = ROOT / "docs"
    page = (docs / "evaluation.md").read_text(encoding="utf-8")
    for line in ranking.tables(found).splitlines():
        if line.startswith("| "):
            assert line in page, line
    assert (docs / "images" / "optimism.svg").read_text(encoding="utf-8") == ranking.picture(found)


def test_the_file_is_small_and_has_no_torn_line() -> None:
    content = ranking.FILE.read_bytes()
    assert len(content) < 400_000 and content.endswith(b"\n")
    assert all(isinstance(json.loads(line), dict) for line in content.splitlines())
