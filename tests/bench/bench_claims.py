"""Claims under kills and pauses, beside plain Optuna; and the seconds of a claim in a large study with many workers.

    python -m tests.bench.bench_claims --out bench/claims            # both; needs PostgreSQL on this machine
    python -m tests.bench.bench_claims --out bench/claims --only large --finished 10000 --workers 64

``faults``: 100 queued trials, four processes as if on four machines.  One is killed with -9 in a trial, one is
stopped in a trial for longer than its lease (plain Optuna: its heartbeat's grace period).  When all have ended, the
same command runs once more.  Plain Optuna is ``study.optimize``, as its documentation shows it.

``large``: workers that only claim and tell, in a study on PostgreSQL with many finished trials; with TPE, and with
random proposals.

Prints Markdown tables; every figure is in ``--out``/claims.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from optuna.trial import TrialState

from hpo.search.claim import Claim, Claims
from hpo.search.proposals import Proposal, Proposals
from hpo.search.sampled import make_sampler
from hpo.search.telling import Teller
from hpo.study import leases
from hpo.study.folder import StudyFolder
from hpo.study.ownership import ownership_of
from hpo.study.place import VARIABLE, place_of
from hpo.study.result import COMPLETE, Result
from hpo.study.server import server_of
from hpo.study.storage import begun_study, create_study, open_study
from tests.cheap_claims import enqueue, on_its_own_machine, work
from tests.faults.zygote import attempt, finish, start
from tests.postgres import Postgres
from trainer.config import TrainConfig
from trainer.files import append_line, make_folder, read_records

QUEUED, TRIAL_SECONDS = 100, 0.15
LEASE_SECONDS, PAUSE_SECONDS = 1.5, 6.0
HEARTBEAT_SECONDS, GRACE_SECONDS = 1, 2
DIMENSIONS = 12


# Faults


def trouble(name: str, log: Path, x: float, claimed: list[float]) -> None:
    """One trial: noted, and for two of the workers the fault in their tenth."""
    append_line(log, json.dumps({"x": x, "worker": name}))
    claimed.append(x)
    if len(claimed) == 10 and name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(claimed) == 10 and name == "paused":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(TRIAL_SECONDS)


def own_worker(folder: StudyFolder, log: Path, name: str) -> None:
    on_its_own_machine(name, LEASE_SECONDS)
    claimed: list[float] = []
    work(folder, lambda claim: trouble(name, log, claim.suggested["x"], claimed))


def plain_storage(url: str, heartbeat: bool) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    if not heartbeat:
        return optuna.storages.RDBStorage(url)
    return optuna.storages.RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3),
    )


def plain_worker(url: str, heartbeat: bool, log: Path, name: str) -> None:
    claimed: list[float] = []

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trouble(name, log, x, claimed)
        return x

    study = optuna.load_study(study_name="study", storage=plain_storage(url, heartbeat))
    enough = optuna.study.MaxTrialsCallback(QUEUED, states=(TrialState.COMPLETE,))
    study.optimize(objective, callbacks=[enough])


def plain_begin(url: str) -> None:
    study = optuna.create_study(study_name="study", storage=plain_storage(url, False), direction="maximize")
    for number in range(QUEUED):
        study.enqueue_trial({"x": number / QUEUED})


def faults(
    worker: Callable[[str], int], log: Path, trials: Callable[[], list[tuple[str, float]]]
) -> dict[str, Any]:
    """Four workers, the two faults, one worker more, and what came of the queue."""
    names = ("killed", "paused", "third", "fourth")
    pids = {name: worker(name) for name in names}
    finish(pids["killed"])
    os.waitpid(pids["paused"], os.WUNTRACED)
    time.sleep(PAUSE_SECONDS)
    os.kill(pids["paused"], signal.SIGCONT)
    codes = [finish(pids[name]) for name in names[1:]]
    time.sleep(max(LEASE_SECONDS, GRACE_SECONDS) + 1)
    codes.append(finish(worker("again")))
    queue = {number / QUEUED for number in range(QUEUED)}
    begun = Counter(row["x"] for row in read_records(log) if row["x"] in queue)
    states = trials()
    told = Counter(x for state, x in states if state == "COMPLETE")
    return {
        "begun more than once": sum(count - 1 for count in begun.values()),
        "results twice": sum(count - 1 for x, count in told.items() if x in queue),
        "without a result": len(queue - told.keys()),
        "not in the queue": sum(count for x, count in told.items() if x not in queue),
        "left running": sum(state == "RUNNING" for state, _ in states),
        "failed": sum(state == "FAIL" for state, _ in states),
        "workers that ended with an error": sum(code != 0 for code in codes),
    }


def states_of(study: optuna.Study) -> list[tuple[str, float]]:
    return [(t.state.name, t.params.get("x", -1.0)) for t in study.get_trials(deepcopy=False)]


def fault_rows(server: Postgres, place: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    for title, heartbeat, on_server in (
        ("plain Optuna, SQLite", False, False),
        ("plain Optuna, PostgreSQL", False, True),
        ("plain Optuna, PostgreSQL, heartbeat and retry", True, True),
    ):
        own = Path(tempfile.mkdtemp(dir=place))
        url = (
            server.new_database().render_as_string(hide_password=False)
            if on_server
            else f"sqlite:///{own}/x.db"
        )
        url = url.replace("{", "{{").replace("}", "}}")
        attempt(plain_begin, url)
        log = own / "log"
        rows[title] = faults(
            lambda name, url=url, hb=heartbeat, log=log: start(plain_worker, url, hb, log, name),  # type: ignore[misc]
            log,
            lambda url=url: states_of(
                optuna.load_study(study_name="study", storage=plain_storage(url, False))
            ),  # type: ignore[misc]
        )
        print(title, rows[title], flush=True)
    for title, on_server in (("this tool, SQLite", False), ("this tool, PostgreSQL", True)):
        folder = StudyFolder(Path(tempfile.mkdtemp(dir=place)) / "study")
        if on_server:
            os.environ[VARIABLE] = server.place(folder)
        attempt(enqueue, folder, QUEUED)
        log = folder.root.parent / "log"
        rows[title] = faults(
            lambda name, folder=folder, log=log: start(own_worker, folder, log, name),  # type: ignore[misc]
            log,
            lambda folder=folder: states_of(open_study(folder)),  # type: ignore[misc]
        )
        print(title, rows[title], flush=True)
    return rows


# Large


class Sampled(Proposals):
    """New proposals for ever, of TPE or random, over twelve parameters."""

    def __init__(self, study: optuna.Study, *, learned: bool) -> None:
        self.study, self.learned = study, learned

    total = 1_000_000

    def queued(self) -> Iterator[Proposal | None]:
        yield None

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        self.study.sampler = make_sampler(1, trial.number, 30, learned=self.learned)
        return {f"p{n}": trial.suggest_float(f"p{n}", 0, 1) for n in range(DIMENSIONS)}

    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        return TrainConfig()

    def settings(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        return dict(suggested)


def result_of(number: int, value: float) -> Result:
    parts = {
        name: 0.5 for name in ("prompt_following", "likeness", "clip_t", "clip_i", "copy_rate", "diversity")
    }
    return Result(number=number, state=COMPLETE, value=value, se=0.01, reason="", message="", config_sha256="", lora="",
                  lora_sha256="", n_images=1, steps=1, skipped_steps=0, train_seconds=0.0, score_seconds=0.0, remedy="",
                  time_utc="", objective=value, objective_se=0.01, **parts)  # fmt: skip


def one_trial(claims: Claims, times: dict[str, float]) -> None:
    """Claim and tell one, with the seconds of each."""
    began = time.monotonic()
    claim = claims.take()
    assert isinstance(claim, Claim)
    claimed = time.monotonic()
    number, settings = claim.trial.number, dict(claim.suggested)
    claims.teller.tell(
        claim.trial, result_of(number, sum(settings.values()) / DIMENSIONS), settings, claim.lock
    )
    claim.lock.release()
    times |= {"claim": claimed - began, "tell": time.monotonic() - claimed}


def claims_of(folder: StudyFolder, study: optuna.Study, learned: bool) -> Claims:
    return Claims(
        study, Sampled(study, learned=learned), Teller(study, folder, ("score",), lambda text: None)
    )


def fill(folder: StudyFolder, finished: int) -> None:
    """One trial through the tool, then copies of its rows with other parameters and values."""
    make_folder(folder.root)
    with ownership_of(folder).study():
        study = create_study(folder, {"direction": "maximize"})
    one_trial(claims_of(folder, study, False), {})
    place = place_of(folder)
    assert place is not None
    with server_of(place).engine.begin() as connection:
        for statement in (
            "INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete) "
            "SELECT g, study_id, state, datetime_start, datetime_complete FROM trials, "
            f"generate_series(1, {finished - 1}) g WHERE number = 0",
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
            "SELECT t.trial_id, p.param_name, random(), p.distribution_json FROM trials t, trial_params p "
            "JOIN trials o ON o.trial_id = p.trial_id WHERE o.number = 0 AND t.number > 0",
            "INSERT INTO trial_values (trial_id, objective, value, value_type) "
            "SELECT t.trial_id, v.objective, random(), v.value_type FROM trials t, trial_values v "
            "JOIN trials o ON o.trial_id = v.trial_id WHERE o.number = 0 AND t.number > 0",
            *(
                f'INSERT INTO {table} (trial_id, "key", value_json) SELECT t.trial_id, a."key", a.value_json '
                f"FROM trials t, {table} a JOIN trials o ON o.trial_id = a.trial_id "
                "WHERE o.number = 0 AND t.number > 0"
                for table in ("trial_user_attributes", "trial_system_attributes")
            ),
        ):
            connection.execute(sql.text(statement))


def large_worker(
    folder: StudyFolder, study: optuna.Study, learned: bool, name: str, trials: int, log: Path
) -> None:
    """A worker whose cache is warm, as after its first trial.  Connections are not shared with the process it forked
    from."""
    on_its_own_machine(name, 120.0)
    backend = study._storage._backend  # type: ignore[attr-defined]
    backend.engine.dispose(close=False)
    claims = claims_of(folder, study, learned)
    for _ in range(trials):
        times: dict[str, float] = {}
        one_trial(claims, times)
        append_line(log.with_name(f"{log.name}-{name}"), json.dumps(times))


def large_row(folder: StudyFolder, workers: int, trials: int, learned: bool) -> dict[str, Any]:
    """All workers at once, each with so many trials."""
    log = Path(tempfile.mkdtemp(dir=folder.root.parent)) / "times"

    def measured() -> None:
        began = time.monotonic()
        study = begun_study(folder)
        assert study is not None
        before = len(study.get_trials(deepcopy=False))
        first = time.monotonic() - began
        gc.collect()
        gc.freeze()  # so that the forks share the loaded study
        began = time.monotonic()
        pids = [start(large_worker, folder, study, learned, f"w{n}", trials, log) for n in range(workers)]
        codes = [finish(pid) for pid in pids]
        seconds = time.monotonic() - began
        assert not any(codes), codes
        rows = [row for path in log.parent.glob("times-*") for row in read_records(path)]
        after = begun_study(folder)
        assert after is not None
        found = after.get_trials(deepcopy=False)
        own = {
            "workers": workers,
            "finished before": before,
            "sampler": "TPE" if learned else "random",
            "seconds to load the study, once per worker": round(first, 2),
            "wall seconds per trial, all workers together": round(seconds / len(rows), 3),
            "median seconds of a claim with its wait": round(statistics.median(r["claim"] for r in rows), 2),
            "longest": round(max(r["claim"] for r in rows), 2),
            "median seconds of telling": round(statistics.median(r["tell"] for r in rows), 3),
            "trials told": len(rows),
            "numbers twice": len(found) - len({t.number for t in found}),
            "left running": sum(t.state == TrialState.RUNNING for t in found),
        }
        (log.parent / "row.json").write_text(json.dumps(own))

    assert attempt(measured) == 0
    row: dict[str, Any] = json.loads((log.parent / "row.json").read_text())
    print(row, flush=True)
    return row


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(str(row[c]) for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("faults", "large"))
    parser.add_argument("--finished", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=2, help="of each worker")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="claims-"))
    found: dict[str, Any] = {}
    server = Postgres("-c max_connections=400")
    try:
        server.start()
        leases.STUDY_WAIT_SECONDS = 3600  # the wait is what is measured
        if words.only != "large":
            found["faults"] = fault_rows(server, place)
        if words.only != "faults":
            folder = StudyFolder(place / "large")
            os.environ[VARIABLE] = server.place(folder)
            assert attempt(fill, folder, words.finished) == 0
            found["large"] = [
                large_row(folder, workers, words.trials, learned)
                for learned in (False, True)
                for workers in (1, words.workers)
            ]
    finally:
        server.remove()
    (words.out / "claims.json").write_text(json.dumps(found, indent=1))
    if "faults" in found:
        print(table(found["faults"]))
    if "large" in found:
        print(table({f"{row['sampler']}, {row['workers']} workers": row for row in found["large"]}))


if __name__ == "__main__":
    main()
