"""Scoring of a study's trials and a run's checkpoints: prompts, references and the Evaluator.

Owns the steps from a definition to an ``evaluation.score.Evaluator``: first a plan, which
is checked before anything is loaded, then the Evaluator.  Does not choose the definition or
the images (``hpo.search.workbench``, ``hpo.judge.standard``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch

from evaluation.encoders import (
    PatchEncoder,
    StyleEncoder,
    embed,
    embed_references,
    require_references,
    self_test,
)
from evaluation.gauges import others
from evaluation.images import SHOWN_REFERENCES, SampleConfig, thumbnail
from evaluation.prompts import (
    AUTO,
    CONFIRM_SEEDS,
    SEARCH_SEEDS,
    STYLE,
    TAGS,
    CountTokens,
    PromptSet,
    are_tags,
    generate,
    load_prompts,
)
from evaluation.score import Evaluator, SafeguardLimits, Safeguards, embed_copies, scene_encoders
from hpo.study.config import Inputs, Say, StudyConfig
from trainer.bases import Base
from trainer.data import Dataset, Item, is_image, read_picture, visible
from trainer.errors import DataError, MissingData
from trainer.text import clean_text

NATURAL = "natural"


@dataclass(frozen=True)
class ScoringPlan:
    """The scoring settings from the definition, the images and the command line.  Nothing is loaded yet."""

    study: StudyConfig
    data: Dataset
    references: tuple[Path, ...]
    scorer: str
    likeness: str


def plan_scoring(
    study: StudyConfig, data: Dataset, references: Sequence[Path], base: str, clip: str | None
) -> ScoringPlan:
    """Choose the encoders for a base (``base`` as for ``load_base``).  ``clip`` is the user's choice.

    Raises ToolError if an encoder cannot be loaded, as far as this can be checked without loading it.
    """
    require_references(len(references))
    scorer = clip or study.study.clip or embed.default_scorer(base)
    likeness = study.study.likeness or embed.default_likeness(base, scorer)
    embed.check_scorer(scorer)
    embed.check_likeness(likeness)
    embed.fetch_likeness(likeness)
    for spec in study.study.also:
        others.check(spec)
    return ScoringPlan(study, data, tuple(references), scorer, likeness)


def make_evaluator(
    plan: ScoringPlan, base: Base, prompts: PromptSet, sampling: SampleConfig, say: Say
) -> Evaluator:
    """The Evaluator for all adapters of a study or run.  Loads the encoders to the device of the base."""
    scorer, likeness = _load_encoders(plan, base.device, say)
    also = plan.study.study.also
    return Evaluator(
        base=base,
        prompts=prompts,
        sampling=sampling,
        references=embed_references(plan.references, likeness),
        scorer=scorer,
        likeness=likeness,
        formula=plan.study.score,
        safeguards=_safeguards(plan.data, plan.references, scorer, likeness, plan.study.limits),
        gauges=(
            *others.usual(scorer, likeness, plan.references),
            *others.also(also, scorer, plan.references, base.device, say),
        ),
        reference_pictures=_pictures(plan.references),
    )


def on_another_base(
    evaluator: Evaluator, base: Base, sampling: SampleConfig, data: Dataset, references: Sequence[Path]
) -> Evaluator:
    """An Evaluator with the same prompts and models for LoRAs of another base, trained on ``data``."""
    assert evaluator.safeguards is not None, "make_evaluator makes them"
    limits = evaluator.safeguards.limits
    own = _safeguards(data, references, evaluator.scorer, evaluator.likeness, limits)
    return replace(evaluator, base=base, sampling=sampling, safeguards=own, anchors=None)


def _pictures(paths: Sequence[Path]) -> tuple[np.ndarray, ...]:
    """Thumbnails of the references, to be shown beside the images."""
    return tuple(thumbnail(read_picture(path).pixels_HW3) for path in paths[:SHOWN_REFERENCES])


def _load_encoders(
    plan: ScoringPlan, device: torch.device, say: Say
) -> tuple[embed.Scorer, embed.ImageEncoder]:
    """Load the scorer, run its self-test, and load the likeness encoder.  The style preset encodes patches."""
    scorer = embed.load_scorer(plan.scorer, device)
    plain = embed.load_likeness(plan.likeness, scorer, device)
    self_test(scorer, say)
    return scorer, StyleEncoder(cast(PatchEncoder, plain)) if plan.study.preset.style else plain


def _safeguards(
    data: Dataset,
    references: Sequence[Path],
    scorer: embed.Scorer,
    likeness: embed.ImageEncoder,
    limits: SafeguardLimits,
) -> Safeguards:
    """The safeguards.  The copy check uses only images that show the subject."""
    encoders = scene_encoders(scorer, likeness)
    copies = embed_copies([item.path for item in subject_items(data)], references, encoders)
    return Safeguards(encoders, copies, limits)


def prompt_sets(
    inputs: Inputs, study: StudyConfig, data: Dataset, count_tokens: CountTokens
) -> tuple[PromptSet, PromptSet | None]:
    """The search set and the disjoint confirmation set (None for a hand-written set without a class word)."""
    study = worded(study, data)
    plan, later = study.prompts, study.confirmation
    make = partial(
        generate,
        [item.caption for item in subject_items(data)],
        trigger=data.trigger,
        class_word=data.class_word,
        count_tokens=count_tokens,
        separator=study.train.caption_separator,
    )
    if inputs.prompts:
        chosen = load_prompts(
            inputs.prompts, trigger=data.trigger, class_word=data.class_word, count_tokens=count_tokens
        )
        if not data.class_word:
            return chosen, None
    else:
        chosen = make(
            words=plan.words,
            counts=plan.counts or study.preset.counts,
            seeds=plan.seeds or SEARCH_SEEDS,
        )
    confirmation = make(
        words=later.words,
        counts=later.counts or study.preset.confirm_counts,
        seeds=later.seeds or CONFIRM_SEEDS,
        exclude=chosen,
    )
    return chosen, confirmation


def worded(study: StudyConfig, data: Dataset) -> StudyConfig:
    """The definition with the form of its prompts decided, where it says ``auto``: the form of the captions.

    Confirmation prompts follow the search's.  The form is stored with the study, so it is decided once.
    """
    words = study.prompts.words
    if words == AUTO:
        captions = [item.caption for item in subject_items(data)]
        form = TAGS if are_tags(captions, study.train.caption_separator) else NATURAL
        words = form + STYLE if study.preset.style else form
    later = words if study.confirmation.words == AUTO else study.confirmation.words
    sections = dict(study.sections)
    for section, decided in (("prompts", words), ("confirmation", later)):
        if sections.get(section, {}).get("words") == AUTO:
            sections[section] = {**sections[section], "words": decided}
    return replace(
        study,
        prompts=replace(study.prompts, words=words),
        confirmation=replace(study.confirmation, words=later),
        sections=sections,
    )


def wording_line(before: StudyConfig, chosen: PromptSet, words: str) -> str:
    """What to say about prompts whose form was decided by the captions.  Empty if the definition or a file says it."""
    if before.prompts.words != AUTO:
        return ""
    example = next((p.text for p in chosen.prompts if p.kind == "altered"), chosen.prompts[0].text)
    is_tags = words.startswith(TAGS)
    form, others, other = ("tags", "sentences", NATURAL) if is_tags else ("sentences", "tags", TAGS)
    return (
        f"the captions are {form}, so the prompts are, too: {clean_text(example)!r}; for {others} instead: "
        f"--set prompts.words={other}"
    )


def subject_items(data: Dataset) -> tuple[Item, ...]:
    """The images that show the subject.  Regularization images show its class; their captions have no trigger."""
    return tuple(item for item in data.items if not item.is_reg)


def say_notes(prompts: PromptSet, confirmation: PromptSet | None, say: Say) -> None:
    """Print the notes of generated prompt sets."""
    for note in prompts.notes:
        say(note)
    for note in confirmation.notes if confirmation else ():
        say(f"confirmation prompts: {note}")


def reference_paths(folder: Path, data: Dataset) -> list[Path]:
    """The images of --references.  Raises DataError for a corrupt image.

    None may be a training image: likeness would then measure memorization.
    """
    try:
        if not folder.is_dir():
            raise MissingData(f"no folder {folder}", "--references must be a folder of reference images")
        found = [path for path in visible(folder) if is_image(path)]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}", "check its permissions") from None
    if len(found) < 2:
        raise DataError(
            f"{folder} contains {len(found)} images", "add images: likeness needs at least 2 references"
        )
    trained = {item.sha256 for item in data.items}
    for path in found:
        if read_picture(path).sha256 in trained:
            raise DataError(
                f"{path} is also a training image", "use reference images that are not in the training data"
            )
    return found
