"""Scoring noise of a study: the smallest difference between trials that can be detected.

Owns the choice of trials for the estimate, and reading the raw cosines of their images from the trial
folders.  Does not own the estimate; see ``evaluation.score.statistics``.  Does not import torch, because
``hpo status`` uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import TrialState

from evaluation.score import Components, Formula, Scale, image_scores, variance_components
from hpo.study.folder import StudyFolder, read_json
from hpo.study.standing import is_feasible, objective_of, rank
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import optuna

ENOUGH = 6  # scored trials; only the better half is used, because close decisions are between good trials
FEWEST = 3  # trials of the better half with readable image scores


def components(study: optuna.Study, folder: StudyFolder) -> Components | None:
    """The variance components of the better half of the trials.  None if there are too few."""
    found = [
        t
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if is_feasible(t) and objective_of(t)  # a score clipped at 0 has no slope
    ]
    if len(found) < ENOUGH:
        return None
    better = sorted(found, key=rank, reverse=True)[: (len(found) + 1) // 2]
    anchors = read_json(folder.anchors)
    try:
        scale, ids = Scale.of(anchors or {}), list((anchors or {})["prompt_ids"])
        rows = [_image_scores(read_json(folder.trial(t.number).metrics), ids, scale) for t in better]
    except (ConfigError, KeyError, TypeError, ValueError):  # the files were edited by hand
        return None
    whole = [row for row in rows if row is not None]
    same = [row for row in whole if row.shape == whole[0].shape]
    return variance_components(np.stack(same)) if len(same) >= FEWEST else None


def _image_scores(metrics: dict[str, Any] | None, ids: list[str], scale: Scale) -> np.ndarray | None:
    """(P, S) scores of a trial's images, by the formula it was scored with, for the seeds that all prompts
    have.  None if there are none."""
    found = {(row["prompt_id"], row["seed"]): row for row in (metrics or {}).get("per_image", ())}
    of_prompt = [{seed for prompt, seed in found if prompt == p} for p in ids]
    seeds = sorted(set.intersection(*of_prompt)) if of_prompt else []
    if not seeds or {p for p, _ in found} != set(ids):
        return None
    clip_t, clip_i = (
        np.array([[found[p, s][key] for s in seeds] for p in ids]) for key in ("clip_t", "clip_i")
    )
    return image_scores(clip_t, clip_i, scale, Formula(**(metrics or {}).get("formula", {})))
