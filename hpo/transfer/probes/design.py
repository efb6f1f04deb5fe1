"""Chooses the next probe (a short run on the target) and evaluates the finished ones.  Pure.

Owns two designs, the decision rule, the horizon shift and the agreement of source and target.  Does not run
anything; see ``hpo.transfer.probes.run``.  Rates are in octaves: log2 of the factor on the transferred rate.
The text encoder rate keeps its ratio, or is 0.

ladder   the transferred settings, the target's default settings, half and double the rate, another good
         configuration, the vertex of a parabola, text encoders off (or on, if they are not trained); each step uses
         the results of the ones before
grid     rates × {½, 0.77, 1, 1½} with text encoders on and off; a parabola is fitted to all of them and its vertex is
         used only if it gains more than one standard error; corrected with the same grid on the source at both
         horizons
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evaluation.score import BOOTSTRAP_SEED, Correlation, kendall, spearman

TRANSFERRED, DEFAULT = "transferred", "default"
TEXT_ON = "text encoders on"  # a candidate if the transferred settings do not train them
NEAR = 0.2  # octaves (15 %); a rate this close to a probed one is not probed
DRAWS = 400
ENOUGH_PAIRS = 8  # with fewer pairs, a rank agreement is always inconclusive
SIGNIFICANT = 0.05
GRID_OCTAVES = tuple(math.log2(factor) for factor in (0.5, 0.77, 1.0, 1.5))


@dataclass(frozen=True)
class Probe:
    """One short run: the settings of a candidate, with its rates multiplied by 2**octaves."""

    candidate: str = TRANSFERRED
    octaves: float = 0.0
    text_encoder: bool = True

    @property
    def role(self) -> str:
        words = [self.candidate]
        if self.octaves:
            words.append(f"rate × {2**self.octaves:.3g}")
        if not self.text_encoder:
            words.append("text encoders off")
        return ", ".join(words)


@dataclass(frozen=True)
class ProbeScore:
    """A finished probe.  ``prompts``: scores by prompt, in the same order for all probes; can be empty."""

    probe: Probe
    score: float
    se: float
    prompts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scope:
    """The limits for probes.

    ``budget``: number of probes.  ``candidates``: candidates other than the transferred settings, best first.
    ``low``, ``high``: limits in octaves.
    """

    budget: int
    candidates: tuple[str, ...] = ()
    low: float = -4.0
    high: float = 4.0
    trains_text_encoder: bool = True

    def holds(self, probe: Probe) -> bool:
        known = probe.candidate in (TRANSFERRED, *self.candidates)
        return known and self.low - 1e-9 <= probe.octaves <= self.high + 1e-9


@dataclass(frozen=True)
class Decision:
    """The decision: the transferred settings, or others with a significant gain.

    ``gain`` is relative to the transferred settings; ``low`` and ``high`` are its 95 % interval.
    """

    probe: Probe
    gain: float
    low: float
    high: float
    reason: str

    @property
    def keeps(self) -> bool:
        return self.probe == Probe()


class Design(Protocol):
    """A strategy for choosing probes and deciding from their scores."""

    @property
    def name(self) -> str: ...

    def next(self, outcomes: Sequence[ProbeScore], scope: Scope) -> Probe | None: ...
    def decide(
        self, outcomes: Sequence[ProbeScore], scope: Scope, shift: float | None = None
    ) -> Decision: ...


def find(outcomes: Sequence[ProbeScore], probe: Probe) -> ProbeScore | None:
    for outcome in outcomes:
        same = outcome.probe.candidate == probe.candidate and outcome.probe.text_encoder == probe.text_encoder
        if same and abs(outcome.probe.octaves - probe.octaves) < 1e-6:
            return outcome
    return None


def gain_se(a: ProbeScore, b: ProbeScore) -> float:
    """Standard error of a − b.  Paired by prompt if both have scores by prompt, so that prompt difficulty cancels."""
    if a.prompts and len(a.prompts) == len(b.prompts) > 1:
        return float(np.std(np.subtract(a.prompts, b.prompts), ddof=1) / math.sqrt(len(a.prompts)))
    return math.hypot(a.se, b.se)


def parabola(octaves: Sequence[float], scores: Sequence[float]) -> tuple[float, float, float]:
    """The coefficients a, b, c of a + b·x + c·x², fitted by least squares."""
    c, b, a = np.polyfit(octaves, scores, 2)
    return float(a), float(b), float(c)


@dataclass(frozen=True)
class Ladder:
    """One probe after the other.  The best one is used if the paired 95 % interval of its gain is above 0."""

    name: str = "ladder"
    errors: float = 1.96  # how many standard errors a gain must exceed

    def next(self, outcomes: Sequence[ProbeScore], scope: Scope) -> Probe | None:
        if len(outcomes) >= scope.budget:
            return None
        for step in self._steps(scope):
            probe = step(outcomes)
            if probe is not None and scope.holds(probe) and find(outcomes, probe) is None:
                return probe
        return None

    def _steps(self, scope: Scope) -> list[Callable[[Sequence[ProbeScore]], Probe | None]]:
        default = (DEFAULT,) if DEFAULT in scope.candidates else ()
        others = [name for name in scope.candidates if name not in (DEFAULT, TEXT_ON)]
        fixed = [
            Probe(),
            *map(Probe, default),
            Probe(octaves=-1.0),
            Probe(octaves=1.0),
            *map(Probe, others[:1]),
        ]
        more = [*map(Probe, others[1:])]

        def always(probe: Probe) -> Callable[[Sequence[ProbeScore]], Probe | None]:
            return lambda outcomes: probe

        switch = _text_encoders_off if scope.trains_text_encoder else always(Probe(TEXT_ON))
        steps = [*map(always, fixed), lambda outcomes: _vertex(outcomes, scope), switch, *map(always, more)]
        return [*steps, lambda outcomes: _vertex(outcomes, scope)]

    def decide(self, outcomes: Sequence[ProbeScore], scope: Scope, shift: float | None = None) -> Decision:
        """Decide from the measured scores.  The horizon shift is not used."""
        own = find(outcomes, Probe())
        if own is None:
            return Decision(
                Probe(), 0.0, 0.0, 0.0, "the transferred settings are kept because they have no score"
            )
        best = max(outcomes, key=lambda o: (o.score, o.probe == Probe()))
        if best is own:
            return Decision(
                Probe(), 0.0, 0.0, 0.0, f"none of {len(outcomes) - 1} other target trials scored higher"
            )
        return _weighed(best.probe, best.score - own.score, gain_se(best, own), self.errors)


@dataclass(frozen=True)
class Grid:
    """Eight points and a parabola.  The vertex is used if it gains more than one standard error."""

    name: str = "grid"
    errors: float = 1.0

    def points(self, scope: Scope) -> list[Probe]:
        order = sorted(GRID_OCTAVES, key=abs)
        first = [Probe(octaves=x) for x in (order[0], GRID_OCTAVES[0], GRID_OCTAVES[-1], order[1])]
        if scope.trains_text_encoder:
            first += [Probe(octaves=p.octaves, text_encoder=False) for p in first]
        return [probe for probe in first if scope.holds(probe)]

    def next(self, outcomes: Sequence[ProbeScore], scope: Scope) -> Probe | None:
        if len(outcomes) >= scope.budget:
            return None
        return next((p for p in self.points(scope) if find(outcomes, p) is None), None)

    def decide(self, outcomes: Sequence[ProbeScore], scope: Scope, shift: float | None = None) -> Decision:
        used = [o for o in outcomes if o.probe.candidate == TRANSFERRED]
        rates = sorted({round(o.probe.octaves, 6) for o in used})
        if len(rates) < 3 or find(used, Probe()) is None:
            return Decision(Probe(), 0.0, 0.0, 0.0, f"{len(rates)} rates are too few for a parabola")
        x_N = np.array([o.probe.octaves for o in used])
        te_N = np.array([float(o.probe.text_encoder) for o in used])
        columns = [np.ones_like(x_N), x_N, x_N**2] + ([te_N] if len(set(te_N)) == 2 else [])
        design_NB = np.stack(columns, axis=1)
        y_N = np.array([o.score for o in used])
        fit_B, *_ = np.linalg.lstsq(design_NB, y_N, rcond=None)
        place = _curve_top(fit_B, rates, shift or 0.0, scope)
        text = len(fit_B) < 4 or bool(fit_B[3] >= 0)
        if not text and -fit_B[3] <= self.errors * self._se(used, design_NB, y_N, np.array([0, 0, 0, 1.0])):
            text = True
        if place is None and text:
            return Decision(
                Probe(),
                0.0,
                0.0,
                0.0,
                "the rate is kept because the fitted curve of the scores has no maximum",
            )
        moved = 0.0 if place is None else place
        delta = shift or 0.0
        # The curve of whole runs is that of short runs, moved by the horizon shift.
        here, there = delta, moved + delta
        contrast_B = np.array([0.0, there - here, there**2 - here**2, (0.0 if text else -1.0)][: len(fit_B)])
        gain = float(contrast_B @ fit_B)
        se = self._se(used, design_NB, y_N, contrast_B)
        return _weighed(Probe(octaves=round(moved, 6), text_encoder=text), gain, se, self.errors)

    def _se(
        self, used: Sequence[ProbeScore], design_NB: np.ndarray, y_N: np.ndarray, contrast_B: np.ndarray
    ) -> float:
        """Standard error of a contrast of the fit: the larger of the estimates from prompts and from residuals."""
        solve_BN = np.linalg.pinv(design_NB)
        weights_N = contrast_B @ solve_BN
        free = len(y_N) - design_NB.shape[1]
        residuals = y_N - design_NB @ (solve_BN @ y_N)
        by_fit = (
            math.sqrt(float(residuals @ residuals) / free) * float(np.linalg.norm(weights_N)) if free else 0.0
        )
        counts = {len(o.prompts) for o in used}
        if counts == {0} or len(counts) > 1:
            ses_N = np.array([o.se for o in used])
            return max(by_fit, float(np.sqrt((weights_N**2) @ (ses_N**2))))
        prompts_NP = np.array([o.prompts for o in used])
        drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(
            0, prompts_NP.shape[1], (DRAWS, prompts_NP.shape[1])
        )
        values_K = weights_N @ prompts_NP[:, drawn].mean(-1)
        return max(by_fit, float(values_K.std(ddof=1)))


LADDER = "ladder"  # the better one of short runs; for the comparison see docs/transfer.md
DESIGNS: dict[str, Design] = {LADDER: Ladder(), "grid": Grid()}


def _weighed(probe: Probe, gain: float, se: float, errors: float) -> Decision:
    low, high = gain - 1.96 * se, gain + 1.96 * se
    measured = f"{probe.role} gains {gain:.4f} (95 % interval {low:.4f} to {high:.4f})"
    if probe == Probe():
        return Decision(probe, gain, low, high, "the transferred settings are the best")
    if gain > errors * se and gain > 0:
        return Decision(probe, gain, low, high, measured)
    what = "1 standard error" if errors == 1 else f"{errors:g} standard errors"
    return Decision(
        Probe(),
        gain,
        low,
        high,
        f"{measured}; this is not more than {what}, so the transferred settings are kept",
    )


def _rates_of(outcomes: Sequence[ProbeScore]) -> list[ProbeScore]:
    return [o for o in outcomes if o.probe.candidate == TRANSFERRED and o.probe.text_encoder]


def _vertex(outcomes: Sequence[ProbeScore], scope: Scope) -> Probe | None:
    """The vertex of the parabola if it is between the probed rates, else one octave beyond the better end.

    None if that rate was probed already.
    """
    known = _rates_of(outcomes)
    rates = [o.probe.octaves for o in known]
    if len(set(rates)) < 3:
        return None
    _, b, c = parabola(rates, [o.score for o in known])
    top = -b / (2 * c) if c < 0 else None
    if top is None or not min(rates) <= top <= max(rates):
        best = max(known, key=lambda o: o.score).probe.octaves
        if best not in (min(rates), max(rates)):
            return None
        top = best + math.copysign(1.0, best)
    top = min(max(top, scope.low), scope.high)
    return None if min(abs(top - x) for x in rates) < NEAR else Probe(octaves=top)


def _text_encoders_off(outcomes: Sequence[ProbeScore]) -> Probe | None:
    known = _rates_of(outcomes)
    best = max(known, key=lambda o: o.score).probe.octaves if known else 0.0
    return Probe(octaves=best, text_encoder=False)


def _curve_top(fit_B: np.ndarray, rates: Sequence[float], shift: float, scope: Scope) -> float | None:
    """The fitted best rate of whole runs, at most half an octave beyond the probed rates; None without a maximum."""
    b, c = float(fit_B[1]), float(fit_B[2])
    if c >= 0:
        return None
    top = min(max(-b / (2 * c), min(rates) - 0.5), max(rates) + 0.5)
    return min(max(top - shift, scope.low), scope.high)


def horizon_shift(short: Sequence[ProbeScore], whole: Sequence[ProbeScore]) -> float | None:
    """Octaves by which the best rate of short runs is above that of whole runs; None if a curve has no maximum."""
    tops = []
    for outcomes in (short, whole):
        known = _rates_of(outcomes)
        rates = [o.probe.octaves for o in known]
        if len(set(rates)) < 3:
            return None
        _, b, c = parabola(rates, [o.score for o in known])
        if c >= 0:
            return None
        tops.append(min(max(-b / (2 * c), min(rates) - 0.5), max(rates) + 0.5))
    return tops[0] - tops[1]


# Does the source predict the target?


@dataclass(frozen=True)
class Agreement:
    """Rank agreement of source and target over the same configurations."""

    spearman: Correlation
    kendall: Correlation

    @property
    def conclusive(self) -> bool:
        return self.kendall.n >= ENOUGH_PAIRS and self.kendall.p < SIGNIFICANT

    def line(self) -> str:
        exact = "exact" if self.kendall.exact else "from random permutations"
        found = (
            f"Spearman {self.spearman.value:+.2f} (p {self.spearman.p:.3f}), Kendall {self.kendall.value:+.2f} "
            f"(p {self.kendall.p:.3f}, {exact}) over {self.kendall.n} shared configurations"
        )
        if self.conclusive:
            verdict = "predicts" if self.kendall.value > 0 else "misleads about"
            return f"the ranking on the source {verdict} the ranking on the target: {found}"
        few = f"; fewer than {ENOUGH_PAIRS} pairs are not enough" if self.kendall.n < ENOUGH_PAIRS else ""
        return f"inconclusive whether the source predicts the target: {found}{few}"


def agreement(source: Sequence[float], target: Sequence[float]) -> Agreement | None:
    """The rank agreement; None with fewer than three pairs or if one side is constant."""
    if len(source) < 3 or len(set(source)) < 2 or len(set(target)) < 2:
        return None
    return Agreement(spearman(source, target), kendall(source, target))


def search_is_better(outcomes: Sequence[ProbeScore], found: Agreement | None) -> str | None:
    """The reason why a direct search on the target would be better; None if there is none."""
    own, usual = find(outcomes, Probe()), find(outcomes, Probe(DEFAULT))
    if own and usual and usual.score - own.score > 1.96 * gain_se(usual, own):
        return f"the target's default settings score {usual.score - own.score:.4f} higher than the transferred ones"
    if found is not None and found.spearman.value < 0 and found.spearman.p < 0.2:
        return f"source and target rank the shared configurations in opposite order ({found.spearman.value:+.2f})"
    return None
