"""Translate sd-scripts' network_module and network_args.

Does not own what a type of adapter does (``trainer.adapters``) or LyCORIS (``trainer.kohya.lycoris``).
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.errors import ConfigError
from trainer.kohya.keys import KOHYA_DEFAULTS, NETWORK_ARGUMENTS
from trainer.kohya.lycoris import lycoris
from trainer.kohya.netargs import Arguments, multipliers
from trainer.kohya.reading import Reading, key_values
from trainer.paths import user_path
from trainer.tomlfile import as_text

_OTHER_MODELS = ("flux", "sd3", "lumina", "anima", "hunyuan", "qwen", "wan")
_BLOCKS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


def _network(reading: Reading) -> None:
    module = str(reading.take("network_module") or "networks.lora")
    arguments = Arguments(reading, key_values("network_args", reading.take("network_args")))
    translate = MODULES.get(module)
    if translate is not None:
        translate(reading, arguments)
    elif any(name in module for name in _OTHER_MODELS):
        reading.refuse("network_module", module, "it is for another model than SD1.5 and SDXL")
    else:
        reading.refuse("network_module", module, "supported: " + ", ".join(MODULES))
    if reading.left.get("network_alpha") == 0:
        rank = reading.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
        reading.left["network_alpha"] = rank
        reading.say("network_alpha", 0, f"{as_text(rank)}, which is network_dim")


def _lora(reading: Reading, arguments: Arguments) -> None:
    """networks/lora.py: create_network."""
    conv_dim, conv_alpha = arguments.number("conv_dim"), arguments.number("conv_alpha")
    if conv_dim is not None:
        arguments.set("conv_dim", conv_dim)
        if conv_dim == 0:
            reading.translated[-1] += ": layers of resnets, but not their 3×3 convolutions, as in sd-scripts"
        elif conv_alpha == 0:
            reading.given["conv_alpha"] = conv_dim
            reading.say("network_args conv_alpha", 0, f"{as_text(conv_dim)}, which is conv_dim")
        elif conv_alpha is not None:
            arguments.set("conv_alpha", conv_alpha)
    elif conv_alpha:
        reading.without_effect.append(
            f"network_args conv_alpha = {as_text(conv_alpha)}: conv_dim is not given"
        )
    for name in ("rank_dropout", "module_dropout", "block_lr_zero_threshold"):
        if value := arguments.number(name):
            arguments.set(name, value)
    for name in _BLOCKS:
        if (value := arguments.take(name)) is not None:
            reading.given[name] = multipliers(value)
            reading.say(f"network_args {name}", value, f"{name} = {as_text(reading.given[name])}")
    _block_ranks(reading, arguments)
    arguments.nothing("factor", "only LoKr has factors")
    arguments.use_lora_plus()
    arguments.rest("networks.lora", NETWORK_ARGUMENTS)


def _block_ranks(reading: Reading, arguments: Arguments) -> None:
    """sd-scripts reads them only if block_dims or a block's rate is given."""
    names = ("block_alphas", "conv_block_dims", "conv_block_alphas")
    if "block_dims" in arguments.left or any(reading.given.get(name) for name in _BLOCKS):
        arguments.use("block_dims", *names)
    for name in names:
        arguments.nothing(name, "sd-scripts reads it only together with block_dims or down_lr_weight")


def _weights(reading: Reading) -> None:
    """Files that are merged into the base first; one file may stand without a list."""
    files, multipliers_ = reading.take("base_weights"), reading.take("base_weights_multiplier")
    if files is None:
        if multipliers_ is not None:
            reading.without_effect.append("base_weights_multiplier: base_weights is not given")
        return
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(
            f"base_weights = {as_text(files)} is not a list of files", 'write ["a.safetensors"]'
        )
    if odd := [name for name in names if ";" in name]:
        reading.refuse("base_weights", odd[0], "a file name with ; in it")
        return
    reading.given["base_weights"] = ";".join(user_path(name, "base_weights") for name in names)
    reading.say("base_weights", files, "merged into the base before training; the LoRA does not contain them")
    if multipliers_ is not None:
        reading.given["base_weights_multiplier"] = multipliers(multipliers_)
        reading.say("base_weights_multiplier", multipliers_, reading.given["base_weights_multiplier"])


MODULES: dict[str, Callable[[Reading, Arguments], None]] = {
    "networks.lora": _lora,
    "lycoris.kohya": lycoris,
}
TRANSLATIONS = (_network, _weights)
