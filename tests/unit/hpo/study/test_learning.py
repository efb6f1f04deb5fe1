"""Nothing learned: when it is said, why, and what to change.  Studies are real databases with a trial's real files."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
import pytest

from evaluation.score.statistics import above_zero, prompt_draws
from hpo.cli.options import PATH, Renamed
from hpo.cli.studies import search
from hpo.search.summary import summary
from hpo.study.changes import LEARNED_CHANGE
from hpo.study.config import StudyConfig, build_study
from hpo.study.folder import StudyFolder
from hpo.study.learning import (
    NothingLearned,
    early_note,
    learning_lines,
    nothing_learned,
    require_learned,
)
from hpo.study.nextsearch import FLAGS, LEFT_OUT, NAMES_OR_PATHS, PATHS, RENAMED
from hpo.study.standing import standing
from hpo.study.storage import create_study, open_study
from tests import ranking
from tests.tiny_search import tiny_study
from trainer.errors import ConfigError

IMAGES_PER_EPOCH = 80
BASELINE = {
    "learning_rate": 1e-3,
    "text_encoder_lr": 5e-4,
    "network_dim": 2,
    "network_alpha": 2,
    "max_train_epochs": 2,
}


def study(base: str = "sd15") -> StudyConfig:
    space = {"text_encoder_lr_ratio": {"low": 0.1, "high": 1.0}}
    return tiny_study({"space": space, "baseline": BASELINE})


def trial(likeness: float = 0.0, **values: Any) -> dict[str, Any]:
    """A finished trial that drew what the untrained base draws."""
    usual = {
        "likeness": likeness, "likeness_se": 0.02, "following": 1.0, "following_se": 0.02, "reason": "", "epochs": 2,
        "rate": 1e-3, "change": 0.03, "skipped": 0, "losses": [0.2, 0.1] * 15,
    }  # fmt: skip
    return {**usual, **values}


def made(
    root: Path, *trials: dict[str, Any], base: str = "sd15", definition: StudyConfig | None = None
) -> StudyFolder:
    """A study with these trials, as a search leaves it."""
    folder, definition = StudyFolder(root), definition or study()
    folder.locks.mkdir(parents=True)
    stored = create_study(folder, {"seed": "7"}, ("score",))
    facts = {"definition": "tiny", "sections": dict(definition.sections), "base": base}
    folder.facts.write_text(json.dumps(facts))
    for number, of in enumerate(trials):
        files, seen = folder.trial(number), of["epochs"] * IMAGES_PER_EPOCH
        files.root.mkdir()
        batch = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
        train = {
            "learning_rate": of["rate"],
            "max_train_epochs": of["epochs"],
            "max_train_steps": None,
            **batch,
        }
        files.params.write_text(json.dumps({"train": train}))
        result = {"steps": seen // 8, "skipped_steps": of["skipped"], "weight_change": of["change"]}
        files.result.write_text(json.dumps({k: v for k, v in result.items() if v is not None}))
        rows = [{"event": "step", "step": n, "loss": loss} for n, loss in enumerate(of["losses"], 1)]
        files.steps.write_text("".join(json.dumps(row) + "\n" for row in rows))
        attributes: dict[str, Any] = (
            {"reason": of["reason"]} if of["reason"] else {"likeness": of["likeness"]}
        )
        if not of["reason"]:
            metrics = {"likeness": of["likeness"], "likeness_se": of["likeness_se"]}
            metrics |= {"prompt_following": of["following"], "prompt_following_se": of["following_se"]}
            files.metrics.write_text(json.dumps(metrics))
        value = -0.1 if of["reason"] else max(0.0, of["likeness"])
        frozen = optuna.trial.create_trial(value=value, user_attrs=attributes)
        if of["reason"]:
            frozen.set_constraint(of["reason"], 1.0)
        stored.add_trial(frozen)
    return folder


def state(folder: StudyFolder) -> NothingLearned | None:
    return nothing_learned(open_study(folder), folder)


def changed(found: NothingLearned, definition: StudyConfig | None = None) -> StudyConfig:
    """The study with what is advised, read from the words as a shell would read them."""
    words = shlex.split(found.advice.partition("hpo search NAME … ")[2])
    assert words[::2] == ["--set"] * len(found.changes) and words[1::2] == list(found.changes)
    return build_study("tiny", (definition or study()).sections, sets=words[1::2])


def test_it_is_said_after_five_trials_and_not_before(tmp_path: Path) -> None:
    assert state(made(tmp_path / "four", *[trial()] * 4)) is None
    found = state(made(tmp_path / "five", *[trial()] * 4, trial(-0.018)))
    assert found is not None and found.trials == 5
    assert "none of 5 trials is better than the untrained base" in found.headline


def test_one_trial_above_the_noise_is_enough_and_the_best_of_many_needs_more(tmp_path: Path) -> None:
    z = 2.5  # standard errors: enough for the best of 5 (2.33), not for the best of 13 (2.66)
    better = trial(z * 0.02)
    assert state(made(tmp_path / "five", *[trial()] * 4, better)) is None
    assert state(made(tmp_path / "thirteen", *[trial()] * 12, better)) is not None
    lost = trial(0.5, following=0.05, following_se=0.1)
    assert state(made(tmp_path / "lost", *[trial()] * 4, lost)) is not None, "prompts are not followed"
    copied = trial(0.9, reason="copied")
    assert state(made(tmp_path / "copied", *[trial()] * 4, copied)) is not None, (
        "an infeasible trial is no use"
    )


def test_the_recorded_trials_that_learned_something_are_told_from_the_others() -> None:
    """The ground truth is in the images: the untrained base draws less than a tenth of the figure's parts."""
    recorded = ranking.read()
    for one in recorded.trials:
        draws = one.parts(prompt_draws(len(one.prompts.texts)))
        (following,), (alike,) = one.parts()
        parts = [
            (float(v), float(np.nanstd(k, ddof=1))) for v, k in zip((following, alike), draws, strict=True)
        ]
        if above_zero(parts, among=len(recorded.trials)):
            assert one.graded > 0.1, one.name
        else:
            assert one.graded < 0.1 or following < 0.3, one.name
    assert len(recorded.trials) == 30


def test_too_few_images_are_named_with_the_length_that_is_needed(tmp_path: Path) -> None:
    found = state(made(tmp_path / "few", *(trial(-0.083 + 0.01 * n, epochs=1 + n % 2) for n in range(6))))
    assert found is not None
    assert found.causes == (
        "too few images seen: 10–20 updates a trial, 80–160 images; subjects usually need 1,000+ images seen",
    )
    longer = {p.name: p.domain for p in changed(found).space}["max_train_epochs"]
    assert min(longer.edges) * IMAGES_PER_EPOCH >= 1000 > (min(longer.edges) - 1) * IMAGES_PER_EPOCH
    assert state(made(tmp_path / "mini", *[trial(epochs=3)] * 5, base="mini-sd15")).causes != found.causes  # type: ignore[union-attr]


def test_a_rate_too_low_shows_in_the_weights_and_the_loss(tmp_path: Path) -> None:
    flat = [0.2 + 0.01 * math.sin(n) for n in range(30)]
    found = state(made(tmp_path / "low", *[trial(0.001, epochs=20, change=2e-4, losses=flat)] * 5))
    assert found is not None
    words = "learning rate too low: 5 trials hardly changed the weights (by at most 0.02 %) or the loss"
    assert found.causes == (words,)
    after, before = changed(found), study()
    assert after.config(after.baseline).learning_rate > before.config(before.baseline).learning_rate
    rates = {p.name: p.domain for p in after.space}["learning_rate"]
    assert rates.edges == pytest.approx((1e-3, 1.0))
    nothing = state(made(tmp_path / "no-effect", *[trial(reason="no_effect", epochs=20, change=None)] * 5))
    assert nothing is not None and nothing.causes[0].startswith("learning rate too low")


def test_a_rate_far_too_low_is_raised_until_the_weights_would_change(tmp_path: Path) -> None:
    """Ten times as much would be as flat again."""
    low = [
        "learning_rate={low=1e-7, high=1e-6, log=true}",
        "baseline.learning_rate=1e-7",
        "baseline.text_encoder_lr=5e-8",
    ]
    flat = build_study("tiny", study().sections, sets=low)
    trials = [trial(epochs=20, change=rate * 50, rate=rate) for rate in (1e-7, 2e-7, 3e-7, 5e-7, 9e-7)]
    found = state(made(tmp_path / "flat", *trials, definition=flat))
    assert found is not None
    rates = {p.name: p.domain for p in changed(found, flat).space}["learning_rate"].edges
    assert rates[0] * 50 < LEARNED_CHANGE < rates[1] * 50 and rates[1] == pytest.approx(
        10 * rates[0], rel=0.1
    )


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ({"reason": "diverged", "change": None}, "infeasible (diverged)"),
        ({"losses": [0.1] * 15 + [0.4] * 15}, "the loss rises"),
        ({"skipped": 30}, "steps are skipped because of NaN"),
        ({"following": -0.7}, "prompts are no longer followed"),
    ],
)
def test_a_rate_too_high_shows_in_what_breaks(tmp_path: Path, sign: dict[str, Any], words: str) -> None:
    broken = trial(-0.3, **{"epochs": 20, "change": 0.6, **sign})
    found = state(made(tmp_path / "high", *[broken] * 4, trial(epochs=20)))
    assert found is not None and found.causes == (f"learning rate too high: 4 trials broken: {words}",)
    rates = {p.name: p.domain for p in changed(found).space}["learning_rate"]
    assert rates.edges == pytest.approx((1e-5, 1e-2))


def test_between_rates_that_are_too_low_and_too_high_the_range_is_narrowed(tmp_path: Path) -> None:
    low = [trial(epochs=20, change=1e-4, rate=rate) for rate in (1e-4, 2e-4, 4e-4)]
    high = [trial(-0.1, epochs=20, change=0.5, following=-0.5, rate=rate) for rate in (3e-2, 2e-2)]
    found = state(made(tmp_path / "both", *low, *high))
    assert found is not None and found.causes[0].startswith("learning rates from too low to too high")
    rates = {p.name: p.domain for p in changed(found).space}["learning_rate"]
    assert rates.edges == pytest.approx((4e-4, 2e-2))


def test_where_neither_length_nor_rate_is_the_cause_the_data_is(tmp_path: Path) -> None:
    found = state(made(tmp_path / "data", *[trial(epochs=20)] * 5))
    assert found is not None and "captions" in found.causes[0] and "hpo dataset check" in found.advice


def test_a_fixed_length_and_rate_are_changed_as_fixed_values(tmp_path: Path) -> None:
    fixed = build_study("tiny", study().sections, sets=["max_train_epochs=2", "learning_rate=1e-6"])
    found = state(made(tmp_path / "fixed", *[trial(change=1e-5, rate=1e-6)] * 5, definition=fixed))
    assert found is not None and found.changes[:2] == ("max_train_epochs=13", "learning_rate=0.003")
    assert changed(found, fixed).train.max_train_epochs == 13


def test_files_of_older_versions_and_edited_ones_are_read(tmp_path: Path) -> None:
    old = made(tmp_path / "old", *[trial(change=None)] * 5)
    facts = json.loads(old.facts.read_text())
    old.facts.write_text(json.dumps({"base": facts["base"]}))  # a definition was not always stored
    found = state(old)
    assert found is not None and found.changes == () and "longer trials" in found.advice
    for number in range(5):
        old.trial(number).metrics.write_text("{}")
    assert state(old) is None, "nothing is known without the trials' files"


def test_what_is_unknown_is_not_taken_for_nothing_learned(tmp_path: Path) -> None:
    folder = made(tmp_path / "s", *[trial(0.5)] * 6, trial(reason="diverged"))
    for number in range(6):
        folder.trial(number).metrics.unlink()
    assert state(folder) is None
    require_learned(open_study(folder), folder, "confirm", anyway=False)
    one = made(tmp_path / "one", *[trial()] * 5, trial(0.5))
    one.trial(5).metrics.unlink()
    assert state(one) is None, "the missing one may be the one that learned"


def test_confirm_and_transfer_refuse_unless_asked(tmp_path: Path) -> None:
    folder = made(tmp_path / "s", *[trial()] * 5)
    stored = open_study(folder)
    with pytest.raises(ConfigError, match="nothing learned: none of 5 trials") as refused:
        require_learned(stored, folder, "confirm", anyway=False)
    assert "--anyway" in refused.value.hint and "max_train_epochs" in refused.value.hint
    require_learned(stored, folder, "confirm", anyway=True)
    assert learning_lines(stored, folder)[1].startswith("  likely cause: too few images seen")


def searched(folder: StudyFolder, words: list[str], cwd: Path) -> None:
    """Record a finished search, as the command line does."""
    row = {
        "id": "1",
        "event": "started",
        "step": "search",
        "words": words,
        "cwd": str(cwd),
        "time_utc": "2026",
    }
    rows = (row, {**row, "event": "finished"})
    (folder.root / "work.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.mark.parametrize(
    "words",
    [
        ["search", "luca", "--base", "sd15", "--data", "luca"],
        ["search", "--base", "sd15", "--data=luca", "--stop-when-converged", "runs/luca"],
        ["search", "--base", "sd15", "--name", "luca", "--data", "luca"],
        ["search", "--name=luca", "--base", "sd15", "--data", "luca"],
    ],
)
def test_the_next_search_is_the_recorded_one_under_a_new_name(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "luca-2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = made(Path("runs/luca"), *[trial()] * 5)
    searched(folder, words, tmp_path)
    found = state(folder)
    assert found is not None
    assert found.lines()[-2:] == ["  what to do: search again under another name:", f"  {found.command}"]
    with pytest.raises(ConfigError) as refused:
        require_learned(open_study(folder), folder, "confirm", anyway=False)
    assert refused.value.commands == (found.command,) and "--anyway" in refused.value.hint
    again = shlex.split(found.command)
    assert again[:3] == ["hpo", "search", "luca-3"] and "--base" in again
    assert sum("luca" in word for word in again) == 2, "the name is replaced, the folder of images is not"
    assert again[-4:] == ["--set", found.changes[0], "--set", found.changes[1]]
    said = summary(folder, standing(open_study(folder), 5), {}, "5 trials are done", found)
    assert said[-1] == f"next: {found.command}" and not any("hpo confirm" in line for line in said)


def test_the_next_search_can_be_pasted_in_another_folder_and_takes_no_enqueued_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "runs").mkdir(parents=True)
    (there / "models").mkdir()
    here.mkdir()
    for name in ("mine.toml", "models/sd.safetensors", "models/clip.pt"):
        (there / name).write_text("")
    words = [
        "search", "runs/luca", "--base", "models/sd.safetensors", "--data=images", "--study", "mine",
        "--clip", "ViT-B-32:models/clip.pt", "--enqueue", "old.toml", "--enqueue=old.toml", "--runs", "elsewhere",
        "--references", str(tmp_path), "--set", "network_dim=4", "--notify-on=best",
    ]  # fmt: skip
    folder = made(there / "runs" / "luca", *[trial()] * 5)
    searched(folder, words, there)
    monkeypatch.chdir(here)
    found = state(folder)
    assert found is not None
    sets = [word for change in found.changes for word in ("--set", change)]
    assert shlex.split(found.command) == [
        "hpo", "search", "luca-2", "--runs", str(there / "runs"), "--base", str(there / "models/sd.safetensors"),
        "--data", str(there / "images"), "--definition", str(there / "mine.toml"),
        "--clip", f"ViT-B-32:{there / 'models/clip.pt'}", "--references", str(tmp_path),
        "--set", "network_dim=4", "--notify-on", "best", *sets,
    ]  # fmt: skip
    searched(
        folder, ["search", "--base", "sd15", "--set", "max_train_epochs=1", "--set=network_dim=4"], there
    )
    found = state(folder)
    assert found is not None and "network_dim=4" in found.command
    assert " max_train_epochs=1 " not in found.command, "what is changed is not set twice"
    searched(
        folder, ["search", "--base", "mini-sd15", "--definition", "sd15", "--clip", "ViT-B-32:openai"], there
    )
    (there / "mini-sd15").mkdir()
    found = state(folder)
    assert found is not None and "--base mini-sd15 --definition sd15 --clip ViT-B-32:openai" in found.command


def test_the_options_of_a_search_are_known_where_its_command_is_repeated() -> None:
    options = [param for param in search.params if isinstance(param, click.Option)]
    assert {name for one in options if one.is_flag or one.count for name in one.opts} == set(FLAGS)
    paths = {name for one in options if one.type is PATH for name in one.opts}
    assert paths == {*PATHS, "--enqueue", "--runs"}
    assert all(name.startswith("--") for one in options for name in one.opts), (
        "a short option is not understood"
    )
    known = {name for one in options for name in one.opts}
    assert {*NAMES_OR_PATHS, *LEFT_OUT} - {"--name"} <= known
    assert isinstance(search, Renamed) and search.renamed == {**RENAMED, "--name": ""}


def test_before_five_trials_one_sentence_says_that_nothing_is_above_the_noise(tmp_path: Path) -> None:
    few = made(tmp_path / "few", trial(0.014), trial(0.036))
    note = early_note(open_study(few), few)
    assert "best likeness 0.036 ± 0.020" in note and not learning_lines(open_study(few), few)
    good = made(tmp_path / "good", trial(0.014), trial(0.5))
    five = made(tmp_path / "five", *[trial(0.01)] * 5)
    assert early_note(open_study(good), good) == "" and early_note(open_study(five), five) == ""
