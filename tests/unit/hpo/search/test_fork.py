"""hpo search --fork-from: a new study takes over the trials of another one that fit into its space."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import CliRunner
from optuna.search_space import IntersectionSearchSpace

import hpo.search.session
from hpo.cli.main import main
from hpo.search.fork import Fork
from hpo.search.sampled import SearchLimits
from hpo.search.samplers import make_sampler
from hpo.study.folder import FORK, StudyFolder, read_json
from hpo.study.locks import Lock
from hpo.study.ownership import ClaimLost
from hpo.study.standing import FORKED_FROM
from hpo.study.storage import open_study
from hpo.study.use import read_from
from hpo.study.work import INVOCATION, Invocation, steps
from tests.faults.zygote import attempt
from tests.tiny_search import check_study, draw_images, make_search, tiny_bench, tiny_study
from tests.tiny_session import run_session
from trainer.errors import ConfigError, MachineError

LOWER = {"low": 1e-5, "high": 5e-2, "log": True}  # one of the trials is above it
MOVED = "learning_rate={low=1e-5, high=5e-2, log=true}"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a finished study of four trials named tiny."""
    place = tmp_path_factory.mktemp("fork")
    images = draw_images(place / "images" / "1_zkw figure", 10).parent
    make_search(tiny_bench(place / "runs" / "tiny", images), SearchLimits(4)).run()
    return place


@pytest.fixture
def here(searched: Path, tmp_path: Path) -> Path:
    shutil.copytree(searched / "runs", tmp_path / "runs")
    return tmp_path


def fork(here: Path, data: Path, name: str = "wide", trials: int = 5, **more: Any) -> str:
    return run_session(here / "runs" / name, data, trials, fork_from="tiny", **more)


def trials(here: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    return open_study(StudyFolder(here / "runs" / name)).get_trials(deepcopy=False)


def test_trials_inside_the_new_space_are_taken_over_and_the_search_goes_on_with_them(
    here: Path, searched: Path
) -> None:
    before = trials(here, "tiny")
    fit = [t for t in before if t.params["learning_rate"] <= 5e-2]
    assert 2 <= len(fit) < len(before)  # else this test could not fail
    said = fork(here, searched / "images", sets=(MOVED,))
    assert f"took over {len(fit)} of 4 finished trials of study tiny" in said
    assert "1 does not fit: learning_rate was outside 1e-05 … 0.05, log (1 trial)" in said
    after = trials(here, "wide")
    assert len(after) == 5
    for new, old in zip(after, fit, strict=False):
        assert new.user_attrs[FORKED_FROM]["trial"] == old.number
        assert new.user_attrs[FORKED_FROM]["study"] == "tiny"
        assert (new.params, new.values, new.constraints) == (old.params, old.values, old.constraints)
        same = ("score", "se", "likeness", "prompt_following", "settings", "outcome", "role")
        assert [new.user_attrs.get(n) for n in same] == [old.user_attrs.get(n) for n in same]
    assert not any(t.user_attrs.get(FORKED_FROM) for t in after[len(fit) :])
    # TPE models the parameters that all trials share with equal distributions: the whole new space
    study = open_study(StudyFolder(here / "runs" / "wide"))
    shared = IntersectionSearchSpace().calculate(study)
    assert shared == tiny_study({"space": {"learning_rate": LOWER}}).space.distributions()
    # the files of a trial went along: everything that holds for a study that was searched holds for this one
    check_study(StudyFolder(here / "runs" / "wide"), 5)
    assert "trial 0" in said and fork(here, searched / "images", sets=(MOVED,)).count("took over") == 0
    shutil.rmtree(here / "runs" / "tiny")  # the new study does not need it any more
    assert "5 trials are done" in fork(here, searched / "images", sets=(MOVED,))


def test_a_setting_that_is_fixed_now_keeps_the_trials_that_had_its_value(here: Path, searched: Path) -> None:
    ranks = [t.params["network_dim_log2"] for t in trials(here, "tiny")]
    assert len(set(ranks)) > 1
    rank = ranks[0]
    said = fork(here, searched / "images", trials=ranks.count(rank), sets=(f"network_dim={2**rank}",))
    assert "the trials taken over count too: give a larger number" in said
    assert f"took over {ranks.count(rank)} of 4" in said and f"network_dim was not {2**rank} (" in said
    assert all("network_dim_log2" not in t.params for t in trials(here, "wide"))


def test_another_baseline_is_trained_although_trials_were_taken_over(here: Path, searched: Path) -> None:
    fork(here, searched / "images", trials=5, sets=("baseline.learning_rate=2e-3",))
    found = [t for t in trials(here, "wide") if t.user_attrs.get("role") == "baseline"]
    assert len(found) == 1 and found[0].params["learning_rate"] == 2e-3
    assert FORKED_FROM not in found[0].user_attrs


def test_what_does_not_compare_is_refused_and_named(here: Path, searched: Path, tmp_path: Path) -> None:
    others = draw_images(tmp_path / "other" / "1_zkw figure", 10, seed=5).parent
    for data, more, named in (
        (others, {}, "images and captions: was"),
        (searched / "images", {"seed": 8}, "seed: was 7, is now 8"),
        (searched / "images", {"sets": ("sampling.steps=3",)}, "sampling: was"),
        (searched / "images", {"sets": ("score.below_zero=clipped",)}, "[score] below_zero: was signed"),
    ):
        with pytest.raises(ConfigError, match=r"trials of study tiny cannot be taken over") as caught:
            fork(here, data, **more)
        assert named in caught.value.message
        assert not (here / "runs" / "wide").exists()
    with pytest.raises(
        ConfigError, match=r"none of the 4 finished trials .* fits .*max_grad_norm was not 0\.5"
    ):
        fork(here, searched / "images", sets=("max_grad_norm=0.5",))
    assert not (here / "runs" / "wide").exists()


def test_only_a_new_study_can_take_over_trials(here: Path, searched: Path) -> None:
    with pytest.raises(ConfigError, match="needs a new study"):
        fork(here, searched / "images", name="tiny")
    shutil.copytree(here / "runs" / "tiny", here / "runs" / "other")
    with pytest.raises(ConfigError, match=r"study other was already begun without --fork-from"):
        fork(here, searched / "images", name="other")
    with pytest.raises(ConfigError, match="no study nobody"):
        run_session(here / "runs" / "wide", searched / "images", 5, fork_from="nobody")


def test_a_changed_definition_names_the_option(here: Path, searched: Path) -> None:
    with pytest.raises(ConfigError, match="different definition") as caught:
        run_session(here / "runs" / "tiny", searched / "images", 5, sets=(MOVED,))
    assert "hpo search NAME … --fork-from tiny" in caught.value.hint
    with pytest.raises(ConfigError, match="different definition") as caught:
        run_session(here / "runs" / "tiny", searched / "images", 5, seed=8)
    assert "--fork-from" not in caught.value.hint  # it would be refused


@pytest.mark.parametrize("dies_in", ["write_params", "Teller"])
def test_a_fork_that_was_killed_goes_on_where_it_was(
    here: Path, searched: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    bench = tiny_bench(here / "runs" / "wide", searched / "images")
    worker = make_search(bench, SearchLimits(5))
    taken = Fork.into(bench, StudyFolder(here / "runs" / "tiny"))

    class Killed(BaseException):
        """Nothing catches it, like a kill."""

    calls = 0

    def dies(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return original(*_, **__)

    import hpo.search.fork as module

    original = getattr(module, dies_in)
    monkeypatch.setattr(module, dies_in, dies)
    with pytest.raises(Killed):
        taken.take(worker.study, lambda text: None)
    monkeypatch.setattr(module, dies_in, original)
    assert [t.state.name for t in worker.study.get_trials()] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert not worker.study.user_attrs[FORK]["finished"]
    taken.take(worker.study, lambda text: None)
    worker.run()
    check_study(bench.folder, 5)
    sources = [(t.user_attrs.get(FORKED_FROM) or {}).get("trial") for t in worker.study.get_trials()]
    assert sources == [0, 1, 2, 3, None]
    assert read_json(bench.folder.trial(2).result)["score_seconds"] > 0


def test_random_suggestions_of_a_fork_are_not_those_of_its_source() -> None:
    def first(**more: Any) -> float:
        study = optuna.create_study(sampler=make_sampler(7, 5, 30, learned=False, **more))
        return study.ask().suggest_float("x", 0, 1)

    assert first() == first() and first(forked="a") == first(forked="a")
    assert len({first(), first(forked="a"), first(forked="b")}) == 3


def command(words: list[str]) -> None:
    raise SystemExit(CliRunner().invoke(main, words).exit_code)


def test_the_source_is_neither_cleaned_nor_deleted_while_its_trials_are_taken_over(
    here: Path, searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, codes = Fork.take, list[int]()
    where = ["tiny", "--yes", "--runs", str(here / "runs")]
    commands = (["clean", "--keep-best", "1", *where], ["delete", *where])

    def meanwhile(*given: Any) -> None:
        codes.extend(attempt(command, words) for words in commands)  # in processes of their own
        take(*given)

    monkeypatch.setattr(Fork, "take", meanwhile)
    assert "took over 4 of 4" in fork(here, searched / "images")
    assert codes == [5, 5]
    assert [attempt(command, words) for words in commands] == [0, 0]


def test_a_source_that_was_just_deleted_leaves_nothing_behind(tmp_path: Path) -> None:
    gone = StudyFolder(tmp_path / "runs" / "gone")
    with pytest.raises(ConfigError, match="there is no study gone any more"), read_from(gone):
        raise AssertionError
    assert not gone.root.exists()


def test_an_error_after_the_trials_were_taken_over_is_one_of_a_study_that_has_begun(
    here: Path, searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MachineError("the disk is full", "free some space")

    monkeypatch.setattr(hpo.search.session, "_begin", full)
    token = INVOCATION.set(Invocation(("search", "wide"), str(here)))
    try:
        with pytest.raises(MachineError):
            fork(here, searched / "images")
    finally:
        INVOCATION.reset(token)
    assert [step.state for step in steps(here / "runs" / "wide")] == ["failed"]  # hpo resume goes on with it
    assert len(trials(here, "wide")) == 4


@pytest.mark.parametrize("how", ["held by another worker", "lost"])
def test_nothing_is_written_into_a_trial_that_another_worker_has(
    here: Path, searched: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bench = tiny_bench(here / "runs" / "wide", searched / "images")
    worker, said = make_search(bench, SearchLimits(4)), list[str]()
    acquire = Lock.try_acquire

    def try_acquire(lock: Lock, **given: Any) -> bool:
        return lock.path.name != "trial_0001.lock" and acquire(lock, **given)

    def check(lock: Lock, *, certain: bool = False) -> None:
        if lock.path.name == "trial_0001.lock":
            raise ClaimLost("trial 1 is no longer this worker's")

    if how == "lost":
        monkeypatch.setattr(Lock, "check", check)
    else:
        monkeypatch.setattr(Lock, "try_acquire", try_acquire)
    Fork.into(bench, StudyFolder(here / "runs" / "tiny")).take(worker.study, said.append)
    assert [t.state.name for t in worker.study.get_trials()] == [
        "COMPLETE",
        "RUNNING",
        "COMPLETE",
        "COMPLETE",
    ]
    assert not bench.folder.trial(1).result.exists()
    assert bench.folder.trial(1).root.exists() is (how == "lost")
    assert any("no longer this worker's" in line for line in said) is (how == "lost")
