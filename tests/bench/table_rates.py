"""How the best learning rate moves with batch, length, alpha, rank and base: fitted on the table, beside known rules.

    python -m tests.bench.table_rates [--file CELLS] [--base mini-sd15]

The Gaussian process of ``table_surface`` has the rate as a multiple of length^a · batch^b · (alpha / rank)^c · rank^d,
and of a factor between the bases.  All are fitted with the rest of the kernel.  The intervals are 95 %, from the
curvature of the density there (Laplace's approximation; Rasmussen and Williams 2006, 3.4).  A rule says which powers
there are; the logarithm of its density, less that of the fitted ones, says how well it agrees with the cells (3 is e³,
about 20 : 1; Kass and Raftery 1995).  Length is counted in images seen, so a rule in updates has both a and b.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.bench.record_table import BASES, CELLS
from tests.bench.table_surface import MOVES, Cells, Model

# Powers of images seen, batch, alpha / rank, rank
RULES = {
    "keep": (0.0, 0.0, 0.0, 0.0),
    "√batch (Malladi et al. 2022)": (0.0, 0.5, 0.0, 0.0),
    "linear in the batch (Goyal et al. 2017)": (0.0, 1.0, 0.0, 0.0),
    "1 / √updates": (-0.5, 0.5, 0.0, 0.0),
    "1 / updates": (-1.0, 1.0, 0.0, 0.0),
    "√batch, 1 / √alpha": (0.0, 0.5, -0.5, -0.5),
    "√batch, rank / alpha": (0.0, 0.5, -1.0, 0.0),
    "1 / √updates, √(rank / alpha) (rsLoRA's size of an update)": (-0.5, 0.5, -0.5, 0.0),
    "1 / √updates, rank / alpha": (-0.5, 0.5, -1.0, 0.0),
    "1 / √(alpha × updates)": (-0.5, 0.5, -0.5, -0.5),
    "1 / (alpha × updates)^⅔": (-0.67, 0.67, -0.67, -0.67),
    "1 / (alpha × updates)": (-1.0, 1.0, -1.0, -1.0),
    "1 / √(alpha × images)": (-0.5, 0.0, -0.5, -0.5),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=CELLS)
    parser.add_argument("--base", choices=list(BASES), action="append", help="only this base's cells")
    args = parser.parse_args(argv)
    cells = Cells.read(args.file, tuple(args.base or BASES))
    free = Model(cells)
    by = free.shape(free.theta)
    spread = np.sqrt(np.diag(np.linalg.inv(free.curvature())))[-1 - len(MOVES) :]
    print(f"{cells.runs} runs on {', '.join(args.base or BASES)}")
    print("\n| the best rate goes with | power | 95 % |\n|---|---|---|")
    for name, power, sd in zip(MOVES, by.moves_K.tolist(), spread, strict=False):
        print(f"| {name} | {power:+.2f} | {power - 1.96 * sd:+.2f} … {power + 1.96 * sd:+.2f} |")
    if not args.base:
        low, high = (10 ** (float(by.family) + side * 1.96 * spread[-1]) for side in (-1, 1))
        print(
            f"\nmini-sdxl's best rate is {10 ** float(by.family):.2f} ({low:.2f} … {high:.2f}) of mini-sd15's"
        )
    print("\n| rule | log density, less that of the fitted powers |\n|---|---|")
    for name, powers in RULES.items():
        fixed = Model(cells, moves=torch.tensor(powers, dtype=torch.float64))
        print(f"| {name} | {fixed.evidence - free.evidence:+.1f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
