"""The result of a confirmation: means, intervals, ties and the winner; and confirmed.json.

Owns the decision rule and the file that transfer and reports read.  Does not own reading the runs (see
``hpo.confirm.repeats``), statistics (see ``evaluation.score.statistics``) or output texts (see ``hpo.confirm.view``).

The winner has the best confirmed score, unless a clearly cheaper configuration is equal to it within the noise.
``RULE`` says this to users.  Cost is the number of images that a training sees, because time depends on what
else the machine did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from evaluation.score import (
    Difference,
    difference,
    interval,
    p_best,
    repeat_sd,
    shrunken,
    with_repeat_noise,
)
from hpo.study import StudyFolder, read_json
from trainer.files import write_atomic

RETRAINED, RESCORED = "retrained", "rescored"
CHEAPER = 0.8  # at most this share of the best one's images counts as cheaper (assumed)
RULE = (
    "The winner has the best confirmed score, unless a trial that sees at least "
    f"{100 * (1 - CHEAPER):.0f} % fewer images is behind it by no more than the noise (±): "
    "then the cheapest such trial."
)


@dataclass(frozen=True)
class Repeat:
    """One scored run of a configuration on the confirmation set.

    ``objective`` and ``draws_K`` decide: the score and its bootstrap draws, continued below 0 in a study that is told
    signed values.  ``score`` is shown; without an ``objective`` it decides, too.
    """

    trial: int  # of the confirmation study
    train_seed: int
    score: float
    draws_K: np.ndarray
    train_seconds: float
    trained_images: int  # training images that a run sees; its cost, independent of machine load
    objective: float | None = None

    @property
    def told(self) -> float:
        return self.score if self.objective is None else self.objective


@dataclass(frozen=True)
class ConfirmCandidate:
    """A trial of the search with its repeats.  ``trouble``: the reason for an infeasible repeat, else empty."""

    number: int
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    search_score: float
    search_se: float
    repeats: tuple[Repeat, ...]
    trouble: str = ""

    @property
    def score(self) -> float:
        return float(np.mean([r.score for r in self.repeats]))

    @property
    def objective(self) -> float:
        return float(np.mean([r.told for r in self.repeats]))

    @property
    def images(self) -> float:
        """Images that one training sees: the cost in the rule."""
        return float(np.mean([r.trained_images for r in self.repeats]))


@dataclass(frozen=True)
class ConfirmedRow:
    """One configuration in the outcome.

    ``behind``: the best score minus this one, paired by prompt; None for the best.  ``tied``: behind by no more
    than one standard error of that difference.
    """

    number: int
    settings: Mapping[str, Any]
    score: float
    low: float
    high: float
    repeats: tuple[float, ...]
    confirming_trials: tuple[int, ...]
    search_score: float
    p_best: float
    tied: bool
    over_trial0: Difference | None
    trained_images: float
    train_seconds: float
    behind: Difference | None = None


@dataclass(frozen=True)
class Confirmed:
    """The result of a confirmation.  ``beats_trial0`` is None if trial 0 has no score."""

    how: str
    winner: int
    config: Mapping[str, Any]
    rows: tuple[ConfirmedRow, ...]  # best first
    ties: tuple[int, ...]
    beats_trial0: bool | None
    trial0: int | None
    train_sd: float
    train_freedom: int
    shrinkage: (
        float | None
    )  # mean drop in score from search to confirmation over the selected trials (trial 0 is excluded)
    expected: float | None  # estimate of the best search score after correction for selection
    troubles: Mapping[int, str]

    @property
    def won(self) -> ConfirmedRow:
        return self.row(self.winner)

    def row(self, number: int) -> ConfirmedRow:
        return next(row for row in self.rows if row.number == number)


def decide(
    candidates: Sequence[ConfirmCandidate],
    trial0: int | None,
    how: str,
    searched: Sequence[float] = (),
    own_se: float = 0.0,
) -> Confirmed | None:
    """The outcome, or None if no configuration has a score.

    ``searched``: scores of all trials of the search.  ``own_se``: standard error of the noise that
    trials do not share.
    """
    sound = [c for c in candidates if not c.trouble and c.repeats]
    if not sound:
        return None
    baseline = next((c for c in sound if c.number == trial0), None)
    sd, freedom = repeat_sd([[r.score for r in c.repeats] for c in sound])
    draws_CK = _draws(sound, shown=True)
    values = [c.score for c in sound]
    told_C, told_CK = [c.objective for c in sound], _draws(sound, shown=False)
    order = sorted(range(len(sound)), key=lambda k: (-told_C[k], sound[k].number))
    best = order[0]
    # What was told to the sampler is compared: it also ranks scores that are shown as 0.
    behind = {k: difference(told_C[best], told_C[k], told_CK[best], told_CK[k]) for k in order[1:]}
    tied = [best, *(k for k in order[1:] if behind[k].mean <= behind[k].se)]
    over: dict[int, Difference] = {}
    if baseline is not None:
        zero = sound.index(baseline)
        over = {
            k: difference(values[k], values[zero], draws_CK[k], draws_CK[zero]) for k in order if k != zero
        }
    cheaper = [k for k in tied if sound[k].images <= CHEAPER * sound[best].images]
    winner = sound[min(cheaper or [best], key=lambda k: (sound[k].images, order.index(k)))]
    chances = p_best(told_CK)
    rows = tuple(
        ConfirmedRow(
            number=sound[k].number,
            settings=sound[k].settings,
            score=values[k],
            low=interval(draws_CK[k])[0],
            high=interval(draws_CK[k])[1],
            repeats=tuple(r.score for r in sound[k].repeats),
            confirming_trials=tuple(r.trial for r in sound[k].repeats),
            search_score=sound[k].search_score,
            p_best=float(chances[k]),
            tied=k in tied,
            over_trial0=over.get(k),
            trained_images=sound[k].images,
            train_seconds=float(np.mean([r.train_seconds for r in sound[k].repeats])),
            behind=behind.get(k),
        )
        for k in order
    )
    falls = [c.search_score - c.score for c in sound if c.number != trial0]
    return Confirmed(
        how=how,
        winner=winner.number,
        config=winner.config,
        rows=rows,
        ties=tuple(sound[k].number for k in tied),
        beats_trial0=any(d.low > 0 for d in over.values()) if baseline is not None else None,
        trial0=trial0 if baseline is not None else None,
        train_sd=sd,
        train_freedom=freedom,
        shrinkage=float(np.mean(falls)) if falls else None,
        expected=expected_best(searched, math.hypot(own_se, sd)) if own_se else None,
        troubles={c.number: c.trouble for c in candidates if c.trouble},
    )


def _draws(candidates: Sequence[ConfirmCandidate], *, shown: bool) -> np.ndarray:
    """(C, K) draws of the mean over the repeats, widened by their noise: of the score that is shown, or of the
    objective."""
    floor = 0.0 if shown else -math.inf
    means = [np.mean([np.maximum(r.draws_K, floor) for r in c.repeats], axis=0) for c in candidates]
    values = [[r.score if shown else r.told for r in c.repeats] for c in candidates]
    return with_repeat_noise(np.stack(means), [len(c.repeats) for c in candidates], *repeat_sd(values))


def expected_best(searched: Sequence[float], noise: float) -> float | None:
    """Estimate of the true value of a search's best score: the score shrunk towards the mean of the better half.

    The worse half is left out because bad configurations can score arbitrarily low.  ``noise``: standard
    error of the noise that trials do not share.
    """
    better = sorted(searched, reverse=True)[: (len(searched) + 1) // 2]
    return float(shrunken(better, [noise] * len(better))[0]) if len(better) >= 3 else None


def write_outcome(folder: StudyFolder, outcome: Confirmed, facts: Mapping[str, Any]) -> bool:
    """Write confirmed.json into the folder of the searched study.

    Returns False without writing if it would replace a confirmation with retraining by a rescoring.
    """
    before = read_json(folder.confirmed)
    if outcome.how == RESCORED and before is not None and before.get("how") == RETRAINED:
        return False
    won = outcome.won
    zero = outcome.row(outcome.trial0) if outcome.trial0 is not None else None
    values = {
        "study": folder.name,
        "how": outcome.how,
        "rule": RULE,
        "winner": outcome.winner,
        "config": dict(outcome.config),
        "settings": dict(won.settings),
        "score": won.score,
        "interval": [won.low, won.high],
        "trial0": zero and {"number": zero.number, "score": zero.score, "interval": [zero.low, zero.high]},
        "over_trial0": won.over_trial0 and asdict(won.over_trial0),
        "beats_trial0": outcome.beats_trial0,
        "ties": list(outcome.ties),
        "training_seed_sd": outcome.train_sd if outcome.train_freedom else None,
        "shrinkage": outcome.shrinkage,
        "expected": outcome.expected,
        "rows": [asdict(row) for row in outcome.rows],
        "infeasible": {str(number): why for number, why in outcome.troubles.items()},
        **facts,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomic(folder.confirmed, json.dumps(values, indent=1))
    return True
