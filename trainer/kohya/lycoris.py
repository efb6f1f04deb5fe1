"""Translate network_module = lycoris.kohya (LyCORIS f49d30d, lycoris/kohya.py: create_network).

Does not own what a type of adapter does (``trainer.adapters``) or which modules a preset trains
(``trainer.adapters.presets``).
"""

from __future__ import annotations

from typing import Any

from trainer.checks import suggestion
from trainer.kohya.keys import KOHYA_DEFAULTS, LORA_PLUS, LYCORIS_TYPES
from trainer.kohya.netargs import Arguments
from trainer.kohya.reading import Reading
from trainer.settings import LYCORIS_PRESETS
from trainer.tomlfile import as_text

ARGUMENTS = (
    "algo",
    "preset",
    "conv_dim",
    "conv_alpha",
    "dropout",
    "rank_dropout",
    "module_dropout",
    "dora_wd",
    "wd_on_output",
    "bypass_mode",
    "factor",
    "full_matrix",
    "decompose_both",
    "unbalanced_factorization",
    "use_tucker",
    "use_scalar",
    "rs_lora",
    "train_norm",
    "constraint",
    "rescaled",
    "block_size",
)
TUCKER_LOHA = (
    "use_tucker: hada_w1_a and hada_w2_a of 3×3 convolutions get their own gradients; in {} each gets one that is "
    "computed from the other half"
)
_FACTORS = ("LoRA", "LoCon", "LoHa", "LoKr", "GLoRA")  # kinds that are products of factors
_WITHOUT_CONVOLUTIONS = ("full-lin", "attn-mlp", "attn-only", "unet-transformer-only", "ia3")


def lycoris(reading: Reading, arguments: Arguments) -> None:
    algorithm = str(arguments.take("algo") or "lora").lower()
    kind = LYCORIS_TYPES.get(algorithm)
    if kind is None:
        known = suggestion(algorithm, LYCORIS_TYPES) or "supported: " + ", ".join(LYCORIS_TYPES)
        reading.refuse("network_args algo", algorithm, known, stands_for="network_type")
        return
    preset = _preset(reading, arguments)
    if kind in ("LoRA", "LoCon"):
        kind = "LoRA" if preset in _WITHOUT_CONVOLUTIONS else "LoCon"
    if arguments.flag("dora_wd"):
        kind = _dora(reading, arguments, algorithm, kind)
    _modules(reading, kind, preset)
    _ranks(reading, arguments, preset)
    _form(reading, arguments, kind)
    _dropout(reading, arguments, kind)
    arguments.nothing("wd_on_output", "only together with dora_wd")
    arguments.nothing("rank_dropout_scale", "LyCORIS does not read it in network_args")
    arguments.nothing("train_t5xxl", "it belongs to other models")
    arguments.nothing("train_on_input", "LyCORIS does not read it in network_args; a preset file can tell it")
    if kind in ("LoRA", "LoCon", "DoRA"):
        arguments.use_lora_plus()
    for name in LORA_PLUS:
        arguments.nothing(
            name, f"LyCORIS raises the rate of lora_up only, which its {algorithm} does not have"
        )
    arguments.rest("lycoris.kohya", ARGUMENTS)


def _preset(reading: Reading, arguments: Arguments) -> str:
    preset = str(arguments.take("preset") or "full")
    if preset not in LYCORIS_PRESETS and not preset.lower().endswith(".toml"):
        reading.refuse(
            "network_args preset",
            preset,
            suggestion(preset, LYCORIS_PRESETS) or "supported: a .toml file, " + ", ".join(LYCORIS_PRESETS),
            stands_for="lycoris_preset",
        )
        return "full"
    if preset == "ia3":
        reading.differ(
            "network_args preset = ia3: the modules that end in to_k, to_v, ff.net.2, k_proj, v_proj and mlp.fc2; "
            "LyCORIS compares these names with the beginning of each path, so it finds none and cannot train"
        )
    return preset


def _form(reading: Reading, arguments: Arguments, kind: str) -> None:
    """Options of single algorithms; LyCORIS ignores those of others."""
    for old in ("use_cp", "use_conv_cp"):
        if (value := arguments.take(old)) is not None:
            arguments.left.setdefault("use_tucker", value)
    if arguments.take("disable_conv_cp") is not None:
        reading.differ(
            "network_args disable_conv_cp: no Tucker form here; LyCORIS reads its value as that of use_tucker"
        )
    if kind == "LoKr":
        _lokr(reading, arguments)
    elif kind == "DyLoRA":
        reading.given["unit"] = arguments.number("block_size") or 4
        reading.differ(
            "algo = dylora: scaled by alpha / dim · √(dim / ranks in use), as in sd-scripts' networks.dylora; LyCORIS "
            "trains at alpha / blocks in use, so its file is weaker than what was trained"
        )
    elif kind in ("OFT", "BOFT"):
        if (value := arguments.take("constrain")) is not None:
            arguments.left.setdefault("constraint", value)
        if value := arguments.number("constraint"):
            arguments.set("constraint", value)
        arguments.use_flags("rescaled")
    elif kind == "Full":
        reading.differ(
            "algo = full: weight decay pulls the change of a weight to 0; in LyCORIS it pulls the weight itself"
        )
    if kind in ("LoCon", "LoHa", "LoKr"):
        arguments.use_flags("use_tucker")
        if kind == "LoHa" and reading.given.get("use_tucker"):
            reading.differ(TUCKER_LOHA.format("LyCORIS"))
    if kind in _FACTORS:
        arguments.use_flags("use_scalar")
    if kind in (*_FACTORS, "DoRA"):
        arguments.use_flags("rs_lora")
    arguments.use_flags("train_norm")
    for name in ARGUMENTS[ARGUMENTS.index("factor") :]:
        arguments.nothing(name, f"it is not for {kind} with these modules")


def _lokr(reading: Reading, arguments: Arguments) -> None:
    arguments.use("factor")
    if "decompose_both" in arguments.left:
        if arguments.flag("decompose_both"):
            arguments.set("decompose_both", True)
        else:
            reading.differ(
                "network_args decompose_both = False: off here; LyCORIS takes any text for on, this one too"
            )
    arguments.use_flags("full_matrix", "unbalanced_factorization")


def _modules(reading: Reading, kind: str, preset: str) -> None:
    """attn-mlp are the modules of networks.lora (192 and 722 of the U-Net, 72 and 264 of text encoders)."""
    reading.given["network_type"] = kind
    if preset != "attn-mlp":
        reading.given["lycoris_preset"] = preset
    where = "the modules of networks.lora" if preset == "attn-mlp" else f"lycoris_preset = {preset}"
    reading.say("network_module", "lycoris.kohya", f"network_type = {kind}, {where}")


def _dora(reading: Reading, arguments: Arguments, algorithm: str, kind: str) -> str:
    if kind not in ("LoRA", "LoCon"):
        why = f"supported for lora and locon, not for {algorithm}"
        reading.refuse("network_args dora_wd", True, why, stands_for="network_type")
        return kind
    if arguments.flag("wd_on_output") or "wd_on_output" not in arguments.left:
        reading.say("network_args wd_on_output", True, "false: DoRA magnitudes are per input here")
    reading.differ(
        "dora_wd: the norm of W + ΔW is a constant of the gradient, as the paper proposes (arXiv 2402.09353, 4.3); "
        "LyCORIS differentiates it too"
    )
    return "DoRA"


def _ranks(reading: Reading, arguments: Arguments, preset: str) -> None:
    """Ranks and alphas. An argument arrives as a text, so ``conv_dim=0`` is a rank of 0 (no 3×3 convolutions) and not
    the rank of the others; an alpha of 0 is the rank of the module."""
    rank = reading.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
    alpha = reading.left.get("network_alpha", KOHYA_DEFAULTS["network_alpha"])
    if preset in _WITHOUT_CONVOLUTIONS:
        why = f"preset = {preset} trains no 3×3 convolutions"
        arguments.nothing("conv_dim", why)
        arguments.nothing("conv_alpha", why)
        return
    given_dim, given_alpha = arguments.number("conv_dim"), arguments.number("conv_alpha")
    conv_dim = rank if given_dim is None else given_dim
    conv_alpha = alpha if given_alpha is None else given_alpha
    reading.given["conv_dim"] = conv_dim
    if conv_dim == 0:
        reading.say("network_args conv_dim", 0, "conv_dim = 0: no 3×3 convolutions")
        return
    reading.given["conv_alpha"] = conv_alpha or conv_dim
    if given_dim is not None:
        reading.say("network_args conv_dim", given_dim, f"conv_dim = {as_text(conv_dim)}")
    if given_alpha is not None:
        meaning = ", which is conv_dim" if given_alpha == 0 else ""
        reading.say(
            "network_args conv_alpha", given_alpha, f"conv_alpha = {as_text(conv_alpha or conv_dim)}{meaning}"
        )


def _dropout(reading: Reading, arguments: Arguments, kind: str) -> None:
    """Only what LyCORIS applies: it computes W + ΔW first, so values are not dropped (without bypass_mode), and
    rank_dropout drops rows of ΔW."""
    usual = reading.take("network_dropout")
    given = arguments.number("dropout")
    value: Any = usual if given is None else given
    name = "network_dropout" if given is None else "network_args dropout"
    bypass = arguments.flag("bypass_mode")
    if value:
        if bypass and kind in ("LoRA", "LoCon"):
            reading.given["network_dropout"] = value
            reading.differ(
                f"{name} = {as_text(value)} with bypass_mode: values after lora_down are dropped, in LyCORIS those "
                "after lora_up"
            )
        elif bypass and kind in ("LoHa", "LoKr"):
            reading.differ(f"{name} = {as_text(value)} with bypass_mode: not applied to {kind} here")
        else:
            why = (
                f"LyCORIS has none for {kind}"
                if kind not in ("LoRA", "LoCon", "DoRA")
                else "LyCORIS applies it with bypass_mode only"
            )
            reading.without_effect.append(f"{name} = {as_text(value)}: {why}")
    elif bypass:
        reading.without_effect.append(
            "network_args bypass_mode = true: it changes speed and memory, not the result"
        )
    if kind in ("IA3", "GLoRA", "DyLoRA", "BOFT"):
        arguments.nothing("rank_dropout", f"LyCORIS does not apply it to {kind}")
    elif rank := arguments.number("rank_dropout"):
        arguments.set("rank_dropout", rank)
        if not (bypass and kind in ("LoRA", "LoCon")):
            reading.given["rank_dropout_rows"] = True
        if reading.given.get("train_norm"):
            reading.differ(
                f"rank_dropout = {as_text(rank)} leaves out that share of the values of norms; LyCORIS keeps that share"
            )
    if module := arguments.number("module_dropout"):
        arguments.set("module_dropout", module)
