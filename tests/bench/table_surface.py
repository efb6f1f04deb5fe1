"""Surfaces to replay a search on: random functions that agree with the recorded table (``record_table``).

One Gaussian process over settings, subject and the finished part of the run is fitted to all cells of a base
(Rasmussen and Williams 2006, chapter 2 and 5.4).  Its kernel, with squared exponentials k:

    a² · k(settings) · (rho + (1 − rho) [same subject]) · k(part)      the surface
    r² · [same run] · k(part)                                          what a training seed adds to a whole run
    e²(part)                                                           what the images drawn add to one score

The mean of such a process is smoother than any real surface, so searches are replayed on draws from it: a prior draw
by random Fourier features (Rahimi and Recht 2007), corrected at the recorded cells (Wilson et al. 2020, "Efficiently
sampling functions from Gaussian process posteriors", equation 5).  Every draw agrees with the cells and differs where
nothing was recorded, so the spread over draws says how much the table decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.study import Choice
from tests.bench.record_table import CELLS, IMAGES, LENGTH, QUARTERS, SUBJECTS, definition, recorded

Array = NDArray[np.float64]
FEATURES = 2000  # random Fourier features of a draw
FIT_STEPS = 60
PARTS = np.arange(1, QUARTERS + 1) / QUARTERS
BROKEN = -1.0  # what Optuna is told of an infeasible trial of a signed study
LIMIT = 0.98  # scores are modelled as LIMIT · tanh(z): they end there, and their noise shrinks towards it
SCHEDULES = ("constant", "cosine", "cosine_with_restarts_3", "polynomial")


def coordinates(values: Mapping[str, Any]) -> Array:
    """(D,) The settings of a cell as numbers of about equal range: logarithms as in the space, choices as corners."""
    space = {p.name: p.domain for p in definition().space}
    found = []
    for name, domain in {**space, LENGTH: IMAGES}.items():
        if name == "lr_scheduler":
            found += [float(values[name] == one) / math.sqrt(2) for one in SCHEDULES]
        elif name == "train_batch_size":
            found.append(math.log2(values[name]) / 3)
        elif name == "min_snr_gamma":  # 0 weighs every timestep alike, as a very large gamma would
            found.append({0: 1.0, 1: 0.0, 5: 0.5, 10: 0.7}[values[name]])
        elif name == "warmup_ratio" and values["lr_scheduler"] == "constant":
            found.append(0.0)
        else:
            found.append(float(domain.to_unit(values[name])))
    return np.array(found)


@dataclass(frozen=True)
class Cells:
    """What was recorded on one base.  N scores: ``x_ND`` settings, ``t_N`` part of the run, ``s_N`` subject,
    ``run_N`` number of the run, ``y_N`` what Optuna would be told, as z."""

    x_ND: Array
    t_N: Array
    s_N: NDArray[np.int64]
    run_N: NDArray[np.int64]
    y_N: Array

    @classmethod
    def read(cls, base: str, path: Path = CELLS) -> Cells:
        x, t, s, run, y = [], [], [], [], []
        cells = [row for key, row in recorded(path).items() if key[0] == base]
        for number, row in enumerate(cells):
            for part, at in zip(PARTS, _whole_run(row), strict=True):
                x.append(coordinates(row["suggested"]))
                t.append(part)
                s.append(SUBJECTS.index(row["subject"]))
                run.append(number)
                y.append(told(at))
        return cls(np.array(x), np.array(t), np.array(s), np.array(run), to_z(np.array(y)))

    @property
    def runs(self) -> int:
        return int(self.run_N.max()) + 1 if len(self.run_N) else 0


def to_z(score: Array) -> Array:
    return np.arctanh(np.clip(score, -0.95, 0.95) / LIMIT)


def to_score(z: Array) -> Array:
    return LIMIT * np.tanh(z)


def _whole_run(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scores of the four quarters; those after a failure are the failure's."""
    found = [*row["at"]]
    while len(found) < QUARTERS:
        found.append({"failed": row.get("failed", "unknown")})
    return found


def told(at: Mapping[str, Any]) -> float:
    """What Optuna is told of a score: its objective, or the value of an infeasible trial."""
    if "failed" in at or any(amount > 0 for amount in at.get("limits", {}).values()):
        return BROKEN
    return float(at["objective"])


class Model:
    """The Gaussian process of a base, fitted by the largest posterior density (L-BFGS).

    Priors: logarithms of lengths around 0.7 (settings; sd 0.7), so that few cells do not look like proof; the other
    logarithms with sd 1 around values of former miniature studies.  Scores are modelled as z (``to_z``).
    """

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.dims = cells.x_ND.shape[1]
        self.mean = float(np.mean(cells.y_N))
        start = [math.log(0.7)] * self.dims + [math.log(v) for v in (0.7, 0.35, 0.05, 0.05)]
        self._prior = torch.tensor([*start, 0.0], dtype=torch.float64)
        self._spread = torch.tensor([0.7] * self.dims + [0.7, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
        self.theta = self._fitted()
        with torch.no_grad():
            self.root_NN = np.linalg.cholesky(self._covariance(self.theta).numpy())

    def _parts(self, theta: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lengths, (part, a, r, e) = theta[: self.dims].exp(), theta[self.dims : self.dims + 4].exp()
        return lengths, part, a, r, e, torch.sigmoid(theta[-1])

    def _covariance(self, theta: torch.Tensor) -> torch.Tensor:
        lengths, part, a, r, e, rho = self._parts(theta)
        c = self.cells
        x, t = torch.from_numpy(c.x_ND), torch.from_numpy(np.log(c.t_N))
        same_subject = torch.from_numpy((c.s_N[:, None] == c.s_N[None]).astype(float))
        same_run = torch.from_numpy((c.run_N[:, None] == c.run_N[None]).astype(float))
        along = torch.exp(-0.5 * ((t[:, None] - t[None]) / part) ** 2)
        scaled = x / lengths
        apart = (scaled[:, None] - scaled[None]).square().sum(-1)
        found = a**2 * torch.exp(-0.5 * apart) * (rho + (1 - rho) * same_subject) * along
        drawn = e**2 * torch.from_numpy(np.where(c.t_N == 1, 1.0, 2.0))
        return found + r**2 * same_run * along + torch.diag(drawn + 1e-6)

    def _loss(self, theta: torch.Tensor) -> torch.Tensor:
        y = torch.from_numpy(self.cells.y_N - self.mean)
        root = torch.linalg.cholesky(self._covariance(theta))
        white = torch.linalg.solve_triangular(root, y[:, None], upper=False)
        prior = 0.5 * (((theta - self._prior) / self._spread) ** 2).sum()
        return 0.5 * white.square().sum() + root.diagonal().log().sum() + prior

    def _fitted(self) -> torch.Tensor:
        theta = self._prior.clone().requires_grad_()
        search = torch.optim.LBFGS([theta], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            search.zero_grad()
            loss = self._loss(theta)
            loss.backward()
            return loss

        search.step(closure)
        return theta.detach()

    def left_out(self) -> Array:
        """(runs, 2) For every run: its last score, and what the model says of it without that run."""
        c = self.cells
        k_NN = self.root_NN @ self.root_NN.T
        inverse = np.linalg.inv(k_NN)
        weights = inverse @ (c.y_N - self.mean)
        found = []
        for run in range(c.runs):
            at = np.flatnonzero(c.run_N == run)
            off = np.linalg.solve(inverse[np.ix_(at, at)], weights[at])  # Rasmussen and Williams, 5.4.2
            found.append((c.y_N[at[-1]], c.y_N[at[-1]] - off[-1]))
        return np.array(found)


class Surface:
    """One draw for one subject: what a search is replayed on."""

    def __init__(self, model: Model, subject: int, seed: int) -> None:
        self.model, self.subject = model, subject
        lengths, part, a, r, e, rho = (v.numpy() for v in model._parts(model.theta))
        self._scale = np.append(1 / lengths, 1 / part)
        self._r, self._e, self._part = float(r), float(e), float(part)
        c = model.cells
        rng = np.random.default_rng([seed, 7])  # the same draw for all subjects: they share a part of it
        d = model.dims + 1
        self._weights: list[tuple[float, Array, Array, Array]] = []
        for share in (rho, *[1 - rho] * len(SUBJECTS)):
            w_DF = rng.standard_normal((d, FEATURES)) * self._scale[:, None]
            bias, amount = rng.uniform(0, 2 * math.pi, FEATURES), rng.standard_normal(FEATURES)
            self._weights.append((float(a) * math.sqrt(2 * share / FEATURES), w_DF, bias, amount))
        z_ND = np.column_stack([c.x_ND, np.log(c.t_N)])
        prior = self._prior(z_ND, c.s_N)
        noise = self._noise(rng, c)
        off = c.y_N - model.mean - prior - noise
        self._solved = np.linalg.solve(model.root_NN.T, np.linalg.solve(model.root_NN, off))
        self._z_ND = z_ND * self._scale
        self._share_N = float(a) ** 2 * np.where(c.s_N == subject, 1.0, float(rho))
        self.best = self._best(rng)

    def _noise(self, rng: np.random.Generator, c: Cells) -> Array:
        along = _along(PARTS, self._part)
        root = np.linalg.cholesky(along + 1e-9 * np.eye(QUARTERS))
        found = np.empty(len(c.y_N))
        for run in range(c.runs):
            at = np.flatnonzero(c.run_N == run)
            found[at] = self._r * (root @ rng.standard_normal(len(at)))
        spread = self._e * np.sqrt(np.where(c.t_N == 1, 1.0, 2.0))
        return found + spread * rng.standard_normal(len(found))

    def _prior(self, z_ND: Array, s_N: NDArray[np.int64]) -> Array:
        def features(which: int) -> Array:
            scale, w_DF, bias, amount = self._weights[which]
            return scale * (np.cos(z_ND @ w_DF + bias) @ amount)

        found = features(0)
        for subject in np.unique(s_N):
            at = s_N == subject
            found[at] += features(1 + int(subject))[at]
        return found

    def true(self, x_MD: Array, part: float | Array = 1.0) -> Array:
        """(M,) The score without noise."""
        return to_score(self._z(x_MD, part))

    def score(self, values: Mapping[str, Any]) -> float:
        """The score of whole runs with these settings, without noise."""
        return float(self.true(coordinates(values)[None])[0])

    def _z(self, x_MD: Array, part: float | Array) -> Array:
        parts = np.broadcast_to(np.log(part), len(x_MD))
        z_MD = np.column_stack([x_MD, parts])
        prior = self._prior(z_MD, np.full(len(z_MD), self.subject))
        scaled = z_MD * self._scale
        apart = ((scaled**2).sum(1)[:, None] + (self._z_ND**2).sum(1)[None] - 2 * scaled @ self._z_ND.T).clip(
            min=0
        )
        return self.model.mean + prior + (np.exp(-0.5 * apart) * self._share_N) @ self._solved

    def _best(self, rng: np.random.Generator) -> float:
        """The best score without noise: of quasi-random points, then of smaller and smaller steps from the best."""
        values = random_settings(rng, 4000)
        x_MD = np.array([coordinates(v) for v in values])
        y = self.true(x_MD)
        top = [values[i] for i in np.argsort(y)[-20:]]
        best = float(y.max())
        for width in (0.2, 0.1, 0.05, 0.02):
            near = [nearby(rng, one, width) for one in top for _ in range(60)]
            y = self.true(np.array([coordinates(v) for v in near]))
            best = max(best, float(y.max()))
            top = [near[i] for i in np.argsort(y)[-20:]]
        return best

    def run(self, values: Mapping[str, Any], rng: np.random.Generator) -> Run:
        """A training with these settings and a seed of its own."""
        x = np.tile(coordinates(values), (QUARTERS, 1))
        along = np.linalg.cholesky(_along(PARTS, self._part) + 1e-9 * np.eye(QUARTERS))
        own = self._z(x, PARTS) + self._r * (along @ rng.standard_normal(QUARTERS))
        return Run(own, self._e, rng)


@dataclass(frozen=True)
class Run:
    """One training: its scores (as z) at the quarters, with the training seed's part but without the images' noise."""

    own_Q: Array
    image_noise: float
    rng: np.random.Generator

    def score(self, quarter: int, images: float = 1.0) -> float:
        """The measured score with this share of the images."""
        noise = self.image_noise / math.sqrt(images) * self.rng.standard_normal()
        return float(to_score(self.own_Q[quarter - 1] + noise))


def _along(parts: Array, length: float) -> Array:
    at = np.log(parts)
    return np.exp(-0.5 * ((at[:, None] - at[None]) / length) ** 2)


def domains() -> dict[str, Any]:
    return {**{p.name: p.domain for p in definition().space}, LENGTH: IMAGES}


def random_settings(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Settings drawn evenly from the whole space."""
    found = domains()
    return [
        {name: domain.from_unit(place) for (name, domain), place in zip(found.items(), row, strict=True)}
        for row in rng.random((count, len(found)))
    ]


def nearby(rng: np.random.Generator, values: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The settings with a few of them moved by about ``width`` of their range."""
    found = dict(values)
    for name, domain in domains().items():
        if isinstance(domain, Choice):
            if rng.random() < width:
                found[name] = domain.from_unit(float(rng.random()))
        elif rng.random() < 0.5:
            place = float(np.clip(domain.to_unit(values[name]) + width * rng.standard_normal(), 0, 1))
            found[name] = domain.from_unit(place)
    return found


def rank_of_parts(path: Path = CELLS) -> Mapping[str, Sequence[float]]:
    """For each base, Spearman's correlation of the score at a quarter, half and three quarters with the last one."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    found = {}
    for base in sorted({key[0] for key in recorded(path)}):
        cells = Cells.read(base, path)
        y = cells.y_N.reshape(-1, QUARTERS)
        found[base] = [float(spearmanr(y[:, q], y[:, -1]).statistic) for q in range(QUARTERS - 1)]
    return found


@dataclass(frozen=True)
class Table:
    """The fitted models, once per base."""

    path: Path = CELLS

    @cached_property
    def sd15(self) -> Model:
        return Model(Cells.read("mini-sd15", self.path))

    @cached_property
    def sdxl(self) -> Model:
        return Model(Cells.read("mini-sdxl", self.path))
