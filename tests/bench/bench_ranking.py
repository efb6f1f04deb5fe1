"""Does the score rank as the ground truth does?  Records the study that test_ranking.py reads.

    python -m tests.bench.bench_ranking record                  # ~20 minutes on one core; resumable
    python -m tests.bench.bench_ranking tables                  # the tables of docs/evaluation.md
    python -m tests.bench.bench_ranking objectives              # its tables of what is told below zero
    python -m tests.bench.bench_ranking picture > docs/images/optimism.svg

``record`` trains ``--trials`` quasi-random configurations of studies/mini.toml on the demo character, trial 0,
and the best one with a rate 10× as high, draws the search set with each and with the untrained base (trigger in
the prompts), then retrains the best eight and trial 0 with fresh seeds on the confirmation set.  Every row has
raw cosines and the ground-truth checker's reading of every image; finished rows are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.images.images import SampledImage, invalid_reason
from evaluation.images.sampling import sample
from evaluation.prompts.prompts import PromptSet
from evaluation.score.anchors import Anchors
from evaluation.score.evaluator import make_anchors
from hpo.search.workbench import Workbench, load
from hpo.study.config import Inputs, find_study, read_study
from hpo.study.folder import StudyFolder
from tests import objectives, ranking
from trainer.adapters import adapter as adapters
from trainer.bases.miniature import captions, checker, subjects
from trainer.config import TrainConfig
from trainer.errors import ConfigError, SettingsFailure
from trainer.files import append_line, read_records
from trainer.loop import loop

SOBOL_SEED = 30
CONFIRMED = 8  # best trials that are retrained
CONFIRM_TRAIN_SEED = 7000
KIND = "character"
ROUND_TRIPS = 128  # real pictures through the autoencoder


def proposals(bench: Workbench, count: int) -> list[dict[str, Any]]:
    """Quasi-random points of the space: a scrambled Sobol sequence (Owen 1998), one dimension a parameter."""
    places = torch.quasirandom.SobolEngine(len(bench.study.space), scramble=True, seed=SOBOL_SEED).draw(count)
    return [
        {p.name: p.domain.from_unit(float(place)) for p, place in zip(bench.study.space, row, strict=True)}
        for row in places.tolist()
    ]


def verdict(image: SampledImage, text: str) -> tuple[int, int, str]:
    """The checker's reading: background right, place right, the subject's parts that show (1 or 0 each).

    Only what the prompt names is asked.  Sizes are left out: the checker reads 81 % of the real pictures'
    sizes, and all of their backgrounds, places and parts.
    """
    seen = checker.read(image.pixels_HW3, "figure")
    parts = subjects.parts_shown(image.pixels_HW3, KIND)
    named = {
        "background": [n for n, phrases in captions.BACKGROUND_PHRASES.items() if phrases[0] in text],
        "place": [n for n, phrases in captions.PLACE_PHRASES.items() if phrases[0] in text],
    }
    background, place = (int(not want or seen.get(key) == want[0]) for key, want in named.items())
    return background, place, "".join(str(int(shown)) for shown in parts.values())


def measure(bench: Workbench, prompts: PromptSet, images: Sequence[SampledImage]) -> dict[str, Any]:
    """Raw cosines and verdicts, one entry an image, prompt by prompt."""
    text_of = {p.id: row for row, p in enumerate(prompts.prompts)}
    pixels = [image.pixels_HW3 for image in images]
    pictures_ND = bench.evaluator.scorer.image_features(pixels).double()
    texts_PD = bench.evaluator.scorer.text_features([p.scored_text for p in prompts.prompts]).double()
    alike_ND = bench.evaluator.likeness.image_features(pixels).double()
    cosines_NP = (pictures_ND @ texts_PD.T).numpy()
    rows_N = np.array([text_of[image.prompt_id] for image in images])
    own_N = cosines_NP[np.arange(len(images)), rows_N]
    read = [verdict(i, prompts.prompts[row].text) for i, row in zip(images, rows_N, strict=True)]
    return {
        "clip_t": _short(own_N),
        "other_t": _short((cosines_NP.sum(1) - own_N) / (len(prompts.prompts) - 1)),
        "clip_i": _short((alike_ND @ bench.evaluator.references.features_RD.double().T).numpy().mean(1)),
        "background": [v[0] for v in read],
        "place": [v[1] for v in read],
        "parts": [v[2] for v in read],
        "invalid": sum(invalid_reason(i) is not None for i in images),
    }


def _short(values: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in values]


def as_grid(prompts: PromptSet) -> PromptSet:
    """Every prompt under the set's seeds: the recording's arrays are prompts × seeds, all of them full.

    A study draws its first class-only prompt under more seeds, for diversity, which is not recorded.
    """
    return replace(prompts, prompts=tuple(replace(p, seeds=()) for p in prompts.prompts))


class Recording:
    """The file, and what is already in it."""

    def __init__(self, bench: Workbench, path: Path) -> None:
        self.bench, self.path = bench, path
        assert bench.confirmation is not None
        self.sets = {
            ranking.SEARCH: as_grid(bench.prompts),
            ranking.CONFIRMATION: as_grid(bench.confirmation),
        }

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["name"], row["set"]): row for row in read_records(self.path)}

    def anchors(self, which: str, folder: Path) -> Anchors:
        """Measured anew at each start (they are the same); written once."""
        bench, prompts = self.bench, self.sets[which]
        anchors = make_anchors(bench.evaluator.on(prompts), folder)
        recorded = self.rows().get(("anchors", which))
        if recorded is not None and recorded["anchors"]["identity"] != anchors.identity:
            raise ConfigError(f"{self.path} was recorded with other {which} anchors", "give another --file")
        if recorded is None:
            kept = anchors.as_dict()
            asked = [{"id": p.id, "text": p.text, "kind": p.kind} for p in prompts.prompts]
            row = {"prompts": asked, "seeds": list(prompts.seeds), "anchors": kept}
            facts = {"scorer": bench.evaluator.scorer.name, "likeness": bench.evaluator.likeness.name}
            self.write("anchors", which, {**row, **facts, "sampling": asdict(bench.evaluator.sampling)})
        return anchors

    def write(self, name: str, which: str, values: Mapping[str, Any]) -> None:
        append_line(self.path, json.dumps({"name": name, "set": which, **values}))

    def autoencoder(self) -> None:
        """Which parts of the real pictures the checker still sees once the base has encoded and decoded them."""
        if ("autoencoder", ranking.SEARCH) in self.rows():
            return
        pictures = [subjects.picture(KIND, index, 0, 64)[0] for index in range(ROUND_TRIPS)]
        pixels_BCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            vae = self.bench.base.vae
            decoded_BCHW = vae.decode(vae.encode(pixels_BCHW).latent_dist.mean).sample
        back = ((decoded_BCHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        shown = [subjects.parts_shown(picture, KIND) for picture in back]
        kept = {part: float(np.mean([row[part] for row in shown])) for part in shown[0]}
        self.write("autoencoder", ranking.SEARCH, {"kept": kept, "pictures": ROUND_TRIPS})

    def untrained(self) -> None:
        if ("base", ranking.SEARCH) not in self.rows():
            prompts = self.sets[ranking.SEARCH]
            images = sample(self.bench.base, prompts, self.bench.evaluator.sampling)
            self.write("base", ranking.SEARCH, measure(self.bench, prompts, images))

    def trained(self, name: str, which: str, suggested: Mapping[str, Any], config: TrainConfig) -> None:
        """Train and draw, unless it is recorded."""
        if (name, which) in self.rows():
            return
        prompts = self.sets[which]
        started = time.monotonic()
        lora = adapters.inject(self.bench.base, config)
        try:
            steps = sum(1 for _ in loop.train(config, self.bench.base, lora, self.bench.prepared(config)))
            lora.round_to(config.save_precision)
            images = sample(self.bench.base, prompts, self.bench.evaluator.sampling)
            found = measure(self.bench, prompts, images)
        except SettingsFailure as error:
            steps, found = 0, {"failed": error.reason}
        finally:
            lora.remove()
        facts = {"suggested": dict(suggested), "train_seed": config.seed, "events": steps}
        self.write(name, which, {**facts, "seconds": round(time.monotonic() - started, 1), **found})
        print(name, which, f"{time.monotonic() - started:.0f} s", flush=True)


def bench_in(folder: Path, sets: Sequence[str] = ()) -> Workbench:
    """Everything of the study, its demo images drawn at the size that mini-sd15 is trained at."""
    study = read_study(find_study(None, "mini-sd15"), sets=list(sets))
    subjects.write_subject(KIND, folder / "data", study.train.resolution)
    return load(Inputs("mini-sd15", folder / "data"), study, StudyFolder(folder / "study"), print)


def record(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        bench = bench_in(Path(temporary), args.sets)
        recording = Recording(bench, args.file)
        for which in (ranking.SEARCH, ranking.CONFIRMATION):
            recording.anchors(which, Path(temporary) / which)
        recording.autoencoder()
        recording.untrained()
        drawn = {"trial 0": dict(bench.study.baseline)}
        drawn |= {f"random {n}": row for n, row in enumerate(proposals(bench, args.trials))}
        for name, suggested in drawn.items():
            recording.trained(name, ranking.SEARCH, suggested, bench.config(suggested, 0))
        found = ranking.read(args.file)
        order = ranking.names(found.ranked)
        best = bench.config(drawn[order[0]], 0)
        hot = best.with_values(
            {name: 10 * rate for name in ranking.RATES if (rate := getattr(best, name)) is not None}
        )
        recording.trained("overfitted", ranking.SEARCH, {"of": order[0], "rates": 10}, hot)
        for n, name in enumerate(dict.fromkeys([*order[:CONFIRMED], "trial 0"])):
            fresh = bench.config(drawn[name], 0).with_values({"seed": CONFIRM_TRAIN_SEED + n})
            recording.trained(name, ranking.CONFIRMATION, drawn[name], fresh)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    recorder = parts.add_parser("record")
    recorder.add_argument("--trials", type=int, default=30)
    recorder.add_argument("--threads", type=int, default=1)
    recorder.add_argument("--set", dest="sets", action="append", default=[])
    recorder.set_defaults(do=record)
    for name, do in (
        ("tables", ranking.tables),
        ("objectives", objectives.tables),
        ("picture", ranking.picture),
    ):
        parts.add_parser(name).set_defaults(do=lambda a, do=do: print(do(ranking.read(a.file)), end=""))
    for part in parts.choices.values():
        part.add_argument("--file", type=Path, default=ranking.FILE)
    args = parser.parse_args(argv)
    args.do(args)


if __name__ == "__main__":
    main(sys.argv[1:])
