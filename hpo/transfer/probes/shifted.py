"""A model of the target: the source's surrogate at shifted rates, plus what a few target trials say.

    target(x) = a + b · source(x, its rates divided by 10**s) + residual(x)

Owns this model, its posterior, and the expected gain of a new trial.  Does not own the surrogate
(``hpo.transfer.probes.surrogate``) or what is tried with it (``hpo.transfer.probes.guided``).

The idea: a process on the residuals of a process of an earlier task (stacked residual GP, Golovin et al. 2017, Google
Vizier, section 3.3).  The shift, the factor b and the constant a are added because the rules of a transfer are least
sure about rates, and because two bases have different scales.  s, b and the size of the residual have a grid, a is
analytic: nothing is drawn at random, so the same trials give the same posterior.

Names end in their axes: n target trials, M places, D numbers of a place, S shifts, B factors, T sizes of the residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpo.transfer.probes.surrogate import JITTER, Kernel, Surrogate

# Published rates for SDXL are 0.5 to 1 times those for SD1.5; on the miniature the rules were off by up to 1.5
# octaves (docs/transfer.md).  Half a decade (a factor of 3) covers both.
SHIFT_SD = 0.5  # decades
SHIFTS = tuple(np.round(np.arange(-1.25, 1.2501, 0.05), 2).tolist())
FACTORS, FACTOR_SD = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), 0.5  # around 1; 0: the source says nothing
RESIDUALS = (0.2, 0.6)  # standard deviation of the residual, relative to the source's
CONSTANT_VARIANCE = 4.0  # of a, in standardised scores
LEAST_WEIGHT = 1e-4  # share of the posterior below which a cell of the grid does not count


@dataclass(frozen=True)
class Observed:
    """Target trials: places (n, D), scores and their standard errors (n,), in the units of the score."""

    x_nD: np.ndarray
    scores: Sequence[float]
    ses: Sequence[float]


@dataclass(frozen=True)
class TargetModel:
    """The model before any target trial.  ``decade_D``: how far a place moves for a rate 10 times as high; 0 for a
    number that is not a rate."""

    source: Surrogate
    decade_D: np.ndarray

    @property
    def shifts(self) -> tuple[float, ...]:
        """Without a searched rate there is nothing to shift."""
        return SHIFTS if np.any(self.decade_D) else (0.0,)

    def moved(self, x_MD: np.ndarray, shift: float) -> np.ndarray:
        """The place on the source that a place on the target is compared with."""
        return np.asarray(x_MD - shift * self.decade_D)

    def after(self, observed: Observed) -> TargetPosterior:
        return TargetPosterior.of(self, observed)


@dataclass(frozen=True)
class TargetPosterior:
    """The model after some target trials.  ``weight_SBT``: the posterior of the grid, its sum is 1."""

    model: TargetModel
    observed: Observed
    weight_SBT: np.ndarray
    _half_SBTnn: np.ndarray  # L⁻¹ of the covariance of the trials
    _rest_SBTn: np.ndarray  # L⁻¹ (y − b · source)

    @classmethod
    def of(cls, model: TargetModel, observed: Observed) -> TargetPosterior:
        source, shifts = model.source, model.shifts
        x_nD = np.asarray(observed.x_nD, dtype=float)
        y_n = (np.asarray(observed.scores, dtype=float) - source.centre) / source.scale
        noise_n = (np.asarray(observed.ses, dtype=float) / source.scale) ** 2 + source.spread + JITTER
        moved = [model.moved(x_nD, shift) for shift in shifts]
        mean_Sn = np.stack([source.mean(x) for x in moved])
        known_Snn = np.stack([source.covariance(x, x) for x in moved])
        b_B, t_T = np.asarray(FACTORS), np.asarray(RESIDUALS)
        covariance = (
            b_B[None, :, None, None, None] ** 2 * known_Snn[:, None, None]
            + t_T[None, None, :, None, None] ** 2 * _residual(source).matrix(x_nD, x_nD)
            + CONSTANT_VARIANCE
            + np.diag(noise_n)
        )
        chol = np.linalg.cholesky(covariance)
        eye = np.broadcast_to(np.eye(len(y_n)), chol.shape)
        half = np.linalg.solve(chol, eye)
        left_SBn = y_n - b_B[None, :, None] * mean_Sn[:, None, :]
        rest = np.einsum("sbtij,sbj->sbti", half, left_SBn)
        log = -0.5 * (rest**2).sum(-1) - np.log(np.diagonal(chol, axis1=-2, axis2=-1)).sum(-1)
        log = log - 0.5 * (np.asarray(shifts) / SHIFT_SD)[:, None, None] ** 2
        log = log - 0.5 * ((b_B - 1) / FACTOR_SD)[None, :, None] ** 2
        weight = np.exp(log - log.max())
        weight[weight < LEAST_WEIGHT * weight.sum()] = 0
        return cls(model, observed, weight / weight.sum(), half, rest)

    # The shift

    def shift(self) -> tuple[float, float, float]:
        """Mean of s in decades, and the ends of its 80 % interval."""
        shifts = np.asarray(self.model.shifts)
        weight_S = self.weight_SBT.sum((1, 2))
        below = np.cumsum(weight_S)
        low, high = (float(shifts[min(int(np.searchsorted(below, q)), len(shifts) - 1)]) for q in (0.1, 0.9))
        return float(shifts @ weight_S), low, high

    # Predictions

    def predict(self, x_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the true scores at the places, each (M,), in the units of the score."""
        mean_M, square_M = np.zeros(len(x_MD)), np.zeros(len(x_MD))
        for weight, mean, variance, _ in self._cells(np.asarray(x_MD, dtype=float)):
            mean_M += weight * mean
            square_M += weight * (variance + mean**2)
        deviation_M = np.sqrt(np.maximum(square_M - mean_M**2, 0))
        return self.model.source.centre + self.model.source.scale * mean_M, (
            self.model.source.scale * deviation_M
        )

    def apart(self, one: int, other: int) -> tuple[float, float]:
        """Mean and standard deviation of the difference of the true scores of two trials, in the units of the score."""
        mean, square = 0.0, 0.0
        x_nD = np.asarray(self.observed.x_nD, dtype=float)
        for weight, mean_n, variance_n, covariance_nn in self._cells(x_nD, with_trials=True):
            apart = float(mean_n[one] - mean_n[other])
            variance = float(variance_n[one] + variance_n[other] - 2 * covariance_nn[one, other])
            mean += weight * apart
            square += weight * (max(variance, 0.0) + apart**2)
        scale = self.model.source.scale
        return scale * mean, scale * math.sqrt(max(square - mean**2, 0.0))

    def gains(self, x_MD: np.ndarray) -> np.ndarray:
        """Expected improvement of a trial at each place over the best tried one, (M,), in the units of the score.

        In each cell of the grid, the best tried place is the one with the highest posterior mean, and the deviation
        is that of the difference to it: scores are noisy, and what both share (the constant a) must not count.  The
        mean over cells then weighs what is unknown about the rates (integrated EI, Snoek et al. 2012).
        """
        x_nD = np.asarray(self.observed.x_nD, dtype=float)
        count = len(x_nD)
        both = np.concatenate([x_nD, np.asarray(x_MD, dtype=float)])
        total_M = np.zeros(len(x_MD))
        for weight, mean, variance, covariance in self._cells(both, with_trials=True):
            best = int(np.argmax(mean[:count]))
            apart = mean[count:] - mean[best]
            deviation = np.sqrt(
                np.maximum(variance[count:] + variance[best] - 2 * covariance[count:, best], 1e-12)
            )
            total_M += weight * improvement(apart, deviation)
        return np.asarray(self.model.source.scale * total_M)

    def _cells(
        self, x_MD: np.ndarray, *, with_trials: bool = False
    ) -> list[tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
        """For each cell that counts: its weight; means and variances (M,); covariances with the trials (M, n), which
        are 0 unless ``with_trials``.  Standardised."""
        source, x_nD = self.model.source, np.asarray(self.observed.x_nD, dtype=float)
        residual = _residual(source)
        apart_Mn = residual.matrix(x_MD, x_nD)
        found = []
        for s, shift in enumerate(self.model.shifts):
            if not self.weight_SBT[s].any():
                continue
            there_MD, here_nD = self.model.moved(x_MD, shift), self.model.moved(x_nD, shift)
            mean_M = source.mean(there_MD)
            half_NM = source.half(there_MD)
            known_Mn = source.kernel.matrix(there_MD, here_nD) - half_NM.T @ source.half(here_nD)
            own_M = source.kernel.amplitude - (half_NM**2).sum(0)
            for b, factor in enumerate(FACTORS):
                for t, size in enumerate(RESIDUALS):
                    weight = float(self.weight_SBT[s, b, t])
                    if not weight:
                        continue
                    cross_Mn = factor**2 * known_Mn + size**2 * apart_Mn + CONSTANT_VARIANCE
                    reduced_Mn = cross_Mn @ self._half_SBTnn[s, b, t].T
                    mean = factor * mean_M + reduced_Mn @ self._rest_SBTn[s, b, t]
                    prior = factor**2 * own_M + size**2 * residual.amplitude + CONSTANT_VARIANCE
                    variance = np.maximum(prior - (reduced_Mn**2).sum(1), 1e-12)
                    covariance = np.zeros_like(cross_Mn)
                    if with_trials:
                        covariance = cross_Mn - reduced_Mn @ reduced_Mn[: len(x_nD)].T
                    found.append((weight, mean, variance, covariance))
        return found


def _residual(source: Surrogate) -> Kernel:
    """The kernel of the residual: it varies as the source does."""
    return Kernel(source.kernel.lengths, source.kernel.amplitude)


def improvement(apart_M: np.ndarray, deviation_M: np.ndarray) -> np.ndarray:
    """Mean of the positive part of a normal variable (Jones et al. 1998)."""
    import torch

    z_M = apart_M / deviation_M
    density_M = np.exp(-0.5 * z_M**2) / math.sqrt(2 * math.pi)
    below_M = torch.special.ndtr(torch.from_numpy(z_M)).numpy()
    return np.asarray(apart_M * below_M + deviation_M * density_M)
