"""Judge: base, prompts, references and scorer, loaded once to score all LoRAs of a run.

Owns the order of loading (cheap checks first) and the reuse of images from earlier calls.  Does not
own which study, images and prompts are used (see ``hpo.judge.standard``) or the comparison of scores
(see ``evaluation.choice.checkpoints`` and ``evaluation.choice.compare``).

    EVALUATION/base/<hash>/            the untrained base on one prompt set: samples/, anchors.json
    EVALUATION/<checkpoint>/<set>/     one LoRA on one prompt set: samples/, grid.png, metrics.json, lora.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evaluation.images import Heading, OnImages, SampledImage, sample
from evaluation.prompts import MAX_TOKENS, PromptSet
from evaluation.score import (
    METRICS_NAME,
    SAMPLES_NAME,
    Anchors,
    Evaluator,
    Safeguards,
    Score,
    evaluate_adapter,
    make_anchors,
    read_score,
)
from hpo.health import Lookout
from hpo.judge import standard as standards
from hpo.judge.runfiles import RunFiles
from hpo.machine import deterministic, own_device, share_threads
from hpo.study import (
    Inputs,
    make_evaluator,
    on_another_base,
    plan_scoring,
    read_json,
    say_notes,
    subject_items,
)
from hpo.terminal import short
from trainer.adapters import DATASET_KEY, base_weights, check_lora, lorafile, merge_base_weights
from trainer.bases import Base, check_vae, compute_type, load_base
from trainer.config import TrainConfig
from trainer.data import Dataset, shown
from trainer.errors import ConfigError, DataError, MissingModel, ModelFileError
from trainer.files import make_folder, sha256_file, write_atomic
from trainer.oom import memory_named

if TYPE_CHECKING:
    from hpo.study import Say

LORA_NAME = (
    "lora.json"  # the LoRA that was scored, and a hash of the limits, training images and extra metrics
)
# the settings that a grid names
TOLD = (
    "learning_rate",
    "network_dim",
    "network_alpha",
    "optimizer_type",
    "max_train_epochs",
    "max_train_steps",
)
T = TypeVar("T")


@dataclass
class Judge:
    """Everything needed to score the LoRAs of a run.  ``name``: name of the run; ``settings``: some of its settings,
    for grids."""

    name: str
    data: Dataset
    evaluator: Evaluator
    confirmation: PromptSet | None
    reference_files: tuple[Path, ...]
    say: Say
    settings: Mapping[str, str] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)
    lookout: Lookout = field(default_factory=Lookout)

    @property
    def safeguards(self) -> Safeguards:
        assert self.evaluator.safeguards is not None, "load makes them"
        return self.evaluator.safeguards

    @property
    def watch(self) -> str:
        """Hash of what is reported next to the score: limits, training images (copy check) and extra metrics."""
        parts = (
            self.safeguards.limits.as_dict(),
            sorted({item.sha256 for item in subject_items(self.data)}),
            [encoder.sha for encoder in self.safeguards.encoders],
            [(gauge.measure, gauge.model, gauge.sha) for gauge in self.evaluator.gauges],
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def on(self, prompts: PromptSet) -> Judge:
        """The same judge for other prompts.  Their anchors must still be measured."""
        return replace(self, evaluator=self.evaluator.on(prompts))

    def measure_anchors(self, evaluation: Path, on_image: OnImages | None = None) -> Anchors:
        """The anchors of the untrained base on the prompts.  Measured once, then read from disk."""
        folder = self._base_folder(evaluation)
        make_folder(folder)
        anchors = make_anchors(self.evaluator, folder, on_image)
        self.evaluator = self.evaluator.with_anchors(anchors)
        return anchors

    def untrained_images(self, evaluation: Path) -> list[SampledImage]:
        """The images that the anchors were measured on, with the class word instead of the trigger."""
        return self._draw(self._base_folder(evaluation), self.evaluator.base.identity, as_class=True)

    def score(self, lora: Path, folder: Path, on_image: OnImages | None = None) -> Score:
        """The score of a LoRA file, read from ``folder`` if stored there.  Otherwise generates the missing images.

        If limits, training images or extra metrics have changed, the stored images are measured again.
        """
        found = self._stored(lora, folder)
        if found is not None:
            return found
        make_folder(folder)
        heading = Heading(f"{self.name}: {lora.name} on {self.evaluator.base.name}", self.settings)
        with self._applied(lora) as identity:
            result = evaluate_adapter(
                self.evaluator, folder, identity=identity, heading=heading, on_image=on_image
            )
        note = {"file": lora.name, "sha256": sha256_file(lora), "watch": self.watch}
        write_atomic(folder / LORA_NAME, json.dumps(note))
        return result

    def images(self, lora: Path, folder: Path) -> list[SampledImage]:
        """The images of a score that ``score`` returned."""
        with self._applied(lora) as identity:
            return self._draw(folder, identity)

    def check(self, lora: Path) -> None:
        """Raise ModelFileError if the file cannot be applied to the base.  Says once what a user should know of it."""
        file = lorafile.read(lora)
        lorafile.attach(self.evaluator.base, file).remove()
        for note in file.notes:
            if note not in self.noted:
                self.noted.add(note)
                self.say(f"warning: {lora.name}: {note}")

    def free(self) -> None:
        """Free the memory of the base.  The judge cannot be used afterwards."""
        self.evaluator.base.free()

    @contextmanager
    def _applied(self, lora: Path) -> Iterator[str]:
        """Context with the LoRA applied to the base.  Yields an identity string of both."""
        base = self.evaluator.base
        with memory_named(f"out of memory while applying {lora.name} to {base.name}"):
            adapter = lorafile.attach(base, lorafile.read(lora))
        try:
            yield f"{base.identity}:{adapter.fingerprint()}"
        finally:
            adapter.remove()

    def _draw(self, folder: Path, identity: str, *, as_class: bool = False) -> list[SampledImage]:
        """The images for the prompts, generated with the base in its current state.  Stored images are read."""
        by = self.evaluator
        samples = folder / SAMPLES_NAME
        return sample(by.base, by.prompts, by.sampling, samples, identity=identity, as_class=as_class)

    def _base_folder(self, evaluation: Path) -> Path:
        parts = list(self.evaluator.identity.values())
        return evaluation / "base" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _stored(self, lora: Path, folder: Path) -> Score | None:
        """The stored score of this file, or None if file, anchors, formula, limits or extra metrics differ."""
        note = read_json(folder / LORA_NAME)
        if note is None or note.get("sha256") != sha256_file(lora) or note.get("watch") != self.watch:
            return None
        try:
            found = read_score(folder / METRICS_NAME)
        except DataError:
            return None
        by = self.evaluator
        return found if found.anchors_key == by.scale.key and found.formula == by.formula else None


def load(
    run: RunFiles, inputs: Inputs, say: Say, *, named: str | None = None, like: Judge | None = None
) -> Judge:
    """Load and check everything needed to score a run.  Writes nothing.

    ``named``: the value of ``--definition``.  ``like``: judge of another run, whose prompts, references, encoders
    and limits are used, so that two bases can be compared.
    """
    config = standards.settings(run, inputs, "-b" if like else "")
    spec = config.pretrained_model_name_or_path
    deterministic()
    share_threads()
    device = own_device(inputs.device, base=spec, precision=config.mixed_precision, say=say)
    data = standards.training_data(run, config, inputs)
    known = standards.standard(run, config, named, data)
    study = known.study
    paths = list(like.reference_files) if like else standards.references(run, inputs, data, known)
    standards.check_unseen(run, paths, data)
    if data.held_out and paths == [item.path for item in data.held_out]:
        say(f"references: {len(paths)} images in {', '.join(sorted({shown(path.parent) for path in paths}))}")
    plan = None
    if like is None:
        plan = plan_scoring(study, data, paths, spec, inputs.clip or known.clip)
        standards.sets(run, inputs, study, data, lambda text: 0)
        if known.says:
            say(known.says)
    config = _with_vae_of_run(config, say)
    say(f"loading {spec} on {device} …")
    base = load_base(
        spec,
        device=device,
        dtype=compute_type(config.mixed_precision, device),
        no_half_vae=config.no_half_vae,
        settings=config,
        say=say,
    )
    _merge_base_weights_of_run(base, config, say)
    _say_changes(run, base, data, say)
    sampling = standards.sampling(run, known, config, base)
    if plan is not None:
        prompts, confirmation = standards.sets(run, inputs, study, data, base.token_count)
        evaluator = make_evaluator(plan, base, prompts, sampling, say)
        say_notes(prompts, confirmation, say)
    else:
        assert like is not None
        confirmation = like.confirmation
        _check_readable(base, confirmation or like.evaluator.prompts)
        for words in standards.other_words(data, like.evaluator.prompts):
            say(
                f"warning: {run.name} was trained with {words} (from {like.name}); the LoRA may not respond to it"
            )
        evaluator = on_another_base(like.evaluator, base, sampling, data, paths)
    told = {name: short(getattr(config, name)) for name in TOLD if getattr(config, name) is not None}
    return Judge(
        run.name, data, evaluator, confirmation, tuple(paths), say, told, lookout=Lookout(study.health)
    )


def _with_vae_of_run(config: TrainConfig, say: Say) -> TrainConfig:
    """The settings, without a VAE that is not on this machine: a LoRA file names only the file of its VAE."""
    if not config.vae:
        return config
    try:
        check_vae(config.vae)
    except (MissingModel, ConfigError):
        say(
            f"warning: the VAE of the run, {config.vae}, is not here: images are decoded with that of the base"
        )
        return config.with_values({"vae": ""})
    return config


def _merge_base_weights_of_run(base: Base, config: TrainConfig, say: Say) -> None:
    """Make the base that the run was trained on, unless one of its files is not on this machine."""
    try:
        for path, _ in base_weights(config):
            check_lora(path, base.family)
    except (ModelFileError, ConfigError) as error:
        say(f"warning: images are generated without base_weights of the run: {error.message}")
        return
    merge_base_weights(base, config, say)


def _say_changes(run: RunFiles, base: Base, data: Dataset, say: Say) -> None:
    """Warn if base or training images differ from those of the training."""
    metadata = run.metadata()
    if metadata.get("lora_hpo_base", base.identity) != base.identity:
        say(f"warning: {run.name} was trained on a different base than {base.name}")
    if metadata.get(DATASET_KEY, data.content_hash) != data.content_hash:
        say(
            f"warning: {data.root} has different images or captions than {run.name} was trained on; "
            "the references may have been used in training"
        )


def _check_readable(base: Base, prompts: PromptSet) -> None:
    for prompt in prompts.prompts:
        tokens = base.token_count(prompt.text)
        if tokens > MAX_TOKENS:
            raise ConfigError(
                f"the prompt {prompt.text[:40]!r}… is too long for {base.name} ({tokens} tokens, at most {MAX_TOKENS})",
                "use shorter prompts (--prompts)",
            )
