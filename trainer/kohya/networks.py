"""Translate sd-scripts' network_module and network_args.

Does not own what a type of adapter does (``trainer.adapters``) or LyCORIS (``trainer.kohya.lycoris``).
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.checks import suggestion
from trainer.errors import ConfigError
from trainer.kohya.keys import KOHYA_DEFAULTS, LORA_PLUS, NETWORK_ARGUMENTS
from trainer.kohya.lycoris import TUCKER_LOHA, lycoris
from trainer.kohya.netargs import Arguments, multipliers
from trainer.kohya.reading import Reading, key_values
from trainer.paths import user_path
from trainer.tomlfile import as_text

# What a module that is not supported is, by a part of its name, and what does the same here.
_OTHERS = {
    **{
        name: f"it is for {title}; for SD1.5 and SDXL use networks.lora"
        for name, title in (
            ("flux", "FLUX"),
            ("sd3", "Stable Diffusion 3"),
            ("lumina", "Lumina"),
            ("anima", "Anima"),
            ("hunyuan", "HunyuanImage and HunyuanVideo"),
            ("qwen", "Qwen-Image"),
            ("wan", "Wan"),
        )
    },
    "lllite": "it trains a ControlNet and no LoRA; for a LoRA use networks.lora",
    "lycoris": "use lycoris.kohya",
    "locon": 'it became part of LyCORIS; use lycoris.kohya with network_args = ["algo=locon"]',
}
_BLOCKS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_BLOCK_RANKS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_PLUS = {"LoHa": "hada_w2_a", "LoKr": "lokr_w1"}  # networks/network_base.py, _is_plus_param


def _network(reading: Reading) -> None:
    module = str(reading.take("network_module") or "networks.lora")
    arguments = Arguments(reading, key_values("network_args", reading.take("network_args")))
    translate = MODULES.get(module)
    if translate is not None:
        translate(reading, arguments)
    else:
        reading.refuse("network_module", module, _instead(module), stands_for="network_type")
        for name in list(arguments.left):
            arguments.nothing(name, "it is of a network_module that is not supported")
    if reading.left.get("network_alpha") == 0:
        rank = reading.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
        reading.left["network_alpha"] = rank
        reading.say("network_alpha", 0, f"{as_text(rank)}, which is network_dim")


def _instead(module: str) -> str:
    """What to use instead of a module that is not supported."""
    known = (text for part, text in _OTHERS.items() if part in module.lower())
    usual = f"use networks.lora; supported: {', '.join(MODULES)}"
    return next(known, "") or suggestion(module, MODULES) or usual


def _lora(reading: Reading, arguments: Arguments) -> None:
    """networks/lora.py: create_network."""
    _convolutions(reading, arguments)
    _dropout(arguments)
    _blocks(reading, arguments)
    arguments.nothing("factor", "only LoKr has factors")
    arguments.use_lora_plus()
    arguments.rest("networks.lora", NETWORK_ARGUMENTS)


def _convolutions(reading: Reading, arguments: Arguments) -> None:
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


def _dropout(arguments: Arguments) -> None:
    for name in ("rank_dropout", "module_dropout"):
        if value := arguments.number(name):
            arguments.set(name, value)


def _blocks(reading: Reading, arguments: Arguments) -> None:
    """Rates and ranks of blocks; sd-scripts reads ranks only if block_dims or a block's rate is given."""
    if value := arguments.number("block_lr_zero_threshold"):
        arguments.set("block_lr_zero_threshold", value)
    for name in _BLOCKS:
        if (value := arguments.take(name)) is not None:
            reading.given[name] = multipliers(value)
            reading.say(f"network_args {name}", value, f"{name} = {as_text(reading.given[name])}")
    if "block_dims" in arguments.left or any(reading.given.get(name) for name in _BLOCKS):
        arguments.use(*_BLOCK_RANKS)
    for name in _BLOCK_RANKS[1:]:
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


def _lora_fa(reading: Reading, arguments: Arguments) -> None:
    """networks/lora_fa.py; its lora_down is constant."""
    _kind(reading, "networks.lora_fa", "LoRA-FA")
    _convolutions(reading, arguments)
    _dropout(arguments)
    _blocks(reading, arguments)
    for name in ("factor", *LORA_PLUS):
        arguments.nothing(name, "networks.lora_fa does not read it")
    arguments.rest("networks.lora_fa", NETWORK_ARGUMENTS)


def _dylora(reading: Reading, arguments: Arguments) -> None:
    """networks/dylora.py: conv_dim turns convolutions on and must be network_dim; conv_alpha is read and not used. It
    knows no dropout."""
    _kind(reading, "networks.dylora", "DyLoRA")
    rank = reading.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
    conv_dim = arguments.number("conv_dim")
    if conv_dim is not None:
        if conv_dim != rank:
            reading.refuse(
                "network_args conv_dim",
                conv_dim,
                f"networks.dylora wants that of network_dim, {as_text(rank)}",
                stands_for="conv_dim",
            )
        arguments.set("conv_dim", rank)
        alpha = reading.left.get("network_alpha", KOHYA_DEFAULTS["network_alpha"])
        reading.given["conv_alpha"] = alpha or rank
        arguments.nothing("conv_alpha", "networks.dylora gives convolutions network_alpha")
    arguments.use("unit")
    _without_dropout(reading, arguments, "networks.dylora")
    arguments.use_lora_plus()
    for name in NETWORK_ARGUMENTS:
        arguments.nothing(name, "networks.dylora does not read it")
    reading.differ(
        "networks.dylora: ranks after those of a step are not used in it, as the paper proposes (arXiv 2210.07558); "
        "in sd-scripts they are used, as constants"
    )
    arguments.rest("networks.dylora", ("unit", "conv_dim", "conv_alpha"))


def _oft(reading: Reading, arguments: Arguments) -> None:
    """networks/oft.py: the attention of the U-Net, or more with two switches, which any text turns on there."""
    _kind(reading, "networks.oft", "OFT")
    alpha = reading.take("network_alpha")
    if alpha == 0:
        reading.refuse(
            "network_alpha", 0, "networks.oft trains nothing with it; use 0.001", stands_for="constraint"
        )
    reading.given |= {
        "oft_blocks": True,
        "constraint": 1.0 if alpha is None else alpha,
        "network_train_unet_only": True,
    }
    reading.take("network_train_unet_only")
    reading.say("network_alpha", alpha, f"constraint = {as_text(reading.given['constraint'])}")
    linear, convolutions = (arguments.take(name) is not None for name in ("enable_all_linear", "enable_conv"))
    if convolutions and not linear:
        reading.refuse("network_args enable_conv", True, "supported together with enable_all_linear")
    elif convolutions:
        rank = reading.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
        reading.given["conv_dim"] = rank
    elif not linear:
        reading.given["lycoris_preset"] = "attn-only"
    _without_dropout(reading, arguments, "networks.oft")
    arguments.rest("networks.oft", ("enable_all_linear", "enable_conv"))


def _loha(reading: Reading, arguments: Arguments) -> None:
    _native(reading, arguments, "networks.loha", "LoHa")


def _lokr(reading: Reading, arguments: Arguments) -> None:
    arguments.use("factor")
    _native(reading, arguments, "networks.lokr", "LoKr")


def _native(reading: Reading, arguments: Arguments, module: str, kind: str) -> None:
    """networks/loha.py and networks/lokr.py (sd-scripts aff4a2e): the modules of networks.lora, and a rank_dropout that
    scales up the rest."""
    _kind(reading, module, kind)
    arguments.use_flags("use_tucker")
    if kind == "LoHa" and reading.given.get("use_tucker"):
        reading.differ(TUCKER_LOHA.format(module))
    if value := reading.take("network_dropout"):
        reading.without_effect.append(f"network_dropout = {as_text(value)}: {module} has none")
    for name in ("exclude_patterns", "include_patterns", "network_reg_dims", "network_reg_lrs"):
        if (value := arguments.take(name)) is not None:
            reading.refuse(
                f"network_args {name}", value, "modules are not chosen by patterns; see lycoris_preset"
            )
    _convolutions(reading, arguments)
    _dropout(arguments)
    for name in LORA_PLUS:
        if value := arguments.number(name):
            reading.refuse(
                f"network_args {name}",
                value,
                f"{module} raises the rate of {_PLUS[kind]}; LoRA+ is supported for lora_up only",
                stands_for=name,
            )
    for name in (*_BLOCKS, *_BLOCK_RANKS, "block_lr_zero_threshold", "factor"):
        arguments.nothing(name, f"{module} does not read it")
    arguments.rest(module, ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "use_tucker"))


def _kind(reading: Reading, module: str, kind: str) -> None:
    reading.given["network_type"] = kind
    reading.say("network_module", module, f"network_type = {kind}")


def _without_dropout(reading: Reading, arguments: Arguments, module: str) -> None:
    if value := reading.take("network_dropout"):
        reading.without_effect.append(f"network_dropout = {as_text(value)}: {module} has none")
    for name in ("rank_dropout", "module_dropout"):
        arguments.nothing(name, f"{module} does not read it")


MODULES: dict[str, Callable[[Reading, Arguments], None]] = {
    "networks.lora": _lora,
    "networks.loha": _loha,
    "networks.lokr": _lokr,
    "networks.lora_fa": _lora_fa,
    "networks.dylora": _dylora,
    "networks.oft": _oft,
    "lycoris.kohya": lycoris,
}
TRANSLATIONS = (_network, _weights)
