"""What a transfer is worth on the miniature: the table of docs/transfer.md, filled cell by cell.

    python -m tests.bench.bench_transfer_table --work DIR [--subject character] [--trials 12] [--probes 6]

A row is a way to come to settings for mini-sdxl; a cell is one training with them – subject × training seed – scored
on the confirmation prompts.  Finished cells are appended to tests/data/transfer_table.jsonl and never made again;
searches, probes and trainings of a stopped call go on.  Missing cells are shown as missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpo.profile import read_family, read_profile
from tests.bench.bench_probe_grid import DOCS, between
from trainer.config import TrainConfig
from trainer.files import append_line, read_records, write_atomic

CELLS = Path(__file__).parent.parent / "data" / "transfer_table.jsonl"
BEGIN, END = "<!-- transfer table: begin -->", "<!-- transfer table: end -->"
SUBJECTS = ("character",)
SEEDS = (8000, 8001)
ROWS = {
    "untrained base": "no training",
    "default settings": "trial 0 of a direct search",
    "transferred": "the search's best trial, by the rules",
    "transferred + probe": "and what the probes changed",
    "direct search": "on mini-sdxl, as many training samples × cost as search and probes took",
    "random trial transferred": "any trial of the search, by the rules",
    "worst quartile transferred": "a trial of the search's worst quarter, by the rules",
}
RANDOM_SEED = 1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training with the settings of one row."""

    row: str
    subject: str
    seed: int


def read_cells(path: Path = CELLS) -> dict[Cell, dict[str, Any]]:
    return {Cell(r["row"], r["subject"], r["seed"]): r for r in read_records(path)}


def wanted(subjects: Sequence[str] = SUBJECTS) -> list[Cell]:
    return [Cell(row, subject, seed) for subject in subjects for seed in SEEDS for row in ROWS]


# The stages of a subject: each of them goes on where it was stopped


def hpo(work: Path, *words: str) -> None:
    print("hpo " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-c", "from hpo.cli import main; main()", *words], cwd=work, check=True)


def direct_trials(source_samples: float, probes: int, target_samples: float, cost: float) -> int:
    """Trials on the target that cost as much as the search there and the probes here, in source samples."""
    spent = source_samples + probes * 0.25 * target_samples * cost
    return max(1, round(spent / (target_samples * cost)))


def settings_of(args: argparse.Namespace, subject: str) -> dict[str, TrainConfig | None]:
    """The settings of every row.  None: nothing is trained."""
    from hpo.folder import StudyFolder
    from hpo.transfercmd import make
    from hpo.transfersource import read_source
    from trainer.trainfile import read_train_file

    data, name = args.work / f"data-{subject}", f"{subject}-mini-sd15"
    if not data.is_dir():
        hpo(args.work, "dataset", "demo", subject, str(data.resolve()))
    sets = [word for text in args.sets for word in ("--set", text)]
    search = ("search", "--data", str(data.resolve()), *sets)
    hpo(args.work, *search, "--base", "mini-sd15", "--name", name, "--trials", str(args.trials))
    family, profile = read_family("mini-sdxl"), read_profile("mini-sdxl")
    source = read_source(StudyFolder(args.work / "runs" / name))
    plain = make(source, profile, None)
    words = ("transfer", "--to", "mini-sdxl", "--study", name, "--probes", str(args.probes))
    hpo(args.work, *words)
    samples = plain.samples
    epochs = [t.config.max_train_epochs or 1 for t in source.trials]
    target = (plain.plan.config.max_train_epochs or 1) * samples
    count = direct_trials(sum(epochs) * samples, args.probes, target, family.cost_of_a_sample)
    direct = f"{subject}-mini-sdxl-direct"
    hpo(args.work, *search, "--base", "mini-sdxl", "--name", direct, "--trials", str(count))
    found = read_source(StudyFolder(args.work / "runs" / direct))

    def carried(trial: Any) -> TrainConfig:
        return make(dataclasses.replace(source, best=trial), profile, None).plan.config

    worst = source.trials[-max(1, len(source.trials) // 4) :]
    random = source.trials[int(np.random.default_rng(RANDOM_SEED).integers(len(source.trials)))]
    usual = found.baseline or found.best
    return {
        "untrained base": None,
        "default settings": usual.config,
        "transferred": plain.plan.config,
        "transferred + probe": read_train_file(source.folder.root / "transfer" / "mini-sdxl.toml").config,
        "direct search": found.best.config,
        "random trial transferred": carried(random),
        "worst quartile transferred": carried(worst[len(worst) // 2]),
    }


def fill(args: argparse.Namespace) -> None:
    """Make every missing cell of a subject."""
    from hpo.folder import StudyFolder
    from hpo.result import COMPLETE, write_params
    from hpo.study import Inputs, find_study, read_study
    from hpo.trial import run_trial
    from hpo.workbench import load
    from tests.tiny_search import Recorder

    missing = [cell for cell in wanted([args.subject]) if cell not in read_cells(args.file)]
    print(f"{args.subject}: {len(missing)} cells are missing", flush=True)
    if not missing:
        return
    configs = settings_of(args, args.subject)
    study = read_study(find_study(None, "mini-sdxl"), sets=args.sets)
    folder = StudyFolder(args.work / f"table-{args.subject}")
    bench = load(Inputs("mini-sdxl", args.work / f"data-{args.subject}"), study, folder, print)
    assert bench.confirmation is not None
    bench = dataclasses.replace(bench, prompts=bench.confirmation)
    bench.measure_anchors(print)
    order = wanted([args.subject])
    for cell in missing:
        config, row = configs[cell.row], dataclasses.asdict(cell)
        if config is None:  # by the anchors' definition: it follows prompts as itself and is like nobody
            row |= {"score": 0.0, "prompts": [0.0] * len(bench.prompts.prompts), "outcome": COMPLETE}
        else:
            number = order.index(cell)
            names = ("pretrained_model_name_or_path", "train_data_dir", "output_name")
            own = bench.config(study.baseline, number).as_dict()
            config = config.with_values({"seed": cell.seed, **{name: own[name] for name in names}})
            trial = folder.trial(number)
            write_params(trial, row, (), config)
            result = run_trial(bench, trial, config, Recorder())
            if result.value is None:
                raise SystemExit(f"{cell}: {result.reason}: {result.message}")
            row |= {
                "score": max(0.0, round(result.value, 5)),
                "outcome": result.state,
                "prompts": _prompts(bench, trial),
            }
            row |= {"learning_rate": config.learning_rate, "text_encoder_lr": config.text_encoder_lr}
        append_line(args.file, json.dumps(row))
        print(json.dumps({k: v for k, v in row.items() if k != "prompts"}), flush=True)


def _prompts(bench: Any, trial: Any) -> list[float]:
    from hpo.standing import by_prompt

    return [round(value, 4) for value in by_prompt(trial.metrics, bench.anchors)]


# The table


def interval(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % bootstrap interval over prompts of the mean over training seeds; a subject's prompts are its own."""
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        return float("nan"), float("nan")
    mean_P = np.mean(np.array(rows), axis=0)
    picked_KP = np.random.default_rng(0).integers(0, len(mean_P), (2000, len(mean_P)))
    low, high = np.percentile(mean_P[picked_KP].mean(1), [2.5, 97.5])
    return float(low), float(high)


def table(cells: dict[Cell, dict[str, Any]], subjects: Sequence[str] = SUBJECTS) -> str:
    """Every row of every subject, with what is missing."""
    lines = [
        "| subject | settings | score | 95 % interval | over transferred | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        own = {seed: cells.get(Cell("transferred", subject, seed)) for seed in SEEDS}
        for row, meaning in ROWS.items():
            found = {s: c for s in SEEDS if (c := cells.get(Cell(row, subject, s))) is not None}
            name = f"{row} ({meaning})"
            if not found:
                lines.append(f"| {subject} | {name} | missing | | | 0 of {len(SEEDS)} |")
                continue
            low, high = interval([c["prompts"] for c in found.values()])
            both = [(c, own[s]) for s, c in found.items() if own[s] is not None and row != "transferred"]
            gains = [
                np.subtract(c["prompts"], t["prompts"])
                for c, t in both
                if t and len(c["prompts"]) == len(t["prompts"])
            ]
            over = ""
            if gains:
                least, most = interval([list(gain) for gain in gains])
                over = f"{np.mean(gains):+.3f} ({least:+.3f} to {most:+.3f})"
            score = np.mean([c["score"] for c in found.values()])
            lines.append(f"| {subject} | {name} | {score:.3f} | {low:.3f} to {high:.3f} | {over} "
                         f"| {len(found)} of {len(SEEDS)} |")  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="folder of the studies; without it only the table is written"
    )
    parser.add_argument("--subject", default=SUBJECTS[0], choices=["character", "style", "object"])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--probes", type=int, default=6)
    parser.add_argument("--file", type=Path, default=CELLS)
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], help="as of hpo search; for trying it out"
    )
    args = parser.parse_args(arguments)
    if args.work:
        args.work = args.work.resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        fill(args)
    found = table(read_cells(args.file))
    print(found)
    if args.file == CELLS:
        write_atomic(DOCS, between(DOCS.read_text(encoding="utf-8"), BEGIN, END, found))


if __name__ == "__main__":
    main()
