"""The recorded ranking study: its file, its scores recomputed from raw cosines, its ground truth and its tables.

Recorded by tests/bench/bench_ranking.py.  Only images whose prompt asks for the subject count for the truth.

* *strict*: the share of correct images.  Background and place must match the prompt, and every part of the figure that
  the base's autoencoder preserves (in at least half of the real images after a round trip) must be visible.
* *graded*: the mean of ``subjects.is_subject`` (the share of all four parts), 0 if background or place is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.score import statistics
from evaluation.score.anchors import Anchors
from evaluation.score.score import anchored, composite
from hpo.confirm.outcome import expected_best
from hpo.study.result import INFEASIBLE_VALUE
from trainer.files import read_records

FILE = Path(__file__).parent / "data" / "ranking_mini_sd15.jsonl"
SEARCH, CONFIRMATION = "search", "confirmation"
RATES = ("learning_rate", "unet_lr", "text_encoder_lr")
KEPT = 0.5  # a part counts if the autoencoder preserves it in this share of the real images


@dataclass(frozen=True)
class Prompts:
    """One prompt set of the recording: P prompts, S seeds and the anchors."""

    anchors: Anchors
    texts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def asks_P(self) -> np.ndarray:
        return np.array(self.anchors.asks_for_subject)

    @property
    def scale(self) -> statistics.Scale:
        return statistics.Scale.of(vars(self.anchors))


@dataclass(frozen=True)
class Measured:
    """One configuration on one prompt set; arrays are (P, S)."""

    name: str
    clip_t_PS: np.ndarray
    clip_i_PS: np.ndarray
    strict_PS: np.ndarray
    graded_PS: np.ndarray
    invalid: int
    prompts: Prompts

    def parts(self, weights_KP: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Prompt following and likeness (K) for K weightings of the prompts."""
        weights = np.ones((1, len(self.prompts.texts))) if weights_KP is None else weights_KP
        return anchored(self.clip_t_PS.mean(1), self.clip_i_PS.mean(1), self.prompts.anchors, weights)

    def values(self, weights_KP: np.ndarray | None = None) -> np.ndarray:
        """The score (K), as reported to a study."""
        following_K, alike_K = self.parts(weights_KP)
        return (
            np.full(len(following_K), INFEASIBLE_VALUE) if self.invalid else composite(following_K, alike_K)
        )

    @property
    def score(self) -> float:
        return float(self.values()[0])

    @property
    def clip_t(self) -> float:
        return float(self.clip_t_PS.mean())

    @property
    def likeness(self) -> float:
        return float(self.parts()[1][0])

    @property
    def strict(self) -> float:
        return float(self.strict_PS[self.prompts.asks_P].mean())

    @property
    def graded(self) -> float:
        return float(self.graded_PS[self.prompts.asks_P].mean())


@dataclass(frozen=True)
class Recorded:
    """Everything in the file."""

    on: dict[str, dict[str, Measured]]  # prompt set → configuration → measurement
    kept: dict[str, float]  # part of the figure → share of the real images that show it after a round trip

    @property
    def trials(self) -> list[Measured]:
        """The quasi-random configurations on the search set, in order."""
        found = [m for name, m in self.on[SEARCH].items() if name.startswith("random ")]
        return sorted(found, key=lambda m: int(m.name.split()[1]))

    @property
    def ranked(self) -> list[Measured]:
        return sorted(self.trials, key=lambda m: -m.score)

    def column(self, of: str) -> list[float]:
        return [getattr(m, of) for m in self.trials]


def read(path: Path = FILE) -> Recorded:
    rows = read_records(path)
    sets = {row["set"]: _prompts(row) for row in rows if row["name"] == "anchors"}
    kept: dict[str, float] = next((row["kept"] for row in rows if row["name"] == "autoencoder"), {})
    asked = np.array([share >= KEPT for share in kept.values()])
    on: dict[str, dict[str, Measured]] = {which: {} for which in sets}
    for row in rows:
        if row["name"] not in ("anchors", "autoencoder"):
            on[row["set"]][row["name"]] = _measured(row, sets[row["set"]], asked)
    return Recorded(on, kept)


def _prompts(row: dict[str, Any]) -> Prompts:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in row["anchors"].items()}
    return Prompts(Anchors(**values), tuple(p["text"] for p in row["prompts"]), tuple(row["seeds"]))


def _measured(row: dict[str, Any], prompts: Prompts, asked: np.ndarray) -> Measured:
    shape = (len(prompts.texts), len(prompts.seeds))
    if "failed" in row:
        nothing = np.zeros(shape)
        return Measured(row["name"], nothing, nothing, nothing, nothing, nothing.size, prompts)
    clip_t, clip_i = (np.array(row[key]).reshape(shape) for key in ("clip_t", "clip_i"))
    parts_N4 = np.array([[part == "1" for part in parts] for parts in row["parts"]])
    named_PS = (np.array(row["background"], bool) & np.array(row["place"], bool)).reshape(shape)
    strict_PS = named_PS & parts_N4[:, asked].all(1).reshape(shape) if len(asked) else named_PS
    graded_PS = named_PS * parts_N4.mean(1).reshape(shape)
    return Measured(row["name"], clip_t, clip_i, strict_PS, graded_PS, row["invalid"], prompts)


# Tables


def noise(found: Recorded) -> statistics.Components:
    """The noise estimated as in ``hpo status``, from the better half of the trials."""
    better = found.ranked[: (len(found.trials) + 1) // 2]
    scores = [statistics.image_scores(m.clip_t_PS, m.clip_i_PS, m.prompts.scale) for m in better]
    return statistics.variance_components(np.stack([s for s in scores if s is not None]))


@dataclass(frozen=True)
class Optimism:
    """Means over random pairs of disjoint prompt sets of one size.

    ``said``: score of the best trial on the set that selected it.  ``expected``: the score predicted from
    that set alone.  ``worth``: score on the other set.  Either set can be the selecting one, so
    differences in difficulty cancel.
    """

    prompts: int
    said: float
    expected: float
    worth: float


def optimism(found: Recorded, prompts: int) -> Optimism:
    """The selection bias of a search with few prompts, measured on the 30 trained LoRAs of the recording."""
    trials, random = found.trials, np.random.default_rng(SPLIT_SEED)
    asking = np.flatnonzero(trials[0].prompts.asks_P)
    weights_2KP = np.zeros((2, SPLITS, len(trials[0].prompts.texts)))
    for k in range(SPLITS):
        order = random.permutation(asking)
        weights_2KP[0, k, order[:prompts]] = weights_2KP[1, k, order[prompts : 2 * prompts]] = 1
    selecting_CK, other_CK = (np.stack([m.values(w) for m in trials]) for w in weights_2KP)
    best_K, splits = selecting_CK.argmax(0), np.arange(SPLITS)
    own = float(noise(found).paired_se(prompts) / np.sqrt(2))
    expected = [expected_best(scores_C.tolist(), own) for scores_C in selecting_CK.T]
    return Optimism(
        prompts,
        float(selecting_CK[best_K, splits].mean()),
        float(np.mean([value for value in expected if value is not None])),
        float(other_CK[best_K, splits].mean()),
    )


SIZES = (1, 2, 3, 4, 5, 6, 7)
SPLITS, SPLIT_SEED = 500, 11


def confirmed(found: Recorded) -> list[tuple[Measured, Measured]]:
    """Pairs (search set, confirmation set) of all retrained configurations, the best of the search first."""
    pairs = [(found.on[SEARCH][name], m) for name, m in found.on[CONFIRMATION].items()]
    return sorted(pairs, key=lambda pair: -pair[0].score)


def interval(m: Measured) -> tuple[float, float]:
    return statistics.interval(m.values(statistics.prompt_draws(len(m.prompts.texts))))


def tables(found: Recorded) -> str:
    lines = [
        "| ranked by | Spearman with the strict truth | 95 % | with the graded truth | 95 % |",
        "|---|---|---|---|---|",
    ]
    for name, of in (("**score**", "score"), ("likeness alone", "likeness"), ("CLIP-T alone", "clip_t")):
        strict, graded = (
            statistics.spearman(found.column(of), found.column(truth)) for truth in ("strict", "graded")
        )
        lines.append(
            f"| {name} | {strict.value:.3f} | {strict.low:.3f} – {strict.high:.3f} "
            f"| {graded.value:.3f} | {graded.low:.3f} – {graded.high:.3f} |"
        )
    for truth in ("strict", "graded"):
        gain = statistics.lead(found.column("score"), found.column("clip_t"), found.column(truth))
        lines.append(
            f"\nlead over CLIP-T ({truth}): {gain.mean:+.3f} (95 % {gain.low:+.3f} to {gain.high:+.3f})"
        )
    lines += ["", "| configuration | score | prompt following | likeness | strict truth | graded truth |"]
    lines.append("|---|---|---|---|---|---|")
    search = found.on[SEARCH]
    best = found.ranked[0]
    for m in (search["base"], search["trial 0"], best, search["overfitted"], found.ranked[-1]):
        t, i = (float(part[0]) for part in m.parts())
        lines.append(f"| {m.name} | {m.score:.3f} | {t:.3f} | {i:.3f} | {m.strict:.2f} | {m.graded:.2f} |")
    lines += ["", "| trial | search score | confirmed | 95 % | decrease |", "|---|---|---|---|---|"]
    for said, worth in confirmed(found):
        low, high = interval(worth)
        lines.append(
            f"| {said.name} | {said.score:.3f} | {worth.score:.3f} | {low:.3f} – {high:.3f} "
            f"| {said.score - worth.score:+.3f} |"
        )
    parts = noise(found)
    lines += ["", parts.sentence(), parts.figures()]
    lines += [
        "",
        "| prompts used to select | score of the best | expected after correction | score on other prompts |",
    ]
    lines.append("|---|---|---|---|")
    for about in (optimism(found, size) for size in SIZES):
        lines.append(f"| {about.prompts} | {about.said:.3f} | {about.expected:.3f} | {about.worth:.3f} |")
    lines.append(f"kept by the autoencoder: {found.kept}")
    return "\n".join(lines)


# The figure

WIDE_PX, HIGH_PX, LEFT_PX, RIGHT_PX, FOOT_PX, TOP_PX = 760, 380, 60, 190, 60, 44
LOW, HIGH = 0.6, 1.0  # of the score's axis


def picture(found: Recorded) -> str:
    """An SVG of the best trial's search score, expected score and score on other prompts, by number of prompts."""
    rows = [optimism(found, size) for size in SIZES]

    def x(prompts: float) -> float:
        return LEFT_PX + (WIDE_PX - LEFT_PX - RIGHT_PX) * (prompts - SIZES[0]) / (SIZES[-1] - SIZES[0])

    def y(value: float) -> float:
        return HIGH_PX - FOOT_PX - (HIGH_PX - FOOT_PX - TOP_PX) * (value - LOW) / (HIGH - LOW)

    def text(
        at_x: float, at_y: float, words: str, anchor: str = "start", size: int = 12, colour: str = "#222"
    ) -> str:
        place = f'x="{at_x:.0f}" y="{at_y:.0f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
        return f"<text {place}>{words}</text>"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE_PX} {HIGH_PX}" font-family="sans-serif">',
        f'<rect width="{WIDE_PX}" height="{HIGH_PX}" fill="white"/>',
        text(
            LEFT_PX, 22, "The best of 30 trials looks better than it is, above all with few prompts", size=15
        ),
    ]
    for tenth in range(round(10 * LOW), round(10 * HIGH) + 1):
        out.append(f'<path d="M{LEFT_PX} {y(tenth / 10):.1f}H{WIDE_PX - RIGHT_PX}" stroke="#ddd"/>')
        out.append(text(LEFT_PX - 8, y(tenth / 10) + 4, f"{tenth / 10:.1f}", "end"))
    for size in SIZES:
        out.append(text(x(size), HIGH_PX - FOOT_PX + 18, str(size), "middle"))
    out.append(
        text(x(4), HIGH_PX - FOOT_PX + 36, "prompts used to select the best trial (2 seeds each)", "middle")
    )
    lines = (
        ("said", "#c2410c", "", "score of the best"),
        ("expected", "#1d4ed8", "6 4", "expected after correction"),
        ("worth", "#15803d", "", "score on other prompts"),
    )
    for of, colour, dashes, _ in lines:
        points = " ".join(f"{x(row.prompts):.1f},{y(getattr(row, of)):.1f}" for row in rows)
        style = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}" fill="none"'
        out.append(f'<polyline points="{points}" {style}/>')
    for place, (of, colour, _, words) in enumerate(lines):
        out.append(text(WIDE_PX - RIGHT_PX + 10, TOP_PX + 40 + 22 * place, words, colour=colour))
        out.append(text(WIDE_PX - RIGHT_PX + 10, HIGH_PX - FOOT_PX - 50 + 18 * place,
                        f"7 prompts: {getattr(rows[-1], of):.3f}", colour=colour))  # fmt: skip
    out.append(
        text(LEFT_PX, HIGH_PX - 6, "500 random pairs of disjoint prompt sets of the recorded study", size=11)
    )
    return "\n".join([*out, "</svg>", ""])


def names(of: Sequence[Measured]) -> list[str]:
    return [m.name for m in of]
