"""Checkpoints: which checkpoint of a run to keep, and whether the run was too short or too long.

Owns the choice, which is a pure function of the scores. Does not own sampling and scoring
(``evaluation.score.score``), finding files or printing (``hpo.judge.evaluate``).

The choice is the earliest checkpoint within one standard error of the best (Breiman et al. 1984, 3.4.3): more
training without a visible gain is not worth the loss in prompt following and variety. The standard error is
the *paired* one: that of the difference to the best checkpoint over the same prompts. Two checkpoints of a
run share most of their noise, so their own error bars say little about their difference. The curve is not
smoothed over neighbouring checkpoints. Instead the best few are scored again on prompts and seeds that played
no part in the choice, which removes the luck without mixing a checkpoint with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.score import Anchors, Difference, Score, above_zero, paired_difference
from trainer.errors import ModelFileError

FINALISTS = 3  # scored again on the confirmation prompts (assumed)
UNDERTRAINED, OVERTRAINED, BETWEEN, SINGLE = "undertrained", "overtrained", "between", "single"
NO_BETTER = "no better than the untrained base"
LOOK = "look at the images: lower learning_rate if they are broken, raise it or train longer if they look untrained"
# Why a point has no score, if the reason says something about the run's length.
UNCHANGED = "unchanged"  # its images equal the untrained base's
SPOILED = "spoiled"  # its images show nothing, are copies, or all look alike


@dataclass(frozen=True)
class CheckpointPoint:
    """One checkpoint on the curve. If it has no score, ``reason`` says why it cannot be chosen, and ``cause``
    is UNCHANGED or SPOILED, or empty if the reason says nothing about the training (a damaged file)."""

    name: str
    epoch: int | None
    step: int | None
    score: Score | None
    reason: str = ""
    cause: str = ""


@dataclass(frozen=True)
class CheckpointChoice:
    """Indices into the points, in the order of training.

    ``lead[n]`` is the best score minus the score of point n, paired by prompt; None if n has no score or is
    the best. ``within`` are the points within one standard error of the best.
    """

    best: int
    chosen: int
    within: tuple[int, ...]
    lead: tuple[Difference | None, ...]


@dataclass(frozen=True)
class CheckpointVerdict:
    """One word about the run's length, the reason, and what to do."""

    word: str
    why: str
    advice: str


def choose(points: Sequence[CheckpointPoint], anchors: Anchors) -> CheckpointChoice:
    """The best point, and the earliest within one paired standard error of it.

    Raises ModelFileError if no point has a score.
    """
    scored = {n: point.score for n, point in enumerate(points) if point.score is not None}
    if not scored:
        reasons = sorted({point.reason for point in points})
        raise ModelFileError(
            f"none of {len(points)} checkpoints can be scored: {'; '.join(reasons)}",
            "a lower learning_rate if their images show nothing; else train them again",
        )
    best = max(scored, key=lambda n: (scored[n].objective, -n))
    lead = tuple(
        paired_difference(scored[best], scored[n], anchors) if n in scored and n != best else None
        for n in range(len(points))
    )
    within = tuple(n for n in scored if n == best or _is_within(lead[n]))
    return CheckpointChoice(best, min(within), within, lead)


def _is_within(difference: Difference | None) -> bool:
    return difference is not None and difference.mean <= difference.se


def finalists(
    points: Sequence[CheckpointPoint], choice: CheckpointChoice, count: int = FINALISTS
) -> tuple[int, ...]:
    """The points to score again, in training order: the chosen one, the best, and the next best."""
    scored = [n for n, point in enumerate(points) if point.score is not None]
    by_objective = sorted(scored, key=lambda n: -_score(points[n]).objective)
    ranked = dict.fromkeys([choice.chosen, choice.best, *by_objective])
    return tuple(sorted(list(ranked)[:count]))


def _score(point: CheckpointPoint) -> Score:
    assert point.score is not None
    return point.score


def verdict(
    points: Sequence[CheckpointPoint], choice: CheckpointChoice, *, finished: bool = True
) -> CheckpointVerdict:
    """Whether the run was too short or too long, from the position of the best checkpoint on the curve.

    A damaged file is not part of the curve, so it is neither the first nor the last checkpoint.
    """
    if _score(points[choice.best]).value <= 0:
        return CheckpointVerdict(
            NO_BETTER, "no checkpoint scores above 0, the score of the untrained base", LOOK
        )
    if len(points) == 1:
        return CheckpointVerdict(
            SINGLE,
            "the run saved one checkpoint, so there is no curve",
            "train with save_every_n_epochs, for example --set save_every_n_epochs=2",
        )
    best = points[choice.best].name
    known = [n for n, point in enumerate(points) if point.score is not None or point.cause == UNCHANGED]
    first, last = known[0], known[-1]
    spoiled = next((p for p in points[choice.best + 1 :] if p.cause == SPOILED), None)
    if choice.best == last and spoiled:
        return CheckpointVerdict(
            OVERTRAINED,
            f"{best} is the best; a later checkpoint is unusable: {spoiled.name}: {spoiled.reason}",
            "halve learning_rate (assumed) or train fewer epochs",
        )
    if len(known) == 1:
        return CheckpointVerdict(
            SINGLE,
            f"only {best} can be scored, so there is no curve",
            "to find out whether the run was too long or too short, train the other checkpoints again",
        )
    if choice.best == last:
        return _at_the_end(points, choice, _place("last", last == len(points) - 1), finished)
    if choice.best == first:
        return _at_the_start(points, choice, _place("first", first == 0), last)
    return CheckpointVerdict(
        BETWEEN,
        f"{best} is the best; it is neither the first nor the last checkpoint",
        "the length is right for this learning_rate",
    )


def no_better_sentence(point: CheckpointPoint, among: int = 1) -> str:
    """A sentence if the checkpoint, the best of ``among``, is not better than the untrained base by more than
    the noise (``above_zero``).  Else empty.

    The score is clipped at 0, so its two parts decide.
    """
    score = point.score
    assert score is not None
    parts = (score.likeness, score.likeness_se), (score.prompt_following, score.prompt_following_se)
    if above_zero(parts, among):
        return ""
    (like, like_se), (follow, follow_se) = parts
    return (
        f"warning: {point.name} is no better than the untrained base within the noise: likeness {like:.3f} ± "
        f"{like_se:.3f} (base: 0), prompt following {follow:.3f} ± {follow_se:.3f} (base: 1); {LOOK}"
    )


def _place(which: str, of_all: bool) -> str:
    return f"the {which} checkpoint" + ("" if of_all else " that can be scored")


def _at_the_end(
    points: Sequence[CheckpointPoint], choice: CheckpointChoice, place: str, finished: bool
) -> CheckpointVerdict:
    best = points[choice.best].name
    if not finished:
        return CheckpointVerdict(
            UNDERTRAINED, f"the newest checkpoint, {best}, is the best", "let the training run to its end"
        )
    why = f"{place}, {best}, is the best"
    if choice.chosen != choice.best:
        return CheckpointVerdict(
            UNDERTRAINED,
            f"{why}, though {points[choice.chosen].name} cannot be told apart from it",
            "the curve is nearly flat at its end: more epochs would gain little",
        )
    return CheckpointVerdict(
        UNDERTRAINED,
        why,
        "the curve still rises: raise max_train_epochs by half (assumed), or raise learning_rate",
    )


def _at_the_start(
    points: Sequence[CheckpointPoint], choice: CheckpointChoice, place: str, last: int
) -> CheckpointVerdict:
    why = f"{place}, {points[choice.best].name}, is the best"
    if last in choice.within:
        return CheckpointVerdict(
            OVERTRAINED,
            f"{why}, though {points[last].name} cannot be told apart from it",
            "the curve is flat: the training after it made no measurable difference",
        )
    return CheckpointVerdict(
        OVERTRAINED,
        why,
        "halve learning_rate (assumed) or train fewer epochs, and save more often (save_every_n_epochs = 1)",
    )


def confirmed(
    search: CheckpointChoice, tested: Sequence[int], confirmation: CheckpointChoice
) -> tuple[int, str]:
    """The final choice as an index into all points, and whether the confirmation agrees with the first choice.

    ``confirmation`` is the choice among ``tested`` by the same rule, on prompts that were not used before.
    """
    final = tested[confirmation.chosen]
    if final == search.chosen:
        return final, "confirmed"
    return final, "changed"
