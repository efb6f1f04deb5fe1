"""Read configuration files of kohya and of this tool: a TOML file becomes a TrainConfig, and no
key is ignored silently.

Owns reading and translating. Does not own the tables of keys; see ``trainer.kohya.keys``. Each key belongs to
one of four classes: used under its own name, translated (reported), without effect here (listed), or refused
because the result would differ. Unknown keys are treated as typos. Missing keys get kohya's defaults in a
kohya file and ours in our own file.

Section names have no meaning: setting names are unique, so any section is accepted.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checks import check_known
from trainer.config import OPTIMIZER_NAMES, SCHEDULER_NAMES, SETTINGS, TrainConfig, check_value
from trainer.errors import ConfigError
from trainer.findings import piece
from trainer.kohya.keys import (
    KNOWN_KEYS,
    KOHYA_DEFAULTS,
    LYCORIS_TYPES,
    NETWORK_ARGUMENTS,
    NO_EFFECT_REASON,
    REFUSED,
    SAME_ARGUMENTS,
    SAME_OPTIMIZER,
    WEIGHT_DECAY,
    ZERO_IS_UNSET,
)
from trainer.text import clean_text
from trainer.tomlfile import as_text, flat, read_table


@dataclass(frozen=True)
class KohyaFile:
    """A kohya file as settings of this tool. ``given`` are the settings from the file; the rest of ``config``
    is kohya's defaults. The lists contain one line per key for the user."""

    path: Path
    config: TrainConfig
    given: Mapping[str, Any]
    translated: tuple[str, ...]
    without_effect: tuple[str, ...]
    refused: tuple[str, ...]
    output_dir: str | None = None

    def require_all(self) -> KohyaFile:
        """Raise ConfigError if any key was refused, because the result would differ from what the file requests."""
        if self.refused:
            raise ConfigError(
                f"{clean_text(str(self.path))} has settings that are not supported: {'; '.join(self.refused)}",
                "remove these lines if you do not need them",
            )
        return self


def read_kohya(path: Path) -> KohyaFile:
    """Read a file for sd-scripts' ``--config_file``.  Raises ConfigError for unreadable files,
    typos and invalid values."""
    return from_kohya(path, flat(path, read_table(path)))


def from_kohya(path: Path, settings: Mapping[str, Any]) -> KohyaFile:
    """Translate settings of sd-scripts; ``path`` is the file they come from."""
    return _SettingsReading(Path(path), settings).result()


def read_own(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Read a file of this tool: (the configuration, the settings from the file). Missing
    settings get our defaults."""
    given = flat(path, read_table(path))
    return from_own(path, given), given


def from_own(path: Path, settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration from settings of this tool, with our defaults for the rest."""
    known = _known_only(Path(path), settings, SETTINGS, "see docs/settings.md")
    return TrainConfig.of(known)


def is_kohya(settings: Iterable[str]) -> bool:
    """Whether settings are in the form of sd-scripts: one of the keys exists only there, such as network_module."""
    return any(name in KNOWN_KEYS and name not in SETTINGS for name in settings)


def _known_only(
    path: Path, given: Mapping[str, Any], known: Collection[str], otherwise: str
) -> dict[str, Any]:
    """The settings with known names. Raises ConfigError for an unknown one, with the most similar known one."""
    found = {}
    for name, value in given.items():
        with piece():
            check_known(name, known, "setting", clean_text(str(path)), otherwise)
            found[name] = value
    return found


class _SettingsReading:
    """Translates one kohya file to a TrainConfig: each method handles a group of keys and removes them."""

    def __init__(self, path: Path, table: Mapping[str, Any]) -> None:
        table = _known_only(path, table, KNOWN_KEYS, "sd-scripts has no such key")
        self.path = path
        # GUIs write "" and [] for unset values, and sd-scripts reads them as unset.
        self.left = {name: value for name, value in table.items() if value not in ("", [])}
        self.given: dict[str, Any] = {}
        self.translated: list[str] = []
        self.without_effect: list[str] = []
        self.refused: list[str] = []
        self.output_dir: str | None = None

    def result(self) -> KohyaFile:
        for translate in (
            self._places,
            self._old_names,
            self._resolution,
            self._length,
            self._rates,
            self._optimizer,
            self._schedule,
            self._network,
            self._zeros,
            self._precision,
            self._attention,
            self._samples,
            self._datasets,
        ):
            with piece():
                translate()
        self._rest()
        values = {**TrainConfig().as_dict(), **KOHYA_DEFAULTS}
        values["weight_decay"] = WEIGHT_DECAY[
            self.given.get("optimizer_type", KOHYA_DEFAULTS["optimizer_type"])
        ]
        values |= self.given
        config, given = TrainConfig.of(values), {}
        for name, value in self.given.items():
            with piece():
                given[name] = check_value(name, value)
        return KohyaFile(
            self.path,
            config,
            given,
            tuple(self.translated),
            tuple(self.without_effect),
            tuple(self.refused),
            self.output_dir,
        )

    def _take(self, name: str) -> Any:
        return self.left.pop(name, None)

    def _say(self, name: str, value: Any, meaning: str) -> None:
        self.translated.append(f"{name} = {as_text(value)} → {meaning}")

    def _refuse(self, name: str, value: Any, reason: str) -> None:
        self.refused.append(f"{name} = {as_text(value)}: {reason}")

    def _places(self) -> None:
        folder = self._take("output_dir")
        if folder is not None:
            if not isinstance(folder, str):
                raise ConfigError(f"output_dir = {as_text(folder)} is not a folder", "write a path")
            self.output_dir = folder

    def _old_names(self) -> None:
        if (extension := self._take("caption_extention")) is not None:
            self.given["caption_extension"] = extension
            self._say("caption_extention", extension, "caption_extension")

    def _resolution(self) -> None:
        """A side, "side" or "width,height"; only squares, because resolution² is the area."""
        value = self._take("resolution")
        if value is None:
            return
        sides = str(value).strip("[]()").split(",") if isinstance(value, str | list) else [value]
        try:
            numbers = [
                int(side) if isinstance(side, str) else check_value("resolution", side) for side in sides
            ]
        except ValueError:
            hint = 'write for example 512 or "512,512"'
            raise ConfigError(f"resolution = {as_text(value)} is not a size", hint) from None
        if len(set(numbers)) != 1 or len(numbers) > 2:
            self._refuse(
                "resolution", value, "only squares are supported; buckets keep aspect ratios at the same area"
            )
            return
        self.given["resolution"] = numbers[0]
        if numbers[0] != value:
            self._say("resolution", value, str(numbers[0]))

    def _length(self) -> None:
        """In sd-scripts, epochs override steps; here, steps override epochs."""
        epochs, steps = self._take("max_train_epochs"), self._take("max_train_steps")
        if epochs is not None:
            self.given |= {"max_train_epochs": epochs, "max_train_steps": None}
            if steps is not None:
                self._say("max_train_steps", steps, "ignored, because max_train_epochs is given")
        elif steps is not None:
            self.given |= {"max_train_epochs": None, "max_train_steps": steps}
        ratio = self._take("save_n_epoch_ratio")
        if ratio:
            if not isinstance(epochs, int) or not isinstance(ratio, int) or ratio < 1:
                self._refuse(
                    "save_n_epoch_ratio", ratio, "it needs max_train_epochs; use save_every_n_epochs instead"
                )
                return
            every = max(1, epochs // ratio)
            self.left["save_every_n_epochs"] = every
            self._say("save_n_epoch_ratio", ratio, f"save_every_n_epochs = {every}")

    def _rates(self) -> None:
        """sd-scripts accepts a list of text encoder rates and uses the first one for SD1.5 and SDXL."""
        rates = self._take("text_encoder_lr")
        if isinstance(rates, list):
            self._say(
                "text_encoder_lr", rates, f"{as_text(rates[0])} for all text encoders, as sd-scripts does"
            )
            rates = rates[0]
        if rates is not None:
            self.given["text_encoder_lr"] = rates
        if self._take("network_train_text_encoder_only"):
            self.given["unet_lr"] = 0.0
            self.left.pop("unet_lr", None)
            self._say("network_train_text_encoder_only", True, "unet_lr = 0")

    def _optimizer(self) -> None:
        name = self._take("optimizer_type")
        if self._take("use_8bit_adam"):
            name = "AdamW8bit"
            self._say("use_8bit_adam", True, "optimizer_type = AdamW8bit")
        if self._take("use_lion_optimizer"):
            self._refuse(
                "use_lion_optimizer", True, "32-bit Lion is not supported; use optimizer_type = Lion8bit"
            )
        ours = KOHYA_DEFAULTS["optimizer_type"]
        if name is not None:
            exact = {known.lower(): known for known in OPTIMIZER_NAMES}
            found = exact.get(str(name).lower()) or SAME_OPTIMIZER.get(str(name).lower())
            if found is None:
                self._refuse("optimizer_type", name, "supported optimizers: " + ", ".join(OPTIMIZER_NAMES))
            else:
                ours = self.given["optimizer_type"] = found
                if found != name:
                    self._say("optimizer_type", name, found)
        self._optimizer_arguments(ours, _arguments("optimizer_args", self._take("optimizer_args")))

    def _optimizer_arguments(self, optimizer: str, arguments: dict[str, Any]) -> None:
        for name, value in arguments.items():
            if name == "weight_decay":
                self.given["weight_decay"] = value
                self._say("optimizer_args weight_decay", value, f"weight_decay = {as_text(value)}")
            elif optimizer == "Prodigy" and name == "safeguard_warmup":
                self._safeguard(value)
            elif not _is_one_of(value, SAME_ARGUMENTS[optimizer].get(name, ())):
                self._refuse(
                    f"optimizer_args {name}", value, f"this argument of {optimizer} cannot be changed"
                )
        if optimizer == "Adafactor" and "relative_step" not in arguments:
            self._refuse(
                "optimizer_args relative_step",
                True,
                "Adafactor needs a fixed learning rate: add relative_step=False",
            )
        if optimizer == "Prodigy" and "safeguard_warmup" not in arguments:
            self._safeguard(False)

    def _safeguard(self, value: Any) -> None:
        """Prodigy uses safeguard_warmup if there is a warm-up."""
        warms_up = bool(self.left.get("lr_warmup_steps"))
        warms_up &= self.left.get("lr_scheduler", KOHYA_DEFAULTS["lr_scheduler"]) != "constant"
        if bool(value) != warms_up:
            why = "true, because of the warm-up" if warms_up else "false, because there is no warm-up"
            self._say("optimizer_args safeguard_warmup", value, why)

    def _schedule(self) -> None:
        name = self._take("lr_scheduler")
        warmup, cycles = self.left.get("lr_warmup_steps"), self.left.get("lr_scheduler_num_cycles")
        if isinstance(warmup, float) and warmup >= 1:
            self._take("lr_warmup_steps")
            reason = (
                "sd-scripts reads a number with a decimal point as a fraction of all steps; remove the point"
            )
            self._refuse("lr_warmup_steps", warmup, reason)
        if cycles == 0 and not isinstance(cycles, bool) and name != "cosine_with_restarts":
            self._take("lr_scheduler_num_cycles")
            self.without_effect.append("lr_scheduler_num_cycles: only used by cosine_with_restarts")
        if name is None:
            return
        if name in SCHEDULER_NAMES:
            self.given["lr_scheduler"] = name
        else:
            self._refuse("lr_scheduler", name, "supported schedules: " + ", ".join(SCHEDULER_NAMES))

    def _network(self) -> None:
        module = self._take("network_module")
        arguments = _arguments("network_args", self._take("network_args"))
        if module == "lycoris.kohya":
            arguments = self._lycoris(arguments)
        else:
            arguments = self._zero_convolutions(arguments)
        if module not in (None, "networks.lora", "lycoris.kohya"):
            known = "supported: networks.lora (LoCon with conv_dim) and lycoris.kohya (locon, loha, lokr)"
            self._refuse("network_module", module, known)
        for name, value in arguments.items():
            if name in NETWORK_ARGUMENTS:
                self.given[name] = _multipliers(value) if name.endswith("lr_weight") else value
                self._say(f"network_args {name}", value, f"{name} = {as_text(self.given[name])}")
            elif value not in (0, None, False):
                self._refuse(f"network_args {name}", value, "supported: " + ", ".join(NETWORK_ARGUMENTS))
        if self.left.get("network_alpha") == 0:
            rank = self.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
            self.left["network_alpha"] = rank
            self._say("network_alpha", 0, f"{as_text(rank)}, which is network_dim")

    def _lycoris(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Translate the LyCORIS algorithm to network_type; returns the remaining arguments."""
        left = dict(arguments)
        algorithm = str(left.pop("algo", "lora")).lower()
        kind = LYCORIS_TYPES.get(algorithm)
        if kind is None:
            self._refuse("network_args algo", algorithm, "supported: " + ", ".join(LYCORIS_TYPES))
            return left
        if left.pop("dora_wd", False) not in (False, 0, "False", "false"):
            if kind not in ("LoRA", "LoCon"):
                self._refuse(
                    "network_args dora_wd", True, f"supported for lora and locon, not for {algorithm}"
                )
                return left
            kind = "DoRA"
            if left.pop("wd_on_output", True) not in (False, "False", "false"):
                self._say("network_args wd_on_output", True, "false: DoRA magnitudes are per input here")
        if (dropout := left.pop("dropout", None)) is not None:
            self._lycoris_dropout(kind, dropout)
        preset = left.pop("preset", "full")
        if preset not in ("full", "attn-mlp"):
            self._refuse(
                "network_args preset", preset, "not supported: the modules of networks.lora are trained"
            )
        if (
            preset == "full" and kind == "LoRA"
        ):  # the LyCORIS preset full also trains convolutions, which is LoCon
            kind = "LoCon"
        rank = self.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
        usual = {
            "conv_dim": rank,
            "conv_alpha": self.left.get("network_alpha", KOHYA_DEFAULTS["network_alpha"]),
        }
        for name, value in usual.items():
            if name in left and _is_one_of(left[name], (0, None)):
                del left[name]
                taken = f"{as_text(value)}, as LyCORIS does" if preset == "full" else "unset"
                self._say(f"network_args {name}", 0, taken)
            if preset == "full":
                left.setdefault(name, value)
        self.given["network_type"] = kind
        where = "the modules of networks.lora" + (" with 3×3 convolutions" if preset == "full" else "")
        self._say("network_module", "lycoris.kohya", f"network_type = {kind}, on {where}")
        return left

    def _lycoris_dropout(self, kind: str, value: Any) -> None:
        """The LyCORIS name of network_dropout; it overrides network_dropout."""
        self._take("network_dropout")
        if kind in ("LoHa", "LoKr"):
            self._say("network_args dropout", value, f"ignored: LyCORIS has no dropout for {kind}")
            return
        self.given["network_dropout"] = value or 0.0
        self._say("network_args dropout", value, f"network_dropout = {as_text(value or 0.0)}")

    def _zero_convolutions(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """In networks.lora, rank 0 means no 3×3 convolutions, and alpha 0 means alpha = rank."""
        left = dict(arguments)
        if _is_one_of(left.get("conv_dim"), (0,)):
            self._say("network_args conv_dim", left.pop("conv_dim"), "unset: no 3×3 convolutions")
        if _is_one_of(left.get("conv_alpha"), (0,)):
            rank = left.get("conv_dim")
            if rank is None:
                del left["conv_alpha"]
            else:
                left["conv_alpha"] = rank
            self._say("network_args conv_alpha", 0, "unset" if rank is None else f"{rank}, which is conv_dim")
        return left

    def _zeros(self) -> None:
        """0 turns these settings off, as in sd-scripts or its GUIs."""
        for name in ZERO_IS_UNSET:
            value = self.left.get(name)
            if not isinstance(value, bool) and value == 0:
                self._take(name)
                self.given[name] = None

    def _precision(self) -> None:
        if self._take("full_fp16"):
            self._say("full_fp16", True, "mixed_precision = fp16; the weights of the LoRA stay in fp32")
            self.given["mixed_precision"] = "fp16"
            self.left.pop("mixed_precision", None)
        if self.left.get("full_bf16"):
            self.left["mixed_precision"] = "bf16"
        if self._take("fp8_base_unet"):
            self._say("fp8_base_unet", True, "fp8_base = true, with one scale per output of each layer")
            self.given["fp8_base"] = True
            self.left.pop("fp8_base", None)

    def _attention(self) -> None:
        for name in ("xformers", "mem_eff_attn"):
            if self._take(name):
                self._say(name, True, "SDPA, which gives the same result")

    def _samples(self) -> None:
        sampler = self._take("sample_sampler")
        if sampler is not None:
            self._say("sample_sampler", sampler, "sample images use DPM-Solver++ (2M)")

    def _datasets(self) -> None:
        """sd-scripts reads ``[[datasets]]`` only from its dataset_config. Settings in it here
        are refused, not ignored."""
        value = self._take("datasets")
        if value is None:
            return
        asked = sorted(set(_keys_inside(value)) - {"subsets", "image_dir"})
        if asked or not isinstance(value, list):
            self._refuse(
                "datasets", ", ".join(asked) or value, "move these settings to the top level of the file"
            )
        else:
            self.without_effect.append("datasets: the dataset is the folder given to this command")

    def _rest(self) -> None:
        """Keys without translation: used unchanged, refused, or without effect."""
        for name, value in self.left.items():
            if name in SETTINGS:
                self.given[name] = value
            elif name in REFUSED:
                harmless, reason = REFUSED[name]
                if not _is_one_of(value, harmless):
                    self._refuse(name, value, reason)
            elif name in NO_EFFECT_REASON:
                self.without_effect.append(f"{name}: {NO_EFFECT_REASON[name]}")


# Values


def _keys_inside(value: Any) -> list[str]:
    """The keys of the tables in a list, including nested lists of tables."""
    tables = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    pairs = [pair for table in tables for pair in table.items()]
    return [key for key, _ in pairs] + [key for _, inner in pairs for key in _keys_inside(inner)]


def _arguments(name: str, value: Any) -> dict[str, Any]:
    """Parse ``["key=value", …]`` of optimizer_args and network_args; values are Python literals."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list) or not all(isinstance(entry, str) and "=" in entry for entry in value):
        raise ConfigError(
            f"{name} = {as_text(value)} is not a list of key=value", f'write {name} = ["key=value"]'
        )
    return {key.strip(): _literal(text.strip()) for key, _, text in (entry.partition("=") for entry in value)}


def _multipliers(value: Any) -> str:
    """Block multipliers as one text: from a tuple of numbers, a number, or the name of a shape."""
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether a value is one of the values without an effect. True and 1 are different here."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless)
