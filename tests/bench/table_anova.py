"""In which coordinates do the settings of the table interact least?

    python -m tests.bench.table_anova [--file CELLS] [--base mini-sd15]

An additive Gaussian process, one squared exponential for each setting and none for pairs, is fitted to the whole runs
of a base in several coordinates of the rate, the alpha and the length (Duvenaud, Nickisch and Rasmussen 2011,
"Additive Gaussian processes", order 1).  The logarithm of its evidence says how well the scores are explained without
interactions: coordinates with a larger one need fewer trials.  A difference of 3 is e³, about 20 : 1, and counts as
evidence (Kass and Raftery 1995); less is none.  Beside it, what each setting explains in the best coordinates: its
share of the variance of the additive part, over the recorded settings.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.record_table import BASES, CELLS, LENGTH, SUBJECTS, definition, recorded
from tests.bench.table_surface import coordinates, domains, to_z, told

Array = NDArray[np.float64]
STEPS = 80
Of = Callable[[Mapping[str, Any]], float]


def rate(alpha: float = 0.0, rank: float = 0.0, batch: float = 0.0) -> Of:
    """log2 of learning_rate × (alpha/rank)^alpha × rank^rank / batch^batch."""

    def found(v: Mapping[str, Any]) -> float:
        own = math.log2(v["learning_rate"]) + alpha * math.log2(v["network_alpha_ratio"])
        return own + rank * v["network_dim_log2"] - batch * math.log2(effective(v))

    return found


def effective(values: Mapping[str, Any]) -> int:
    return int(values["train_batch_size"]) * int(values["gradient_accumulation_steps"])


# What replaces a coordinate of the table, each on about the range 0 to 1
WAYS: Mapping[str, Mapping[str, Of]] = {
    "kohya's: rate, alpha / rank, images": {},
    "rate × alpha / rank": {"learning_rate": rate(alpha=1)},
    "rate × √(alpha / rank)": {"learning_rate": rate(alpha=0.5)},
    "rate, alpha itself": {
        "network_alpha_ratio": lambda v: math.log2(v["network_alpha_ratio"]) + v["network_dim_log2"]
    },
    "rate × √rank": {"learning_rate": rate(rank=0.5)},
    "rate × rank": {"learning_rate": rate(rank=1)},
    "rate / √batch": {"learning_rate": rate(batch=0.5)},
    "rate / batch": {"learning_rate": rate(batch=1)},
    "rate, updates": {LENGTH: lambda v: math.log2(v[LENGTH] / effective(v))},
    "rate × alpha / rank / √batch": {"learning_rate": rate(alpha=1, batch=0.5)},
    "rate × alpha / rank, updates": {
        "learning_rate": rate(alpha=1),
        LENGTH: lambda v: math.log2(v[LENGTH] / effective(v)),
    },
}


@dataclass(frozen=True)
class Whole:
    """The whole runs of a base: settings, subject and score (as z) of each of N runs."""

    values: tuple[Mapping[str, Any], ...]
    s_N: Array
    y_N: Array

    @classmethod
    def read(cls, base: str, path: Path) -> Whole:
        rows = [row for key, row in recorded(path).items() if key[0] == base]
        y = [told(row["at"][-1] if len(row["at"]) == 4 else {"failed": "unknown"}) for row in rows]
        s = [SUBJECTS.index(row["subject"]) for row in rows]
        return cls(tuple(row["suggested"] for row in rows), np.array(s, float), to_z(np.array(y)))


def blocks() -> list[tuple[str, int]]:
    """Name and number of coordinates of each setting, in the order of ``coordinates``."""
    return [(name, 4 if name == "lr_scheduler" else 1) for name in domains()]


def places(whole: Whole, way: Mapping[str, Of]) -> list[Array]:
    """For each setting its coordinates (N, C)."""
    x_ND = np.array([coordinates(v) for v in whole.values])
    found, at = [], 0
    for name, count in blocks():
        own = x_ND[:, at : at + count]
        at += count
        if name in way:
            raw = np.array([[way[name](v)] for v in whole.values])
            own = (raw - raw.min()) / max(float(np.ptp(raw)), 1e-9)
        found.append(own)
    return found


class Additive:
    """The fitted process.  ``evidence``: log p(scores), at the largest posterior density of its numbers."""

    def __init__(self, whole: Whole, way: Mapping[str, Of]) -> None:
        self.x = [torch.from_numpy(block) for block in places(whole, way)]
        self.y = torch.from_numpy(whole.y_N - whole.y_N.mean())
        self.same = torch.from_numpy((whole.s_N[:, None] == whole.s_N[None]).astype(float))
        count = len(self.x)
        # lengths, amounts, subject, noise: logarithms
        found = [self._fitted(length, amount, count) for length in (0.25, 0.6) for amount in (0.3, 0.8)]
        self.theta = max(found, key=lambda theta: float(self._density(theta)))
        self.evidence = float(self._evidence(self.theta))

    def _density(self, theta: torch.Tensor) -> torch.Tensor:
        """The evidence with the prior: lengths around half the range, amounts around 0.3, each within a factor e."""
        count = len(self.x)
        middle = torch.tensor([math.log(0.5)] * count + [math.log(0.3)] * count + [-1.0, -1.0]).double()
        return self._evidence(theta) - 0.5 * (theta - middle).square().sum()

    def _fitted(self, length: float, amount: float, count: int) -> torch.Tensor:
        begin = [math.log(length)] * count + [math.log(amount)] * count + [-1.0, -1.0]
        theta = torch.tensor(begin, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([theta], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            search.zero_grad()
            loss = -self._density(theta)
            loss.backward()
            return loss

        search.step(closure)
        return theta.detach()

    def _parts(self, theta: torch.Tensor) -> list[torch.Tensor]:
        count = len(self.x)
        return [
            theta[count + n].exp() ** 2
            * torch.exp(-0.5 * ((own[:, None] - own[None]) / theta[n].exp()).square().sum(-1))
            for n, own in enumerate(self.x)
        ]

    def _covariance(self, theta: torch.Tensor) -> torch.Tensor:
        noise = theta[-1].exp() ** 2 * torch.eye(len(self.y), dtype=torch.float64)
        return sum(self._parts(theta)) + theta[-2].exp() ** 2 * self.same + noise  # type: ignore[return-value]

    def _evidence(self, theta: torch.Tensor) -> torch.Tensor:
        root = torch.linalg.cholesky(self._covariance(theta))
        white = torch.linalg.solve_triangular(root, self.y[:, None], upper=False)
        constant = 0.5 * len(self.y) * math.log(2 * math.pi)
        return -0.5 * white.square().sum() - root.diagonal().log().sum() - constant

    def shares(self) -> list[float]:
        """The variance over the runs that each setting's part explains, as shares of all parts and the noise."""
        solved = torch.linalg.solve(self._covariance(self.theta), self.y)
        found = [float((part @ solved).var()) for part in self._parts(self.theta)]
        noise = float(self.theta[-1].exp() ** 2)
        return [one / (sum(found) + noise) for one in found]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=CELLS)
    parser.add_argument("--base", choices=list(BASES), default="mini-sd15")
    args = parser.parse_args(argv)
    whole = Whole.read(args.base, args.file)
    fitted = {name: Additive(whole, way) for name, way in WAYS.items()}
    usual = next(iter(fitted.values())).evidence
    print(f"{args.base}: {len(whole.y_N)} runs of {len(definition().space) + 1} settings\n")
    print("| coordinates | log evidence, less that of kohya's |\n|---|---|")
    for name, one in fitted.items():
        print(f"| {name} | {one.evidence - usual:+.1f} |")
    best = max(fitted, key=lambda name: fitted[name].evidence)
    print(f"\nShares of the variance, in “{best}”:\n\n| setting | share |\n|---|---|")
    named = zip([name for name, _ in blocks()], fitted[best].shares(), strict=True)
    for name, share in sorted(named, key=lambda one: -one[1]):
        print(f"| {name} | {share:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
