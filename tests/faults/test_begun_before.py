"""What was begun and killed with the code of an earlier commit goes on with the code of today.

Owns the promise that stored formats hold: the files of a search, of its confirmation and of a run of ``hpo
train``. What is stored, and how it was made: ``tests/stored/make.py``.  Only the command line and public
files are used here, so that these tests hold whatever the modules are called.

That a file was taken over, and not made again with the same content, shows in its time of change.  Nothing
that is trained or drawn here is compared to the bit with what another machine made.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optuna
import pytest
from safetensors import safe_open

from tests.stored.commands import (
    BEGUN_TRIALS,
    CONFIRM,
    NAME,
    SEARCH,
    STEPS,
    TRAIN,
    TRIALS,
    environment,
    hpo,
    unpack,
)

pytestmark = pytest.mark.faults
TELLING = TRIALS - 2  # its result is on disk, Optuna was not told
TRAINING = TRIALS - 1  # killed some steps beyond its checkpoint
SAME_LOSS = 1e-4  # other instruction sets of a CPU differ by 1e-7; an optimizer without its state by 1e-3


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return unpack(tmp_path)


def run(folder: Path, *words: str) -> str:
    """The command to its end; what it printed."""
    done = subprocess.run(
        hpo(*words),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def kept(paths: Iterable[Path]) -> dict[Path, tuple[int, bytes]]:
    """Files as they are: when each was changed, and its content."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths if path.is_file()}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def opened(study: Path) -> tuple[dict[str, Any], list[optuna.trial.FrozenTrial]]:
    """The study's own attributes and its trials, as Optuna itself reads them."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{study / 'study.db'}")
    try:
        (name,) = optuna.get_all_study_names(storage)
        found = optuna.load_study(study_name=name, storage=storage)
        return found.user_attrs, found.get_trials()
    finally:
        storage.engine.dispose()


def trials(study: Path) -> list[optuna.trial.FrozenTrial]:
    return opened(study)[1]


def states(study: Path) -> list[str]:
    return [trial.state.name for trial in trials(study)]


def says_still(now: Any, before: Any) -> bool:
    """Whether what was said is said still, under the same names; a later version may say more."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(k in now and says_still(now[k], v) for k, v in before.items())
    return bool(now == before)


def definition(study: Path) -> dict[str, Any]:
    """study.json but for the versions of libraries: every call writes it anew."""
    return {name: value for name, value in read(study / "study.json").items() if name != "versions"}


def described(lora: Path) -> tuple[set[str], set[str]]:
    """The names of a LoRA file's tensors, and those of its metadata."""
    with safe_open(lora, framework="np") as file:
        return set(file.keys()), set(file.metadata())


def newest_checkpoint(folder: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def check_went_on(before: list[dict[str, Any]], after: list[dict[str, Any]], saved: int) -> None:
    """A training went on from its checkpoint: what led up to it was not done again – the seconds of a step are not
    the same twice –, what the killed process did beyond it comes out as it did then, and the last step is reached."""
    then, now = ([row for row in log if row["event"] == "step"] for log in (before, after))
    assert saved < len(then) < STEPS
    assert [row["step"] for row in then] == [*range(1, len(then) + 1)]
    assert [row["step"] for row in now] == [*range(1, STEPS + 1)]
    last = {"event": "finished", "steps": STEPS, "skipped": 0}
    assert last.items() <= after[-1].items()  # later versions log more
    assert now[:saved] == then[:saved]
    for old, new in zip(then[saved:], now[saved:], strict=False):
        assert old.keys() <= new.keys() and old["seconds"] != new["seconds"]
        assert abs(old["loss"] - new["loss"]) < SAME_LOSS
        assert old["learning_rate"] == new["learning_rate"]


def test_a_search_keeps_what_it_finished_and_takes_up_the_killed_trial_at_its_checkpoint(here: Path) -> None:
    """W16 · weight 5 · A search begun with an older version → It goes on: finished trials stay, and the trial
    that was killed continues from its checkpoint.
    """
    study = here / "runs" / NAME
    lost = study / f"trial_{TRAINING:04d}"
    finished = [study / f"trial_{number:04d}" for number in range(TRAINING)]
    done = kept(path for folder in finished for path in folder.rglob("*")) | kept([lost / "params.json"])
    shared = kept(path for name in ("base", "cache") for path in (study / name).rglob("*"))
    stored, begun = [read(folder / "result.json") for folder in finished], definition(study)
    saved = newest_checkpoint(lost / "checkpoints")
    steps, starts = rows(lost / "train.jsonl"), rows(lost / "starts.jsonl")
    attributes, told = opened(study)
    assert states(study) == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    assert f"study={NAME} complete={BEGUN_TRIALS}/{TRIALS} " in run(here, "status", NAME)

    said = run(here, *SEARCH, "--trials", str(TRIALS))

    assert f"trial {TELLING} was already finished on disk; its result was added to the study" in said
    assert f"trial {TRAINING} ({TRIALS}/{TRIALS}), resumed: " in said
    assert kept(done) == done
    # Latents, texts and anchors of then are found: none was changed, and none made beside them.
    assert kept(path for name in ("base", "cache") for path in (study / name).rglob("*")) == shared
    assert says_still(definition(study), begun)
    after, now = opened(study)
    assert after == attributes
    assert states(study) == ["COMPLETE"] * TRIALS
    assert now[:BEGUN_TRIALS] == told[:BEGUN_TRIALS]
    assert [trial.value for trial in now[:TRAINING]] == [result["value"] for result in stored]
    assert [trial.params for trial in now] == [trial.params for trial in told]
    for trial in now[BEGUN_TRIALS:]:
        assert trial.user_attrs.keys() >= now[BEGUN_TRIALS - 1].user_attrs.keys()
    check_went_on(steps, rows(lost / "train.jsonl"), saved)
    assert rows(lost / "starts.jsonl")[: len(starts)] == starts
    result, lora = read(lost / "result.json"), lost / f"lora_trial_{TRAINING}.safetensors"
    assert (result["number"], result["state"], result["steps"]) == (TRAINING, "complete", STEPS)
    assert result.keys() >= stored[0].keys() and result["value"] == now[TRAINING].value
    assert result["amounts"].keys() == stored[0]["amounts"].keys(), "a limit that it began without stays off"
    assert hashlib.sha256(lora.read_bytes()).hexdigest() == result["lora_sha256"]
    assert described(lora) == described(finished[0] / "lora_trial_0.safetensors")
    assert not (lost / "checkpoints").exists()
    shown = run(here, "status", NAME)
    assert f"study={NAME} complete={TRIALS}/{TRIALS} infeasible=0 failed=0 " in shown.splitlines()[-1]
    assert f"# {said.splitlines()[-1]}" == shown.splitlines()[-1]


def test_a_confirmation_draws_only_the_images_that_are_missing(here: Path) -> None:
    searched, study = here / "runs" / NAME, here / "runs" / f"{NAME}__confirm"
    lost = study / "trial_0001"
    images = kept(lost.glob("samples/*.png"))
    done = (
        kept(study.glob("trial_0000/**/*")) | kept(study.glob("base/**/*")) | kept(searched.glob("cache/*"))
    )
    done |= images | kept(lost / name for name in ("params.json", "lora_trial_1.safetensors", "train.jsonl"))
    (attributes, told), begun = opened(study), definition(study)
    assert states(study) == ["COMPLETE", "RUNNING"]
    assert not (searched / "confirmed.json").exists()

    said = run(here, *CONFIRM)

    assert "trial 1 (2/2), resumed: " in said
    assert kept(done) == done
    assert says_still(definition(study), begun)
    after, now = opened(study)
    assert after == attributes
    assert states(study) == ["COMPLETE", "COMPLETE"] and now[0] == told[0]
    results = [read(study / f"trial_{number:04d}" / "result.json") for number in (0, 1)]
    assert [trial.value for trial in now] == [result["value"] for result in results]
    assert 0 < len(images) < len(list(lost.glob("samples/*.png"))) == results[1]["n_images"]
    confirmed = read(searched / "confirmed.json")
    scores = {row["number"]: row["score"] for row in confirmed["rows"]}
    assert scores.keys() == {0, 1} and scores[0] == pytest.approx(results[0]["value"])
    assert f"confirmed (retrained): trial {confirmed['winner']}, score " in run(here, "status", NAME)


def test_a_run_of_hpo_train_goes_on_from_its_checkpoint_to_its_lora_file(here: Path) -> None:
    output, log = here / "output", here / "output" / f"{NAME}.run"
    lora, config = output / f"{NAME}.safetensors", read(log / "config.json")
    saved, steps = newest_checkpoint(log / "checkpoints"), rows(log / "train.jsonl")
    early = {path for path in output.glob("*-step*.safetensors") if int(path.stem[-8:]) <= saved}
    done = kept((log / "cache").iterdir()) | kept(early)
    assert early and not lora.exists()

    said = run(here, *TRAIN)

    assert f"going on after step {saved}/{STEPS}" in said
    assert "latents, 0 of them encoded now" in said
    assert kept(done) == done
    assert says_still(read(log / "config.json"), config)
    check_went_on(steps, rows(log / "train.jsonl"), saved)
    assert all(described(lora) == described(path) for path in early)
    assert not (log / "checkpoints").exists()
    assert "is trained already, with these settings and images" in run(here, *TRAIN)
