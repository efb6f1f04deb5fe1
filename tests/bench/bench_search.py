"""What a search is worth: the claims of docs/benchmarks.md, measured again.

    python -m tests.bench.bench_search rates   --out bench/rates     # score over learning_rate
    python -m tests.bench.bench_search confirm --out bench/confirm   # a study, its best trial retrained
    python -m tests.bench.bench_search throughput --out bench/trials [--full-size]   # trials per hour

``rates``: one configuration, rates from 30× below to 30× above, several training seeds, scored on the search
prompts.  ``confirm``: runs ``hpo search --trials 12`` (or takes ``--study``), retrains its best trial and
trial 0 with fresh seeds and scores them on the held-out prompts beside the untrained base.  ``throughput``: trials
per hour beside a script for each trial (``tests.bench.throughput``).  Finished cells
are kept in ``--out`` and not repeated.  Prints Markdown tables; every figure is in ``--out``'s JSON files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.score.anchors import Anchors
from evaluation.score.evaluator import Evaluator, make_anchors
from evaluation.score.score import (
    Score,
    _values,
    evaluate_adapter,
    paired_difference,
    prompt_draws,
    read_score,
)
from evaluation.score.statistics import Difference
from hpo.search.workbench import Inputs, Workbench, load
from hpo.study.config import find_study, read_study
from hpo.study.folder import StudyFolder
from hpo.study.storage import open_study
from tests.bench import throughput
from trainer.adapters import adapter as adapters
from trainer.config import TrainConfig
from trainer.loop import loop

FACTORS = (1 / 30, 1 / 10, 1 / 3, 1, 3, 10, 30)
CENTRE = {
    "learning_rate": 3e-3,
    "text_encoder_lr_ratio": 0.3,
    "network_dim_log2": 3,
    "network_alpha_ratio": 1.0,
    "lr_scheduler": "cosine",
    "max_train_epochs": 2,
}


def workbench(base: str, folder: Path, data: Path | None = None) -> Workbench:
    return load(Inputs(base, data), read_study(find_study(None, base)), StudyFolder(folder), print)


def trained_score(bench: Workbench, config: TrainConfig, evaluator: Evaluator, folder: Path) -> Score:
    """Train once and score; a finished cell is read back."""
    if (folder / "metrics.json").is_file():
        return read_score(folder / "metrics.json")
    folder.mkdir(parents=True, exist_ok=True)
    lora = adapters.inject(bench.base, config)
    try:
        for _ in loop.train(config, bench.base, lora, bench.prepared(config)):
            pass
        lora.round_to(config.save_precision)
        return evaluate_adapter(evaluator, folder)
    finally:
        lora.remove()


def interval(scores: Sequence[Score], anchors: Anchors) -> Difference:
    """Mean score over training seeds with its 95 % bootstrap interval over prompts."""
    draws = prompt_draws(len(anchors.prompt_ids))
    mean_K = np.mean([_values(s, anchors, draws) for s in scores], axis=0)
    low, high = np.nanpercentile(mean_K, [2.5, 97.5])
    return Difference(float(np.mean([s.value for s in scores])), float(low), float(high))


def rates(args: argparse.Namespace) -> None:
    bench = workbench(args.base, args.out, args.data)
    bench.measure_anchors(print)
    rows: list[dict[str, Any]] = []
    by_factor: dict[float, list[Score]] = {}
    for factor in FACTORS:
        suggested = {**CENTRE, "learning_rate": args.centre * factor}
        config = bench.config(suggested, 0)
        for seed in range(args.seeds):
            cell = args.out / f"rate_{args.centre * factor:.1e}_seed{seed}"
            score = trained_score(bench, config.with_values({"seed": 7000 + seed}), bench.evaluator, cell)
            by_factor.setdefault(factor, []).append(score)
        found = interval(by_factor[factor], bench.anchors)
        rows.append({"learning_rate": args.centre * factor, "factor": factor, **dataclasses.asdict(found)})
        parts = by_factor[factor]
        rows[-1] |= {
            "prompt_following": float(np.mean([s.prompt_following for s in parts])),
            "likeness": float(np.mean([s.likeness for s in parts])),
        }
        print(json.dumps(rows[-1]), flush=True)
    best = max(rows, key=lambda row: row["mean"])["factor"]
    report = {
        "rows": rows,
        "best_factor": best,
        "best_minus_lowest": dataclasses.asdict(
            paired_difference(by_factor[best], by_factor[FACTORS[0]], bench.anchors)
        ),
        "best_minus_highest": dataclasses.asdict(
            paired_difference(by_factor[best], by_factor[FACTORS[-1]], bench.anchors)
        ),
    }
    (args.out / "rates.json").write_text(json.dumps(report, indent=1))
    print("\n| learning_rate | score | 95 % | prompt following | likeness |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['learning_rate']:.1e} | {row['mean']:.3f} | {row['low']:.3f} – {row['high']:.3f} "
            f"| {row['prompt_following']:.3f} | {row['likeness']:.3f} |"
        )
    for name in ("best_minus_lowest", "best_minus_highest"):
        print(f"{name}: {_words(report[name])}")


def confirm(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    study_root: Path = args.study or args.out / "runs" / "bench"
    if args.study is None:
        command = ["hpo", "search", "--base", args.base, "--trials", "12", "bench"]
        subprocess.run([*command, "--runs", str(args.out / "runs")], check=True)
    study = open_study(StudyFolder(study_root))
    best = study.best_trial.number
    data = json.loads((study_root / "study.json").read_text())["data"]
    bench = workbench(args.base, args.out / "bench", Path(data))
    assert bench.confirmation is not None
    evaluator = bench.evaluator.on(bench.confirmation)
    anchors = make_anchors(evaluator, args.out / "base")
    evaluator = evaluator.with_anchors(anchors)
    scores: dict[str, list[Score]] = {}
    for name, number in (("trial 0", 0), (f"best (trial {best})", best)):
        params = json.loads((study_root / f"trial_{number:04d}" / "params.json").read_text())
        config = TrainConfig(**params["train"])
        for seed in range(args.seeds):
            cell = args.out / f"trial{number}_seed{seed}"
            fresh = config.with_values({"seed": 9000 + seed})
            scores.setdefault(name, []).append(trained_score(bench, fresh, evaluator, cell))
    (first, second) = scores
    rows = {name: dataclasses.asdict(interval(found, anchors)) for name, found in scores.items()}
    report: dict[str, Any] = {
        "best_trial": best,
        "search_score": study.best_trial.value,
        "search_score_trial_0": study.trials[0].value,
        "held_out": rows,
        "best_minus_trial_0": dataclasses.asdict(paired_difference(scores[second], scores[first], anchors)),
        "best_minus_untrained": rows[
            second
        ],  # the untrained base is 0 by definition, for every draw of prompts
    }
    (args.out / "confirm.json").write_text(json.dumps(report, indent=1))
    print("\n| settings | held-out score | 95 % |\n|---|---|---|\n| untrained base | 0.000 | by definition |")
    for name, row in rows.items():
        print(f"| {name} | {row['mean']:.3f} | {row['low']:.3f} – {row['high']:.3f} |")
    print(f"best minus trial 0: {_words(report['best_minus_trial_0'])}")


def trials_per_hour(args: argparse.Namespace) -> None:
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    setting = (throughput.full_size if args.full_size else throughput.miniature)(args.out)
    if args.steps:
        setting = dataclasses.replace(setting, job=dataclasses.replace(setting.job, steps=args.steps))
    if args.trials:
        setting = dataclasses.replace(setting, trials=args.trials)
    print("\n" + throughput.table(throughput.measure(setting, args.out, args.rounds)))


def _words(row: Mapping[str, float]) -> str:
    return f"{row['mean']:+.3f} (95 % {row['low']:+.3f} to {row['high']:+.3f})"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["rates", "confirm", "throughput"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="mini-sd15")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--study", type=Path, help="confirm: a finished study's folder")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds")
    parser.add_argument(
        "--centre", type=float, default=CENTRE["learning_rate"], help="rates: the middle rate"
    )
    parser.add_argument("--full-size", action="store_true", help="throughput: SD1.5 with random weights")
    parser.add_argument("--rounds", type=int, default=2, help="throughput: rounds of both ways")
    parser.add_argument("--steps", type=int, help="throughput: training steps of a trial")
    parser.add_argument("--trials", type=int, help="throughput: trials of a study")
    args = parser.parse_args(argv)
    {"rates": rates, "confirm": confirm, "throughput": trials_per_hour}[args.part](args)


if __name__ == "__main__":
    main(sys.argv[1:])
