"""Workbench: everything that all trials of a study share.  It is loaded once.

Owns the order of loading (cheap checks first; nothing is written before all user input is checked) and the facts that
must not change during a study.  Does not run trials (``hpo.search.trial``) or suggest them (``hpo.search.sampled``).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.images import SampleConfig, default_config
from evaluation.prompts import PromptSet, no_class_word
from evaluation.score import Anchors, Evaluator, make_anchors
from hpo.machine import deterministic, own_device, share_threads
from hpo.search.remedies import Remedies
from hpo.study import (
    IDENTITY,
    Inputs,
    Pace,
    Say,
    StudyConfig,
    StudyFolder,
    as_begun,
    begun_study,
    make_evaluator,
    plan_scoring,
    prompt_sets,
    promptfiles,
    read_json,
    reference_paths,
    say_notes,
    subject_items,
    worded,
    wording_line,
)
from hpo.terminal import left
from trainer.adapters import merge_base_weights
from trainer.bases import compute_type, is_miniature, load_base
from trainer.config import TrainConfig
from trainer.data import Dataset, cache, preflight, read_dataset, shown, split_references, words_everywhere
from trainer.errors import ConfigError, MachineError, OutOfMemory
from trainer.files import atomic_folder, make_folder, write_atomic
from trainer.memory import encoding_rung
from trainer.oom import MORE_ROOM, release
from trainer.text import clean_text

if TYPE_CHECKING:
    from trainer.bases import Base

SECONDS = "seconds_per_image"
MINUTE = 60.0  # a step that takes longer announces it


@dataclass
class Workbench:
    """Training data, base and scoring.  One per process; each trial injects its LoRA into ``base`` and removes it."""

    study: StudyConfig
    folder: StudyFolder
    evaluator: Evaluator
    data: Dataset
    reference_items: tuple[str, ...]
    confirmation: PromptSet | None
    data_folder: Path
    base_spec: str
    store: cache.Store
    image_seconds: float | None = None  # measured with the untrained base
    pace: Pace | None = None  # estimated before the first trial
    _vae_batch: int | None = None  # images encoded at once, after memory ran out
    inputs: Inputs | None = None

    @cached_property
    def remedies(self) -> Remedies:
        """What trials begin with, so that they fit into memory."""
        return Remedies(self)

    @property
    def base(self) -> Base:
        return self.evaluator.base

    @property
    def prompts(self) -> PromptSet:
        return self.evaluator.prompts

    @property
    def anchors(self) -> Anchors:
        return self.evaluator.scale

    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        """The complete settings of a trial, including names and paths."""
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
        """Latents and text encoder outputs, from the study's cache after the first trial.  Encodes fewer images at
        once where memory runs out.  Raises MachineError where one image or caption does not fit: no setting of a trial
        can change that."""
        if self._vae_batch is not None:
            config = config.with_values({"vae_batch_size": min(self._vae_batch, config.vae_batch_size)})
        while True:
            try:
                return cache.prepare(self.base, self.data, config, store=self.store, on_image=on_image)
            except OutOfMemory as error:
                rung = encoding_rung(config)
                if rung is None:
                    raise MachineError(error.message, MORE_ROOM) from None
            release(self.base.device)
            config = rung.config
            self._vae_batch = config.vae_batch_size
            self.base.say_once(f"out of memory while encoding: {rung.says}")

    def measure_anchors(self, say: Say, *, fresh: bool = False) -> None:
        """Score the untrained base, once per study, and measure the time per image.

        If the anchors cannot be distinguished, a fresh study raises DataError; a resumed study prints a warning.
        """
        timer = ImageTimer(say)
        if not self.folder.anchors.is_file():
            say(f"generating {self.prompts.image_count} images with the untrained {self.base.name} …")
        anchors = make_anchors(self.evaluator, self.folder.base_images, timer)
        self.evaluator = self.evaluator.with_anchors(anchors)
        if each := timer.finished():
            self.image_seconds = each
            write_atomic(self.folder.base_seconds, json.dumps({SECONDS: each}))
        elif isinstance(each := (read_json(self.folder.base_seconds) or {}).get(SECONDS), float):
            self.image_seconds = each  # another process has drawn them, or this one before it was stopped
        if fresh:
            anchors.require_separable()
        for problem in anchors.problems:
            say(f"warning: {problem}")

    def release(self) -> None:
        """Give back the memory that nothing uses any more."""
        release(self.base.device)

    def facts(self) -> dict[str, str]:
        """The facts that must not change during a study: name → value as text."""
        by = self.evaluator
        return {
            "direction": "maximize",
            "base": f"{by.base.name} {by.base.identity[:16]}",
            # mixed_precision = "auto" depends on the machine
            "compute type": str(compute_type(self.study.train.mixed_precision, by.base.device)),
            "images and captions": self.data.content_hash[:16],
            "references": by.references.hash[:16],
            "prompts": by.prompts.hash[:16],
            "sampling": json.dumps(_without_batch(by.sampling)),
            "scorer": f"{by.scorer.name} {by.scorer.sha[:16]}",
            "likeness": f"{by.likeness.name} {by.likeness.sha[:16]}",
            "seed": str(self.study.study.seed),
            "objectives": ", ".join(self.study.objectives),
            "composite": by.formula.words(),
            "limits": json.dumps(self.study.limits.as_dict()),
            "beside": ", ".join(f"{g.measure} {g.model} {g.sha[:16]}" for g in by.gauges),
            **self.study.frozen(),
        }


class ImageTimer:
    """Measures how long images take while they are generated, and says so once if that is longer than a minute."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._started = 0.0
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self._started = time.monotonic()
        elif self._done == 0:
            seconds = (time.monotonic() - self._started) / done * (total - done)
            if seconds > MINUTE:
                self._say(f"  {done}/{total} images, {left(seconds)}")
        self._done = done

    def finished(self) -> float | None:
        """Seconds per image with scoring.  None if nothing was generated."""
        return (time.monotonic() - self._started) / self._done if self._done else None


def load(inputs: Inputs, study: StudyConfig, folder: StudyFolder, say: Say) -> Workbench:
    """Load and check everything.  Writes only demo data (see ``hpo.study.use.in_use``)."""
    deterministic()
    share_threads()
    precision = "bf16" if study.train.full_bf16 else study.train.mixed_precision
    device = own_device(inputs.device, base=inputs.base, precision=precision, say=say)
    begun = begun_study(folder)
    study = as_begun(study, begun.user_attrs.get(IDENTITY) if begun else None)
    train = study.train
    data_folder = inputs.data or demo_data(inputs.base, folder, study.study.preset)
    data = read_dataset(data_folder, train, trigger=inputs.trigger, class_word=inputs.class_word)
    for note in data.notes:
        say(note)
    asked, study = study, worded(study, data)
    if not data.class_word and inputs.prompts is None:
        raise no_class_word()
    if not data.trigger and inputs.prompts is None:
        say(_no_trigger(data))
    data, held_out = split_references(_as_begun(data, folder), 0 if inputs.references else None)
    paths = [item.path for item in held_out.items]
    if inputs.references:
        paths = reference_paths(inputs.references, data)
    plan = plan_scoring(study, data, paths, inputs.base, inputs.clip)
    SampleConfig(**study.sample_values())
    prompt_sets(inputs, study, data, count_tokens=lambda text: 0)
    # The checks up to here are cheap; loading a base may download gigabytes.
    dtype = compute_type(train.mixed_precision, device)
    say(f"loading {inputs.base} on {device} …")
    base = load_base(
        inputs.base, device=device, dtype=dtype, no_half_vae=train.no_half_vae, settings=train, say=say
    )
    merge_base_weights(base, train, say)
    if base.native_resolution_px < train.resolution and is_miniature(inputs.base):
        raise ConfigError(
            f"{inputs.base} has {base.native_resolution_px} px, but resolution is {train.resolution}",
            f"use --set resolution={base.native_resolution_px}, or remove --definition",
        )
    for config in (
        train,
        *(study.config({**study.baseline, p.name: edge}) for p in study.space for edge in p.domain.edges),
    ):
        preflight.check(base, config)
    for note in preflight.notes(base, train, data):
        say(note)
    chosen, confirmation = prompt_sets(inputs, study, data, base.token_count)
    if not inputs.prompts and (line := wording_line(asked, chosen, study.prompts.words)):
        say(line)
    say_notes(chosen, confirmation, say)
    return Workbench(
        study=study,
        folder=folder,
        evaluator=make_evaluator(plan, base, chosen, default_config(base, **study.sample_values()), say),
        data=data,
        reference_items=tuple(str(path) for path in paths),
        confirmation=confirmation,
        data_folder=data_folder,
        base_spec=inputs.base,
        store=cache.Store(folder.cache),
        inputs=inputs,
    )


def _no_trigger(data: Dataset) -> str:
    words = words_everywhere([item.caption for item in subject_items(data)])
    everywhere = f" (in every caption: {', '.join(shown(word)[:40] for word in words[:8])})" if words else ""
    return (
        f"no trigger word is known, so prompts name only the class {clean_text(data.class_word or '')}; "
        f"if the captions have one, give it with --trigger{everywhere}"
    )


def _as_begun(data: Dataset, folder: StudyFolder) -> Dataset:
    """The dataset without its held-out images if the study was begun with references from the training images:
    earlier versions did not look for ``held_out/`` next to a folder like ``10_luca man``."""
    stored = (read_json(folder.facts) or {}).get("references", [])
    before = {Path(str(path)).resolve() for path in stored}
    apart = any(item.path.resolve() in before for item in data.items)
    return dataclasses.replace(data, held_out=()) if apart and data.held_out else data


def demo_data(base: str, folder: StudyFolder, preset: str = "character") -> Path:
    """The demo images of a preset for a miniature base, used without --data."""
    if not is_miniature(base):
        raise ConfigError(
            "no training images given", "add --data FOLDER (kohya folders, or images with .txt captions)"
        )
    if not folder.data.is_dir():
        from trainer.bases import write_subject

        make_folder(folder.root)
        try:
            with atomic_folder(folder.data) as temporary:
                write_subject(preset, temporary)
        except MachineError:
            if not folder.data.is_dir():  # otherwise another process has just written them
                raise
    return folder.data


def write_definition(bench: Workbench, facts: Mapping[str, str], say: Say = lambda text: None) -> None:
    """Write study.json, prompts.toml and confirmation.toml, for readers and for a later confirmation."""
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
        "sampling": dataclasses.asdict(bench.evaluator.sampling),
        "facts": dict(facts),
        "versions": {name: version(name) for name in ("lora-hpo", "optuna", "torch", "diffusers", "peft")},
    }
    write_atomic(bench.folder.facts, json.dumps(values, indent=1))
    promptfiles.write(bench.folder, bench.prompts, bench.confirmation, bench.base.token_count, say)


def _without_batch(config: SampleConfig) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "batch_size"}
