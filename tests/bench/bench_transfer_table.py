"""Measures the benefit of a transfer on the miniature: the table in docs/transfer.md, filled cell by cell.

    python -m tests.bench.bench_transfer_table --work DIR [--subject character] [--trials 12] [--probes 6]

A row is a way to find settings for mini-sdxl.  A cell is one training with these settings (subject × training
seed), scored on the confirmation prompts.  Finished cells are appended to tests/data/transfer_table.jsonl and
never repeated; interrupted searches, probes and trainings are resumed.  Missing cells are shown as missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from evaluation.score import statistics
from evaluation.score.score import anchored, composite
from evaluation.score.statistics import prompt_draws
from hpo.transfer.profile import read_family, read_profile
from tests.bench.bench_probe_grid import DOCS, between
from trainer.config import TrainConfig
from trainer.files import append_line, read_records, write_atomic

CELLS = Path(__file__).parent.parent / "data" / "transfer_table.jsonl"
BEGIN, END = "<!-- transfer table: begin -->", "<!-- transfer table: end -->"
SUBJECTS = ("character", "style", "object")
SEEDS = (8000, 8001)
ROWS = {
    "untrained base": "no training",
    "default settings": "trial 0 of a direct search",
    "transferred": "best trial of the search",
    "transferred + probe": "best trial of the search, corrected by target trials",
    "direct search": "on mini-sdxl, for the same cost as search and target trials",
    "random trial transferred": "a random trial of the search",
    "worst quartile transferred": "a trial of the search's worst quarter",
}
RANDOM_SEED = 1
SCALE = "scale"  # the row with the anchors of a subject
ANCHORS = ("base_t_P", "chance_t_P", "base_i_P", "asks_for_subject", "real_i", "t_unit_se", "i_unit_se")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training with the settings of one row."""

    row: str
    subject: str
    seed: int


def read_cells(path: Path = CELLS) -> dict[Cell, dict[str, Any]]:
    """The finished cells, each with the anchors of its subject as ``scale``."""
    rows = list(read_records(path))
    scales = {r["subject"]: r for r in rows if r["row"] == SCALE}
    found = {Cell(r["row"], r["subject"], r["seed"]): r for r in rows if r["row"] != SCALE}
    return {cell: {**r, "scale": scales[cell.subject]} for cell, r in found.items()}


def wanted(subjects: Sequence[str] = SUBJECTS) -> list[Cell]:
    return [Cell(row, subject, seed) for subject in subjects for seed in SEEDS for row in ROWS]


# The stages of a subject.  Each is resumed where it was interrupted.


def hpo(work: Path, *words: str) -> None:
    print("hpo " + " ".join(words), flush=True)
    subprocess.run(
        [sys.executable, "-c", "from hpo.cli.main import main; main()", *words], cwd=work, check=True
    )


def direct_trials(source_samples: float, probes: int, target_samples: float, cost: float) -> int:
    """Number of trials on the target that cost as much as the search on the source and the probes on the target."""
    spent = source_samples + probes * 0.25 * target_samples * cost
    return max(1, round(spent / (target_samples * cost)))


def settings_of(args: argparse.Namespace, subject: str) -> dict[str, TrainConfig | None]:
    """The settings of every row.  None means no training."""
    from hpo.study.folder import StudyFolder
    from hpo.transfer.mapping import make
    from hpo.transfer.source import read_source
    from trainer.kohya.trainfile import read_train_file

    data, name = args.work / f"data-{subject}", f"{subject}-mini-sd15"
    if not data.is_dir():
        hpo(args.work, "dataset", "demo", subject, str(data.resolve()))
    sets = [word for text in args.sets for word in ("--set", text)]
    search = ("search", "--data", str(data.resolve()), *sets)
    hpo(args.work, *search, "--base", "mini-sd15", name, "--trials", str(args.trials))
    family, profile = read_family("mini-sdxl"), read_profile("mini-sdxl")
    source = read_source(StudyFolder(args.work / "runs" / name))
    plain = make(source, profile, None)
    words = ("transfer", "--to", "mini-sdxl", name, "--trials", str(args.probes))
    hpo(args.work, *words)
    samples = plain.plan.figures.samples
    epochs = [t.config.max_train_epochs or 1 for t in source.trials]
    target = (plain.plan.config.max_train_epochs or 1) * samples
    count = direct_trials(sum(epochs) * samples, args.probes, target, family.cost_of_a_sample)
    direct = f"{subject}-mini-sdxl-direct"
    hpo(args.work, *search, "--base", "mini-sdxl", direct, "--trials", str(count))
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
    """Run all missing cells of a subject."""
    from hpo.search.trial import run_trial
    from hpo.search.workbench import load
    from hpo.study.config import Inputs, find_study, read_study
    from hpo.study.folder import StudyFolder
    from hpo.study.result import COMPLETE, write_params
    from tests.tiny_search import Recorder

    missing = [cell for cell in wanted([args.subject]) if cell not in read_cells(args.file)]
    print(f"{args.subject}: {len(missing)} cells are missing", flush=True)
    if not missing:
        return
    configs = settings_of(args, args.subject)
    study = read_study(find_study(None, "mini-sdxl"), sets=args.sets, preset=args.subject)
    folder = StudyFolder(args.work / f"table-{args.subject}")
    bench = load(Inputs("mini-sdxl", args.work / f"data-{args.subject}"), study, folder, print)
    assert bench.confirmation is not None
    bench.evaluator = bench.evaluator.on(bench.confirmation)
    bench.measure_anchors(print)
    if not any(r["row"] == SCALE and r["subject"] == args.subject for r in read_records(args.file)):
        scale = {key: getattr(bench.anchors, key) for key in ANCHORS}
        append_line(args.file, json.dumps({"row": SCALE, "subject": args.subject, **scale}))
    order = wanted([args.subject])
    for cell in missing:
        config, row = configs[cell.row], dataclasses.asdict(cell)
        if config is None:  # the untrained base: prompt following 1 and likeness 0 by definition
            row |= {"outcome": COMPLETE, "t_P": bench.anchors.base_t_P, "i_P": bench.anchors.base_i_P}
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
            row |= {"outcome": result.state, **cosines(trial.metrics, bench.anchors.prompt_ids)}
            row |= {"learning_rate": config.learning_rate, "text_encoder_lr": config.text_encoder_lr}
        append_line(args.file, json.dumps(row))
        print(json.dumps({k: v for k, v in row.items() if k not in ("t_P", "i_P")}), flush=True)


def cosines(metrics: Path, prompt_ids: Sequence[str]) -> dict[str, list[float]]:
    """The raw cosines of a run by prompt, with the text and with the references."""
    from evaluation.score.score import read_score

    rows = read_score(metrics).per_image
    of = [[r for r in rows if r.prompt_id == p] for p in prompt_ids]
    return {
        "t_P": [round(float(np.mean([r.clip_t for r in images])), 6) for images in of],
        "i_P": [round(float(np.mean([r.clip_i for r in images])), 6) for images in of],
    }


def cost_of_a_sample(repeats: int = 2) -> float:
    """Time of a training sample on mini-sdxl relative to mini-sd15, measured alternately on one thread."""
    import statistics as stats
    import tempfile

    import torch

    from trainer.adapters import adapter as adapters
    from trainer.bases.load import load_base
    from trainer.bases.miniature.subjects import write_subject
    from trainer.data import cache
    from trainer.data.dataset import read_dataset
    from trainer.events import Step
    from trainer.loop import loop

    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"mini-sd15": [], "mini-sdxl": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_subject("character", data)
        for _ in range(repeats):
            for spec, side_px in (("mini-sd15", 64), ("mini-sdxl", 128)):
                base = load_base(spec)
                config = TrainConfig(
                    resolution=side_px,
                    min_bucket_reso=32,
                    bucket_reso_steps=32,
                    train_batch_size=4,
                    network_dim=8,
                    network_alpha=8,
                    optimizer_type="AdamW",
                    text_encoder_lr=5e-5,
                    max_train_steps=16,
                )
                prepared = cache.prepare(base, read_dataset(data, config), config)
                events = loop.train(config, base, adapters.inject(base, config), prepared)
                steps = [event.seconds for event in events if isinstance(event, Step)]
                seconds[spec].append(stats.median(steps[3:]))
    return stats.mean(seconds["mini-sdxl"]) / stats.mean(seconds["mini-sd15"])


# The table


@dataclasses.dataclass(frozen=True)
class Standing:
    """Score, prompt following and likeness of a row as means over training seeds, and the score of each draw."""

    score: float
    following: float
    likeness: float
    draws_K: np.ndarray


def standing(cells: Sequence[dict[str, Any]]) -> Standing:
    """The means of a row.  The bootstrap uses the same prompt draws for all rows, so that differences are paired."""
    scale = SimpleNamespace(**cells[0]["scale"])
    whole_KP = np.ones((1, len(scale.base_t_P)))
    draws_KP = prompt_draws(len(scale.base_t_P))
    points, draws = [], []
    for cell in cells:
        t_P, i_P = np.array(cell["t_P"]), np.array(cell["i_P"])
        following, likeness = anchored(t_P, i_P, scale, whole_KP)  # type: ignore[arg-type]
        points.append([composite(following, likeness)[0], following[0], likeness[0]])
        draws.append(composite(*anchored(t_P, i_P, scale, draws_KP)))  # type: ignore[arg-type]
    score, following, likeness = np.mean(points, axis=0)
    return Standing(score, following, likeness, np.mean(draws, axis=0))


def table(cells: dict[Cell, dict[str, Any]], subjects: Sequence[str] = SUBJECTS) -> str:
    """All rows of all subjects as Markdown, including missing cells."""
    lines = [
        "| subject | settings | score (95 %) | following | likeness | over transferred (95 %) | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        own = {seed: cells.get(Cell("transferred", subject, seed)) for seed in SEEDS}
        for row, meaning in ROWS.items():
            found = {s: c for s in SEEDS if (c := cells.get(Cell(row, subject, s))) is not None}
            name = f"{row.replace('probe', 'target trials')} ({meaning})"
            if not found:
                lines.append(f"| {subject} | {name} | missing | | | | 0 of {len(SEEDS)} |")
                continue
            it = standing(list(found.values()))
            low, high = statistics.interval(it.draws_K)
            over = ""
            beside = [transferred for s in found if (transferred := own[s]) is not None]
            if row != "transferred" and len(beside) == len(found):
                other = standing(beside)
                gain = statistics.difference(it.score, other.score, it.draws_K, other.draws_K)
                over = f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
            lines.append(
                f"| {subject} | {name} | {it.score:.3f} ({low:.3f} to {high:.3f}) | {it.following:.2f} "
                f"| {it.likeness:.2f} | {over} | {len(found)} of {len(SEEDS)} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="folder of the studies; without it, only the table is written"
    )
    parser.add_argument("--subject", default=SUBJECTS[0], choices=SUBJECTS)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--probes", type=int, default=6)
    parser.add_argument("--file", type=Path, default=CELLS)
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], help="as for hpo search; for short test runs"
    )
    parser.add_argument("--cost", action="store_true", help="only measure cost_of_a_sample")
    args = parser.parse_args(arguments)
    if args.cost:
        print(f"a sample of mini-sdxl costs {cost_of_a_sample():.2f} times as much as one of mini-sd15")
        return
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
