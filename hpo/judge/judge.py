"""Judge: what scores the LoRAs of a run – base, prompts, references, scorer – loaded once for all of them.

Owns the order of loading (cheap checks first), and that what is drawn is kept and not drawn
again.  Which study, images and prompts judge a run is ``hpo.judge.standard``'s.  Does not choose
between scores (``evaluation.choice.checkpoints``, ``evaluation.choice.compare``).

    EVALUATION/base/<hash>/            the untrained base on one prompt set: samples/, anchors.json
    EVALUATION/<checkpoint>/<set>/     one LoRA on one prompt set: samples/, grid.png, metrics.json, lora.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from evaluation.encoders import References, embed, embed_references, require_references
from evaluation.gauges import Gauge, others
from evaluation.images import OnImages, SampleConfig, SampledImage, sample
from evaluation.prompts import MAX_TOKENS, PromptSet
from evaluation.score import (
    METRICS_NAME,
    Anchors,
    Formula,
    SafeguardLimits,
    Safeguards,
    Score,
    evaluate_adapter,
    make_anchors,
    read_score,
)
from hpo.judge import standard as standards
from hpo.judge.runfiles import RunFiles
from hpo.study import (
    Inputs,
    check_encoders,
    load_encoders,
    make_safeguards,
    read_json,
    say_notes,
    subject_items,
)
from hpo.train import check_device
from trainer.adapters import DATASET_KEY, lorafile
from trainer.bases import Base, compute_type, load_base
from trainer.data import Dataset
from trainer.errors import ConfigError, DataError, OutOfMemory
from trainer.files import machine_error, sha256_file, write_atomic

if TYPE_CHECKING:
    from hpo.study import Say

LORA_NAME = "lora.json"  # which LoRA the figures beside it are of, and by which limits, copies and gauges
T = TypeVar("T")


@dataclass
class Judge:
    """Everything that every LoRA of a run is scored with.  ``name``: the run's."""

    name: str
    base: Base
    data: Dataset
    prompts: PromptSet
    confirmation: PromptSet | None
    sampling: SampleConfig
    reference_files: tuple[Path, ...]
    references: References
    scorer: embed.Scorer
    likeness: embed.ImageEncoder
    formula: Formula
    safeguards: Safeguards
    gauges: tuple[Gauge, ...]
    say: Say

    @property
    def watch(self) -> str:
        """Hash of what is told beside the score: limits, the images that may not be repeated, other models."""
        parts = (
            dataclasses.asdict(self.safeguards.limits),
            sorted({item.sha256 for item in subject_items(self.data)}),
            [encoder.sha for encoder in self.safeguards.encoders],
            [(gauge.measure, gauge.model, gauge.sha) for gauge in self.gauges],
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def anchors(self, prompts: PromptSet, evaluation: Path, on_image: OnImages | None = None) -> Anchors:
        """The untrained base on a prompt set; measured once, then read."""
        folder = self._base_folder(prompts, evaluation)

        def measure() -> Anchors:
            return make_anchors(
                self.base,
                prompts,
                self.sampling,
                self.references,
                self.scorer,
                self.likeness,
                folder,
                on_image=on_image,
            )

        _make(folder)
        return self._within_memory(measure)

    def untrained_images(self, prompts: PromptSet, evaluation: Path) -> list[SampledImage]:
        """The pictures that the anchors were measured on: the class word instead of the trigger."""
        folder = self._base_folder(prompts, evaluation) / "samples"
        return sample(self.base, prompts, self.sampling, folder, identity=self.base.identity, as_class=True)

    def score(
        self,
        lora: Path,
        prompts: PromptSet,
        anchors: Anchors,
        folder: Path,
        on_image: OnImages | None = None,
    ) -> Score:
        """The score of a LoRA file: from ``folder`` if it is there, else drawn, from where it was left.

        Under other limits, training images or gauges than before it is measured anew on the pictures that are there.
        """
        found = self._stored(lora, anchors, folder)
        if found is not None:
            return found
        _make(folder)
        adapter = lorafile.attach(self.base, lorafile.read(lora))
        try:
            identity = f"{self.base.identity}:{adapter.fingerprint()}"

            def draw() -> Score:
                return evaluate_adapter(
                    self.base,
                    prompts,
                    self.sampling,
                    self.references,
                    self.scorer,
                    self.likeness,
                    anchors,
                    folder,
                    identity=identity,
                    on_image=on_image,
                    formula=self.formula,
                    safeguards=self.safeguards,
                    gauges=self.gauges,
                )

            result = self._within_memory(draw)
        finally:
            adapter.remove()
        note = {"file": lora.name, "sha256": sha256_file(lora), "watch": self.watch}
        write_atomic(folder / LORA_NAME, json.dumps(note))
        return result

    def images(self, lora: Path, prompts: PromptSet, folder: Path) -> list[SampledImage]:
        """The pictures behind a score that ``score`` returned."""
        adapter = lorafile.attach(self.base, lorafile.read(lora))
        try:
            identity = f"{self.base.identity}:{adapter.fingerprint()}"
            return sample(self.base, prompts, self.sampling, folder / "samples", identity=identity)
        finally:
            adapter.remove()

    def check(self, lora: Path) -> None:
        """Raise ModelFileError unless a file can be put into the base."""
        lorafile.attach(self.base, lorafile.read(lora)).remove()

    def free(self) -> None:
        """Give the base's memory back.  The judge is unusable after."""
        self.base.free()

    def _base_folder(self, prompts: PromptSet, evaluation: Path) -> Path:
        parts = (
            self.base.identity,
            prompts.hash,
            self.sampling.hash,
            self.scorer.sha,
            self.likeness.sha,
            self.references.hash,
        )
        return evaluation / "base" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _stored(self, lora: Path, anchors: Anchors, folder: Path) -> Score | None:
        """A finished score of this very file on this scale, with the same told beside it."""
        note = read_json(folder / LORA_NAME)
        if note is None or note.get("sha256") != sha256_file(lora) or note.get("watch") != self.watch:
            return None
        try:
            found = read_score(folder / METRICS_NAME)
        except DataError:
            return None
        return found if found.anchors_key == anchors.key and found.formula == self.formula else None

    def _within_memory(self, work: Callable[[], T]) -> T:
        """``work``, with half as many images at once as long as the memory does not suffice."""
        while True:
            try:
                return work()
            except OutOfMemory:
                size = self.sampling.batch_size // 2
                if size < 1:
                    raise
                self.sampling = replace(self.sampling, batch_size=size)
                self.say(f"out of memory: drawing {size} images at once from here on")
                if self.base.device.type == "cuda":
                    torch.cuda.empty_cache()


def load(
    run: RunFiles, inputs: Inputs, say: Say, *, named: str | None = None, like: Judge | None = None
) -> Judge:
    """Read and check everything that judges a run; nothing is written.

    ``named``: --study.  ``like``: take prompts, references, encoders and limits from another run's judge, so
    that two bases are compared on the same.
    """
    device = inputs.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    config = standards.settings(run, inputs, "-b" if like else "")
    spec = config.pretrained_model_name_or_path
    known = standards.standard(run, config, named)
    study = known.study
    data = standards.training_data(run, config, inputs, known)
    paths = list(like.reference_files) if like else standards.references(run, inputs, data, known)
    standards.check_unseen(run, paths, data)
    require_references(len(paths))
    scorer_spec = inputs.clip or known.clip or study.study.clip or embed.default_scorer(spec)
    likeness_spec = study.study.likeness or embed.default_likeness(spec)
    if like is None:
        check_encoders(study, scorer_spec, likeness_spec)
        standards.sets(run, inputs, study, data, lambda text: 0)
        if known.says:
            say(known.says)
    say(f"loading {spec} on {device} …")
    base = load_base(
        spec,
        device=device,
        dtype=compute_type(config.mixed_precision, device),
        no_half_vae=config.no_half_vae,
    )
    _say_changes(run, base, data, say)
    if like is None:
        prompts, confirmation = standards.sets(run, inputs, study, data, base.token_count)
        scorer, likeness = load_encoders(study, scorer_spec, likeness_spec, device, say)
        formula = Formula(**dataclasses.asdict(study.score))
        limits = SafeguardLimits(**dataclasses.asdict(study.limits))
        references = embed_references(paths, likeness)
        gauges = others.gauges(study.study.also, scorer, likeness, paths, device)
        say_notes(prompts, confirmation, say)
    else:
        prompts, confirmation, references = like.prompts, like.confirmation, like.references
        scorer, likeness, formula = like.scorer, like.likeness, like.formula
        limits, gauges = like.safeguards.limits, like.gauges
        _check_readable(base, confirmation or prompts)
        for words in standards.other_words(data, prompts):
            say(
                f"warning: {run.name} was trained with {words} of {like.name}: it may not know what it is asked for"
            )
    return Judge(
        run.name,
        base,
        data,
        prompts,
        confirmation,
        standards.sampling(run, known, config, base),
        tuple(paths),
        references,
        scorer,
        likeness,
        formula,
        make_safeguards(data, paths, scorer, likeness, limits),
        gauges,
        say,
    )


def _say_changes(run: RunFiles, base: Base, data: Dataset, say: Say) -> None:
    """What is other than in the training."""
    metadata = run.metadata()
    if metadata.get("lora_hpo_base", base.identity) != base.identity:
        say(f"warning: {run.name} was trained on another base than {base.name}")
    if metadata.get(DATASET_KEY, data.content_hash) != data.content_hash:
        say(
            f"warning: {data.root} has other images or captions than {run.name} was trained on: "
            "whether it has seen the references is not known"
        )


def _check_readable(base: Base, prompts: PromptSet) -> None:
    for prompt in prompts.prompts:
        tokens = base.token_count(prompt.text)
        if tokens > MAX_TOKENS:
            raise ConfigError(
                f"{base.name} would cut the prompt {prompt.text[:40]!r}… ({tokens} of {MAX_TOKENS} tokens)",
                "give shorter ones with --prompts",
            )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_error(error, folder) from error
