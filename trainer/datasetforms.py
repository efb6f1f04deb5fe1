"""Dataset descriptions in their forms: that of sd-scripts (``general``, ``datasets``), alone or beside settings, in
TOML or JSON, and that of LoRA_Easy_Training_Scripts.

Owns the forms. Does not own the keys inside (``trainer.data.subsets``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = ("general", "datasets")


def is_dataset(table: Mapping[str, Any]) -> bool:
    """Whether a table has a dataset description of sd-scripts."""
    datasets = table.get("datasets")
    return isinstance(datasets, list) and any(isinstance(d, Mapping) and "subsets" in d for d in datasets)


def split_dataset(table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(settings, dataset description) of a file; None if it has no description."""
    if not is_dataset(table):
        return dict(table), None
    rest = {name: value for name, value in table.items() if name not in PARTS}
    return rest, {name: table[name] for name in PARTS if name in table}


def is_easy(table: Mapping[str, Any]) -> bool:
    """Whether a table is a configuration of LoRA_Easy_Training_Scripts: its sections have ``args``."""
    sections = ("general_args", "network_args", "optimizer_args", "saving_args", "bucket_args")
    parts = [table.get(name) for name in sections]
    return any(isinstance(part, Mapping) and ("args" in part or "dataset_args" in part) for part in parts)


def easy_dataset(table: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dataset description of a configuration of LoRA_Easy_Training_Scripts, in the form of sd-scripts; None if it
    names no folder. As its backend's validate_dataset_args: values that ask for nothing are left out."""
    general: dict[str, Any] = {}
    for part in table.values():
        if isinstance(part, Mapping) and isinstance(part.get("dataset_args"), Mapping):
            general |= {name: value for name, value in part["dataset_args"].items() if value}
    if general.get("max_token_length") == 75:
        del general["max_token_length"]
    subsets = [
        {name: value for name, value in subset.items() if value and name != "name"}
        for subset in table.get("subsets") or ()
        if isinstance(subset, Mapping)
    ]
    return {"general": general, "datasets": [{"subsets": subsets}]} if subsets else None


def dataset_of(table: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dataset description in a file, in the form of sd-scripts; None if it has none."""
    return easy_dataset(table) if is_easy(table) else split_dataset(table)[1]
