"""Samplers: which of Optuna's samplers proposes a trial, and with which seed.

Owns ``[search] sampler`` in terms of Optuna.  Does not own when a trial is proposed (``hpo.search.sampled``) or the
names (``hpo.study``).

A sampler is made anew for each trial, from the study's seed and the trial's number.  So a resumed study gets the same
suggestions as an uninterrupted one, and workers get different ones.

CMA-ES keeps its state as a pickle in Optuna's storage, and this tool opens no pickle of a database that may come from
elsewhere.  Its state is made anew in memory instead, from the values and results of the finished trials.
"""

from __future__ import annotations

import importlib.util
import zlib
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from hpo.search.balance import Balance, proposing
from hpo.study import SAMPLERS
from trainer.errors import MachineError, install_with

# What a sampler needs beside Optuna; the extra [samplers] has all of it.
MODELS = ("tpe", "tpe-independent", "gp")  # samplers with a model that balance can show the rate to
NEEDS = {"gp": ("scipy",), "qmc": ("scipy",), "cmaes": ("cmaes",)}


def startup_trials(total: int) -> int:
    """Random trials before a model starts: 10 of 30 (5 were worse in simulation), a third for smaller studies."""
    return min(10, max(5, total // 3))


def require_sampler(name: str) -> None:
    """Raise MachineError if a library that the sampler needs is not installed."""
    for library in NEEDS.get(name, ()):
        if importlib.util.find_spec(library) is None:
            raise MachineError(
                f"the sampler {name} needs {library}, which is not installed",
                f"{install_with('samplers')}; or use --set search.sampler=tpe",
            )


def uses_model(name: str, study: Any, total: int, learned: bool) -> bool:
    """Whether a model of the finished trials proposes the next one.  qmc and cmaes keep to their own sequence."""
    if name not in MODELS or not learned:
        return False
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return len(done) >= startup_trials(total)


def make_sampler(
    seed: int,
    number: int,
    total: int,
    *,
    learned: bool = True,
    name: str = "tpe",
    study: Any = None,
    forked: str = "",
    balance: Balance | None = None,
) -> BaseSampler:
    """The sampler of trial ``number``.

    ``learned``: whether some trial is above the untrained base.  Until one is, there is nothing to model, and the
    proposals stay random: a model of noise keeps to the place where the search began (docs/evaluation.md).
    ``study``: the optuna.Study, whose finished trials CMA-ES starts from.  ``forked``: the name of a study that took
    over trials; its random suggestions would repeat those of its source, at the same place in the space.
    ``balance``: how the sampler's model sees the learning rate.  Random proposals fill the space as it is.
    """
    if balance is not None and uses_model(name, study, total, learned):
        inner = make_sampler(seed, number, total, learned=learned, name=name, forked=forked)
        return balance.sampler(inner, study, seed)
    own = [zlib.crc32(forked.encode())] if forked else []
    state = int(np.random.SeedSequence([seed, number, *own]).generate_state(1)[0])
    seed = int(np.random.SeedSequence([seed, *own]).generate_state(1)[0]) if own else seed
    startup = startup_trials(total) if learned else number + 1
    if name in ("tpe", "tpe-independent"):  # Optuna 5's defaults, written out
        return optuna.samplers.TPESampler(
            seed=state,
            n_startup_trials=startup,
            n_ei_candidates=24,
            multivariate=name == "tpe",
            group=False,
            constant_liar=True,
        )
    if name == "gp":
        return optuna.samplers.GPSampler(seed=state, n_startup_trials=startup, deterministic_objective=False)
    if name == "qmc":  # the sequence goes on by an index in the storage, so its seed is the study's
        return optuna.samplers.QMCSampler(
            seed=seed,
            scramble=True,
            independent_sampler=RandomSampler(seed=state),
            warn_independent_sampling=False,
            warn_asynchronous_seeding=False,
        )
    assert name in SAMPLERS, name
    if name == "cmaes" and learned and study is not None:
        return _next_of_cmaes(state, study)
    return RandomSampler(seed=state)


def _next_of_cmaes(state: int, study: optuna.Study) -> BaseSampler:
    """A sampler that proposes what CMA-ES proposes after the study's finished trials, in the order of their numbers.

    Choices have no order, so they are drawn at random.
    """
    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]
    if not done:
        return RandomSampler(seed=state)
    space = done[0].distributions
    sampler = optuna.samplers.CmaEsSampler(
        seed=state % 2**31,  # of study and number: workers that ask at once draw different points
        n_startup_trials=1,
        independent_sampler=RandomSampler(seed=state),
        warn_independent_sampling=False,
    )
    memory = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in done:
        if trial.distributions.keys() == space.keys():
            memory.enqueue_trial(trial.params)
            memory.tell(memory.ask(space), trial.value)
    return proposing(memory.ask(space).params, state)
