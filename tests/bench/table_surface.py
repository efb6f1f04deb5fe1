"""Surfaces to replay a search on: random functions that agree with the recorded table (``record_table``).

One Gaussian process over settings, subject, base and the finished part of the run is fitted to all cells (Rasmussen and
Williams 2006, chapter 2 and 5.4).  Its kernel, with squared exponentials k:

    a_base a_base' · k(settings) · (rho + (1 − rho) [same subject]) · (kappa + (1 − kappa) [same base]) · k(part)
    r² · [same run] · k(part)                                          what a training seed adds to a whole run
    e²                                                                 what the images drawn add to one score

The mean of such a process is smoother than any real surface, so searches are replayed on draws from it: a prior draw
by random Fourier features (Rahimi and Recht 2007), corrected at the recorded cells (Wilson et al. 2020, "Efficiently
sampling functions from Gaussian process posteriors", equation 5).  Every draw agrees with the cells and differs where
nothing was recorded, so the spread over draws says how much the table decides.

    python -m tests.bench.table_surface [--file CELLS]     # how well it predicts configurations that it has not seen
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.study import Choice
from tests.bench.record_table import BASES, CELLS, IMAGES, LENGTH, QUARTERS, SUBJECTS, definition, recorded

Array = NDArray[np.float64]
FEATURES = 2000  # random Fourier features of a draw
FIT_STEPS = 60
# What the best rate may go with, as a power; and how many decades each of the table's coordinates is
MOVES = (LENGTH, "batch", "network_alpha_ratio", "network_dim")
MOVE_SPREAD, FAMILY_SPREAD = 0.5, 0.5  # sd of the prior of an exponent, and of the families' shift in decades
DECADES = math.log10(3e-2 / 1e-4)
LENGTH_PRIOR = (1.5, 1.5)  # a typical length of a setting, and the sd of its logarithm
PARTS = np.arange(1, QUARTERS + 1) / QUARTERS
BROKEN = -1.0  # what Optuna is told of an infeasible trial of a signed study
LIMIT = 0.98  # scores are modelled as LIMIT · tanh(z): they end there, and their noise shrinks towards it
# How bad a bad run is says little about its neighbours: below 0 (the untrained base) z is pressed together.  With 101
# runs, the rank correlation of left-out configurations is 0.12 without this and 0.48 with it (mini-sd15).
LOW = 0.25
LOW_END = -0.25  # of z; broken runs are at -0.5
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
    """What was recorded.  N scores: ``x_ND`` settings, ``t_N`` part of the run, ``s_N`` subject, ``b_N`` base,
    ``c_N`` number of the configuration, ``run_N`` number of the run, ``y_N`` what Optuna would be told, as z."""

    x_ND: Array
    t_N: Array
    s_N: NDArray[np.int64]
    b_N: NDArray[np.int64]
    c_N: NDArray[np.int64]
    run_N: NDArray[np.int64]
    y_N: Array

    @classmethod
    def read(cls, path: Path = CELLS, bases: Sequence[str] = tuple(BASES)) -> Cells:
        x, t, who, y = [], [], [], []
        rows = [(key, row) for key, row in recorded(path).items() if key[0] in bases]
        for number, (key, row) in enumerate(rows):
            for part, at in zip(PARTS, _whole_run(row), strict=True):
                x.append(coordinates(row["suggested"]))
                t.append(part)
                who.append((SUBJECTS.index(row["subject"]), list(BASES).index(key[0]), row["config"], number))
                y.append(told(at))
        s_N, b_N, c_N, run_N = np.array(who).T
        return cls(np.array(x), np.array(t), s_N, b_N, c_N, run_N, to_z(np.array(y)))

    @property
    def runs(self) -> int:
        return int(self.run_N.max()) + 1 if len(self.run_N) else 0


def to_z(score: Array) -> Array:
    z = np.arctanh(np.clip(score, -0.95, 0.95) / LIMIT)
    return np.where(z < 0, LOW * z, z)


def to_score(z: Array) -> Array:
    """The score, or what is told of a broken run.  Between the two, scores stay pressed together, with their noise."""
    return np.where(z < LOW_END, BROKEN, LIMIT * np.tanh(z))


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


def domains() -> dict[str, Any]:
    return {**{p.name: p.domain for p in definition().space}, LENGTH: IMAGES}


def _moved() -> torch.Tensor:
    """(D, K) How many decades of each of ``MOVES`` one unit of each coordinate is."""
    sizes = {
        LENGTH: (LENGTH, math.log10(IMAGES.high / IMAGES.low)),
        "train_batch_size": ("batch", math.log10(8)),
    }
    sizes |= {"gradient_accumulation_steps": ("batch", math.log10(2))}
    sizes |= {"network_alpha_ratio": ("network_alpha_ratio", math.log10(8))}
    sizes |= {"network_dim_log2": ("network_dim", math.log10(16))}
    names = [n for name in domains() for n in ([name] * len(SCHEDULES) if name == "lr_scheduler" else [name])]
    found = torch.zeros(len(names), len(MOVES), dtype=torch.float64)
    for name, (move, decades) in sizes.items():
        found[names.index(name), MOVES.index(move)] = decades
    return found


MOVED_DK = _moved()


@dataclass(frozen=True)
class Shape:
    """The numbers of the kernel."""

    lengths_D: torch.Tensor
    part: torch.Tensor
    run: torch.Tensor  # r
    images: torch.Tensor  # e
    a_B: torch.Tensor
    rho: torch.Tensor
    kappa: torch.Tensor
    moves_K: torch.Tensor  # exponents: the best rate goes with length^m · batch^m · alpha ratio^m · rank^m
    family: torch.Tensor  # decades that the best rate of mini-sdxl is above that of mini-sd15

    def places(self, x_MD: torch.Tensor, b_M: torch.Tensor) -> torch.Tensor:
        """(M, D) Settings in units of the kernel's lengths; the rate as a multiple of what the others ask for."""
        asked = x_MD @ (MOVED_DK @ self.moves_K) + self.family * b_M
        rate = x_MD[:, :1] - asked[:, None] / DECADES
        return torch.cat([rate, x_MD[:, 1:]], 1) / self.lengths_D


class Model:
    """The Gaussian process, fitted by the largest posterior density (L-BFGS).

    Priors: logarithms of the lengths of settings around ``LENGTH_PRIOR``, chosen by the left-out runs (``main``); the
    other logarithms with sd 1 around values of former miniature studies.  Scores are modelled as z (``to_z``).
    """

    def __init__(self, cells: Cells, length_prior: tuple[float, float] = LENGTH_PRIOR) -> None:
        self.cells = cells
        self.dims = cells.x_ND.shape[1]
        bases = range(len(BASES))
        moved = len(MOVES)
        self.mean_B = np.array([cells.y_N[cells.b_N == b].mean() if b in cells.b_N else 0.0 for b in bases])
        typical, spread = length_prior
        others = [0.7, 0.35, 0.05] + [0.7] * len(BASES)
        start = [math.log(typical)] * self.dims + [math.log(v) for v in others]
        self._prior = torch.tensor([*start, 0.0, 0.0, *[0.0] * moved, 0.0], dtype=torch.float64)
        widths = [0.7] + [1.0] * (len(others) + 1) + [MOVE_SPREAD] * moved + [FAMILY_SPREAD]
        self._spread = torch.tensor([spread] * self.dims + widths, dtype=torch.float64)
        self.theta = self._fitted()
        with torch.no_grad():
            self.root_NN = np.linalg.cholesky(self._covariance(self.theta).numpy())

    @property
    def left_N(self) -> Array:
        """What the mean of its base does not explain."""
        return np.asarray(self.cells.y_N - self.mean_B[self.cells.b_N])

    def shape(self, theta: torch.Tensor) -> Shape:
        d, bases = self.dims, len(BASES)
        part, run, images = theta[d : d + 3].exp()
        rho, kappa = torch.sigmoid(theta[d + 3 + bases : d + 5 + bases])
        a_B, moves_K, family = theta[d + 3 : d + 3 + bases].exp(), theta[-1 - len(MOVES) : -1], theta[-1]
        return Shape(theta[:d].exp(), part, run, images, a_B, rho, kappa, moves_K, family)

    def _covariance(self, theta: torch.Tensor) -> torch.Tensor:
        by, c = self.shape(theta), self.cells
        x, t = torch.from_numpy(c.x_ND), torch.from_numpy(np.log(c.t_N))
        along = torch.exp(-0.5 * ((t[:, None] - t[None]) / by.part) ** 2)
        scaled = by.places(x, torch.from_numpy(c.b_N))
        square = scaled.square().sum(1)
        apart = (square[:, None] + square[None] - 2 * scaled @ scaled.T).clamp(min=0)
        found = torch.exp(-0.5 * apart) * along
        found = found * (by.rho + (1 - by.rho) * _same(c.s_N)) * (by.kappa + (1 - by.kappa) * _same(c.b_N))
        height = by.a_B[torch.from_numpy(c.b_N)]
        found = found * height[:, None] * height[None] + by.run**2 * _same(c.run_N) * along
        drawn = by.images**2 * torch.from_numpy(np.where(c.t_N == 1, 1.0, 2.0))
        return found + torch.diag(drawn + 1e-6)

    def _loss(self, theta: torch.Tensor) -> torch.Tensor:
        y = torch.from_numpy(self.left_N)
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

    @property
    def evidence(self) -> float:
        """The logarithm of the density of the fitted parameters and the cells, without constants."""
        return -float(self._loss(self.theta))

    def left_out(self, base: str) -> LeftOut:
        """The last score of every run on a base, predicted without all runs of its configuration on that base."""
        c, b = self.cells, list(BASES).index(base)
        inverse = np.linalg.inv(self.root_NN @ self.root_NN.T)
        weights = inverse @ self.left_N
        true, mean, variance = [], [], []
        for config in np.unique(c.c_N[c.b_N == b]):
            at = np.flatnonzero((c.c_N == config) & (c.b_N == b))
            covariance = np.linalg.inv(inverse[np.ix_(at, at)])  # Rasmussen and Williams, 5.4.2
            off = covariance @ weights[at]
            last = c.t_N[at] == 1
            true += list(c.y_N[at][last])
            mean += list((c.y_N[at] - off)[last])
            variance += list(covariance.diagonal()[last])
        return LeftOut(np.array(true), np.array(mean), np.array(variance))


def _same(of_N: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy((of_N[:, None] == of_N[None]).astype(float))


@dataclass(frozen=True)
class LeftOut:
    """(runs,) each, as z: the measured last scores, and what the model says of them without their configuration."""

    true: Array
    mean: Array
    variance: Array

    @property
    def correlation(self) -> float:
        return float(np.corrcoef(self.true, self.mean)[0, 1])

    @property
    def log_density(self) -> float:
        """The mean logarithm of the predicted density at what was measured; higher is better."""
        found = (self.true - self.mean) ** 2 / self.variance + np.log(2 * np.pi * self.variance)
        return float(-0.5 * found.mean())


class Surface:
    """One draw for one subject on one base: what a search is replayed on.

    Draws with the same ``seed`` belong together: the subjects and the bases share what the fitted kernel says.
    """

    def __init__(self, model: Model, subject: int, seed: int, base: str = "mini-sd15") -> None:
        self.model, self.subject, self.base = model, subject, list(BASES).index(base)
        by = model.shape(model.theta)
        self._by = by
        self._r, self._e, self._part = float(by.run), float(by.images), float(by.part)
        self._a_B = by.a_B.numpy()
        rho, kappa = float(by.rho), float(by.kappa)
        c = model.cells
        rng = np.random.default_rng([seed, 7])
        d = model.dims + 1
        # The prior is a sum: of all, of a subject, of a base, of a subject on a base
        self._weights: dict[tuple[int | None, int | None], tuple[float, Array, Array, Array]] = {}
        for s in (None, *range(len(SUBJECTS))):
            for b in (None, *range(len(BASES))):
                share = (rho if s is None else 1 - rho) * (kappa if b is None else 1 - kappa)
                w_DF = rng.standard_normal((d, FEATURES))
                bias, amount = rng.uniform(0, 2 * math.pi, FEATURES), rng.standard_normal(FEATURES)
                self._weights[s, b] = (math.sqrt(2 * share / FEATURES), w_DF, bias, amount)
        z_ND = self._places(c.x_ND, c.b_N, c.t_N)
        prior = np.empty(len(z_ND))
        for s, b in {(int(s), int(b)) for s, b in zip(c.s_N, c.b_N, strict=True)}:
            at = (c.s_N == s) & (c.b_N == b)
            prior[at] = self._prior(z_ND[at], s, b)
        off = model.left_N - prior - self._noise(rng, c)
        self._solved = np.linalg.solve(model.root_NN.T, np.linalg.solve(model.root_NN, off))
        self._z_ND = z_ND
        self._square_N = (z_ND**2).sum(1)
        height = self._a_B[c.b_N] * self._a_B[self.base]
        self._share_N = (
            height * np.where(c.s_N == subject, 1.0, rho) * np.where(c.b_N == self.base, 1.0, kappa)
        )

    def _places(self, x_MD: Array, b_M: NDArray[np.int64], t_M: Array) -> Array:
        """(M, D + 1) Settings and part of the run, in units of the kernel's lengths."""
        places = self._by.places(torch.from_numpy(x_MD), torch.from_numpy(b_M)).numpy()
        return np.column_stack([places, np.log(t_M) / self._part])

    def _noise(self, rng: np.random.Generator, c: Cells) -> Array:
        root = np.linalg.cholesky(_along(PARTS, self._part) + 1e-9 * np.eye(QUARTERS))
        found = np.empty(len(c.y_N))
        for run in range(c.runs):
            at = np.flatnonzero(c.run_N == run)
            found[at] = self._r * (root @ rng.standard_normal(len(at)))
        spread = self._e * np.sqrt(np.where(c.t_N == 1, 1.0, 2.0))
        return found + spread * rng.standard_normal(len(found))

    def _prior(self, z_ND: Array, subject: int, base: int) -> Array:
        found = np.zeros(len(z_ND))
        for s in (None, subject):
            for b in (None, base):
                scale, w_DF, bias, amount = self._weights[s, b]
                found += scale * (np.cos(z_ND @ w_DF + bias) @ amount)
        return self._a_B[base] * found

    def true(self, x_MD: Array, part: float | Array = 1.0) -> Array:
        """(M,) The score without noise."""
        return to_score(self._z(x_MD, part))

    def score(self, values: Mapping[str, Any]) -> float:
        """The score of whole runs with these settings, without noise."""
        return float(self.true(coordinates(values)[None])[0])

    def _z(self, x_MD: Array, part: float | Array) -> Array:
        parts = np.broadcast_to(np.asarray(part, dtype=float), len(x_MD))
        z_MD = self._places(x_MD, np.full(len(x_MD), self.base), parts)
        prior = self._prior(z_MD, self.subject, self.base)
        apart = ((z_MD**2).sum(1)[:, None] + self._square_N[None] - 2 * z_MD @ self._z_ND.T).clip(min=0)
        return self.model.mean_B[self.base] + prior + (np.exp(-0.5 * apart) * self._share_N) @ self._solved

    @cached_property
    def best(self) -> float:
        """The best score without noise: of quasi-random points, then of smaller and smaller steps from the best."""
        rng = np.random.default_rng(17)
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


def rank_of_parts(cells: Cells) -> Mapping[str, Sequence[float]]:
    """For each base, Spearman's correlation of the score at a quarter, half and three quarters with the last one."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    found = {}
    for b, base in enumerate(BASES):
        y = cells.y_N[cells.b_N == b].reshape(-1, QUARTERS)
        found[base] = [float(spearmanr(y[:, q], y[:, -1]).statistic) for q in range(QUARTERS - 1)]
    return found


@dataclass(frozen=True)
class Table:
    """The table's file, and the model fitted to it."""

    path: Path = CELLS

    @cached_property
    def model(self) -> Model:
        return Model(Cells.read(self.path))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=CELLS)
    cells = Cells.read(parser.parse_args(argv).file)
    for base, ranks in rank_of_parts(cells).items():
        print(f"{base}: rank correlation of the parts with the whole: {', '.join(f'{r:.2f}' for r in ranks)}")
    print(
        "\n| prior of the lengths | base | runs | correlation | log density | rho, kappa, r, e |\n"
        + "|---" * 6
        + "|"
    )
    for prior in ((0.7, 0.7), (1.5, 0.7), (1.5, 1.5), (3.0, 1.0)):
        model = Model(cells, prior)
        by = model.shape(model.theta)
        for base in BASES:
            found = model.left_out(base)
            kernel = ", ".join(f"{float(v):.2f}" for v in (by.rho, by.kappa, by.run, by.images))
            print(
                f"| {prior[0]:g} × e^±{prior[1]:g} | {base} | {len(found.true)} | {found.correlation:.2f} "
                f"| {found.log_density:.3f} | {kernel} |",
                flush=True,
            )
        print(
            f"lengths: {', '.join(f'{v:.1f}' for v in by.lengths_D.tolist())}; evidence {model.evidence:.1f}"
        )
        print(
            "best rate: "
            + ", ".join(f"{m} ^ {v:+.2f}" for m, v in zip(MOVES, by.moves_K.tolist(), strict=True))
        )
        print(f"mini-sdxl × {10 ** float(by.family):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
