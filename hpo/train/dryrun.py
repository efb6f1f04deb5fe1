"""``hpo train --dry-run``: everything that is wrong, found in one go, and the code that the run would end with.

The checks are those of a run, in its order, so the first finding is what the run would end at. That order is also
from cheap to dear: settings, paths, captions and images, the device, the base. Not found: what only loading the weights
can tell (a damaged tensor, a model that the hub does not have) or a step (memory, divergence). Owns the order; the
text is ``hpo.train.plan``'s.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hpo.study import INVOCATION
from hpo.terminal import command, json_text, say
from hpo.train import plan as trainplan
from hpo.train.folder import run_folder
from hpo.train.promptfile import sample_prompts
from trainer.bases import (
    assumed_schedule,
    assumption,
    check_vae,
    detect,
    families,
    published_name,
    require_network,
    said_prediction,
)
from trainer.config import TrainConfig
from trainer.data import Dataset, read_dataset_file, read_training_data
from trainer.errors import ToolError
from trainer.files import machine_error
from trainer.findings import Findings, piece
from trainer.kohya import TrainFile, known_family

if TYPE_CHECKING:
    from hpo.train.command import TrainRequest


def dry_run(request: TrainRequest, console: Console, echo: Callable[[str], None]) -> None:
    """Show what a run would do and everything that is wrong. Raises the ToolError that the run would end with."""
    from hpo.train.command import check, read_request

    findings = Findings()
    file, data, output = None, None, request.output or Path()
    with findings.looking():
        file = read_request(request)
    if file is None:
        if len(findings.errors) > 1 and not request.as_json:
            trainplan.show_findings(console, findings.errors)
        findings.require_none()
        return
    sound = not findings.errors  # otherwise some settings are defaults, and no step can be counted with them
    place, output = None, request.output or Path(file.output_dir or output)
    with findings.looking():
        place = output = request.output_of(file)
    family = None
    with findings.looking():
        family = known_family(file)
    with findings.looking():
        check(file.config, family)
    with findings.looking():
        file.require_all()
    if family:  # a run tells it when the base is loaded
        file = replace(
            file, without_effect=(*file.without_effect, *families.passed_over(file.config, family))
        )
    with findings.looking():
        if _has_data(file.config):
            data = read_training_data(file.config)
            trainplan.count_steps(file.config, data)
    if place is not None:
        with findings.looking():
            _check_place(file, data, place)
    if request.device not in (None, "cpu"):
        with findings.looking():
            from hpo.machine import check_device  # loads torch

            check_device(str(request.device))
    _check_base(file.config, family, findings)
    if file.config.vae:
        with findings.looking():
            check_vae(file.config.vae)
    file = replace(file, translated=(*file.translated, *_assumption(file.config)))
    shown = data if sound else None
    warnings = sample_prompts(file.config).findings
    if request.as_json:
        echo(json_text(trainplan.as_json(file, shown, str(output), findings.as_json(warnings))))
    else:
        trainplan.show(console, file, shown, str(output))
        trainplan.show_findings(console, findings.errors, warnings)
        invocation = INVOCATION.get()
        if invocation and not findings.errors:
            words = [word for word in invocation.stored if word != "--dry-run"]
            say(console, f"next: {command('hpo', *words)}")
    findings.require_none()


def _has_data(config: TrainConfig) -> bool:
    """Whether the images can be counted. They cannot if the dataset file uses an unsupported feature."""
    return not config.dataset_config or not read_dataset_file(Path(config.dataset_config)).refused


def _check_place(file: TrainFile, data: Dataset | None, output: Path) -> None:
    """The output folder: it can be written, and no file of another run is in the way."""
    folder = run_folder(output, file.config)
    if data is not None and folder.lora.exists():
        from hpo.train.run import is_done  # loads torch

        is_done(folder, file.config, data)
    place = folder.root.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    reason = (
        errno.ENOTDIR if not place.is_dir() else None if os.access(place, os.W_OK | os.X_OK) else errno.EACCES
    )
    if reason is not None:
        raise machine_error(OSError(reason, os.strerror(reason)), folder.root)


def _check_base(config: TrainConfig, family: str | None, findings: Findings) -> None:
    """What can be said about the base, and the LoRA to continue from, without loading them."""
    spec = config.pretrained_model_name_or_path
    place = None
    with findings.looking():
        place = detect.locate(spec)
        if place is None:
            _check_cached(published_name(spec))
    if place is not None and family is not None:
        name = detect.short_name(spec)
        with findings.looking():
            text_encoder = detect.configs_of(spec)
            if text_encoder is not None:
                config_file = text_encoder.folder / "text_encoder" / "config.json"
                layers = detect.whole(config_file, detect.read_json(config_file), "num_hidden_layers", 12)
                families.check_clip_skip(config, family, name, layers)
        with findings.looking():
            _check_weights(config, family)
        with findings.looking():
            said = said_prediction(spec)
            assumed = assumed_schedule(said, config).get("prediction_type")
            families.check_prediction(config, name, said or str(assumed or "epsilon"))
    else:
        with findings.looking():
            _check_weights(config, None)


def _assumption(config: TrainConfig) -> list[str]:
    """What a run assumes about a base that does not say what it predicts."""
    try:
        spec = config.pretrained_model_name_or_path
        if detect.locate(spec) is None:
            return []
        line = assumption(detect.short_name(spec), said_prediction(spec), config)
    except ToolError:  # a finding already
        return []
    return [line] if line else []


def _check_cached(repo: str) -> None:
    """A model of the hub cannot be downloaded if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(repo, "model_index.json"), str):
        require_network(repo)


def _check_weights(config: TrainConfig, family: str | None) -> None:
    if config.network_weights:
        from trainer.adapters import check_start, check_values

        with piece():
            check_start(config, family)
            check_values(Path(config.network_weights))
    if config.base_weights:
        from trainer.adapters import base_weights, check_lora, check_values

        for path, _ in base_weights(config):
            with piece():
                check_lora(path, family)
                check_values(Path(path))
