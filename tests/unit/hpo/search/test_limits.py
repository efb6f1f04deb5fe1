"""A broken limit on its way to a verdict: of a trial (copied, collapsed, prior lost, shows nothing) and of a
checkpoint (copied, shows nothing)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evaluation.prompts.prompts import PromptSet, make_prompt
from evaluation.score.limits import SafeguardLimits
from evaluation.score.safeguards import COLLAPSED, COPIED, PRIOR_LOST, SHOWS_NOTHING, Copies, Safeguards
from evaluation.score.score import read_score
from hpo.cli.main import main
from hpo.search.sampled import SearchLimits as Length
from hpo.search.workbench import Workbench
from hpo.study.folder import read_json
from hpo.study.result import INFEASIBLE_REASONS, SIGNED_INFEASIBLE_VALUE
from hpo.study.standing import standing
from hpo.study.storage import open_study
from tests.tiny_run import JUDGING, MINI_CLIP, THREE_CHECKPOINTS, loud_base
from tests.tiny_search import Recorder, draw_images, make_search, tiny_bench
from trainer.data.images import read_picture

PROMPTS = PromptSet(
    (
        make_prompt("{trigger} {class} a", "altered", "zkw", "figure"),
        make_prompt("{trigger} {class} b", "altered", "zkw", "figure"),
        make_prompt("a {class} c", "class-only", "zkw", "figure"),
    ),
    (0, 1),
    "zkw",
    "figure",
)
FAR, EXACT = -1.0, 1e-5  # 1 − cosine: nothing is as near; the same picture is


def guarded(root: Path, data: Path, pictures: list[Path], near: float, limits: SafeguardLimits) -> Workbench:
    """A tiny bench whose training images are said to be these pictures."""
    bench = tiny_bench(root, data)
    scorer = bench.evaluator.scorer
    features_TD = scorer.image_features([read_picture(path).pixels_HW3 for path in pictures])
    safeguards = Safeguards((scorer,), Copies(features_TD, near), limits)
    return replace(bench, evaluator=replace(bench.evaluator.on(PROMPTS), safeguards=safeguards))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """The pictures of trial 0, which no limit stops: 3 prompts × 2 seeds."""
    pictures = sorted(data.glob("*.png"))
    lenient = SafeguardLimits(1.0, 0.0, 1e9)
    bench = guarded(tmp_path_factory.mktemp("drawn") / "study", data, pictures, FAR, lenient)
    make_search(bench, Length(1)).run()
    (trial,) = open_study(bench.folder).get_trials(deepcopy=False)
    assert trial.user_attrs["outcome"] == "complete" and max(trial.constraints.values()) <= 0
    found = sorted((bench.folder.trial(0).root / "samples").glob("*.png"))
    assert len(found) == 6
    return found


@pytest.mark.parametrize(
    ("reason", "near", "limits", "says"),
    [
        (COPIED, EXACT, SafeguardLimits(0.05, 0.0, 1e9), "100% of the images are copies of a training image"),
        (COLLAPSED, FAR, SafeguardLimits(0.05, 50.0, 1e9), "the images of a prompt all look alike"),
        (PRIOR_LOST, FAR, SafeguardLimits(0.05, 0.0, 0.5), "the class word alone produces the subject"),
        (
            SHOWS_NOTHING,
            FAR,
            SafeguardLimits(0.05, 0.0, 1e9, 1e9),
            "the images show nothing: prompt following",
        ),
    ],
)
def test_a_trial_beyond_a_limit_is_infeasible_whatever_it_scores(
    tmp_path: Path,
    data: Path,
    drawn: list[Path],
    reason: str,
    near: float,
    limits: SafeguardLimits,
    says: str,
) -> None:
    bench, view = guarded(tmp_path / "study", data, drawn, near, limits), Recorder()
    search = make_search(bench, Length(1), view)
    if reason == PRIOR_LOST:  # a base whose class word draws nothing like the subject, where the LoRA's does
        base_i_P = [
            i if asks else -1.0 for i, asks in zip(bench.anchors.base_i_P, (True, True, False), strict=True)
        ]
        lower = replace(bench.anchors, base_i_P=tuple(base_i_P), real_i=-0.5)
        bench.evaluator = bench.evaluator.with_anchors(lower)
    if reason == SHOWS_NOTHING:  # whatever the base and the real images show, it is nothing like these
        guards = bench.evaluator.safeguards
        assert guards is not None
        unlike_TD = -guards.copies.features_TD
        copies = replace(guards.copies, features_TD=unlike_TD)
        bench.evaluator = replace(
            bench.evaluator,
            safeguards=replace(guards, copies=copies),
            anchors=replace(bench.anchors, base_ND=unlike_TD),
        )
    search.run()
    study, folder = open_study(bench.folder), bench.folder.trial(0)
    (trial,) = study.get_trials(deepcopy=False)
    assert trial.state.name == "COMPLETE" and trial.value == SIGNED_INFEASIBLE_VALUE, (
        "the sampler learns from it"
    )
    assert trial.user_attrs["outcome"] == "infeasible" and trial.user_attrs["reason"] == reason
    assert [name for name in INFEASIBLE_REASONS if trial.constraints[name] > 0] == [reason]
    now = standing(study, 1)
    assert (now.best, now.baseline, now.infeasible) == (None, None, 1)
    # what was measured is kept, to be looked at
    result, kept = read_json(folder.result), read_score(folder.metrics)
    assert result is not None and kept.safety is not None
    assert (result["state"], result["reason"]) == ("infeasible", reason) and says in result["message"]
    assert result["amounts"] == kept.safety.amounts and result["amounts"][reason] > 0
    assert trial.constraints[reason] == result["amounts"][reason], "by how much, not only that"
    assert result["likeness"] == kept.likeness and result["se"] is None
    assert folder.lora.is_file() and folder.grid.is_file()
    assert any(says in line for line in view.lines) or view.results[0].reason == reason


# Among the checkpoints of a run


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_a_checkpoint_that_repeats_training_images_is_never_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("evaluation.score.safeguards.NEAR", 1e-3)  # a random base's pictures are much alike
    images = draw_images(tmp_path / "images" / "1_zkw figure", count=4)
    draw_images(tmp_path / "images" / "held_out", count=3, seed=2)
    study = JUDGING.replace("copy_rate = 1.0", "copy_rate = 0.05")
    (tmp_path / "sd15-character.toml").write_text(study)
    (tmp_path / "settings.toml").write_text(THREE_CHECKPOINTS)
    loud_base(tmp_path / "tiny", "sd15")
    words = ("--base", "tiny", "--data", "images", "--device", "cpu", "--output", "out")
    run("train", "settings.toml", *words)
    judged = ("evaluate", "out", "--clip", str(MINI_CLIP), "--device", "cpu")
    run(*judged)
    folder = tmp_path / "out" / "zkw.run" / "evaluation"
    before = json.loads((folder / "evaluation.json").read_text())
    assert not any(row["reason"] for row in before["search"]["checkpoints"])
    # the chosen one's pictures become training images, so that it is one that repeats them
    for number, picture in enumerate(
        sorted((folder / before["chosen"] / "search" / "samples").glob("*.png"))
    ):
        shutil.copy(picture, images / f"again_{number}.png")
        shutil.copy(images / "0.txt", images / f"again_{number}.txt")
    shutil.rmtree(folder)
    (tmp_path / "out" / "best.safetensors").unlink()
    said = run(*judged).output
    after = json.loads((folder / "evaluation.json").read_text())
    reasons = {row["checkpoint"]: row["reason"] for row in after["search"]["checkpoints"]}
    assert "are copies of a training image" in reasons.pop(before["chosen"])
    assert after["chosen"] in reasons and not any(reasons.values())
    assert "are copies of a training image" in said and (tmp_path / "out" / "best.safetensors").is_file()
    # the same images under a stricter limit: what is drawn already is judged again
    (tmp_path / "sd15-character.toml").write_text(study.replace("shown = -100.0", "shown = 1.0"))
    said = CliRunner().invoke(main, list(judged), catch_exceptions=False).output
    assert "the images show nothing" in said and "a lower learning_rate if their images show nothing" in said
