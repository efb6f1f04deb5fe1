"""Names of tensors in LoRA files: what every tool writes, as component, module and part.

Owns the spelling of keys. A module's name is "flat": dots are underscores, so that kohya's names and dotted ones are
equal. Does not own what the parts mean (``contents``), which module of a base a name is (``names``), or which model a
file is for (``trainer.bases``).  Loads no torch.

Sources: sd-scripts networks/lora.py; LyCORIS lycoris/modules; ComfyUI comfy/lora.py and comfy/weight_adapter; diffusers
utils/state_dict_utils.py; OneTrainer modules/util/convert_lora_util.py; PEFT utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

UNET, TEXT, TEXT_2, TEXT_3 = "unet", "text_encoder", "text_encoder_2", "text_encoder_3"
PRIOR = "prior"  # Stable Cascade's
BUNDLED = "bundle_emb."  # OneTrainer's embeddings inside a LoRA file

_NAME = (
    r"(?:\.(?!weight$|bias$)[^.]+)?"  # the adapter's name that PEFT keeps in some files: .default, .default_0
)
# The end of a tensor's name → the part that it is, in LyCORIS' words.
_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern + "$"), part)
    for pattern, part in (
        (rf"\.lora_(?:down|A){_NAME}(?:\.weight)?", "lora_down.weight"),
        (rf"\.lora_(?:up|B){_NAME}(?:\.weight)?", "lora_up.weight"),
        (rf"\.lora_(?:down|A){_NAME}\.bias", "lora_down.bias"),
        (rf"\.lora_(?:up|B){_NAME}\.bias", "lora_up.bias"),
        (r"\.lora_mid\.weight", "lora_mid.weight"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight", "lora_down.weight"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight", "lora_up.weight"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)?\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "magnitude"),
        (rf"\.(hada_(?:w[12]_[ab]|t[12])){_NAME}", r"\1"),
        (rf"\.(lokr_(?:w[12](?:_[ab])?|t2)){_NAME}", r"\1"),
        (r"\.(diff|diff_b|w_norm|b_norm|scalar|rescale|oft_blocks|set_weight|reshape_weight)", r"\1"),
        (r"\.(on_input)", r"\1"),
        (rf"\.ia3_l{_NAME}", "ia3_l"),
        (rf"\.oft_R{_NAME}\.weight", "oft_R.weight"),
        (r"\.oft_R\.scaled_oft", "oft_R.scaled_oft"),
        (r"\.((?:a1|a2|b1|b2|bm)\.weight)", r"\1"),
        (r"\.((?:q|p)_layer\.weight|lambda_layer)", r"\1"),
    )
)
# Beginnings that wrap the names of every component.
_WRAPPERS = re.compile(r"(?:base_model\.model\.|_orig_mod\.|module\.|lycoris_)+")
_COMPONENTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), component)
    for pattern, component in (
        (r"lora_prior_(?:unet|te)[._]|prior\.", PRIOR),
        (
            r"lora_te3[._]|te3[._]|text_encoder_3[._]|lora_text_encoder_3_|text_encoders\.t5\w*\.(?:transformer\.)?|t5\w*\.",
            TEXT_3,
        ),
        (
            r"(?:lora|oft)_te2[._]|te2[._]|text_encoder_2[._]|lora_text_encoder_2_"
            r"|text_encoders\.clip_g\.(?:transformer\.)?|clip_g\.|conditioner\.embedders\.1\.(?:model\.)?",
            TEXT_2,
        ),
        (
            r"(?:lora|oft)_te1?[._]|te1?[._]|text_encoder(?:_1)?[._]|lora_text_encoder_"
            r"|text_encoders\.clip_[lh]\.(?:transformer\.)?|clip_[lh]\."
            r"|cond_stage_model\.(?:transformer\.)?|conditioner\.embedders\.0\.(?:transformer\.)?",
            TEXT,
        ),
        (r"(?:lora_|oft_)?unet[._]|(?:model\.)?diffusion_model[._]|lora_transformer[._]|transformer\.", UNET),
    )
)
_BARE_TEXT = re.compile(r"text_model[._]|encoder[._]layers[._]|text_projection\b")
_OLD_TEXT = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out_0": "out_proj",
}  # diffusers before 0.18


@dataclass(frozen=True)
class Name:
    """A module: its component, and its path with underscores, without ``text_model``."""

    component: str
    path: str


@dataclass
class Module:
    """A module of a file: how the file spells it, and part → the name of its tensor."""

    written: str
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass
class Keys:
    """All names of a file.  ``twice``: tensors that are the same part of the same module as another one."""

    modules: dict[Name, Module] = field(default_factory=dict)
    bundled: dict[str, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def having(self, *parts: str) -> list[Name]:
        """The modules that have one of these parts."""
        return [name for name, module in self.modules.items() if not module.tensors.keys().isdisjoint(parts)]


def read_keys(names: Iterable[str]) -> Keys:
    """The names of a file's tensors, sorted into modules."""
    names = list(names)
    scaled = {name.removesuffix(".on_input") for name in names if name.endswith(".on_input")}
    keys = Keys()
    for name in names:
        if name.startswith(BUNDLED):
            placeholder, _, encoder = name.removeprefix(BUNDLED).rpartition(".")
            keys.bundled.setdefault(placeholder, []).append(encoder)
            continue
        module, part = _split(name)
        if part is None and name.removesuffix(".weight") in scaled:  # LyCORIS' IA³
            module, part = name.removesuffix(".weight"), "ia3"
        if part is None:
            keys.others.append(name)
            continue
        entry = keys.modules.setdefault(name_of(module), Module(module))
        if entry.tensors.setdefault(part, name) != name:
            keys.twice.append(name)
    return keys


def name_of(written: str) -> Name:
    """The component and path of a module as a file spells it."""
    rest = written
    component = ""
    for _ in range(2):  # a wrapper may stand before or after the component's name
        if wrapper := _WRAPPERS.match(rest):
            rest = rest[wrapper.end() :]
        for pattern, found in () if component else _COMPONENTS:
            if match := pattern.match(rest):
                rest, component = rest[match.end() :], found
                break
    if not component:
        component = TEXT if _BARE_TEXT.match(rest) else UNET
    path = rest.replace(".", "_").replace("_processor_", "_")
    if component in (TEXT, TEXT_2, TEXT_3):
        path = path.removeprefix("text_model_")
    if path.endswith("_to_out"):
        path += "_0"
    if "self_attn_" in path and component != UNET:
        owner, _, layer = path.rpartition("self_attn_")
        path = f"{owner}self_attn_{_OLD_TEXT.get(layer, layer)}"
    return Name(component, path)


def _split(name: str) -> tuple[str, str | None]:
    """A tensor's name as (module, part); part None: no part of a module of any kind of LoRA."""
    for pattern, part in _ENDINGS:
        if (match := pattern.search(name)) and match.start() > 0:
            return name[: match.start()], match.expand(part)
    return name, None
