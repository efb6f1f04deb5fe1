"""``hpo best``, ``importance``, ``clean``, ``export csv`` and ``parquet``: commands on a finished study."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import optuna
import pandas
import pytest
from click.testing import CliRunner, Result

from evaluation.score.score import SAMPLES_NAME
from hpo.cli.main import main
from hpo.study.folder import StudyFolder, read_json
from hpo.study.importance import FEWEST
from hpo.study.locks import Lock
from hpo.study.retention import DRAWN
from hpo.study.storage import create_study, open_storage, open_study
from tests.stored.commands import NAME, unpack
from tests.tiny_search import finished_runs, tiny_study
from trainer.config import TrainConfig
from trainer.kohya import read_train_file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with one finished study of three trials, named tiny."""
    return finished_runs(tmp_path_factory.mktemp("best"), 3)


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hpo(*words: str, input: str | None = None) -> Result:
    return CliRunner().invoke(main, list(words), input=input, catch_exceptions=False)


def ranked(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return sorted(open_study(folder).get_trials(), key=lambda t: -float(t.values[0]))


def confirm(folder: StudyFolder, winner: int) -> None:
    values = {
        "winner": winner,
        "how": "retrained",
        "score": 0.25,
        "interval": [0.1, 0.4],
        "beats_trial0": False,
    }
    folder.confirmed.write_text(json.dumps(values))


# hpo best


def test_best_is_the_best_of_the_search_until_one_is_confirmed(here: Path) -> None:
    folder = StudyFolder(here / "runs" / "tiny")
    best, *others = ranked(folder)
    shown = hpo("best", "tiny")
    assert shown.exit_code == 0
    assert f"trial {best.number}: the best of the search, not confirmed" in shown.stdout
    assert "to confirm it: hpo confirm tiny" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) < 80
    found = json.loads(hpo("best", "tiny", "--json").stdout)
    assert (found["trial"], found["confirmed"], found["interval"]) == (best.number, False, None)
    assert found["settings"] == best.user_attrs["settings"] and found["score"] == best.user_attrs["score"]
    confirm(folder, others[-1].number)
    shown = hpo("best", "tiny")
    assert f"trial {others[-1].number}: confirmed (retrained)" in shown.stdout
    assert "no trial beats trial 0" in shown.stdout and "hpo confirm" not in shown.stdout
    found = json.loads(hpo("best", "tiny", "--json").stdout)
    assert (found["trial"], found["confirmed"], found["interval"]) == (others[-1].number, True, [0.1, 0.4])
    assert found["settings"] == others[-1].user_attrs["settings"]


def test_best_of_nothing_and_of_a_damaged_confirmation_is_an_error_with_advice(here: Path) -> None:
    confirm(StudyFolder(here / "runs" / "tiny"), 99)
    result = hpo("best", "tiny")
    assert (
        result.exit_code == 2
        and "refers to trial 99" in result.stderr
        and "hpo confirm tiny" in result.stderr
    )
    empty = StudyFolder(here / "runs" / "empty")
    empty.root.mkdir()
    create_study(empty, {})
    for words in (("best", "empty"), ("best", "empty", "--json"), ("best", "empty", "--toml")):
        result = hpo(*words)
        assert result.exit_code == 2 and "no scored trial yet" in result.stderr and result.stdout == ""
    assert hpo("best", "tiny", "--toml", "--json").exit_code == 2


def test_the_settings_file_trains_as_the_trial_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a study that an earlier version began.  Read back as ``hpo train`` reads it, nothing differs."""
    monkeypatch.chdir(unpack(tmp_path))
    found = json.loads(hpo("best", NAME, "--json").stdout)
    result = hpo("best", NAME, "--toml")
    assert result.exit_code == 0
    Path("best.toml").write_text(result.stdout)
    assert result.stdout.startswith(
        f"# study {NAME}, trial {found['trial']}: the best of the search, not confirmed"
    )
    table = tomllib.loads(result.stdout)
    # sd-scripts splits the text of a resolution, and has no sections for images in --config_file
    assert isinstance(table["resolution"], str) and not any(isinstance(v, dict) for v in table.values())
    assert table["output_dir"] == str(tmp_path / "output")
    assert table["train_data_dir"] == str((tmp_path / "images").resolve())
    file = read_train_file(Path("best.toml"))
    assert not file.unknown and not file.refused
    was = TrainConfig().with_values({k: v for k, v in found["train"].items() if hasattr(TrainConfig(), k)})
    now = file.config.with_values(
        {"train_data_dir": was.train_data_dir, "mixed_precision": was.mixed_precision,
         "hold_out_references": was.hold_out_references}
    )  # fmt: skip
    differing = {k: (v, now.as_dict()[k]) for k, v in was.as_dict().items() if v != now.as_dict()[k]}
    # without effect: the alpha of no convolutions, and epochs where the file sets steps
    assert (
        was.conv_dim is None
        and was.max_train_steps
        and differing.keys() == {"conv_alpha", "max_train_epochs"}
    )
    assert hpo("train", "best.toml", "--dry-run").exit_code == 0
    assert hpo("export", "kohya", "best.toml", "kohya").exit_code == 0


# hpo importance


def study_of(root: Path, trials: int, *, equal: bool = False) -> None:
    """A study in which only the rate decides.  No files of trials: only Optuna's database is read."""
    folder = StudyFolder(root)
    folder.root.mkdir(parents=True)
    study = create_study(folder, {})
    space = tiny_study().space.distributions()
    sampler = optuna.samplers.RandomSampler(seed=3)
    for _ in range(trials):
        study.sampler = sampler
        trial = study.ask(space)
        study.tell(trial, 0.5 if equal else 1 - abs(trial.params["learning_rate"] - 0.02))


def test_importance_names_what_decides(tmp_path: Path) -> None:
    study_of(tmp_path / "runs" / "rates", 24)
    words = ("importance", "rates", "--runs", str(tmp_path / "runs"))
    found = json.loads(hpo(*words, "--json").stdout)
    assert found["trials"] == 24 and sum(found["importance"].values()) == pytest.approx(1)
    assert next(iter(found["importance"])) == "learning_rate" and len(found["importance"]) == 4
    shown = hpo(*words).stdout.splitlines()
    assert shown[1].startswith("learning_rate") and "%" in shown[1] and max(map(len, shown)) < 80
    assert "rough" not in shown[-1]


def test_importance_of_few_or_equal_trials_is_a_sentence(tmp_path: Path) -> None:
    study_of(tmp_path / "few", FEWEST - 1)
    study_of(tmp_path / "rough", FEWEST)
    study_of(tmp_path / "equal", 10, equal=True)
    few, rough, equal = (hpo("importance", n, "--runs", str(tmp_path)) for n in ("few", "rough", "equal"))
    assert few.exit_code == 2 and f"has {FEWEST - 1} finished trials, {FEWEST} are needed" in few.stderr
    assert rough.exit_code == 0 and f"a rough estimate: from {FEWEST} trials" in rough.stdout
    assert equal.exit_code == 2 and "have the same score" in equal.stderr


# hpo export csv, parquet


def test_csv_has_optunas_columns_and_ours(here: Path) -> None:
    folder = StudyFolder(here / "runs" / "tiny")
    shown = hpo("export", "csv", "tiny")
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    trials = open_study(folder).get_trials()
    assert [int(row["number"]) for row in rows] == [t.number for t in trials]
    for row, trial in zip(rows, trials, strict=True):
        assert float(row["value_objective"]) == trial.value and row["state"] == "COMPLETE"
        assert float(row["params_learning_rate"]) == trial.params["learning_rate"]
        assert float(row["setting_network_alpha"]) == trial.user_attrs["settings"]["network_alpha"]
        assert float(row["likeness"]) == trial.user_attrs["likeness"] and row["outcome"] == "complete"
        result = read_json(folder.trial(trial.number).result)
        assert result and float(row["train_seconds"]) == result["train_seconds"]
    assert rows[0]["role"] == "baseline" and rows[1]["forked_from_study"] == ""
    told = hpo("export", "csv", "tiny", "--output", "trials.csv")
    assert told.stdout == "" and "written: trials.csv" in told.stderr
    assert Path("trials.csv").read_text() == shown.stdout


def test_parquet_holds_the_same_table_or_names_the_library(here: Path) -> None:
    result = hpo("export", "parquet", "tiny")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        assert result.exit_code == 2
        assert "pip install pyarrow (170 MB)" in result.stderr and "hpo export csv tiny" in result.stderr
        assert not Path("tiny.parquet").exists()
        return
    assert result.exit_code == 0
    table = pandas.read_parquet("tiny.parquet")
    plain = pandas.read_csv(io.StringIO(hpo("export", "csv", "tiny").stdout))
    assert list(table.columns) == list(plain.columns) and list(table["score"]) == list(plain["score"])


# hpo clean


def files(folder: StudyFolder) -> set[str]:
    return {
        str(p.relative_to(folder.root)) for p in folder.root.rglob("*") if p.is_file() and "trial_" in str(p)
    }


def test_clean_says_what_it_frees_asks_and_keeps_results_and_the_best(here: Path) -> None:
    folder = StudyFolder(here / "runs" / "tiny")
    best, middle, worst = (t.number for t in ranked(folder))
    confirm(folder, worst)
    (folder.trial(best).checkpoints / "step-000001").mkdir(parents=True)
    (folder.trial(best).checkpoints / "step-000001" / "state.json").write_bytes(b"x" * 300_000)
    before = files(folder)
    result = hpo("clean", "tiny", "--keep-best", "1")
    assert result.exit_code == 2 and "--yes" in result.stderr and files(folder) == before
    said = " ".join(result.stdout.split())
    assert "LoRA files of 1 trial, " in said and "resume states of 1 trial, 0.3 MB" in said
    assert max(map(len, result.stdout.splitlines())) < 80
    assert hpo("clean", "tiny", "--keep-best", "1", input="n\n").exit_code == 0 and files(folder) == before
    size = sum(p.stat().st_size for p in folder.root.rglob("*") if p.is_file())
    result = hpo("clean", "tiny", "--keep-best", "1", "--yes")
    freed = size - sum(p.stat().st_size for p in folder.root.rglob("*") if p.is_file())
    assert f"freed {freed / 1e6:.1f} MB" in result.stdout and freed > 300_000
    gone = before - files(folder)
    trial = f"trial_{middle:04d}"
    assert gone == {
        f"{trial}/lora_trial_{middle}.safetensors",
        *(name for name in before if name.startswith(f"{trial}/{DRAWN}/")),
        f"trial_{best:04d}/checkpoints/step-000001/state.json",
    }  # grid, metrics and result of all trials stay, and all of the best and of the confirmed one
    assert hpo("clean", "tiny", "--keep-best", "1").stdout.endswith("nothing to free\n")
    assert hpo("status", "tiny").exit_code == 0 and DRAWN == SAMPLES_NAME


def test_clean_leaves_unfinished_trials_and_what_a_search_keeps(here: Path) -> None:
    folder = StudyFolder(here / "runs" / "tiny")
    study = open_study(folder)
    number = study.ask(tiny_study().space.distributions()).number
    (folder.trial(number).checkpoints).mkdir(parents=True)
    (folder.trial(number).checkpoints / "state.json").write_text("{}")
    folder.trial(number).lora.write_text("")
    words = ["search", "tiny", "--keep-best=2"]
    row = {"id": "1", "event": "started", "step": "search", "words": words, "cwd": "", "time_utc": ""}
    end = {"id": "1", "event": "finished", "time_utc": ""}
    (folder.root / "work.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(end) + "\n")
    assert "the best 2 trials keep their files" in " ".join(hpo("clean", "tiny", "--yes").stdout.split())
    assert folder.trial(number).lora.is_file() and (folder.trial(number).checkpoints / "state.json").is_file()
    kept = [t.number for t in study.get_trials() if t.values and folder.trial(t.number).lora.is_file()]
    assert sorted(kept) == sorted(t.number for t in ranked_finished(folder)[:2])


def ranked_finished(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    done = [t for t in open_study(folder).get_trials() if t.values]
    return sorted(done, key=lambda t: -float(t.values[0]))


def test_clean_leaves_a_study_alone_that_a_command_works_on(here: Path) -> None:
    shutil.copytree("runs/tiny", "runs/other")
    lock = here / "runs" / "tiny" / ".locks" / "use.lock"
    holds = (
        "import sys; from pathlib import Path; from hpo.study.locks import Lock; lock = Lock(Path(sys.argv[1])); "
        "assert lock.try_acquire(shared=True); print('held', flush=True); sys.stdin.read()"
    )
    root = str(Path(__file__).parents[4])
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(lock)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
    ) as worker:  # fmt: skip
        assert worker.stdout and worker.stdin and worker.stdout.readline() == "held\n"
        before = files(StudyFolder(here / "runs" / "tiny"))
        result = hpo("clean", "tiny", "--keep-best", "1", "--yes")
        assert result.exit_code == 5 and "works on tiny" in result.stderr
        result = hpo("clean", "--all", "--keep-best", "1", "--yes")
        assert result.exit_code == 0 and "tiny is left alone" in result.stderr and "freed" in result.stdout
        assert files(StudyFolder(here / "runs" / "tiny")) == before
        assert len(files(StudyFolder(here / "runs" / "other"))) < len(before)
        worker.stdin.close()
    assert "freed" in hpo("clean", "tiny", "--keep-best", "1", "--yes").stdout
    assert Lock(lock).try_acquire()  # given back


def test_clean_all_goes_on_past_a_study_that_cannot_be_read(here: Path) -> None:
    for name in ("broken", "empty", "tiny__confirm"):
        shutil.copytree("runs/tiny", f"runs/{name}")
        for part in (here / "runs" / name).glob(
            "study.db*"
        ):  # SQLite would read what it can from its -wal file
            part.unlink()
    (here / "runs" / "broken" / "study.db").write_bytes(b"no database " * 1000)
    for name in ("empty", "tiny__confirm"):  # killed before the study was created
        open_storage(StudyFolder(here / "runs" / name))
    (here / "runs" / "tiny__confirm" / "study.json").write_text('{"facts": {"confirms": "tiny"}}')
    result = hpo("clean", "--all", "--keep-best", "1", "--yes")
    assert result.exit_code == 0 and "freed" in result.stdout  # as hpo studies
    assert "broken is left alone: cannot open" in result.stderr
    assert "empty is left alone: " in result.stderr and "contains no study" in result.stderr
    assert "tiny is left alone" not in result.stderr
    kept = [one.number for one in StudyFolder(here / "runs" / "tiny").trial_folders() if one.lora.is_file()]
    assert len(kept) == 1
    assert hpo("clean", "broken", "--yes").exit_code == 5
