"""Searches replayed on the recorded table, at equal compute: what the tool ends with, against plain Optuna.

    python -m tests.bench.replay_search [--file CELLS] [--surfaces 6] [--seeds 4] [--budgets 10 20 30]

Every search runs on draws of ``table_surface``, for the three subjects, and may use the compute of so many whole
trials: a training sample costs 1, an image ``IMAGE_COST`` (measured, from the table's seconds).  A whole trial is one
of mean length with all its images.  The tool's searches pay for trial 0 and for their own confirmation out of it.
Regret is the best score that the surface has anywhere, less that of the settings the search ends with, both without
noise.  The intervals are over pairs of draw and subject, by bootstrap; the seeds within one are averaged first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from hpo.search.balance import Balance
from hpo.search.samplers import make_sampler, startup_trials
from hpo.study import Space
from hpo.study.hours import CONFIRM_SHARE, LEAST, ROUNDS, Round
from hpo.study.space.space import Parameter
from hpo.transfer.probes.shifted import improvement
from hpo.transfer.probes.surrogate import Surrogate, fit
from tests.bench.record_table import CELLS, IMAGES, LENGTH, QUARTERS, SUBJECTS, definition, recorded
from tests.bench.table_surface import Run, Surface, Table, coordinates, domains, nearby, random_settings, to_z

NOISE_OF_LOOK = 0.1  # sd of the score of 15 images (table: standard errors of 46 are 0.03 to 0.1)
SHOWN = 46  # images of a whole trial: 16 prompts, two seeds for most
CONFIRMED = 44  # of a run of the confirmation
USUAL = {**definition().baseline, LENGTH: 480}
EPOCH = 240  # images seen in one epoch of the demo subjects
# Settings that the small study keeps
MINOR = ("noise_offset", "network_dropout", "min_snr_gamma", "gradient_accumulation_steps", "warmup_ratio")
RAW: Mapping[str, optuna.distributions.BaseDistribution] = {
    # the plain space of a kohya user: every setting as sd-scripts names it, no ratios
    "learning_rate": optuna.distributions.FloatDistribution(1e-4, 3e-2, log=True),
    "text_encoder_lr": optuna.distributions.FloatDistribution(5e-6, 3e-2, log=True),
    "network_dim": optuna.distributions.CategoricalDistribution((2, 4, 8, 16, 32)),
    "network_alpha": optuna.distributions.CategoricalDistribution((1, 2, 4, 8, 16, 32)),
    "lr_scheduler": optuna.distributions.CategoricalDistribution(
        ("constant", "cosine", "cosine_with_restarts_3", "polynomial")
    ),
    "warmup_ratio": optuna.distributions.FloatDistribution(0.0, 0.15),
    "train_batch_size": optuna.distributions.CategoricalDistribution((1, 2, 4, 8)),
    "gradient_accumulation_steps": optuna.distributions.CategoricalDistribution((1, 2)),
    "min_snr_gamma": optuna.distributions.CategoricalDistribution((0, 1, 5, 10)),
    "noise_offset": optuna.distributions.FloatDistribution(0.0, 0.1),
    "network_dropout": optuna.distributions.FloatDistribution(0.0, 0.3),
    "max_train_epochs": optuna.distributions.IntDistribution(1, 5),
}


def from_raw(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the table's terms.  Ratios outside its ranges are the nearest recorded ones."""
    found = {name: values[name] for name in domains() if name in values}
    ratio = values["text_encoder_lr"] / values["learning_rate"]
    alpha = values["network_alpha"] / values["network_dim"]
    return found | {
        "text_encoder_lr_ratio": float(np.clip(ratio, 0.05, 1.0)),
        "network_dim_log2": int(np.log2(values["network_dim"])),
        "network_alpha_ratio": float(np.clip(alpha, 0.25, 2.0)),
        LENGTH: EPOCH * values["max_train_epochs"],
    }


def moved(values: dict[str, Any], moves: Sequence[float]) -> dict[str, Any]:
    """The settings, with the rate that is meant by a rate for the usual settings."""
    if not moves:
        return values
    batch = values["train_batch_size"] * values["gradient_accumulation_steps"]
    sizes = (
        values[LENGTH] / USUAL[LENGTH],
        batch / USUAL["train_batch_size"],
        values["network_alpha_ratio"] / USUAL["network_alpha_ratio"],
        2.0 ** (values["network_dim_log2"] - USUAL["network_dim_log2"]),
    )
    factor = float(np.prod([size**power for size, power in zip(sizes, moves, strict=True)]))
    domain = domains()["learning_rate"]
    rate = values["learning_rate"] * factor
    return {**values, "learning_rate": float(np.clip(rate, domain.low, domain.high))}


@dataclass(frozen=True)
class Way:
    """One way to search.  ``looks``: quarters of the run after which a pruner sees ``look_images`` images."""

    name: str
    sampler: str = "tpe"  # of the tool; "plain": optuna.samplers.TPESampler() as a user makes it
    raw: bool = False
    confirms: bool = True
    baseline: bool = True
    pruner: Callable[[], optuna.pruners.BasePruner] | None = None
    looks: tuple[int, ...] = ()
    look_images: int = 15
    share: float = CONFIRM_SHARE  # of the compute, at most, for the confirmation
    startup: int | None = None  # random trials before the model starts; None: the tool's number
    first: str = "random"  # who proposes them
    fixed: tuple[str, ...] = ()  # settings that keep the usual value
    balanced: bool = False  # the sampler sees the rate as in hpo.search.balance
    moves: tuple[
        float, ...
    ] = ()  # the search's rate is that times these powers of length, batch, alpha ratio, rank
    short_start: float = 1.0  # the random trials have lengths of at most this part of the (logarithmic) range
    by_model: bool = False  # the surrogate's mean, not the noisy score, says which trials are the best
    remembers: bool = False  # whether the search's own score counts in the confirmation


class Behind(optuna.pruners.BasePruner):
    """Stop what is certainly behind: below the best trial's score at the same look by more than ``errors`` standard
    errors of such a difference, or below ``floor``."""

    def __init__(self, noise: float, errors: float = 3.0, floor: float = -0.25) -> None:
        self.noise, self.errors, self.floor = noise, errors, floor

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        step = trial.last_step
        assert step is not None
        own = trial.intermediate_values[step]
        if own < self.floor:
            return True
        if self.errors == np.inf:
            return False
        done = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
        if not done:
            return False
        best = max(done, key=lambda t: t.values[0])
        there = best.intermediate_values.get(step)
        return there is not None and own < there - self.errors * self.noise * 2**0.5


RANDOM = Way("random, whole trainings", "random", raw=True, confirms=False, baseline=False)
PLAIN = Way("TPESampler() on kohya's settings", "plain", raw=True, confirms=False, baseline=False)
TOOL = Way("the tool")
WAYS = (
    RANDOM,
    PLAIN,
    TOOL,
    replace(TOOL, name="· without confirmation", confirms=False),
    replace(TOOL, name="· confirmation at most 1/5", share=0.2),
    replace(TOOL, name="· confirmation at most 1/5, with the search's score", share=0.2, remembers=True),
    replace(TOOL, name="· confirmation at most 1/10", share=0.1),
    replace(TOOL, name="· without trial 0", baseline=False),
    replace(TOOL, name="· 5 random trials", startup=5),
    replace(TOOL, name="· 3 random trials", startup=3),
    replace(TOOL, name="· begins with Sobol", first="qmc"),
    replace(TOOL, name="· begins with 5 Sobol", first="qmc", startup=5),
    replace(TOOL, name="· on kohya's settings", raw=True),
    replace(TOOL, name="· balanced rate", balanced=True),
    replace(TOOL, name="· rate / √batch", moves=(0, 0.5, 0, 0)),
    replace(TOOL, name="· rate, fitted powers", moves=(-0.7, 0.5, -0.7, -0.5)),
    replace(TOOL, name="· short random trials", short_start=0.4),
    replace(TOOL, name="· surrogate", sampler="surrogate", share=0.1),
    replace(TOOL, name="· surrogate, 6 random", sampler="surrogate", share=0.1, startup=6),
    replace(TOOL, name="· surrogate, alone", sampler="surrogate", confirms=False, by_model=True),
    replace(TOOL, name="· gp, confirmation at most 1/10", sampler="gp", share=0.1),
    replace(TOOL, name="· surrogate, short random trials", sampler="surrogate", short_start=0.4),
    replace(TOOL, name="· surrogate, which ranks", sampler="surrogate", by_model=True, share=0.1),
    replace(TOOL, name="· tpe-independent", sampler="tpe-independent"),
    replace(TOOL, name="· gp", sampler="gp"),
    replace(TOOL, name="· cmaes", sampler="cmaes"),
    replace(TOOL, name="· qmc", sampler="qmc"),
    replace(TOOL, name="· random", sampler="random"),
    replace(
        TOOL, name="· stops what is broken at ½", pruner=lambda: Behind(NOISE_OF_LOOK, np.inf), looks=(2,)
    ),
    replace(TOOL, name="· stops what is 3 se behind at ½", pruner=lambda: Behind(NOISE_OF_LOOK), looks=(2,)),
    replace(TOOL, name="· the same at ¼ and ½", pruner=lambda: Behind(NOISE_OF_LOOK), looks=(1, 2)),
    replace(TOOL, name="· the same at ¾", pruner=lambda: Behind(NOISE_OF_LOOK), looks=(3,)),
    replace(
        TOOL,
        name="· MedianPruner at ½",
        pruner=lambda: optuna.pruners.MedianPruner(n_startup_trials=5),
        looks=(2,),
    ),
    replace(
        TOOL,
        name="· SuccessiveHalvingPruner ¼ ½",
        pruner=lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        looks=(1, 2),
    ),
)


@dataclass
class Purse:
    """The compute of one search, in training samples."""

    left: float
    image_cost: float

    def pay(self, samples: float, images: float) -> None:
        self.left -= samples + images * self.image_cost


@dataclass(frozen=True)
class Ended:
    """What a search ended with."""

    settings: Mapping[str, Any]
    trials: int
    pruned: int
    tried: tuple[tuple[Mapping[str, Any], float], ...] = ()  # settings and measured score of each whole trial


def mean_cost(image_cost: float) -> float:
    """Of a whole trial: the mean length in the space, and its images."""
    low, high = IMAGES.low, IMAGES.high
    return (high - low) / float(np.log(high / low)) + SHOWN * image_cost


def search(way: Way, surface: Surface, trials: float, image_cost: float, seed: int) -> Ended:
    """Replay one search with the compute of ``trials`` whole trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng([seed, 11])
    whole = mean_cost(image_cost)
    purse = Purse(trials * whole, image_cost)
    chosen = _round(trials, way.share) if way.confirms else None
    reserve = _confirm_cost(chosen, whole, image_cost) if chosen else 0.0
    distributions = _distributions(way)
    sampler = optuna.samplers.TPESampler(seed=seed) if way.sampler == "plain" else None
    pruner = way.pruner() if way.pruner else optuna.pruners.NopPruner()
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    if way.baseline and not way.raw:
        study.enqueue_trial({name: value for name, value in USUAL.items() if name in distributions})
    kept = {name: USUAL[name] for name in way.fixed}

    def read(params: Mapping[str, Any]) -> dict[str, Any]:
        return from_raw(params) if way.raw else moved({**kept, **params}, way.moves)

    expected = max(2, round((purse.left - reserve) / whole))
    while True:
        done = study.get_trials(deepcopy=False)
        if way.sampler != "plain":
            study.sampler = sampler_of(way, seed, study, expected)
        if purse.left - reserve < whole / 2 and done:  # on average, all is used
            break
        if way.short_start < 1 and 0 < len(done) < startup_trials(expected):
            reach = (IMAGES.high / IMAGES.low) ** (way.short_start * rng.random())
            study.enqueue_trial({LENGTH: int(IMAGES.low * reach)})
        if way.sampler == "surrogate" and len(complete := _scored(study)) >= (
            way.startup or startup_trials(expected)
        ):
            study.enqueue_trial(_by_surrogate(complete, distributions, rng))
        trial = study.ask(distributions)
        settings = read(trial.params)
        _run_trial(way, study, trial, surface.run(settings, rng), purse, settings[LENGTH])
    finished = [t for t in study.get_trials(deepcopy=False) if t.value is not None]
    complete = [t for t in finished if t.state == optuna.trial.TrialState.COMPLETE]
    pruned = len(finished) - len(complete)
    ranked = sorted(complete, key=lambda t: -t.values[0])
    if way.by_model:
        model = _fitted(complete)[2]
        means = model.mean(model.x_ND)
        ranked = [complete[i] for i in np.argsort(-means)]
    tried = tuple((read(t.params), float(t.values[0])) for t in complete)
    if chosen is None or len(ranked) < 2:
        return Ended(read(ranked[0].params), len(finished), pruned, tried)

    def confirmed(trial: optuna.trial.FrozenTrial) -> float:
        known = [trial.values[0]] if way.remembers else []
        return float(
            np.mean(
                [*known, *(surface.run(read(trial.params), rng).score(QUARTERS) for _ in range(chosen.seeds))]
            )
        )

    best = max(ranked[: chosen.top], key=confirmed)
    return Ended(read(best.params), len(finished), pruned, tried)


def _distributions(way: Way) -> Mapping[str, optuna.distributions.BaseDistribution]:
    if way.raw:
        return RAW
    return {name: domain.distribution() for name, domain in domains().items() if name not in way.fixed}


@cache
def balance_without(fixed: tuple[str, ...]) -> Balance | None:
    """How the tool's sampler sees the rate of the table's space."""
    space = Space((*definition().space, Parameter(LENGTH, IMAGES))).without(set(fixed))
    baseline = {name: value for name, value in USUAL.items() if name not in fixed}
    return Balance.between(
        space, definition().train.with_values({"max_train_epochs": None, "max_train_steps": 120}), baseline
    )


def sampler_of(way: Way, seed: int, study: optuna.Study, expected: int) -> optuna.samplers.BaseSampler:
    done = study.get_trials(deepcopy=False)
    learned = any(t.value is not None and t.value > 0.1 for t in done)
    name = way.sampler
    if way.startup is not None:
        learned, expected = learned and len(done) >= way.startup, 3 * way.startup
    name = "tpe" if name == "surrogate" else name
    if way.first != "random" and not (learned and len(done) >= (way.startup or startup_trials(expected))):
        name = way.first
    balance = None if way.raw or not way.balanced else balance_without(way.fixed)
    return make_sampler(seed, len(done), expected, learned=learned, name=name, study=study, balance=balance)


def _scored(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.value is not None]


def _fitted(done: Sequence[optuna.trial.FrozenTrial]) -> tuple[Balance, list[dict[str, Any]], Surrogate]:
    """The trials with the balanced rate, and the Gaussian process of the target trials fitted to them."""
    balance = balance_without(())
    assert balance is not None
    values = [balance.seen({**USUAL, **t.params}) for t in done]
    y_N = to_z(np.array([t.values[0] for t in done]))
    return balance, values, fit(np.array([coordinates(v) for v in values]), y_N.tolist(), [0.0] * len(y_N))


def _by_surrogate(
    done: Sequence[optuna.trial.FrozenTrial],
    distributions: Mapping[str, optuna.distributions.BaseDistribution],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The place with the highest expected improvement over the best mean of a trial."""
    balance, values, model = _fitted(done)
    means = model.mean(model.x_ND)
    top = [values[i] for i in np.argsort(means)[-5:]]
    places = random_settings(rng, 400) + [
        nearby(rng, one, w) for one in top for w in (0.3, 0.1, 0.03) for _ in range(30)
    ]
    x_MD = np.array([coordinates(v) for v in places])
    sd_M = np.sqrt(np.maximum(model.kernel.amplitude - (model.half(x_MD) ** 2).sum(0), 1e-12))
    gains_M = improvement(model.mean(x_MD) - means.max(), sd_M)
    best = balance.stored(places[int(np.argmax(gains_M))])
    return {name: best[name] for name in distributions}


def _run_trial(
    way: Way, study: optuna.Study, trial: optuna.Trial, run: Run, purse: Purse, length: float
) -> None:
    at = 0.0
    for look in way.looks:
        purse.pay((look / QUARTERS - at) * length, way.look_images)
        at = look / QUARTERS
        trial.report(run.score(look, way.look_images / SHOWN), look)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
    purse.pay((1 - at) * length, SHOWN)
    study.tell(trial, run.score(QUARTERS))


def _confirm_cost(what: Round, whole: float, image_cost: float) -> float:
    training = whole - SHOWN * image_cost
    return what.runs * (training + CONFIRMED * image_cost)


def _round(trials: float, share: float) -> Round:
    """The confirmation that --hours plans."""
    fits = (r for r in ROUNDS if r.runs <= share * trials)
    return next(fits, LEAST)


def image_cost(path: Path) -> float:
    """Training samples that cost as much as drawing and scoring one image: medians of the recorded seconds."""
    per_sample, per_image = [], []
    for key, row in recorded(path).items():
        if key[0] != "mini-sd15" or len(row["seconds"]) < QUARTERS:
            continue
        seen = row["suggested"][LENGTH]
        per_sample.append(sum(s[0] for s in row["seconds"]) / seen)
        per_image.append(sum(row["seconds"][-1][1:]) / SHOWN)
    return float(np.median(per_image) / np.median(per_sample))


def interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=CELLS)
    parser.add_argument("--surfaces", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument("--ways", nargs="+", help="only ways whose name contains one of these")
    args = parser.parse_args(argv)
    table = Table(args.file)
    model, cost = table.model, image_cost(args.file)
    seen = model.left_out("mini-sd15")
    print(
        f"{model.cells.runs} cells; an image costs {cost:.1f} samples; left out: r = {seen.correlation:.2f}"
    )
    surfaces = [Surface(model, s, d) for d in range(args.surfaces) for s in range(len(SUBJECTS))]
    ways = [w for w in WAYS if not args.ways or any(a in w.name for a in args.ways)]
    for budget in args.budgets:
        print(
            f"\n## {budget} whole trials\n\n| way | regret | 95 % | of plain TPE's | trials | stopped | s |"
        )
        print("|---|---|---|---|---|---|---|")
        against: NDArray[np.float64] | None = None
        for way in ways:
            began = time.monotonic()
            ends = [
                [search(way, s, budget, cost, at * args.seeds + n) for n in range(args.seeds)]
                for at, s in enumerate(surfaces)
            ]
            regret = np.array(
                [
                    np.mean([s.best - s.score(e.settings) for e in of])
                    for s, of in zip(surfaces, ends, strict=True)
                ]
            )
            if way == PLAIN:
                against = regret
            low, high = interval(regret)
            share = ""
            if against is not None and way != PLAIN:
                share = f"{regret.mean() / against.mean():.2f} ({_ratio(regret, against)})"
            flat = [e for of in ends for e in of]
            print(
                f"| {way.name} | {regret.mean():.3f} | {low:.3f} … {high:.3f} | {share} "
                f"| {np.mean([e.trials for e in flat]):.1f} | {np.mean([e.pruned for e in flat]):.1f} "
                f"| {time.monotonic() - began:.0f} |",
                flush=True,
            )


def _ratio(regret: NDArray[np.float64], against: NDArray[np.float64]) -> str:
    rng = np.random.default_rng(1)
    at = rng.integers(len(regret), size=(4000, len(regret)))
    low, high = np.quantile(regret[at].mean(axis=1) / against[at].mean(axis=1), [0.025, 0.975])
    return f"{low:.2f} … {high:.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
