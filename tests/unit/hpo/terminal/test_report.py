"""The terminal: fits 80 columns, shows what was measured, and obeys no text from outside."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpo.search.dashboard import note_text
from hpo.search.summary import introduction, ratio_line, summary
from hpo.study.config import find_study, read_study
from hpo.study.folder import StudyFolder
from hpo.study.pace import Forecast, Pace
from hpo.study.result import Result, write_result
from hpo.study.standing import Standing
from hpo.terminal.following import command
from hpo.terminal.live import Current, LiveView, PlainView, live_block, make_view, study_line, trial_line
from hpo.terminal.text import clock, left, pace, short
from trainer.events import Step

FORECAST = Forecast(Pace(0.5, 1.0, 10.0), samples=80, images=32, trials_ahead=22, samples_ahead=96.0)
STANDING = Standing(30, 7, 1, 0, 1, (4, 0.61234, 0.02123), (0, 0.4, 0.03), FORECAST)
EMPTY = Standing(30, 0, 0, 0, 1, None, None)
SETTINGS = {
    "learning_rate": 1.3e-4, "text_encoder_lr": 6.5e-5, "network_dim": 128, "network_alpha": 96.0,
    "optimizer_type": "AdamW8bit", "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3,
    "lr_warmup_steps": 0.05, "gradient_accumulation_steps": 3, "max_train_epochs": 18, "min_snr_gamma": 5,
    "noise_offset": 0.0357, "network_dropout": 0.1,
}  # fmt: skip


def step(number: int = 63) -> Step:
    return Step(number, 1200, 1, 18, 0.0834, 1e-4, 5e-5, 0.3, 0.2)


def printed(what: Any, width: int = 80, terminal: bool = False) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width, force_terminal=terminal, color_system=None).print(what)
    return screen.getvalue()


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "number": 7, "state": "complete", "value": 0.53121, "se": 0.0213, "reason": "", "message": "",
        "config_sha256": "", "lora": "", "lora_sha256": "", "prompt_following": 0.9, "likeness": 0.3,
        "clip_t": 0.3, "clip_i": 0.7, "n_images": 32, "steps": 95, "skipped_steps": 0, "train_seconds": 10.0,
        "score_seconds": 4.0, "remedy": "", "time_utc": "",
    }  # fmt: skip
    return Result(**{**values, **changes})


def test_the_live_block_fits_eighty_columns_and_shows_everything() -> None:
    current = Current(7, SETTINGS, STANDING)
    current.on_event(step())
    text = printed(live_block("sd15-character-my-images", current))
    assert max(map(len, text.splitlines())) <= 80
    parts = ["trial 7", "8/30", "training", "63/1200", "5.0 steps/s", "loss 0.0834", "1.30e-4", "128"]
    parts += ["cosine_with_restarts", "trial 4", "0.6123 ± 0.0212", "0.4000", "left", "1 infeasible"]
    for part in parts:
        assert part in text, part


def test_the_live_block_cuts_no_setting_of_the_shipped_study() -> None:
    study = read_study(find_study(None, "sd15"))
    settings = study.space.settings(study.baseline, study.train) | {"lr_scheduler": "cosine_with_restarts"}
    settings |= {"gradient_accumulation_steps": 3, "lr_scheduler_num_cycles": 3}
    text = printed(live_block("x", Current(7, settings, EMPTY)))
    for name, value in settings.items():
        assert f"{name} " in text and short(value) in text, name
    assert "…" not in text.replace("preparing …", "") and max(map(len, text.splitlines())) <= 80
    wide = printed(live_block("x", Current(7, settings, EMPTY), width=160), width=160)
    assert len(wide.splitlines()) < len(text.splitlines())


def test_the_live_block_follows_the_images_too() -> None:
    current = Current(7, SETTINGS, EMPTY)
    current.on_image(8, 32)
    text = printed(live_block("x", current))
    assert "generating images" in text and "8/32 images" in text
    assert "known after the first trial" in text


def test_the_best_and_a_long_baseline_fit_80_columns() -> None:
    text = printed(live_block("x", Current(7, SETTINGS, STANDING), baseline="the transferred settings"))
    assert max(map(len, text.splitlines())) <= 80
    assert "\n  (trial 0, the transferred settings: 0.4000)" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_long_shows_at_a_terminal_that_it_goes_on(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    view = make_view(console, dict, "x")
    with view.waiting("the untrained mini-sdxl"):
        view.say("generating 38 images")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "generating 38 images\n" in text
    assert ("the untrained mini-sdxl" in text and "0:00:0" in text) == terminal


def test_the_live_block_says_that_it_is_stopping() -> None:
    assert "stopping after this step" in printed(live_block("x", Current(7, SETTINGS, EMPTY), stopping=True))


def test_time_left_is_the_rest_of_this_trial_and_the_trials_after_it() -> None:
    current, ahead = Current(7, SETTINGS, STANDING), 22 * (0.5 * 96 + 32 + 10)
    assert current.seconds_left() == pytest.approx(0.5 * 80 + 32 + 10 + ahead, abs=0.5)
    current.on_event(replace(step(20), total_steps=40))
    assert current.seconds_left() == pytest.approx(0.5 * 80 / 2 + 32 + 10 + ahead, abs=0.5)
    current.on_image(0, 32)
    assert current.seconds_left() == pytest.approx(32 + 10 + ahead, abs=0.5)
    current.on_image(24, 32)
    assert current.seconds_left() == pytest.approx(8 + 10 + ahead, abs=0.5)
    assert Current(7, SETTINGS, EMPTY).seconds_left() is None


def test_a_trial_slower_than_expected_is_not_over_before_its_images_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last trial of a study, ten times slower than those before it: something is left to the end."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    last = replace(FORECAST, trials_ahead=0)
    current = Current(29, SETTINGS, replace(STANDING, forecast=last))
    said = []
    for number in range(1, 41):
        now += 10.0
        current.on_event(replace(step(number), total_steps=40))
        said.append((current.seconds_left() or 0.0, left(current.seconds_left() or 0.0)))
    assert said[19][0] == pytest.approx(20 * 10 + 10 * 32 + 10)  # its own pace counts, for its images, too
    for number in (0, 8, 16, 24, 32):
        current.on_image(number, 32)
        now += 80.0
        said.append((current.seconds_left() or 0.0, left(current.seconds_left() or 0.0)))
    assert all(seconds > 0 and "about 0:" not in text for seconds, text in said)
    assert all(seconds > 5 * 8 for seconds, _ in said[:-2]), "minutes are left until the last images"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "a few seconds left"), (9.4, "a few seconds left"), (40, "less than a minute left"),
        (61, "about 1:01 left"), (7200, "about 2:00:00 left"),
    ],
)  # fmt: skip
def test_what_is_left_is_never_nothing(seconds: float, text: str) -> None:
    assert left(seconds) == text


def test_without_a_terminal_there_are_plain_lines_only() -> None:
    screen = io.StringIO()
    view = make_view(Console(file=screen, width=80), lambda suggested: suggested, "x")
    assert type(view) is PlainView
    with view:
        view.on_trial(7, SETTINGS, True, STANDING)
        view._last_line -= 60
        view.on_event(step())
        view.on_result(result(), STANDING)
    text = screen.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert "trial 7 (8/30), resumed: learning_rate 1.30e-4" in text
    assert "step 63/1200" in text
    assert text.splitlines()[-1] == "trial=7 state=complete score=0.5312 se=0.0213 best=4 seconds=14.0"


def test_on_a_terminal_finished_trials_scroll_above_the_block() -> None:
    screen = io.StringIO()
    view = make_view(Console(file=screen, width=80, force_terminal=True), lambda suggested: suggested, "x")
    assert isinstance(view, LiveView)
    with view:
        view.on_trial(7, SETTINGS, False, STANDING)
        view.on_event(step())
        view.on_result(result(), STANDING)
    assert "trial=7 state=complete" in screen.getvalue()


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "[bold]x[/x]", "a\nb", "‮evil", "[/]"])
def test_text_from_outside_is_shown_not_obeyed(text: str) -> None:
    screen = io.StringIO()
    view = PlainView(Console(file=screen, width=80, force_terminal=True), lambda suggested: suggested)
    view.on_trial(1, {"name": text}, False, STANDING)
    view.on_result(result(state="failed", value=None, se=None, reason=text, message=text), STANDING)
    shown = screen.getvalue()
    assert "\x1b]" not in shown and "‮" not in shown
    assert len(shown.splitlines()) == 3
    if text.startswith("["):
        assert text in shown
    printed(live_block(text, Current(1, {text: text}, STANDING)))


def test_a_trial_without_a_score_says_why() -> None:
    line = trial_line(result(state="infeasible", value=-0.1, se=None, reason="diverged"), STANDING)
    assert line == "trial=7 state=infeasible reason=diverged best=4 seconds=14.0"


def test_the_last_line_of_a_search_is_for_scripts() -> None:
    line = study_line("x", STANDING)
    assert (
        line
        == "study=x complete=7/30 infeasible=1 failed=0 best=4 search_score=0.6123 se=0.0212 baseline=0.4000"
    )
    assert study_line("x", EMPTY) == "study=x complete=0/30 infeasible=0 failed=0"


def test_the_end_names_files_next_command_and_that_a_search_score_is_no_result(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "x")
    folder.trial(4).root.mkdir(parents=True)
    folder.trial(4).lora.write_bytes(b"")
    text = "\n".join(summary(folder, STANDING, SETTINGS, "30 trials are done"))
    parts = ["best: trial 4", "0.6123 ± 0.0212", "0.4000 ± 0.0300", "untrained base: 0.0000", "optimistic"]
    for part in [
        *parts,
        str(folder.trial(4).lora),
        "grid.png",
        "metrics.json",
        "search score: 0.6123 ± 0.0212, confirm with: hpo confirm x --runs",
        "not a\n  final result yet",
        "next: hpo confirm x --runs",
    ]:
        assert part in text, part
    assert not [line for line in text.splitlines() if len(line) > 80 and str(tmp_path) not in line]


CONFIRMED = {"how": "retrained", "winner": 4, "score": 0.571, "interval": [0.52, 0.62], "beats_trial0": True,
             "rows": [{"number": 4}, {"number": 0}], "infeasible": {"2": "diverged"}}  # fmt: skip


def test_the_end_of_a_confirmed_search_says_its_result(tmp_path: Path) -> None:
    """The search's command once more, after hpo confirm."""
    folder = StudyFolder(tmp_path / "x")
    folder.root.mkdir()
    folder.facts.write_text(json.dumps({"base": "mini-sd15"}))
    folder.confirmed.write_text(json.dumps(CONFIRMED))
    text = "\n".join(summary(folder, STANDING, SETTINGS, "30 trials are done"))
    assert "confirmed (retrained): trial 4, score 0.5710 (95 % 0.5200 … 0.6200)" in text
    assert (
        "final result yet" not in text
        and "hpo confirm" not in text
        and f"next: hpo transfer {folder.words} --to mini-sdxl" in text
    )
    newer = "\n".join(summary(folder, replace(STANDING, best=(9, 0.7, 0.02)), SETTINGS, "40 trials are done"))
    assert "score 0.5710" in newer and "Trial 9 has a better search score" in newer
    assert "not a final result yet" in newer and "next: hpo confirm x" in newer
    folder.confirmed.write_text("{}")
    assert "next: hpo confirm x" in "\n".join(summary(folder, STANDING, SETTINGS, "30 trials are done"))


BESIDE = [
    {"measure": "clip_t", "model": "ViT-L-14-quickgelu:openai", "value": 0.27134},
    {"measure": "clip_i", "model": "ViT-L-14-quickgelu:openai", "value": 0.71},
    {"measure": "dino_i", "model": "facebook/dinov2-small\x1b[31m", "value": 0.5},
]


def test_figures_beside_the_score_are_shown_with_their_models(tmp_path: Path) -> None:
    clip = "CLIP-T 0.2713 (× 100 is comparable to torchmetrics), CLIP-I 0.7100 by ViT-L-14-quickgelu:openai"
    dino = "DINO-I 0.5000 by facebook/dinov2-small[31m"
    folder = StudyFolder(tmp_path / "x")
    folder.trial(4).root.mkdir(parents=True)
    write_result(folder.trial(4), result(number=4, beside=BESIDE))
    text = summary(folder, STANDING, SETTINGS, "30 trials are done")
    assert f"  extra metrics: {clip}" in text and f"  extra metrics: {dino}" in text
    note = note_text(result(beside=BESIDE), SETTINGS, None)
    assert f"extra metrics: {clip}" in note and "dinov2-small\\[31m" in note
    assert "beside" not in note_text(result(), SETTINGS, None)
    folder.trial(4).result.write_text('{"beside": [{"measure": 1}]}')
    assert not any("extra metrics" in line for line in summary(folder, STANDING, SETTINGS, ""))


def test_the_end_names_the_usual_settings_trial_or_what_became_of_it(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "x")
    again = replace(STANDING, baseline=(3, 0.4, 0.03))
    assert any("usual settings (trial 3): 0.4000" in line for line in summary(folder, again, SETTINGS, ""))
    trouble = replace(STANDING, baseline=None, baseline_trouble="infeasible: diverged (trial 0)")
    assert any(
        "usual settings: infeasible: diverged" in line for line in summary(folder, trouble, SETTINGS, "")
    )


def test_duplicates_are_counted_apart_and_a_folders_name_is_shown_not_obeyed() -> None:
    line = study_line("x\x1b[31m", replace(EMPTY, duplicates=20))
    assert line == "study=x[31m complete=0/30 infeasible=0 failed=0 duplicates=20"


def test_the_end_of_a_search_without_any_score_says_so(tmp_path: Path) -> None:
    assert "no trial has a score yet" in "\n".join(summary(StudyFolder(tmp_path), EMPTY, None, "over"))


def test_the_introduction_fits_eighty_columns() -> None:
    text = printed(introduction(read_study(find_study(None, "sd15")), 30))
    assert max(map(len, text.splitlines())) <= 80
    assert "learning_rate" in text and "network_dropout" in text
    assert ratio_line(12, 30) == "12 settings, 30 trials: 2.5 trials for each searched setting"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65, "1:05"), (7209, "2:00:09"), (-5, "0:00"), (59.6, "1:00")]
)
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.3e-4, "1.30e-4"), (0.5, "0.5"), (96.0, "96"), (3, "3"), ("a\x1bb", "ab"), (0.0, "0")],
)
def test_settings_are_shown_short(value: Any, text: str) -> None:
    assert short(value) == text


def test_a_slow_step_is_told_in_seconds_and_nothing_as_step_0_of_0() -> None:
    assert Current(7, SETTINGS, STANDING).progress_text() == "preparing …"
    assert [pace(2.54), pace(1.0), pace(0.25), pace(0.012)] == [
        "2.5 steps/s",
        "1.0 steps/s",
        "4.0 s/step",
        "83.3 s/step",
    ]


def test_values_are_shown_in_one_form() -> None:
    assert [short(v) for v in (True, 1.31e-3, 1e-3, 0.5, "AdamW")] == [
        "true",
        "1.31e-3",
        "1.00e-3",
        "0.5",
        "AdamW",
    ]


def test_a_command_shows_paths_inside_the_current_folder_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("hpo", "train", tmp_path / "runs" / "a.toml") == "hpo train runs/a.toml"
    assert command("hpo", "train", tmp_path.parent / "a.toml") == f"hpo train {tmp_path.parent / 'a.toml'}"


def test_a_repeat_says_which_trial_it_repeats() -> None:
    console = Console(file=io.StringIO(), width=80)
    view = PlainView(console, dict)
    view.ranks = False
    view.on_trial(1, {"repeats": "trial 6", "training seed": 118}, False, EMPTY)
    view.on_result(result(), EMPTY)
    assert console.file.getvalue().splitlines()[-1].endswith(" repeats=trial_6 training_seed=118")  # type: ignore[attr-defined]
