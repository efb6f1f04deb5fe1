"""Makes the traces that are part of the package (``trainer.memory.shipped``), in a few minutes:

    python -m trainer.memory.makeshipped

Owns which settings they are for.
"""

from __future__ import annotations

from typing import Any

from trainer.bases import KNOWN_BASES
from trainer.config import TrainConfig
from trainer.memory import footprint, store
from trainer.memory.shipped import FILE, key_of, write

FP8: dict[str, Any] = {"gradient_checkpointing": True, "fp8_base": True}


def usual_settings() -> list[TrainConfig]:
    """The settings whose traces are shipped: a LoRA of any rank, with any optimizer and rates, with and without the
    text encoders, at the native resolution; everything that ``hpo plan`` tries for batch sizes 1 and 4
    in 12 GB and more."""
    steps: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    blocks = [{"gradient_checkpointing": True, "checkpoint_blocks": n} for n in range(1, 7)]
    fp8_blocks = [{**FP8, **some} for some in blocks]
    batches = {
        1: [*steps, *blocks, FP8, *fp8_blocks],
        2: [*steps, FP8],
        4: [*steps, *blocks, FP8, *fp8_blocks],
    }
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


def fresh(config: TrainConfig) -> dict[str, Any]:
    """key → table of the answers that a plan of these settings needs, traced now."""
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
