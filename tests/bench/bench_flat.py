"""Does a search climb out of a start where nothing is learned?  What is told now against what was told before.

    python -m tests.bench.bench_flat search --out bench/flat --seed 1    # every form; resumable
    python -m tests.bench.bench_flat table  --out bench/flat             # the table of docs/evaluation.md

Real searches on mini-sd15 and a demo subject, with short trainings and eight prompts.  The greater part of the space
learns nothing: the rate is too low for the number of steps.  The first ten trials are forced into that part (drawn
at random from it, enqueued as trial 0 and ``--enqueue`` are); the search with clipped values is then told ten times
0.  From there on ``hpo.search`` proposes.  The searches of a seed start with the same ten trials, train with the same
seeds and differ in nothing but what the sampler is told and when it begins to model:

clipped   the score, as before; modelled after the startup trials
eager     the objective that continues below 0; modelled after the startup trials
signed    the same objective, and random proposals until a trial is above the untrained base: what ``hpo search`` does

At the end, the best trial of each search is drawn
again with the confirmation prompts, which no search has used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from rich.console import Console

from evaluation.images import Unchanged
from evaluation.score import CLIPPED, SIGNED, evaluate_adapter, make_anchors
from hpo.search.opening import opened
from hpo.search.sampled import SearchLimits, SearchProposals, suggest
from hpo.search.samplers import make_sampler
from hpo.search.workbench import Workbench, load
from hpo.search.worker import Worker
from hpo.study import (
    BASELINE,
    ENQUEUED,
    ROLE,
    Choice,
    Inputs,
    StudyConfig,
    StudyFolder,
    build_study,
    objective_of,
    score_of,
    standing,
)
from hpo.study.use import in_use
from hpo.terminal.live import make_view
from trainer.adapters import lorafile
from trainer.bases import write_subject

EAGER = "eager"
FORMS = (CLIPPED, EAGER, SIGNED)
TRIALS, FORCED = 24, 10
MARKS = (10, 14, 18, 24)  # trials after which the best score is reported
RATE, STEPS = "learning_rate", "max_train_steps"
FLAT = {RATE: (3e-5, 5e-4), STEPS: (5, 16)}  # this part of the space learns nothing

SECTIONS: dict[str, dict[str, Any]] = {
    "train": {
        "resolution": 64,
        "min_bucket_reso": 32,
        "bucket_reso_steps": 32,
        "train_batch_size": 4,
        "optimizer_type": "AdamW",
        "weight_decay": 0.01,
        "caption_extension": ".txt",
    },
    "space": {
        RATE: {"low": 3e-5, "high": 3e-2, "log": True},
        "text_encoder_lr_ratio": {"low": 0.05, "high": 1.0, "log": True},
        "network_dim_log2": {"low": 1, "high": 4},
        "network_alpha_ratio": {"low": 0.25, "high": 2.0, "log": True},
        "lr_scheduler": {"choices": ["constant", "cosine"]},
        STEPS: {"low": 5, "high": 40, "log": True},
    },
    "baseline": {
        RATE: 1e-4,
        "text_encoder_lr": 5e-5,
        "network_dim": 8,
        "network_alpha": 4,
        "lr_scheduler": "cosine",
        STEPS: 10,
    },
    "prompts": {"words": "miniature", "counts": {"train-like": 4, "altered": 4}, "seeds": [0]},
    "confirmation": {"words": "miniature", "counts": {"train-like": 4, "altered": 4}, "seeds": [1000]},
    "sampling": {"steps": 8, "cfg": 5.0},
    "limits": {"copy_rate": 1.0, "diversity": 0.0, "prior": 100.0},  # eight images cannot show them
}


class Eager(SearchProposals):
    """Models after the startup trials, whatever they learned."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        self.study.sampler = make_sampler(self.bench.study.study.seed, trial.number, self.total)
        return suggest(trial, self.bench.study)


def study_of(form: str, seed: int) -> StudyConfig:
    below_zero = CLIPPED if form == CLIPPED else SIGNED
    return build_study("flat", {**SECTIONS, "study": {"seed": seed}, "score": {"below_zero": below_zero}})


def forced(study: StudyConfig, seed: int) -> list[dict[str, Any]]:
    """Trial 0 and random proposals of the part that learns nothing."""
    random = np.random.default_rng(seed)
    found = [dict(study.baseline)]
    while len(found) < FORCED:
        proposal: dict[str, Any] = {}
        for p in study.space:
            place = float(random.uniform())
            if isinstance(p.domain, Choice):
                proposal[p.name] = p.domain.options[int(place * len(p.domain.options))]
                continue
            low, high = FLAT.get(p.name, (0.0, 0.0))
            proposal[p.name] = p.domain.from_unit(place)
            if high:
                value = low * (high / low) ** place
                proposal[p.name] = value if p.name == RATE else round(value)
        found.append(proposal)
    return found


def search(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = args.out / f"data_{args.subject}"
    if not data.is_dir():
        write_subject(args.subject, data)
    for form in args.forms:
        row = searched(args, data, form)
        print(json.dumps(row), flush=True)


def searched(args: argparse.Namespace, data: Path, form: str) -> dict[str, Any]:
    """One search to its end, its best score after each trial, and the best trial on the confirmation prompts."""
    folder = StudyFolder(args.out / f"{args.subject}_{args.seed}_{form}")
    result = folder.root / "flat.json"
    if result.is_file():
        return json.loads(result.read_text())  # type: ignore[no-any-return]
    view = make_view(Console(stderr=True), dict, folder.name)
    with in_use(folder) as use:
        bench = load(Inputs("mini-sd15", data), study_of(form, args.seed), folder, view.say)
        study = opened(bench, use)
        if not study.get_trials(deepcopy=False):
            for number, proposal in enumerate(forced(bench.study, args.seed)):
                study.enqueue_trial(proposal, user_attrs={ROLE: ENQUEUED if number else BASELINE})
        bench.measure_anchors(view.say)
        use.begun = True
        proposals = (Eager if form == EAGER else SearchProposals)(
            study, bench, SearchLimits(TRIALS), view.say
        )
        Worker(study, bench, proposals, view).run()
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"][:TRIALS]
    feasible = [t for t in done if "score" in t.user_attrs]
    best = standing(study, TRIALS).best
    assert best is not None
    row = {
        "subject": args.subject,
        "seed": args.seed,
        "form": form,
        "scores": [round(float(score_of(t) or 0.0), 4) if t in feasible else None for t in done],
        "objectives": [round(float(objective_of(t) or 0.0), 5) for t in done],
        "best": best[0],
        "held_out": held_out(bench, best[0]),
    }
    result.write_text(json.dumps(row))
    return row


def held_out(bench: Workbench, number: int) -> float:
    """The score of a saved LoRA with the confirmation prompts; 0, the base's, if it does not change an image."""
    assert bench.confirmation is not None
    evaluator = bench.evaluator.on(bench.confirmation)
    folder = bench.folder.root / "held_out"
    evaluator = evaluator.with_anchors(make_anchors(evaluator, folder / "base"))
    adapter = lorafile.attach(bench.base, lorafile.read(bench.folder.trial(number).lora))
    try:
        return round(evaluate_adapter(evaluator, folder / f"trial_{number}").value, 4)
    except Unchanged:
        return 0.0
    finally:
        adapter.remove()


def table(args: argparse.Namespace) -> None:
    rows = [json.loads(path.read_text()) for path in sorted(args.out.glob(f"{args.subject}_*/flat.json"))]
    marks = " | ".join(f"best after {n}" for n in MARKS)
    print(f"| seed | told | above 0 among the first {FORCED} | {marks} | best, other prompts |")
    print("|---|---|---|" + "---|" * (len(MARKS) + 1))
    for row in sorted(rows, key=lambda r: (r["seed"], FORMS.index(r["form"]))):
        early = sum((score or 0.0) > 0 for score in row["scores"][:FORCED])
        print(f"| {row['seed']} | {row['form']} | {early} | {_figures([*_curve(row), row['held_out']])} |")
    for form in FORMS:
        own = [[*_curve(row), row["held_out"]] for row in rows if row["form"] == form]
        print(f"| **median of {len(own)}** | **{form}** | | {_figures(np.median(own, axis=0).tolist())} |")


def _curve(row: dict[str, Any]) -> list[float]:
    best = np.maximum.accumulate([score or 0.0 for score in row["scores"]])
    return [float(best[n - 1]) for n in MARKS]


def _figures(values: Sequence[float]) -> str:
    return " | ".join(f"{value:.3f}" for value in values)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["search", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the study: search one at a time")
    parser.add_argument("--subject", default="character", choices=["character", "object", "style"])
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    args = parser.parse_args(argv)
    {"search": search, "table": table}[args.part](args)


if __name__ == "__main__":
    main(sys.argv[1:])
