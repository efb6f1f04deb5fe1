"""A Gaussian process of a finished search: score over settings, with an uncertainty.

Owns the kernel, its fit and its predictions.  Does not own what a setting's number is (``hpo.transfer.probes.prior``)
or how a target differs from its source (``hpo.transfer.probes.shifted``).

Formulas: Rasmussen & Williams, Gaussian Processes for Machine Learning (2006), chapters 2, 4 and 5.  Prior of the
lengths: Hvarfner et al. 2024 (arXiv 2402.02229), which keeps a dozen trials in many dimensions from being overfitted.
Names end in their axes: N trials, M other places, D numbers of a place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

LENGTH_MEAN, LENGTH_SD = math.sqrt(2), math.sqrt(3)  # of log length, for one dimension; + log √D for D
AMPLITUDE_SD = 0.5  # of log amplitude, around 0: scores are standardised
NOISE_MEAN, NOISE_SD = math.log(0.1), 1.0  # of log variance: what a new training seed changes
STARTS = (0.3, 1.0, 3.0)  # lengths from which the fit begins
ITERATIONS = 60
JITTER = 1e-8


@dataclass(frozen=True)
class Kernel:
    """Matérn 5/2 with one length per number of a place (R&W eq. 4.17, 5.1)."""

    lengths: tuple[float, ...]
    amplitude: float = 1.0  # variance

    def matrix(self, a_MD: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
        """Covariances of two sets of places, shape (M, N)."""
        scaled_MND = (a_MD[:, None, :] - b_ND[None, :, :]) / np.asarray(self.lengths)
        r_MN = math.sqrt(5) * np.sqrt((scaled_MND**2).sum(-1))
        return np.asarray(self.amplitude * (1 + r_MN + r_MN**2 / 3) * np.exp(-r_MN))


@dataclass(frozen=True)
class Surrogate:
    """A fitted process.  ``y_N``: standardised scores.  ``noise_N``: their variances.  A score is
    ``centre + scale × y``."""

    x_ND: np.ndarray
    y_N: np.ndarray
    noise_N: np.ndarray
    kernel: Kernel
    centre: float = 0.0
    scale: float = 1.0
    spread: float = 0.0  # the fitted part of the noise: variance between equal trainings, standardised
    _chol_NN: np.ndarray = field(init=False, repr=False)
    _weights_N: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        chol_NN = np.linalg.cholesky(self.kernel.matrix(self.x_ND, self.x_ND) + np.diag(self.noise_N))
        weights_N = np.linalg.solve(chol_NN.T, np.linalg.solve(chol_NN, self.y_N))
        object.__setattr__(self, "_chol_NN", chol_NN)
        object.__setattr__(self, "_weights_N", weights_N)

    def mean(self, x_MD: np.ndarray) -> np.ndarray:
        """Standardised posterior means, shape (M,) (R&W eq. 2.25)."""
        return np.asarray(self.kernel.matrix(x_MD, self.x_ND) @ self._weights_N)

    def half(self, x_MD: np.ndarray) -> np.ndarray:
        """L⁻¹ k(X, x), shape (N, M): the posterior covariance of two sets is k(a, b) − half(a)ᵀ half(b) (eq. 2.26)."""
        return np.asarray(np.linalg.solve(self._chol_NN, self.kernel.matrix(self.x_ND, x_MD)))

    def covariance(self, a_MD: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
        """Standardised posterior covariances of two sets of places, shape (M, N)."""
        return np.asarray(self.kernel.matrix(a_MD, b_ND) - self.half(a_MD).T @ self.half(b_ND))


def fit(x_ND: np.ndarray, scores: Sequence[float], ses: Sequence[float]) -> Surrogate:
    """Fit lengths, amplitude and noise: the maximum of marginal likelihood × prior (R&W eq. 2.30, 5.8).

    ``x_ND``: places, about 0 to 1.  ``ses``: known standard errors of the scores; the fitted noise is added.  The
    result depends on nothing but the arguments.  Raises ValueError without a trial.
    """
    x_ND, raw_N = np.asarray(x_ND, dtype=float), np.asarray(scores, dtype=float)
    if not len(raw_N):
        raise ValueError("a surrogate needs a trial")
    centre, scale = float(raw_N.mean()), float(raw_N.std())
    scale = scale if scale > 1e-9 else 1.0
    y_N = (raw_N - centre) / scale
    known_N = (np.asarray(ses, dtype=float) / scale) ** 2 + JITTER
    starts = [_maximum(x_ND, y_N, known_N, length) for length in STARTS]
    _, logs = max(starts, key=lambda found: found[0])
    lengths = tuple(float(length) for length in np.exp(logs[:-2]))
    amplitude, spread = float(np.exp(logs[-2])), float(np.exp(logs[-1]))
    return Surrogate(x_ND, y_N, known_N + spread, Kernel(lengths, amplitude), centre, scale, spread)


def _maximum(
    x_ND: np.ndarray, y_N: np.ndarray, known_N: np.ndarray, length: float
) -> tuple[float, np.ndarray]:
    """L-BFGS from one start: the log posterior there, and log of lengths, amplitude and noise."""
    import torch

    x, y, known = (torch.from_numpy(values) for values in (x_ND, y_N, known_N))
    dimensions = x_ND.shape[1]
    begin = [math.log(length)] * dimensions + [0.0, NOISE_MEAN]
    logs = torch.tensor(begin, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -_log_posterior(logs, x, y, known)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        value = float(_log_posterior(logs, x, y, known))
    return (value if math.isfinite(value) else -math.inf), logs.detach().numpy()


def _log_posterior(logs: torch.Tensor, x: torch.Tensor, y: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Log marginal likelihood (R&W eq. 2.30) + log prior, without constants."""
    import torch

    lengths, amplitude, noise = logs[:-2], logs[-2], logs[-1]
    scaled = x / lengths.exp()
    squared = (scaled[:, None, :] - scaled[None, :, :]).pow(2).sum(-1)
    r = math.sqrt(5) * (squared + 1e-12).sqrt()
    covariance = amplitude.exp() * (1 + r + r**2 / 3) * (-r).exp() + torch.diag(known + noise.exp())
    chol = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(chol, y[:, None], upper=False)
    likelihood = -0.5 * half.pow(2).sum() - chol.diagonal().log().sum()
    # A log-normal density of the length itself: hence − log length.
    usual = LENGTH_MEAN + 0.5 * math.log(x.shape[1])
    prior = (-0.5 * ((lengths - usual) / LENGTH_SD).pow(2) - lengths).sum()
    prior = prior - 0.5 * (amplitude / AMPLITUDE_SD) ** 2 - 0.5 * ((noise - NOISE_MEAN) / NOISE_SD) ** 2
    return likelihood + prior
