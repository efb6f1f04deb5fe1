"""Shipped: traces of the usual settings as part of the package, so that a first ``hpo plan`` has nothing to trace.

Owns the file ``shipped.xz``, its form and which traces are in it. A shipped trace is found only under the same
settings, the same networks and the same versions of the libraries; any other question is traced as before. It is not
bound to this tool's source code: a test compares shipped traces with fresh ones. Make them again with

    python -m trainer.memory.shipped
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.bases import KNOWN_BASES
from trainer.config import TrainConfig

# Lines of key, tab, JSON: traces have most in common, so one pack.
FILE = Path(__file__).with_name("shipped.xz")
MAKE = "python -m trainer.memory.shipped"
FP8: dict[str, Any] = {"gradient_checkpointing": True, "fp8_base": True}


def usual_settings() -> list[TrainConfig]:
    """The settings whose traces are shipped: a LoRA of any rank, with any optimizer and rates, with and without the
    text encoders, at the native resolution; everything that ``hpo plan`` tries for batch sizes 1 and 4
    in 12 GB and more."""
    steps: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    blocks = [{"gradient_checkpointing": True, "checkpoint_blocks": n} for n in range(1, 7)]
    batches = {1: [*steps, *blocks, FP8], 2: [*steps, FP8], 4: [*steps, *blocks, FP8]}
    usual = []
    for base in (base for base in KNOWN_BASES.values() if base.hub):
        for batch, forms in batches.items():
            for form in steps if base.study else forms:  # a base that is searched fits as it is
                for unet_only in (False, True):
                    values = {**base.settings, "network_train_unet_only": unet_only, **form}
                    usual.append(
                        TrainConfig(pretrained_model_name_or_path=base.name, train_batch_size=batch, **values)
                    )
    return usual


def read(question: Mapping[str, Any], versions: Mapping[str, str]) -> Any:
    """The shipped answer to a question of ``store``, as its JSON table. Raises KeyError if there is none, and OSError,
    LZMAError or ValueError if the file is missing or damaged."""
    return _events_turned(json.loads(_lines()[key_of(question, versions)]))


def write(answers: Mapping[str, Any]) -> None:
    """Write the file: key → table."""
    lines = [f"{key}\t{json.dumps(_events_turned(answers[key]), separators=(',', ':'))}\n" for key in answers]
    FILE.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    _lines.cache_clear()


@lru_cache(maxsize=1)
def _lines() -> dict[str, str]:
    text = lzma.decompress(FILE.read_bytes()).decode()
    return dict(line.split("\t", 1) for line in text.splitlines())


def key_of(question: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The key of a question.  Settings with their default value are left out, so that a new setting changes no
    question. The build of a library (torch 2.10.0+cu128) makes no difference on the meta device."""
    usual = TrainConfig().as_dict()
    asked = dict(question)
    if "settings" in asked:
        asked["settings"] = {k: v for k, v in asked["settings"].items() if k not in usual or v != usual[k]}
    released = {name: text.split("+")[0] for name, text in versions.items() if name != "python"}
    text = json.dumps({**asked, "versions": released}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _events_turned(table: Any) -> Any:
    """A trace's events n, ~n (allocate and free block n) in the form 0, k (allocate the next block; free the one
    allocated k blocks ago), or back. Repeated layers are equal in this form: a tenth of the size when packed."""
    if not isinstance(table, dict) or "events" not in table:
        return table
    events, turned, allocated = table["events"], [], 0
    is_numbered = events[0] == 0 and any(event < 0 for event in events)
    for event in events:
        if is_numbered:
            turned.append(0 if event >= 0 else allocated - ~event)
        else:
            turned.append(allocated if event == 0 else ~(allocated - event))
        allocated += event >= 0 if is_numbered else event == 0
    return {**table, "events": turned}


def fresh(config: TrainConfig) -> dict[str, Any]:
    """key → table of the answers that a plan of these settings needs, traced now."""
    from trainer.memory import footprint, store

    facts = footprint.base_facts(config.pretrained_model_name_or_path)
    bucket = (config.resolution, config.resolution)
    versions = store.versions()
    return {
        key_of(footprint.tensors_question(facts), versions): footprint.fresh_tensors(facts),
        key_of(footprint.step_question(facts, config, bucket), versions): footprint.fresh_step(
            facts, config, bucket
        ),
    }


if __name__ == "__main__":
    made: dict[str, Any] = {}
    for usual in usual_settings():
        made |= fresh(usual)
    write(made)
    print(f"{FILE}: {len(made)} answers, {FILE.stat().st_size} bytes")
