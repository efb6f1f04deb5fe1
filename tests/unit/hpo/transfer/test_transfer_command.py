"""hpo transfer: the choice of study and trial, the table, the files, and probes as a separate study."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from hpo.cli.main import main
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import write_definition
from hpo.study.config import build_study
from hpo.study.firstsettings import FIRST
from hpo.study.folder import StudyFolder
from hpo.study.standing import BASELINE, ROLE
from hpo.study.storage import create_study, open_study
from hpo.study.unchanged import check_unchanged
from hpo.transfer.command import TransferRequest
from hpo.transfer.mapping import Transfer, make, with_decision
from hpo.transfer.plan import PLANNER, SettingMove, derive, normalised, snap_down
from hpo.transfer.probes.candidates import Candidates
from hpo.transfer.probes.design import Ladder, Probe, ProbeScore
from hpo.transfer.probes.findings import agree
from hpo.transfer.probes.run import Probing, identity, judged_as, probe_folder
from hpo.transfer.probes.side import MOST_OCTAVES, ShortRuns, make_side, octave_bounds
from hpo.transfer.probes.study import probe_by_probe
from hpo.transfer.profile import ProfileLimits, read_family, read_profile
from hpo.transfer.rules import revised
from hpo.transfer.source import find_source, read_source
from tests.tiny_search import Recorder, draw_images, make_search, tiny_bench, tiny_study
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Interrupted, StudyStopped
from trainer.kohya.trainfile import read_train_file

QUICK = {"train": {"text_encoder_lr": 5e-4}, "space": {"max_train_epochs": {"low": 1, "high": 2}}}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with a search of three trials whose stored base is mini-sd15."""
    root = tmp_path_factory.mktemp("transfer")
    data = draw_images(root / "10_zkw figure")
    bench = tiny_bench(root / "runs" / "s", data, tiny_study(QUICK))
    bench = dataclasses.replace(bench, base_spec="mini-sd15")
    make_search(bench, SearchLimits(trials=3)).run()
    write_definition(bench, bench.facts())
    return root / "runs"


def call(runs: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["transfer", "--to", "mini-sdxl", "--runs", str(runs), *words])


def transferred(runs: Path) -> Transfer:
    family = read_family("mini-sdxl")
    return make(read_source(find_source("s", runs, family)), read_profile("mini-sdxl"), None)


def test_the_last_study_is_taken_and_said_and_the_files_are_written(searched: Path) -> None:
    result = call(searched)
    assert result.exit_code == 0, result.output
    assert "study s, the one last worked on" in result.stderr and "unconfirmed" in result.output
    for word in ("resolution", "res.native", "batch.micro", "effective batch", "kept:"):
        assert word in result.output
    place = searched / "s" / "transfer"
    assert {p.name for p in place.iterdir()} == {"mini-sdxl.toml", "plan.md", "kohya-mini-sdxl"}
    assert {p.name for p in (place / "kohya-mini-sdxl").iterdir()} == {
        "config.toml",
        "dataset.toml",
        "train.sh",
    }
    lines = (place / "kohya-mini-sdxl" / "train.sh").read_text().splitlines()
    assert lines[0] == "#!/bin/sh" and lines[1].startswith("# ") and len(lines) == 3
    assert lines[2].startswith("accelerate launch ") and "sdxl_train_network.py" in lines[2]
    assert "| resolution | 32 | 128 | res.native |" in (place / "plan.md").read_text()


def test_the_table_is_readable_at_80_columns(searched: Path) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(
        main, ["transfer", "--to", "mini-sdxl", "--runs", str(searched), "s"]
    )
    table = result.output.split("setting", 1)[1].split("kept:")[0].splitlines()
    assert max(map(len, table)) <= 80


def test_the_file_means_what_the_plan_says_and_hpo_train_accepts_it(searched: Path) -> None:
    assert call(searched).exit_code == 0
    file = searched / "s" / "transfer" / "mini-sdxl.toml"
    plan = transferred(searched).plan
    assert read_train_file(file).config == plan.config
    text = file.read_text()
    assert all(f"  {move.rule}: " in text for move in plan.moves)
    result = CliRunner().invoke(main, ["train", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "bucket_reso: only used with" not in result.output, "the user wrote none of it"
    pair = searched / "s" / "transfer" / "kohya-mini-sdxl"
    kohya = read_train_file(pair / "config.toml", dataset=pair / "dataset.toml").config
    for name in ("learning_rate", "network_dim", "network_alpha", "train_batch_size", "max_train_epochs"):
        assert getattr(kohya, name) == getattr(plan.config, name)


def test_the_best_trial_counts_until_a_winner_is_confirmed(searched: Path, tmp_path: Path) -> None:
    folder = StudyFolder(searched / "s")
    source = read_source(folder)
    assert source.best.score == max(t.score for t in source.trials) and not source.confirmed
    other = next(t.number for t in source.trials if t.number != source.best.number)
    confirmed = folder.root / "confirmed.json"
    confirmed.write_text(json.dumps({"winner": other, "ties": [source.best.number]}))
    try:
        now = read_source(folder)
        assert now.best.number == other and now.confirmed and "confirmed winner" in now.says
        assert [c.number for c in now.others] == [source.best.number]
    finally:
        confirmed.unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("x",), "no study x"),
        (("--preset", "balance"), "balanced"),
        (("--profile", "sdxl-16gb"), "is for sdxl"),
        (("--profile", "absent.toml"), "cannot read"),
        (("--trials", "2"), "too few for a decision"),
    ],
)
def test_a_mistake_is_two_lines_and_nothing_is_lost(
    searched: Path, words: tuple[str, ...], message: str
) -> None:
    result = call(searched, *words)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_miniature_settings_are_not_carried_to_the_real_family(searched: Path) -> None:
    result = CliRunner().invoke(main, ["transfer", "--to", "sdxl", "--runs", str(searched), "s"])
    assert result.exit_code == 2 and "--to mini-sdxl" in result.output
    result = CliRunner().invoke(main, ["transfer", "--to", "sdx", "--runs", str(searched)])
    assert result.exit_code == 2 and "sdxl" in result.output


def test_the_old_name_of_trials_works_and_says_so(searched: Path) -> None:
    result = call(searched, "--probes", "0")
    assert result.exit_code == 0 and result.stderr.startswith("note: --probes is now --trials")
    assert "--probes" not in call(searched, "--trials", "0").stderr


def test_a_refused_plan_writes_nothing(searched: Path, tmp_path: Path) -> None:
    hot = tmp_path / "hot.toml"
    hot.write_text('family = "mini-sdxl"\n[limits]\nnormalised_refuse = 1e-9\n')
    file = searched / "s" / "transfer" / "mini-sdxl.toml"
    before = file.read_text() if file.exists() else None
    result = call(searched, "--profile", str(hot))
    assert result.exit_code == 2 and "refused" in result.output
    assert (file.read_text() if file.exists() else None) == before


def test_a_decision_of_probes_is_a_move_like_any_other(searched: Path) -> None:
    done = transferred(searched)
    plan = with_decision(done, {"learning_rate": 2e-3}, "it gains")
    assert plan.config.learning_rate == 2e-3 and plan.moves[-1].rule == "target trials"
    assert with_decision(done, {}, "kept").config == done.plan.config


def test_figures_and_remarks_follow_a_decision(searched: Path) -> None:
    done = transferred(searched)
    own = done.plan.config.learning_rate
    hot = dataclasses.replace(done.profile.limits, normalised_refuse=normalised(own, 1.0))
    done = dataclasses.replace(done, profile=dataclasses.replace(done.profile, limits=hot))
    plan = with_decision(done, {"learning_rate": 2 * own, "network_alpha": 1.0}, "it gains")
    assert plan.derived == derive(plan.source, plan.config, plan.figures, done.profile) != done.plan.derived
    assert [f.about for f in plan.of_level("refuse")] == ["learning_rate"]
    off = with_decision(done, {"text_encoder_lr": 0.0, "network_train_unet_only": True}, "it gains")
    assert not [f for f in off.findings if f.about == "text_encoder_lr"]


def test_a_candidate_is_computed_as_the_planner_wants_the_transferred_settings(searched: Path) -> None:
    done = transferred(searched)
    changed = done.plan.config.with_values({"gradient_checkpointing": True, "network_train_unet_only": True})
    move = SettingMove("gradient_checkpointing", False, True, PLANNER, "it would not fit")
    plan = revised(done.plan, changed, (move,), done.profile)
    done = dataclasses.replace(done, plan=plan)
    candidates = Candidates(done)
    mapped = candidates.mapped(done.source.best)
    assert mapped.gradient_checkpointing and not mapped.network_train_unet_only
    on = candidates.text_encoders_on()
    assert on.trains_text_encoder and on.text_encoder_lr == snap_down(0.67 * plan.config.learning_rate)


def test_a_design_without_probes_is_said_to_mean_nothing(searched: Path) -> None:
    result = call(searched, "--design", "grid")
    assert result.exit_code == 2 and "--trials 6" in result.output


def test_probed_rates_stay_below_what_the_rules_refuse() -> None:
    config = TrainConfig(learning_rate=1e-4, network_dim=16, network_alpha=16)
    limits = ProfileLimits(0.0, 1e-2, normalised_refuse=2e-4)
    assert octave_bounds(config, limits) == (-MOST_OCTAVES, pytest.approx(1.0))
    assert octave_bounds(config.with_values({"learning_rate": 1e-3}), limits) == (pytest.approx(-4), 0.0)
    lion = config.with_values({"optimizer_type": "Lion8bit"})
    assert octave_bounds(lion, limits) == (-MOST_OCTAVES, MOST_OCTAVES)


# Probes


def side_of(bench_study: Any, data: Path, budget: int = 4) -> Any:
    own = TrainConfig(
        learning_rate=1e-2,
        text_encoder_lr=5e-3,
        network_dim=2,
        network_alpha=2,
        resolution=32,
        min_bucket_reso=32,
        bucket_reso_steps=32,
        optimizer_type="AdamW",
        max_train_epochs=4,
        train_batch_size=4,
        train_data_dir=str(data),
    )
    whole = {"transferred": own, "default": own.with_values({"learning_rate": 1e-3, "network_dim": 1})}
    bounds = octave_bounds(own, ProfileLimits(1e-6, 1e-1))
    runs = ShortRuns(samples=8, sampling={"steps": 2, "cfg": 1.0}, seed=7, words="natural")
    return make_side("s__tiny", whole, runs, budget, bounds)


def begin(root: Path, data: Path) -> tuple[Any, Any, Any]:
    side = side_of(None, data)
    bench = tiny_bench(root, data, side.study)
    bench.folder.locks.mkdir(parents=True, exist_ok=True)
    study = create_study(bench.folder, bench.facts())
    bench.measure_anchors(lambda text: None)
    return side, bench, study


def test_short_runs_are_the_beginning_of_whole_ones() -> None:
    side = side_of(None, Path("/images"))
    own, default = side.short["transferred"], side.short["default"]
    assert own.max_train_steps == default.max_train_steps == 2  # a quarter of 4 × 2 updates
    assert own.lr_scheduler == "constant_with_warmup"
    low, high = side.proposal(Probe(octaves=-1)), side.proposal(Probe(octaves=1))
    assert (low["learning_rate"], high["learning_rate"]) == (5e-3, 2e-2)
    assert (low["text_encoder_lr"], high["text_encoder_lr"]) == (2.5e-3, 1e-2)  # the ratio is kept
    assert side.proposal(Probe(text_encoder=False))["text_encoder_lr"] == 0.0
    assert side.proposal(Probe("default"))["network_dim"] == 1


def test_probes_are_an_ordinary_study_that_goes_on_after_a_stop(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "data")
    side, bench, study = begin(tmp_path / "s__tiny", data)

    def choose(found: list[ProbeScore]) -> Probe | None:
        return Ladder().next(found, side.scope)

    view = Recorder()

    def stop_in_the_second(event: Any) -> None:
        view.stop = len(view.started) == 2

    view.event_hook = stop_in_the_second
    with pytest.raises(Interrupted):
        probe_by_probe(study, bench, side, choose, view)
    again = Recorder()
    outcomes = probe_by_probe(study, bench, side, choose, again)
    assert again.started[0] == (1, True)  # adopted under its own number
    assert [o.probe.role for o in outcomes] == [
        "transferred",
        "default",
        "transferred, rate × 0.5",
        "transferred, rate × 2",
    ]
    trials = open_study(bench.folder).get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 4
    assert [t.user_attrs[ROLE] for t in trials] == [BASELINE, *(o.probe.role for o in outcomes[1:])]
    assert [t.value for t in trials] == [o.score for o in outcomes]
    seeds = {bench.config(t.params, t.number).seed for t in trials}
    assert seeds == {7}  # the same order and noise for all
    steps = [json.loads((bench.folder.trial(n).result).read_text())["steps"] for n in range(4)]
    assert steps == [2] * 4  # and the same fraction
    assert all(len(o.prompts) == 2 for o in outcomes)
    done = Recorder()
    assert probe_by_probe(study, bench, side, choose, done) == outcomes and not done.started


def test_a_probe_that_fails_stops_and_is_tried_again(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "data")
    side, bench, study = begin(tmp_path / "s__tiny", data)
    view = Recorder()

    def break_down(event: Any) -> None:
        raise RuntimeError("broken disk")

    view.event_hook = break_down
    first = [Probe()]
    with pytest.raises(StudyStopped):
        probe_by_probe(study, bench, side, lambda found: first[0] if not found else None, view)
    outcomes = probe_by_probe(study, bench, side, lambda found: first[0] if not found else None, Recorder())
    assert len(outcomes) == 1 and [t.state.name for t in study.get_trials()] == ["FAIL", "COMPLETE"]


def test_other_settings_have_probes_of_their_own(searched: Path) -> None:
    done = transferred(searched)
    folder = probe_folder(done)
    assert folder.name == "s__mini-sdxl"
    folder.root.mkdir()
    try:
        folder.facts.write_text(json.dumps({"facts": {"transferred": "of another trial"}}))
        assert probe_folder(done).name == "s__mini-sdxl-2"
        folder.facts.write_text(json.dumps({"facts": {"transferred": identity(done)}}))
        assert probe_folder(done) == folder
    finally:
        folder.facts.unlink()
        folder.root.rmdir()


def former_identity(done: Transfer) -> str:
    """What rules of version 1 stored as ``transferred``: a copy of that function."""
    names = (
        *(
            "logging_dir",
            "sample_at_first",
            "sample_every_n_epochs",
            "sample_every_n_steps",
            "sample_prompts",
        ),
        *("save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps"),
        *("training_comment", "output_name", "pretrained_model_name_or_path", "train_data_dir"),
    )
    values = done.plan.config.as_dict().items()
    deciding = {k: v for k, v in values if k not in names and k in FIRST}
    return hashlib.sha256(json.dumps(["1", deciding], sort_keys=True).encode()).hexdigest()[:16]


def with_values(done: Transfer, **values: Any) -> Transfer:
    config = done.plan.config.with_values(values)
    return dataclasses.replace(done, plan=dataclasses.replace(done.plan, config=config))


def test_probes_of_earlier_rules_go_on(searched: Path) -> None:
    done = transferred(searched)
    folder = probe_folder(done)
    begun = {"source_study": "s", "mapping_version": "1", "transferred": former_identity(done)}
    assert begun["transferred"] != identity(done)
    folder.root.mkdir()
    try:
        folder.facts.write_text(json.dumps({"facts": begun}))
        assert probe_folder(done) == folder
        before = with_values(done, save_every_n_steps=None, save_every_n_epochs=2, save_last_n_epochs=3)
        assert former_identity(before) == begun["transferred"], "save.curve did not change it"
        probing = Probing(done, TransferRequest("mini-sdxl", trials=6), folder, "ladder", Console())
        now = probing.provenance(folder)
        check_unchanged(begun, now, folder.name)
        assert now["mapping_version"] == "1"
        assert probing.provenance(StudyFolder(folder.root.with_name("new")))["mapping_version"] == "4"
        assert probe_folder(with_values(done, weighted_captions=True)).name == "s__mini-sdxl-2"
        assert probe_folder(with_values(done, network_dim=3)).name == "s__mini-sdxl-2"
    finally:
        folder.facts.unlink()
        folder.root.rmdir()


def test_only_what_changes_a_short_run_decides_which_probes_it_has(searched: Path) -> None:
    done = transferred(searched)
    same = {"save_every_n_steps": 7, "sample_prompts": "p.txt", "logging_dir": "log", "vae_batch_size": 3}
    for name, value in {
        **same,
        "cache_latents_to_disk": True,
        "training_comment": "s trial 0, mapping 1",
    }.items():
        assert identity(with_values(done, **{name: value})) == identity(done), name
    for name, value in {"seed": 99, "network_dim": 3, "learning_rate": 9e-3}.items():
        assert identity(with_values(done, **{name: value})) != identity(done), name


def test_how_often_files_are_saved_leaves_no_candidate_out() -> None:
    """save.curve sets save_every_n_steps for a short run and leaves it unset for a long one."""
    own = TrainConfig(optimizer_type="AdamW", max_train_epochs=20, save_every_n_epochs=2)
    other = own.with_values(
        {"max_train_epochs": 5, "network_dim": 4, "save_every_n_epochs": None, "save_every_n_steps": 9}
    )
    side = make_side(
        "s", {"transferred": own, "diverse 1": other}, ShortRuns(8, {}, 1, "natural"), 6, (-4, 4)
    )
    assert "diverse 1" in side.short


def test_ties_are_those_of_the_objective(searched: Path, tmp_path: Path) -> None:
    """Below the untrained base every score is 0, but the objectives differ."""
    shutil.copytree(searched / "s", tmp_path / "s")
    folder = StudyFolder(tmp_path / "s")
    with sqlite3.connect(folder.database) as database:
        for number in range(3):
            row = database.execute("SELECT trial_id FROM trials WHERE number = ?", (number,)).fetchone()
            figures = {"score": 0.0, "se": 0.1, "objective": -float(number), "objective_se": 0.1}
            for name, value in figures.items():
                database.execute(
                    "INSERT OR REPLACE INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
                    (row[0], name, json.dumps(value)),
                )
    source = read_source(folder, anyway=True)
    assert [(t.number, t.score) for t in source.trials] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert [t.number for t in source.others] == [1], "none is equal to the best, so the better half is taken"


def test_the_next_command_keeps_the_device(searched: Path) -> None:
    file = searched / "s" / "transfer" / "mini-sdxl.toml"
    said = call(searched, "--device", "cuda:1")
    assert said.output.rstrip().splitlines()[-1] == f"next: hpo train {file} --device cuda:1"
    assert call(searched).output.rstrip().splitlines()[-1] == f"next: hpo train {file}"


def test_what_probes_found_holds_for_the_next_call(searched: Path) -> None:
    done = transferred(searched)
    folder = probe_folder(done)
    folder.root.mkdir()
    saved = {"design": "ladder", "probes": 6, "values": {"learning_rate": 7e-3}, "reason": "it gains 0.1"}
    saved |= {"lines": ["decision: it gains 0.1"], "outcomes": []}
    try:
        folder.facts.write_text(json.dumps({"facts": {"transferred": identity(done)}}))
        (folder.root / "probes.json").write_text(json.dumps(saved))
        assert call(searched).exit_code == 0
        file = searched / "s" / "transfer" / "mini-sdxl.toml"
        assert (
            "learning_rate = 0.007" in file.read_text() and "target trials: it gains 0.1" in file.read_text()
        )
        assert "decision: it gains 0.1" in (searched / "s" / "transfer" / "plan.md").read_text()
    finally:
        (folder.root / "probes.json").unlink()
        folder.facts.unlink()
        folder.root.rmdir()


def search_from(runs: Path, *words: str) -> Result:
    return CliRunner().invoke(
        main, ["search", "--base", "mini-sdxl", "--from", "s", "--runs", str(runs), *words]
    )


def test_a_search_from_a_study_is_its_transfer_with_target_trials(searched: Path) -> None:
    """What it finds is written as by ``hpo transfer --trials 6``."""
    folder = probe_folder(transferred(searched))
    folder.root.mkdir()
    saved = {"design": "model", "probes": 6, "values": {"learning_rate": 7e-3}, "reason": "it gains 0.1"}
    saved |= {"lines": [], "outcomes": [], "evidence": "a process of 30 trials"}
    file = searched / "s" / "transfer" / "mini-sdxl.toml"
    file.unlink(missing_ok=True)
    try:
        facts = {"transferred": identity(transferred(searched)), "design": "model"}
        folder.facts.write_text(json.dumps({"facts": facts}))
        (folder.root / "probes.json").write_text(json.dumps(saved))
        for words in ((), ("--trials", "6")):
            result = search_from(searched, *words)
            assert result.exit_code == 0, result.output
            assert "using 0 finished target trials of study s__mini-sdxl" in result.output
        assert "learning_rate = 0.007" in file.read_text()
        plan = (searched / "s" / "transfer" / "plan.md").read_text()
        assert "| target trials | it gains 0.1 | a process of 30 trials |" in plan
    finally:
        (folder.root / "probes.json").unlink()
        folder.facts.unlink()
        folder.root.rmdir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", "3", "--data", "x"), "so --data, --seed cannot be given"),
        (("name",), "so NAME cannot be given"),
        (("--base", "sdxl"), "use --base mini-sdxl"),
        (("--trials", "1"), "too few for a decision"),
        (("--from", "absent"), "no study absent"),
    ],
)
def test_what_a_search_from_a_study_cannot_be_given_is_said(
    searched: Path, words: tuple[str, ...], message: str
) -> None:
    result = search_from(searched, *words)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_only_what_both_sides_have_is_compared() -> None:
    target = [ProbeScore(Probe(octaves=x), x, 0.1) for x in (0.0, 1.0, -1.0)]
    twins = [ProbeScore(Probe(octaves=x), 2 * x, 0.1) for x in (0.0, 1.0, -1.0)]
    found = agree(target, twins)
    assert found is not None and found.spearman.value == pytest.approx(1.0) and not found.conclusive
    assert agree(target, twins[:1]) is None


def test_a_rate_that_the_optimizer_finds_is_not_probed(tmp_path: Path) -> None:
    prodigy = TrainConfig(optimizer_type="Prodigy", learning_rate=1.0, text_encoder_lr=1.0)
    with pytest.raises(ConfigError, match="adapts its learning rate"):
        make_side("s", {"transferred": prodigy}, ShortRuns(8, {}, 1, "natural"), 6, (-4, 4))


def test_probes_of_a_style_are_scored_as_a_style() -> None:
    config = TrainConfig(optimizer_type="AdamW")
    for preset in ("style", "character"):
        runs = ShortRuns(8, {}, 1, "natural", preset=preset)
        assert make_side("s", {"transferred": config}, runs, 6, (-4, 4)).study.preset.style == (
            preset == "style"
        )


def test_probes_are_judged_as_the_search_was() -> None:
    """Its limits and its formula: a LoRA that the search accepts is not infeasible on the target."""
    searched = {
        "study": {"title": "x", "preset": "style", "likeness": "clip"},
        "score": {"mean": "harmonic", "likeness": 2.0},
        "limits": {"diversity": 0.25, "copy_rate": 0.2},
        "train": {"resolution": 64},
    }
    runs = ShortRuns(8, {}, 1, "natural", preset="style", judged=judged_as(searched))
    study = make_side("s", {"transferred": TrainConfig(optimizer_type="AdamW")}, runs, 6, (-4, 4)).study
    assert (study.limits.diversity, study.limits.copy_rate, study.limits.prior) == (0.25, 0.2, 1.0)
    assert study.study.likeness == "clip" and study.preset.style
    assert study.score == build_study("t", {**study.sections, "score": searched["score"]}).score
    assert study.score != build_study("t", {**study.sections, "score": {}}).score


def test_the_request_has_the_words_of_the_command() -> None:
    words = {option.name for option in main.commands["transfer"].params}
    of_the_command_line = {"notify", "notify_on", "quiet_hours", "hang_minutes"}
    assert words - of_the_command_line == {f.name for f in dataclasses.fields(TransferRequest)}
