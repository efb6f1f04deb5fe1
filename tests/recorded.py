"""A finished study without any training: real database and study.json, invented scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution

from hpo.search.dashboard import mark_infeasible
from hpo.study.folder import TOTAL, StudyFolder
from hpo.study.storage import create_study

WIDE = {  # twelve settings, as in the default study of SD1.5
    "learning_rate": 1e-4, "text_encoder_lr": 5e-5, "network_dim": 16, "network_alpha": 8.0, "lr_scheduler": "cosine",
    "lr_warmup_steps": 0.05, "min_snr_gamma": 5, "noise_offset": 0.0, "network_dropout": 0.1, "max_train_epochs": 2,
    "lr_scheduler_num_cycles": 3, "weight_decay": 0.01,
}  # fmt: skip


def settings(number: int) -> dict[str, Any]:
    """All twelve settings; the learning rate covers three decades, weight_decay differs in one trial only."""
    changed: dict[str, Any] = {
        name: value * (1 + number % 3) for name, value in WIDE.items() if isinstance(value, float)
    }
    changed |= {"learning_rate": 10 ** (-5 + number / 4), "network_dim": 2 ** (number % 5)}
    changed["lr_scheduler"] = ("cosine", "constant", "cosine_with_restarts")[number % 3]
    changed["weight_decay"] = 0.05 if number == 2 else 0.01
    return {**WIDE, **changed, "min_snr_gamma": number % 2, "lr_scheduler_num_cycles": 1 + number % 2,
            "max_train_epochs": 1 + number % 2}  # fmt: skip


def recorded(
    root: Path,
    trials: int = 6,
    *,
    facts: Mapping[str, Any] | None = None,
    scores: bool = True,
    total: int = 8,
) -> StudyFolder:
    """A study in a real database with finished trials; trial 0 is the baseline, trial 3 is infeasible."""
    folder = StudyFolder(root)
    root.mkdir(parents=True)
    stored = {"facts": dict(facts or {}), "base": "mini-sd15", "sections": {"train": {"resolution": 64}}}
    folder.facts.write_text(json.dumps(stored))
    study = create_study(folder, {})
    study.set_user_attr(TOTAL, total)
    for number in range(trials):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        trial.set_user_attr("settings", settings(number))
        trial.set_user_attr("seconds", 61.0)
        if number == 0:
            trial.set_user_attr("role", "baseline")
        if number == 3 or not scores:
            trial.set_user_attr("outcome", "infeasible")
            trial.set_user_attr("reason", "invalid_images")
            mark_infeasible(trial, {"invalid_images": 1.0})
            study.tell(trial, -0.1)
        else:
            mark_infeasible(trial, {"invalid_images": -1.0})
            trial.set_user_attr("se", 0.02)
            study.tell(trial, 0.1 + 0.01 * number)
    return folder
