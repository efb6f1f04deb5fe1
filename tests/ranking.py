"""The recorded ranking study: its file, its scores computed anew from raw cosines, and its ground truth.

Recorded by tests/bench/bench_ranking.py.  An image is *right* if its background and its place are those its prompt
names, and it shows the whole subject where the prompt asks for it – and does not where the prompt asks for the
class alone.  The truth of a configuration is its share of right images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.anchors import Anchors
from evaluation.score import anchored, composite
from trainer.files import read_records

FILE = Path(__file__).parent / "data" / "ranking_mini_sd15.jsonl"
SEARCH, CONFIRMATION = "search", "confirmation"
RATES = ("learning_rate", "unet_lr", "text_encoder_lr")
INFEASIBLE_VALUE = -0.1  # hpo.trial: what a study is told of invalid images


@dataclass(frozen=True)
class Prompts:
    """One prompt set of the recording: P prompts, S seeds, and what 0 and 1 mean on it."""

    anchors: Anchors
    texts: tuple[str, ...]
    kinds: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """One configuration on one prompt set; arrays are (P, S)."""

    name: str
    clip_t_PS: np.ndarray
    clip_i_PS: np.ndarray
    right_PS: np.ndarray
    invalid: int
    prompts: Prompts

    def parts(self, weights_KP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prompt following and likeness (K) for K weightings of the prompts."""
        return anchored(self.clip_t_PS.mean(1), self.clip_i_PS.mean(1), self.prompts.anchors, weights_KP)

    def values(self, weights_KP: np.ndarray) -> np.ndarray:
        """The composite (K), as a study would be told."""
        if self.invalid:
            return np.full(len(weights_KP), INFEASIBLE_VALUE)
        return composite(*self.parts(weights_KP))

    @property
    def value(self) -> float:
        return float(self.values(np.ones((1, len(self.prompts.texts))))[0])

    @property
    def truth(self) -> float:
        return float(self.right_PS.mean())


@dataclass(frozen=True)
class Recorded:
    """Everything in the file."""

    search: Prompts
    confirmation: Prompts
    measured: dict[tuple[str, str], Measured]

    @property
    def trials(self) -> list[Measured]:
        """The quasi-random configurations on the search set, in their order."""
        found = [m for (name, which), m in self.measured.items() if which == SEARCH]
        return sorted(
            (m for m in found if m.name.startswith("random ")), key=lambda m: int(m.name.split()[1])
        )

    def on(self, which: str) -> dict[str, Measured]:
        return {name: m for (name, where), m in self.measured.items() if where == which}


def read(path: Path = FILE) -> Recorded:
    rows = read_records(path)
    sets = {row["set"]: _prompts(row) for row in rows if row["name"] == "anchors"}
    measured = {
        (row["name"], row["set"]): _measured(row, sets[row["set"]])
        for row in rows
        if row["name"] != "anchors"
    }
    return Recorded(sets[SEARCH], sets[CONFIRMATION], measured)


def _prompts(row: dict[str, Any]) -> Prompts:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in row["anchors"].items()}
    texts, kinds = ([p[key] for p in row["prompts"]] for key in ("text", "kind"))
    return Prompts(Anchors(**values), tuple(texts), tuple(kinds), tuple(row["seeds"]))


def _measured(row: dict[str, Any], prompts: Prompts) -> Measured:
    shape = (len(prompts.texts), len(prompts.seeds))
    if "failed" in row:
        nothing = np.zeros(shape)
        return Measured(row["name"], nothing, nothing, nothing, nothing.size, prompts)
    asked_P = np.array([kind != "class-only" for kind in prompts.kinds])
    whole_PS = np.array(["0" not in parts for parts in row["parts"]]).reshape(shape)
    right_PS = np.array(row["background"], bool) & np.array(row["place"], bool)
    return Measured(
        row["name"],
        np.array(row["clip_t"]).reshape(shape),
        np.array(row["clip_i"]).reshape(shape),
        right_PS.reshape(shape) & (whole_PS == asked_P[:, None]),
        row["invalid"],
        prompts,
    )


def tables(found: Recorded) -> str:
    lines = [
        "| configuration | set | score | following | likeness | right images |",
        "|---|---|---|---|---|---|",
    ]
    for (name, which), m in found.measured.items():
        t, i = (float(x[0]) for x in m.parts(np.ones((1, len(m.prompts.texts)))))
        lines.append(f"| {name} | {which} | {m.value:.3f} | {t:.3f} | {i:.3f} | {m.truth:.2f} |")
    return "\n".join(lines)


def column(trials: Sequence[Measured], of: str) -> np.ndarray:
    return np.array([getattr(t, of) for t in trials])
