"""Workbench: everything that every trial of a study uses and none changes – loaded once.

Owns the order of loading (cheap checks first, nothing written until all of a user's input is known to be good), the
facts a study is frozen to, and what a trial will cost.  Does not run trials (``hpo.search.trial``) or propose them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from evaluation.encoders import embed
from evaluation.encoders.answers import self_test
from evaluation.encoders.style import PatchEncoder, StyleEncoder
from evaluation.gauges import others
from evaluation.images.sampling import SampleConfig, default_config
from evaluation.prompts.prompts import (
    CONFIRM_SEEDS,
    SEARCH_SEEDS,
    CountTokens,
    PromptSet,
    generate,
    load_prompts,
    no_class_word,
)
from evaluation.score.anchors import Anchors, References, embed_references, make_anchors, require_references
from evaluation.score.safeguards import Limits, Safeguards, embed_copies, scene_encoders
from evaluation.score.score import Formula
from hpo.study import promptfiles
from hpo.study.config import MINIATURE_STUDIES, Inputs, StudyConfig
from hpo.study.folder import StudyFolder
from hpo.train.adapter import check_device
from trainer.bases.base import compute_type
from trainer.bases.load import load_base
from trainer.config import TrainConfig
from trainer.data import cache
from trainer.data.dataset import Dataset, Item, read_dataset, split_references
from trainer.data.images import IMAGE_EXTENSIONS, read_picture
from trainer.errors import ConfigError, DataError, MachineError
from trainer.files import atomic_folder, machine_error, write_atomic
from trainer.loop import preflight

if TYPE_CHECKING:
    from evaluation.gauges.gauge import Gauge
    from trainer.bases.base import Base

Say = Callable[[str], None]


@dataclass
class Workbench:
    """Base, data, prompts, scorer, anchors.  One per process; trials inject into ``base`` and clean up."""

    study: StudyConfig
    folder: StudyFolder
    base: Base
    data: Dataset
    reference_items: tuple[str, ...]
    references: References
    prompts: PromptSet
    confirmation: PromptSet | None
    sampling: SampleConfig
    scorer: embed.Scorer
    likeness: embed.ImageEncoder
    data_folder: Path
    base_spec: str
    store: cache.Store
    safeguards: Safeguards | None = None
    gauges: tuple[Gauge, ...] = ()
    image_seconds: float | None = None
    inputs: Inputs | None = None
    _anchors: Anchors | None = None

    @property
    def anchors(self) -> Anchors:
        assert self._anchors is not None, "measure_anchors first"
        return self._anchors

    @property
    def scoring(self) -> dict[str, Any]:
        """What ``evaluate_adapter`` needs beyond models and pictures: formula, safeguards, figures beside."""
        return {
            "formula": Formula(**dataclasses.asdict(self.study.score)),
            "safeguards": self.safeguards,
            "gauges": self.gauges,
        }

    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        """The complete settings of a trial, names and places included."""
        return self.study.config(suggested).with_values(
            {
                "pretrained_model_name_or_path": self.base_spec,
                "train_data_dir": str(self.data_folder),
                "output_name": f"lora_trial_{number}",
            }
        )

    def prepared(
        self, config: TrainConfig, on_image: Callable[[int, int], None] | None = None
    ) -> cache.Prepared:
        """Latents and text states: from the study's cache after the first trial."""
        return cache.prepare(self.base, self.data, config, store=self.store, on_image=on_image)

    def measure_anchors(self, say: Say, *, fresh: bool = False) -> None:
        """Score the untrained base, once per study; note how long an image takes.

        Anchors that cannot be told apart end a fresh study (DataError); one that has begun is warned.
        """
        started = time.monotonic()
        drawn: list[int] = []
        self._anchors = make_anchors(
            self.base,
            self.prompts,
            self.sampling,
            self.references,
            self.scorer,
            self.likeness,
            self.folder.base_images,
            on_image=lambda done, total: drawn.append(done),
        )
        if drawn:
            self.image_seconds = (time.monotonic() - started) / drawn[-1]
        if fresh:
            self._anchors.require_separable()
        for problem in self._anchors.problems:
            say(f"warning: {problem}")

    def empty_cache(self) -> None:
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def facts(self) -> dict[str, str]:
        """What must stay as it is while the study goes on: name → value in words."""
        return {
            "direction": "maximize",
            "base": f"{self.base.name} {self.base.identity[:16]}",
            # mixed_precision = "auto" is another type on another machine
            "compute type": str(compute_type(self.study.train.mixed_precision, self.base.device)),
            "images and captions": self.data.content_hash[:16],
            "references": self.references.hash[:16],
            "prompts": self.prompts.hash[:16],
            "sampling": json.dumps(_without_batch(self.sampling)),
            "scorer": f"{self.scorer.name} {self.scorer.sha[:16]}",
            "likeness": f"{self.likeness.name} {self.likeness.sha[:16]}",
            "seed": str(self.study.study.seed),
            "objectives": ", ".join(self.study.objectives),
            "composite": self.scoring["formula"].words(),
            "limits": json.dumps(dataclasses.asdict(self.study.limits)),
            "beside": ", ".join(f"{g.measure} {g.model} {g.sha[:16]}" for g in self.gauges),
            **self.study.frozen(),
        }


def load(inputs: Inputs, study: StudyConfig, folder: StudyFolder, say: Say) -> Workbench:
    """Read and check everything.  Only demo data is written (see ``hpo.study.folder.in_use``)."""
    device = inputs.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    train = study.train
    data_folder = inputs.data or demo_data(inputs.base, folder)
    data = read_dataset(data_folder, train, trigger=inputs.trigger, class_word=inputs.class_word)
    for note in data.notes:
        say(note)
    if not data.class_word and inputs.prompts is None:
        raise no_class_word()
    data, held_out = split_references(data, 0 if inputs.references else None)
    paths = [item.path for item in held_out.items]
    if inputs.references:
        paths = reference_paths(inputs.references, data)
    require_references(len(paths))
    scorer_spec = inputs.clip or study.study.clip or embed.default_scorer(inputs.base)
    likeness_spec = study.study.likeness or embed.default_likeness(inputs.base)
    check_encoders(study, scorer_spec, likeness_spec)
    SampleConfig(**study.sample_values())
    prompt_sets(inputs, study, data, count_tokens=lambda text: 0)
    # Up to here everything is cheap; a base can be a download of gigabytes.
    dtype = compute_type(train.mixed_precision, device)
    base = load_base(inputs.base, device=device, dtype=dtype, no_half_vae=train.no_half_vae)
    if base.native_resolution_px < train.resolution and inputs.base in MINIATURE_STUDIES:
        raise ConfigError(
            f"{inputs.base} draws {base.native_resolution_px} px, resolution is {train.resolution}",
            f"use --set resolution={base.native_resolution_px}, or leave out --study",
        )
    for config in (
        train,
        *(study.config({**study.baseline, p.name: edge}) for p in study.space for edge in p.domain.edges),
    ):
        preflight.check(base, config)
    for note in preflight.notes(base, train, data):
        say(note)
    chosen, confirmation = prompt_sets(inputs, study, data, base.token_count)
    say_notes(chosen, confirmation, say)
    scorer, likeness = load_encoders(study, scorer_spec, likeness_spec, device, say)
    return Workbench(
        study=study,
        folder=folder,
        base=base,
        data=data,
        reference_items=tuple(str(path) for path in paths),
        references=embed_references(paths, likeness),
        prompts=chosen,
        confirmation=confirmation,
        sampling=default_config(base, **study.sample_values()),
        scorer=scorer,
        likeness=likeness,
        data_folder=data_folder,
        base_spec=inputs.base,
        store=cache.Store(folder.cache),
        inputs=inputs,
        safeguards=make_safeguards(data, paths, scorer, likeness, Limits(**dataclasses.asdict(study.limits))),
        gauges=others.gauges(study.study.also, scorer, likeness, paths, device, say),
    )


def check_encoders(study: StudyConfig, scorer: str, likeness: str) -> None:
    """Raise ToolError for an encoder that cannot be loaded, as far as this shows without loading it."""
    embed.check_scorer(scorer)
    embed.check_likeness(likeness)
    for spec in study.study.also:
        others.check(spec)


def load_encoders(
    study: StudyConfig, scorer_spec: str, likeness_spec: str, device: str, say: Say
) -> tuple[embed.Scorer, embed.ImageEncoder]:
    """The scorer, with its known answers asked, and what sees likeness – for the style preset, in patches."""
    scorer = embed.load_scorer(scorer_spec, device)
    plain = embed.load_likeness(likeness_spec, scorer, device)
    self_test(scorer, say)
    return scorer, StyleEncoder(cast(PatchEncoder, plain)) if study.preset.style else plain


def make_safeguards(
    data: Dataset,
    references: Sequence[Path],
    scorer: embed.Scorer,
    likeness: embed.ImageEncoder,
    limits: Limits,
) -> Safeguards:
    """Copies are those of images that show the subject."""
    encoders = scene_encoders(scorer, likeness)
    copies = embed_copies([item.path for item in subject_items(data)], references, encoders)
    return Safeguards(encoders, copies, limits)


def demo_data(base: str, folder: StudyFolder) -> Path:
    """The miniature's demo character, for those who bring no images."""
    if base not in MINIATURE_STUDIES:
        raise ConfigError(
            "no images are given", "add --data FOLDER (kohya folders, or images with .txt captions)"
        )
    if not folder.data.is_dir():
        from trainer.bases.miniature.subjects import write_subject

        try:
            folder.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise machine_error(error, folder.root) from None
        try:
            with atomic_folder(folder.data) as temporary:
                write_subject("character", temporary)
        except MachineError:
            if not folder.data.is_dir():  # another process was quicker: then there is nothing wrong
                raise
    return folder.data


def prompt_sets(
    inputs: Inputs, study: StudyConfig, data: Dataset, count_tokens: CountTokens
) -> tuple[PromptSet, PromptSet | None]:
    """The search set and the disjoint confirmation set (None if a hand-written set needs no class word)."""
    plan, later = study.prompts, study.confirmation
    make = partial(
        generate,
        [item.caption for item in subject_items(data)],
        trigger=data.trigger,
        class_word=data.class_word,
        count_tokens=count_tokens,
        words=plan.words,
    )
    if inputs.prompts:
        chosen = load_prompts(
            inputs.prompts, trigger=data.trigger, class_word=data.class_word, count_tokens=count_tokens
        )
        if not data.class_word:
            return chosen, None
    else:
        chosen = make(counts=plan.counts or study.preset.counts, seeds=plan.seeds or SEARCH_SEEDS)
    confirmation = make(
        counts=later.counts or study.preset.confirm_counts, seeds=later.seeds or CONFIRM_SEEDS, exclude=chosen
    )
    return chosen, confirmation


def subject_items(data: Dataset) -> tuple[Item, ...]:
    """What shows the subject: regularisation images show its class, without the trigger in their captions."""
    return tuple(item for item in data.items if not item.is_reg)


def say_notes(prompts: PromptSet, confirmation: PromptSet | None, say: Say) -> None:
    """What a user should know of generated sets, once."""
    for note in prompts.notes:
        say(note)
    for note in confirmation.notes if confirmation else ():
        say(f"confirmation prompts: {note}")


def reference_paths(folder: Path, data: Dataset) -> list[Path]:
    """The images of --references, each of them sound.

    None may be trained on: likeness would be memory.
    """
    try:
        if not folder.is_dir():
            raise DataError(f"no folder {folder}", "give --references the folder of the reference images")
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and not p.is_dir())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}", "check its permissions") from None
    if len(found) < 2:
        raise DataError(f"{folder} holds {len(found)} images", "likeness needs at least 2 references")
    trained = {item.sha256 for item in data.items}
    for path in found:
        if read_picture(path).sha256 in trained:
            raise DataError(
                f"{path} is trained on too", "references must be images that training does not see"
            )
    return found


def write_definition(bench: Workbench, facts: Mapping[str, str], say: Say = lambda text: None) -> None:
    """study.json, prompts.toml, confirmation.toml: what a reader, and a later confirmation, needs to know."""
    promptfiles.check_unedited(bench.folder, bench.prompts.hash)
    study = bench.study
    values = {
        "definition": study.name,
        "sections": dict(study.sections),
        "inputs": {k: str(v) for k, v in vars(bench.inputs).items() if v is not None} if bench.inputs else {},
        "base": bench.base_spec,
        "data": str(bench.data_folder),
        "references": list(bench.reference_items),
        "train": study.train.as_dict(),
        "space": study.space.describe(),
        "baseline": dict(study.baseline),
        "sampling": dataclasses.asdict(bench.sampling),
        "facts": dict(facts),
        "versions": {name: version(name) for name in ("lora-hpo", "optuna", "torch", "diffusers", "peft")},
    }
    write_atomic(bench.folder.facts, json.dumps(values, indent=1))
    promptfiles.write(bench.folder, bench.prompts, bench.confirmation, bench.base.token_count, say)


def _without_batch(config: SampleConfig) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "batch_size"}
