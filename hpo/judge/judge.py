"""Judge: what scores the LoRAs of a run – base, prompts, references, scorer – loaded once for all of them.

Owns the order of loading (cheap checks first), and that what is drawn is kept and not drawn
again.  Which study, images and prompts judge a run is ``hpo.judge.standard``'s.  Does not choose
between scores (``evaluation.choice.checkpoints``, ``evaluation.choice.compare``).

    EVALUATION/base/<hash>/            the untrained base on one prompt set: samples/, anchors.json
    EVALUATION/<checkpoint>/<set>/     one LoRA on one prompt set: samples/, grid.png, metrics.json, lora.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from evaluation.images import OnImages, SampledImage, sample
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
from hpo.judge import standard as standards
from hpo.judge.runfiles import RunFiles
from hpo.study import (
    Inputs,
    make_evaluator,
    on_another_base,
    plan_scoring,
    read_json,
    say_notes,
    subject_items,
)
from hpo.train import check_device
from trainer.adapters import DATASET_KEY, lorafile
from trainer.bases import Base, compute_type, load_base
from trainer.data import Dataset
from trainer.errors import ConfigError, DataError, OutOfMemory
from trainer.files import make_folder, sha256_file, write_atomic

if TYPE_CHECKING:
    from hpo.study import Say

LORA_NAME = "lora.json"  # which LoRA the figures beside it are of, and by which limits, copies and gauges
T = TypeVar("T")


@dataclass
class Judge:
    """Everything that every LoRA of a run is scored with.  ``name``: the run's."""

    name: str
    data: Dataset
    evaluator: Evaluator
    confirmation: PromptSet | None
    reference_files: tuple[Path, ...]
    say: Say

    @property
    def safeguards(self) -> Safeguards:
        assert self.evaluator.safeguards is not None, "load makes them"
        return self.evaluator.safeguards

    @property
    def watch(self) -> str:
        """Hash of what is told beside the score: limits, the images that may not be repeated, other models."""
        parts = (
            asdict(self.safeguards.limits),
            sorted({item.sha256 for item in subject_items(self.data)}),
            [encoder.sha for encoder in self.safeguards.encoders],
            [(gauge.measure, gauge.model, gauge.sha) for gauge in self.evaluator.gauges],
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def on(self, prompts: PromptSet) -> Judge:
        """The same on other prompts.  Their anchors are still to be measured."""
        return replace(self, evaluator=self.evaluator.on(prompts))

    def measure_anchors(self, evaluation: Path, on_image: OnImages | None = None) -> Anchors:
        """The untrained base on the prompts; measured once, then read."""
        folder = self._base_folder(evaluation)
        make_folder(folder)
        anchors = self._within_memory(lambda: make_anchors(self.evaluator, folder, on_image))
        self.evaluator = self.evaluator.with_anchors(anchors)
        return anchors

    def untrained_images(self, evaluation: Path) -> list[SampledImage]:
        """The pictures that the anchors were measured on: the class word instead of the trigger."""
        return self._draw(self._base_folder(evaluation), self.evaluator.base.identity, as_class=True)

    def score(self, lora: Path, folder: Path, on_image: OnImages | None = None) -> Score:
        """The score of a LoRA file: from ``folder`` if it is there, else drawn, from where it was left.

        Under other limits, training images or gauges than before it is measured anew on the pictures that are there.
        """
        found = self._stored(lora, folder)
        if found is not None:
            return found
        make_folder(folder)
        with self._applied(lora) as identity:
            result = self._within_memory(
                lambda: evaluate_adapter(self.evaluator, folder, identity=identity, on_image=on_image)
            )
        note = {"file": lora.name, "sha256": sha256_file(lora), "watch": self.watch}
        write_atomic(folder / LORA_NAME, json.dumps(note))
        return result

    def images(self, lora: Path, folder: Path) -> list[SampledImage]:
        """The pictures behind a score that ``score`` returned."""
        with self._applied(lora) as identity:
            return self._draw(folder, identity)

    def check(self, lora: Path) -> None:
        """Raise ModelFileError unless a file can be put into the base."""
        lorafile.attach(self.evaluator.base, lorafile.read(lora)).remove()

    def free(self) -> None:
        """Give the base's memory back.  The judge is unusable after."""
        self.evaluator.base.free()

    @contextmanager
    def _applied(self, lora: Path) -> Iterator[str]:
        """With the LoRA in the base; yields what names the two."""
        base = self.evaluator.base
        adapter = lorafile.attach(base, lorafile.read(lora))
        try:
            yield f"{base.identity}:{adapter.fingerprint()}"
        finally:
            adapter.remove()

    def _draw(self, folder: Path, identity: str, *, as_class: bool = False) -> list[SampledImage]:
        """The prompts' pictures, from the base as it stands; those that are there already are read."""
        by = self.evaluator
        samples = folder / SAMPLES_NAME
        return sample(by.base, by.prompts, by.sampling, samples, identity=identity, as_class=as_class)

    def _base_folder(self, evaluation: Path) -> Path:
        parts = list(self.evaluator.identity.values())
        return evaluation / "base" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _stored(self, lora: Path, folder: Path) -> Score | None:
        """A finished score of this very file on this scale, with the same told beside it."""
        note = read_json(folder / LORA_NAME)
        if note is None or note.get("sha256") != sha256_file(lora) or note.get("watch") != self.watch:
            return None
        try:
            found = read_score(folder / METRICS_NAME)
        except DataError:
            return None
        by = self.evaluator
        return found if found.anchors_key == by.scale.key and found.formula == by.formula else None

    def _within_memory(self, work: Callable[[], T]) -> T:
        """``work``, with half as many images at once as long as the memory does not suffice."""
        while True:
            try:
                return work()
            except OutOfMemory:
                sampling = self.evaluator.sampling
                size = sampling.batch_size // 2
                if size < 1:
                    raise
                self.evaluator = replace(self.evaluator, sampling=replace(sampling, batch_size=size))
                self.say(f"out of memory: drawing {size} images at once from here on")
                if self.evaluator.base.device.type == "cuda":
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
    plan = None
    if like is None:
        plan = plan_scoring(study, data, paths, spec, inputs.clip or known.clip)
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
                f"warning: {run.name} was trained with {words} of {like.name}: it may not know what it is asked for"
            )
        evaluator = on_another_base(like.evaluator, base, sampling, data, paths)
    return Judge(run.name, data, evaluator, confirmation, tuple(paths), say)


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
