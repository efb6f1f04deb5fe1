"""Promises of ``hpo status``: it fits 80 columns, is whole in a pipe and as JSON, and calls things what they are."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from optuna.trial import TrialState

from hpo.cli.main import main
from hpo.study.standing import standing
from hpo.study.storage import open_study
from hpo.study.table import BY_IMPORTANCE, BY_SPREAD, study_table
from hpo.terminal.confirmation import confirm_advice, end_lines
from hpo.terminal.status import status_table, status_tsv, wrapped
from tests.places import ROOT
from tests.recorded import WIDE, recorded, settings


def at_a_terminal(place: Path, *words: str, columns: int = 80) -> str:
    """What a terminal of this width shows: a real pseudo-terminal, colours removed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hpo.cli", *words], cwd=place, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


def test_at_80_columns_the_settings_that_matter_least_are_left_out_and_named(tmp_path: Path) -> None:
    recorded(tmp_path / "runs" / "t")
    text = at_a_terminal(tmp_path, "status", "t")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "study t: search on mini-sd15; 6/8 trials, 1 infeasible"
    assert lines[1] == "same in all trials: resolution=64 noise_offset=0"
    head = text[text.index("usual settings: 0.1000") : text.index("\n0 ")]
    assert "_rate" in head and "weight" not in head
    left_out = " ".join(text[text.index("not shown") :].split())
    assert "weight_decay" in left_out.split(". Everything")[0]
    assert "hpo status t | cat" in left_out
    assert "infeasible (invalid images): trial 3" in text
    (row,) = (line for line in lines if line.startswith("3 "))
    assert row.split()[1] == "infeasible"
    assert "best of the search: trial 5, 0.1500 ± 0.0200 (optimistic: it was selected)" in text
    assert "trial 0, the usual settings: 0.1000 ± 0.0200" in text
    closing = " ".join(text[text.rindex("study=t ") :].split())
    assert closing.startswith("study=t complete=6/8 infeasible=1 failed=0 best=5 search_score=0.1500")
    # a wide terminal shows everything
    wide = at_a_terminal(tmp_path, "status", "t", columns=200)
    assert "not shown" not in wide and "_decay" in wide


def test_commands_are_not_broken_when_a_line_is_wrapped() -> None:
    shown = wrapped("confirm these scores of the search with: hpo confirm a-name --runs elsewhere", 40)
    assert shown.splitlines() == [
        "confirm these scores of the search with:",
        "  hpo confirm a-name --runs elsewhere",
    ]
    long = wrapped(f"everything: hpo status {'x' * 60} --runs elsewhere | cat", 40).splitlines()
    assert long[-1].strip() == f"hpo status {'x' * 60} --runs elsewhere | cat"


def test_a_pipe_gets_every_setting_as_tab_separated_values_and_the_rest_as_remarks(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "runs" / "t")
    found = CliRunner().invoke(
        main, ["status", "t", "--runs", str(folder.root.parent)], catch_exceptions=False
    )
    table = [line.split("\t") for line in found.stdout.splitlines() if not line.startswith("#")]
    assert len({len(row) for row in table}) == 1 and len(table) == 7
    names, rows = table[0], [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    assert set(WIDE) | {"trial", "state", "reason", "score", "se", "seconds", "resolution"} <= set(names)
    assert float(rows[5]["score"]) == 0.1 + 0.05 and float(rows[1]["learning_rate"]) == 10 ** (-5 + 1 / 4)
    assert (rows[3]["state"], rows[3]["reason"], rows[3]["score"]) == ("infeasible", "invalid_images", "")
    assert found.stdout.splitlines()[-1].startswith("# study=t complete=6/8")
    assert "# best of the search: trial 5" in found.stdout


def test_json_has_everything(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "runs" / "t")
    words = ["status", "t", "--json", "--runs", str(folder.root.parent)]
    found = json.loads(CliRunner().invoke(main, words, catch_exceptions=False).stdout)
    assert (found["study"], found["kind"], found["complete"], found["total"]) == ("t", "search", 6, 8)
    assert found["best"] == {"trial": 5, "score": pytest.approx(0.15), "se": 0.02}
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3 + ["infeasible"] + [
        "complete"
    ] * 2
    assert found["trials"][4]["settings"] == settings(4) and found["constants"]["resolution"] == 64
    assert set(found["weights"]) == set(found["settings"]) and found["confirmed"] is None


def test_text_from_files_cannot_break_the_table(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "t")
    study = open_study(folder)
    trial = study.ask()
    trial.set_user_attr("settings", {"a\tb": "x\ty\nz\x1b[31m"})
    study.tell(trial, state=TrialState.FAIL)
    lines = status_tsv(study_table(study, folder))
    assert len({line.count("\t") for line in lines}) == 1 and "\x1b" not in "".join(lines)
    assert all("\n" not in line for line in lines)


def test_importance_decides_with_enough_trials_and_the_spread_before(tmp_path: Path) -> None:
    few, many = (recorded(tmp_path / str(n), n, total=n) for n in (6, 25))
    table = study_table(open_study(few), few)
    assert table.weighed_by == BY_SPREAD
    assert min(table.weights, key=lambda name: table.weights[name]) == "weight_decay"
    table = study_table(open_study(many), many)
    assert table.weighed_by == BY_IMPORTANCE
    assert (
        max(table.weights, key=lambda name: table.weights[name]) == "learning_rate"
    )  # the score follows it alone
    _, left_out = status_table(table, 60)
    assert left_out and "PED-ANOVA" in left_out[0] and "learning_rate" not in left_out[0]


def test_no_result_yet_is_said(tmp_path: Path) -> None:
    for name, trials, scores in (("empty", 0, True), ("broken", 2, False)):
        folder = recorded(tmp_path / "runs" / name, trials, scores=scores)
        found = CliRunner().invoke(main, ["status", name, "--runs", str(folder.root.parent)])
        assert found.exit_code == 0
        assert "# no trial has a score yet" in found.stdout and "confirm with" not in found.stdout


def test_a_search_where_only_trial_0_has_a_score_is_not_sent_to_an_error(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "t", 1)
    now = standing(open_study(folder), 8)
    assert confirm_advice(folder, now)[0].startswith("only trial 0 has a score")
    said, following = end_lines(folder, now)
    assert "confirm with" not in " ".join(said) and following.startswith("hpo status t")
    more = recorded(tmp_path / "more", 2)
    assert "confirm with: hpo confirm more" in confirm_advice(more, standing(open_study(more), 8))[0]


def test_probes_and_repeats_are_called_what_they_are(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    source = recorded(runs / "t")
    recorded(runs / "t__mini-sdxl", facts={"source_study": "t"})
    repeats = recorded(runs / "t__confirm", facts={"confirms": "t"})

    def shown(name: str) -> str:
        return CliRunner().invoke(main, ["status", name, "--runs", str(runs)], catch_exceptions=False).stdout

    probes = shown("t__mini-sdxl")
    assert "target trials of settings transferred from t, run on mini-sd15; 6/8 trials" in probes
    assert "best target trial: trial " in probes
    assert "trial 0, the transferred settings: 0.1000" in probes and "usual settings" not in probes
    assert " score=0.1500 " in probes and " transferred=0.1000" in probes and "hpo confirm" not in probes
    again = shown("t__confirm")
    assert (
        "confirmation of t" in again
        and "best:" not in again
        and "best=" not in again
        and "search_score" not in again
    )
    assert f"the result appears: hpo status t --runs {runs}" in again

    kept = {"how": "retrained", "winner": 2, "score": 0.11, "interval": [0.1, 0.12], "beats_trial0": True}
    source.confirmed.write_text(json.dumps({**kept, "confirmation": repeats.name}))
    text = shown("t")
    assert text.index("confirmed (retrained): trial 2, score 0.1100") < text.index(
        "best of the search: trial 5"
    )
    assert "confirmed (retrained): trial 2, score 0.1100" in shown("t__confirm")


def test_the_runs_of_a_confirmation_name_the_trial_they_repeat(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "t__confirm", 0, facts={"confirms": "t"})
    study = open_study(folder)
    trial = study.ask()
    assert (trial.suggest_int("of", 0, 9), trial.suggest_int("train_seed", 0, 9)) is not None
    study.tell(trial, 0.5)
    (row,) = study_table(study, folder).rows
    assert row.settings == {"repeated_trial": trial.params["of"], "training_seed": trial.params["train_seed"]}
