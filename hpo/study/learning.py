"""Whether a search has learned anything, and if not, the likely cause and what to change.

Owns the state "nothing learned" and its texts.  Decided from the database, the trials' result.json, metrics.json
and train.jsonl.  Does not import torch, because ``hpo status`` uses it.  Does not own the score
(``evaluation.score``) or what a command does with the state.

Prompt following and likeness are anchored on the untrained base (prompt following 1, likeness 0; below 0 means
that the text, or the subject, is further away than chance, or than the base).  Both are differences to the base,
paired by prompt, and so are their standard errors.  A trial is *better than the base* if both parts are above 0 by
more than z standard errors.  The trial to be judged is the best of n, so z allows for n chances: one-sided 5 %,
Bonferroni (z = 2.33 for 5 trials, 2.94 for 30).  The score itself is of no use here, because it is clipped at 0.
In the recorded ranking study (tests/data/ranking_mini_sd15.jsonl) the trials that learned nothing have at most 1.8
standard errors, those that learned something at least 4.0.

*Nothing learned* needs five finished trials, infeasible ones included: with fewer, the sampler has hardly begun.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from evaluation.score import above_zero
from hpo.study.changes import BOTH, RATES, TOO_HIGH, TOO_LOW, changed_space, set_words
from hpo.study.config import StudyConfig, build_study
from hpo.study.folder import StudyFolder, TrialFolder, another_name, read_json
from hpo.study.nextsearch import next_search
from hpo.study.result import INFEASIBLE_REASONS
from hpo.study.standing import is_feasible
from hpo.study.which import parent_of
from trainer.bases import is_miniature
from trainer.errors import ConfigError
from trainer.files import read_records

if TYPE_CHECKING:
    import optuna

FEWEST = 5  # finished trials before anything is said
# Images seen that a subject usually needs.  1,000: the low end of published LoRA recipes (assumed).  Miniature:
# learns from 240 (docs/study.md).
USUAL_IMAGES, MINIATURE_IMAGES = 1000, 200
# ‖ΔW‖ / ‖W‖ below which a LoRA hardly changes the base.  Measured on the miniature (docs/study.md).
HARDLY_CHANGED = 0.01
FOLLOWING_LOST = 0.5  # prompt following below this, by more than its noise, is lost (assumed)
SKIPPED = 0.02  # share of steps with NaN or infinite values that counts as a sign (assumed)
AGAIN = "search again under another name"
NOT_THE_RATE = ("out_of_memory", "no_effect")  # infeasible, but not because of too much training


@dataclass(frozen=True)
class TrialEvidence:
    """What one finished trial says about learning.  ``likeness`` and ``following``: (value, standard error).

    ``loss``: means over the first and the last third of the steps, and the standard error of their difference.
    """

    number: int
    feasible: bool
    reason: str
    likeness: tuple[float, float] | None
    following: tuple[float, float] | None
    length: int  # epochs, or steps where steps are set
    updates: int
    images_seen: int
    skipped: int
    loss: tuple[float, float, float] | None
    weight_change: float | None
    rates: Mapping[str, float]

    def is_better(self, among: int) -> bool:
        """Whether the trial is better than the untrained base, as one of ``among`` trials."""
        return (
            self.feasible
            and self.likeness is not None
            and self.following is not None
            and above_zero((self.likeness, self.following), among)
        )

    @property
    def too_much(self) -> bool:
        """Signs of a rate that is too high: broken images, NaN, a rising loss, prompts that are not followed."""
        if not self.feasible and self.reason in INFEASIBLE_REASONS and self.reason not in NOT_THE_RATE:
            return True
        lost = self.following is not None and self.following[0] + 2 * self.following[1] < FOLLOWING_LOST
        return lost or self.skipped > SKIPPED * self.updates or self.loss_rises

    @property
    def loss_rises(self) -> bool:
        return self.loss is not None and self.loss[1] - self.loss[0] > 2 * self.loss[2]

    @property
    def too_little(self) -> bool:
        """Signs of a rate that is too low: the weights hardly changed, or no pixel did."""
        weak = self.weight_change is not None and self.weight_change < HARDLY_CHANGED
        return not self.too_much and (self.reason == "no_effect" or weak)


@dataclass(frozen=True)
class NothingLearned:
    """The state of a search without a trial that is better than the untrained base."""

    trials: int
    infeasible: int
    best: TrialEvidence | None
    causes: tuple[str, ...]
    changes: tuple[str, ...]  # values of --set
    advice: str
    command: str = ""  # the next search, if it is known how this one was started

    @property
    def headline(self) -> str:
        beside = f" ({self.infeasible} of them infeasible)" if self.infeasible else ""
        text = f"nothing learned: none of {self.trials} trials{beside} is better than the untrained base"
        if self.best is not None and self.best.likeness is not None:
            value, se = self.best.likeness
            text += (
                f"; the best likeness is {value:.3f} ± {se:.3f} (trial {self.best.number}), the base's is 0"
            )
        return text

    def lines(self) -> list[str]:
        """For a terminal: the state, the likely causes, and what to change."""
        return [
            self.headline,
            *(f"  likely cause: {cause}" for cause in self.causes),
            *(
                [f"  what to do: {AGAIN}:", f"  {self.command}"]
                if self.command
                else [f"  what to do: {self.advice}"]
            ),
        ]


def nothing_learned(study: optuna.Study, folder: StudyFolder) -> NothingLearned | None:
    """The state, or None if a trial is better than the untrained base or fewer than five trials are finished."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < FEWEST or parent_of(folder) is not None:  # confirmations and target trials are no searches
        return None
    likely_best = sorted(done, key=lambda t: -float(t.user_attrs.get("likeness", -math.inf)))
    for trial in likely_best:  # the first one usually settles it
        if _scored(trial, folder.trial(trial.number)).is_better(len(done)):
            return None
    found = [evidence(trial, folder.trial(trial.number)) for trial in done]
    if any(e.feasible and (e.likeness is None or e.following is None) for e in found):
        return None  # files of a trial are gone: it may have learned something
    return _state(found, folder)


def early_note(study: optuna.Study, folder: StudyFolder) -> str:
    """One sentence if there are too few trials for the state, and none of them is better than the untrained base."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = [_scored(trial, folder.trial(trial.number)) for trial in done]
    known = [e.likeness for e in found if e.likeness is not None]
    if not 0 < len(done) < FEWEST or len(known) < len(found) or any(e.is_better(len(done)) for e in found):
        return ""
    value, se = max(known)
    return (
        f"note: no trial is better than the untrained base by more than its noise so far (best likeness {value:.3f} "
        f"± {se:.3f}); a score above 0 can be chance"
    )


def require_learned(study: optuna.Study, folder: StudyFolder, command: str, *, anyway: bool) -> None:
    """Raise ConfigError if the search has learned nothing, unless ``anyway`` is set."""
    if anyway or (state := nothing_learned(study, folder)) is None:
        return
    causes = "; ".join(state.causes)
    raise ConfigError(
        f"study {folder.name}: {state.headline}" + (f". Likely cause: {causes}" if causes else ""),
        f"to {command} it all the same, add --anyway; better, {AGAIN}:"
        if state.command
        else f"{state.advice}. To {command} it all the same, add --anyway",
        (state.command,) if state.command else (),
    )


def learning_lines(study: optuna.Study, folder: StudyFolder) -> list[str]:
    """The state as lines for a terminal.  Empty if something was learned or it is too early to say."""
    state = nothing_learned(study, folder)
    return state.lines() if state else []


# Evidence


def evidence(trial: FrozenTrial, folder: TrialFolder) -> TrialEvidence:
    """Everything that is known about a finished trial.  Files of older versions lack the weights' change."""
    result, train = read_json(folder.result) or {}, (read_json(folder.params) or {}).get("train") or {}
    updates = int(result.get("steps") or 0)
    batch = int(train.get("train_batch_size") or 1) * int(train.get("gradient_accumulation_steps") or 1)
    losses = [float(row["loss"]) for row in read_records(folder.steps) if row.get("event") == "step"]
    change = result.get("weight_change")
    return _scored(
        trial,
        folder,
        length=int(train.get("max_train_steps") or train.get("max_train_epochs") or 0),
        updates=updates,
        images_seen=updates * batch,
        skipped=int(result.get("skipped_steps") or 0),
        loss=_thirds(losses),
        weight_change=None if change is None else float(change),
        rates={name: float(train[name]) for name in RATES if train.get(name)},
    )


def _scored(trial: FrozenTrial, folder: TrialFolder, **more: Any) -> TrialEvidence:
    metrics = read_json(folder.metrics) or {}
    nothing: dict[str, Any] = dict.fromkeys(("length", "updates", "images_seen", "skipped"), 0)
    nothing |= {"loss": None, "weight_change": None, "rates": {}}
    return TrialEvidence(
        number=trial.number,
        feasible=is_feasible(trial),
        reason=str(trial.user_attrs.get("reason", "")),
        likeness=_part(metrics, "likeness"),
        following=_part(metrics, "prompt_following"),
        **{**nothing, **more},
    )


def _part(metrics: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    try:
        found = float(metrics[name]), float(metrics[f"{name}_se"])
    except (KeyError, TypeError, ValueError):  # not scored, or edited by hand
        return None
    return found if math.isfinite(found[0]) and math.isfinite(found[1]) else None


def _thirds(losses: Sequence[float]) -> tuple[float, float, float] | None:
    """Means of the first and the last third, and the standard error of their difference.  None if too short."""
    count = len(losses) // 3
    if count < 3:
        return None
    first, last = np.array(losses[:count]), np.array(losses[-count:])
    if not (np.isfinite(first).all() and np.isfinite(last).all()):
        return None
    se = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / count)
    return float(first.mean()), float(last.mean()), se


# Causes and what to change


def needed_images(base: str) -> int:
    """Images seen that a LoRA usually needs on this base (``base`` as for ``load_base``)."""
    return MINIATURE_IMAGES if is_miniature(base) else USUAL_IMAGES


def _state(found: Sequence[TrialEvidence], folder: StudyFolder) -> NothingLearned:
    facts = read_json(folder.facts) or {}
    needed = needed_images(str(facts.get("base", "")))
    few = 0 < max(e.images_seen for e in found) < needed
    much, little = ([e for e in found if getattr(e, sign)] for sign in ("too_much", "too_little"))
    rate = _rate_sign(found, len(much), len(little))
    causes: list[str] = []
    if rate == TOO_HIGH:
        causes.append(f"learning rate too high: {_much_words(much)}")
    if few:
        causes.append(f"too few images seen: {_seen_words(found)}; {needed_words(needed)}")
    if rate == TOO_LOW:
        causes.append(f"learning rate too low: {_little_words(little)}")
    if rate == BOTH:
        causes.append(
            f"learning rates from too low to too high: {_little_words(little)}; {_much_words(much)}"
        )
    definition = _definition(facts)
    changes = changed_space(definition, found, needed if few else 0, rate) if definition else ()
    scored = [e for e in found if e.feasible and e.likeness]
    best = max(scored, key=lambda e: (e.likeness or (0.0, 0.0))[0], default=None)
    if not causes:
        causes.append(
            "not the length or the rate (enough images seen, the weights changed, the loss did not rise): "
            "perhaps the captions lack the trigger word, or the references show something else"
        )
    return NothingLearned(
        trials=len(found),
        infeasible=sum(not e.feasible for e in found),
        best=best,
        causes=tuple(causes),
        changes=changes,
        advice=_advice(folder, changes, few, rate),
        command=next_search(folder, changes),
    )


def _rate_sign(found: Sequence[TrialEvidence], much: int, little: int) -> str:
    """What most trials say about the rate.  BOTH: the right one may lie between those that were tried."""
    if 2 * max(much, little) < len(found):
        return ""
    if 5 * min(much, little) >= len(found):
        return BOTH
    return TOO_HIGH if much > little else TOO_LOW


def needed_words(needed: int) -> str:
    if needed == MINIATURE_IMAGES:
        return f"a miniature usually needs {needed}+ images seen"
    return f"subjects usually need {needed:,}+ images seen"


def span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _seen_words(found: Sequence[TrialEvidence]) -> str:
    ran = [e for e in found if e.updates]
    return f"{span([e.updates for e in ran])} updates a trial, {span([e.images_seen for e in ran])} images"


def _much_words(much: Sequence[TrialEvidence]) -> str:
    reasons = sorted({e.reason for e in much if e.reason})
    signs = [f"infeasible ({', '.join(reasons)})"] if reasons else []
    signs += ["the loss rises"] if any(e.loss_rises for e in much) else []
    signs += ["steps are skipped because of NaN"] if any(e.skipped for e in much) else []
    lost = [e for e in much if e.feasible and e.following and e.following[0] < FOLLOWING_LOST]
    signs += ["prompts are no longer followed"] if lost else []
    return f"{_trials(len(much))} broken: {', '.join(signs)}"


def _little_words(little: Sequence[TrialEvidence]) -> str:
    changed = [e.weight_change for e in little if e.weight_change is not None]
    text = f"{_trials(len(little))} hardly changed the weights"
    if changed:
        text += f" (by at most {_percent(max(changed))} %)"
    if all(e.loss is not None and abs(e.loss[1] - e.loss[0]) <= 2 * e.loss[2] for e in little):
        text += " or the loss"
    return text


def _percent(share: float) -> str:
    """0.014 % as 0.014: two digits, and no exponent."""
    return f"{100 * share:.2g}" if share >= 1e-6 else "0.0001"


def _trials(count: int) -> str:
    return "one trial" if count == 1 else f"{count} trials"


def _advice(folder: StudyFolder, changes: Sequence[str], few: bool, rate: str) -> str:
    if changes:
        return f"search again {another_name(set_words(changes))}"
    wishes = ["longer trials"] if few else []
    wishes += {TOO_LOW: ["a higher rate"], TOO_HIGH: ["a lower rate"], BOTH: ["a narrower rate"]}.get(
        rate, []
    )
    if wishes:
        return f"search again {another_name()}, with {' and '.join(wishes)} in [space]"
    return f"look at the images (hpo dashboard {folder.words}), and check the captions with hpo dataset check"


def _definition(facts: Mapping[str, Any]) -> StudyConfig | None:
    """The study's definition; None for studies of versions that did not store it."""
    try:
        return build_study(str(facts["definition"]), facts["sections"])
    except (ConfigError, KeyError, TypeError):
        return None
