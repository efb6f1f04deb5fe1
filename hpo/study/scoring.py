"""What scores a study's trials and a run's checkpoints: prompts, references, and the Evaluator made of a definition.

Owns the one way from a definition to an ``evaluation.score.Evaluator``: a plan, checked before anything is loaded,
and then the value.  Does not choose the definition or the images (``hpo.search.workbench``, ``hpo.judge.standard``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

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
from evaluation.images import SampleConfig
from evaluation.prompts import CONFIRM_SEEDS, SEARCH_SEEDS, CountTokens, PromptSet, generate, load_prompts
from evaluation.score import Evaluator, SafeguardLimits, Safeguards, embed_copies, scene_encoders
from hpo.study.config import Inputs, StudyConfig
from trainer.bases import Base
from trainer.data import IMAGE_EXTENSIONS, Dataset, Item, read_picture
from trainer.errors import DataError

Say = Callable[[str], None]


@dataclass(frozen=True)
class ScoringPlan:
    """What a study's definition, its images and the command line say of scoring.  Nothing of it is loaded yet."""

    study: StudyConfig
    data: Dataset
    references: tuple[Path, ...]
    scorer: str
    likeness: str


def plan_scoring(
    study: StudyConfig, data: Dataset, references: Sequence[Path], base: str, clip: str | None
) -> ScoringPlan:
    """Which encoders score on a base, as ``load_base`` is told it.  ``clip``: the user's own choice.

    Raises ToolError for what cannot be loaded, as far as this shows without loading it.
    """
    require_references(len(references))
    scorer = clip or study.study.clip or embed.default_scorer(base)
    likeness = study.study.likeness or embed.default_likeness(base)
    embed.check_scorer(scorer)
    embed.check_likeness(likeness)
    for spec in study.study.also:
        others.check(spec)
    return ScoringPlan(study, data, tuple(references), scorer, likeness)


def make_evaluator(
    plan: ScoringPlan, base: Base, prompts: PromptSet, sampling: SampleConfig, say: Say
) -> Evaluator:
    """What every adapter of a study or a run is scored with.  Loads the encoders to where the base is."""
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
    )


def on_another_base(
    evaluator: Evaluator, base: Base, sampling: SampleConfig, data: Dataset, references: Sequence[Path]
) -> Evaluator:
    """The same prompts and models for LoRAs of another base, which were trained on ``data``."""
    assert evaluator.safeguards is not None, "make_evaluator makes them"
    limits = evaluator.safeguards.limits
    own = _safeguards(data, references, evaluator.scorer, evaluator.likeness, limits)
    return replace(evaluator, base=base, sampling=sampling, safeguards=own, anchors=None)


def _load_encoders(
    plan: ScoringPlan, device: torch.device, say: Say
) -> tuple[embed.Scorer, embed.ImageEncoder]:
    """The scorer, with its known answers asked, and what sees likeness – for the style preset, in patches."""
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
    """Copies are those of images that show the subject."""
    encoders = scene_encoders(scorer, likeness)
    copies = embed_copies([item.path for item in subject_items(data)], references, encoders)
    return Safeguards(encoders, copies, limits)


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
