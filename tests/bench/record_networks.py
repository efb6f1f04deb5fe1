"""Records what the networks of sd-scripts and LyCORIS do, for tests/parity/trainer/kohya/test_recorded_networks.py:

    python -m tests.bench.record_networks SD_SCRIPTS NATIVE LYCORIS tests/data/networks_recorded.json

Cases that the file has already stay as they are: delete what is to be recorded again.

SD_SCRIPTS and NATIVE are checkouts of github.com/kohya-ss/sd-scripts at 48d368f and at aff4a2e (the branch that has
networks/loha.py and networks/lokr.py), LYCORIS one of github.com/KohakuBlueleaf/LyCORIS at f49d30d. Needs einops and
toml beside this tool's packages; OpenCV, which these modules import and do not use, may be missing.

Modules, alphas and groups are recorded on sd-scripts' own U-Nets in the published sizes (meta device), what is learned
on the tiny base of the tests, whose classes have the names that both projects look for – except that networks/oft.py
and some presets look for CrossAttention, which diffusers calls Attention, and that networks/loha.py knows no SD1.5.
LyCORIS' full is recorded without ``apply_to``, which removes the weight that its ``forward`` reads (AttributeError),
see also ``unlisted``; its list of algorithms lacks ia3 (KeyError), which is added.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import random
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.fullsize import meta_base
from tests.networkcases import (
    ALPHA,
    BLOCKS,
    CASES,
    EVERY_CASE,
    FAMILIES,
    LEARNED,
    LYCORIS,
    MOMENTUM,
    OPTIMIZERS,
    RANK,
    SINGLE,
    STEPS,
    digest,
    drawn,
    figures,
    filled,
    input_of,
    lines_of,
    loss,
    single_layer,
    start,
)
from tests.tiny import tiny_base

_FILES = {
    "LoConModule": "locon",
    "LohaModule": "loha",
    "LokrModule": "lokr",
    "FullModule": "full",
    "DyLoraModule": "dylora",
}
_SAME_NAMES = {"weight": "diff", "bias": "diff_b"}  # LyCORIS' full


BASES: dict[tuple[str, Path], tuple[list[nn.Module], nn.Module]] = {}


class Encoder(nn.Module):
    """A text encoder with the name that transformers gave its layers before version 5."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = getattr(encoder, "text_model", encoder)


def module_of(roots: dict[str, Path], name: str) -> Any:
    """A network module, imported anew: these modules change their own classes when they make a network. The classes of
    U-Nets stay, since network modules compare them, until another checkout is used."""
    root = roots[
        "lycoris" if name == LYCORIS else "native" if name in ("networks.loha", "networks.lokr") else ""
    ]
    old = {"networks", "lycoris"}
    library = getattr(sys.modules.get("library"), "__file__", None)
    if name != LYCORIS and library is not None and root not in Path(library).parents:
        old.add("library")
        BASES.clear()
    for known in [known for known in sys.modules if known.split(".")[0] in old]:
        del sys.modules[known]
    sys.path.insert(0, str(root))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = importlib.import_module(name)
    finally:
        sys.path.remove(str(root))
    if name == LYCORIS:
        found.network_module_dict.setdefault("ia3", found.IA3Module)
    return found


def created(
    module: Any, case: dict[str, Any], encoders: list[nn.Module], unet: nn.Module
) -> tuple[Any, bool, bool]:
    """The network of a file, as sd-scripts' train_network.py makes it; whether text encoders and the U-Net get it."""
    arguments = dict(argument.split("=", 1) for argument in case.get("network_args", []))
    arguments.setdefault("dropout", None)
    with contextlib.redirect_stdout(io.StringIO()):
        network = module.create_network(
            1.0,
            case["network_dim"],
            case["network_alpha"],
            None,
            encoders if len(encoders) > 1 else encoders[0],
            unet,
            neuron_dropout=None,
            **arguments,
        )
        apply_text = not case.get("network_train_unet_only", False)
        apply_unet = not case.get("network_train_text_encoder_only", False)
        return network, apply_text, apply_unet


def modules_of(network: Any) -> list[Any]:
    if hasattr(network, "unet_ofts"):
        return list(network.unet_ofts)
    return [*network.text_encoder_loras, *network.unet_loras]


def key_of(module: Any) -> str:
    return str(getattr(module, "lora_name", "") or module.oft_name.replace("oft_unet", "lora_unet"))


def groups_of(network: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups with their rates, as train_network.py asks for them."""
    rates = (case.get("text_encoder_lr"), case.get("unet_lr"), case["learning_rate"])
    with contextlib.redirect_stdout(io.StringIO()):
        if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
            found = network.prepare_optimizer_params_with_multiple_te_lrs(*rates)
        else:
            found = network.prepare_optimizer_params(*rates)
    groups = found[0] if isinstance(found, tuple) else found
    return [
        {"params": list(group["params"]), "lr": group.get("lr", case["learning_rate"])} for group in groups
    ]


def trained_values(groups: list[dict[str, Any]]) -> dict[str, int]:
    """rate → how many values are trained at it."""
    found: dict[str, int] = {}
    for group in groups:
        rate = f"{group['lr']:.6g}"
        found[rate] = found.get(rate, 0) + sum(weight.numel() for weight in group["params"])
    return dict(sorted(found.items()))


def halves(module: Any) -> tuple[list[Tensor], list[Tensor]] | None:
    """DyLoRA's parts: those of lora_down, those of lora_up."""
    for down, up in (("lora_A", "lora_B"), ("down_list", "up_list")):
        if hasattr(module, down):
            return list(getattr(module, down)), list(getattr(module, up))
    return None


def described(module: Any) -> tuple[float | None, dict[str, tuple[int, ...]]]:
    """(alpha, tensors and their shapes) of a module, in the words of a file."""
    name = type(module).__name__
    if (parts := halves(module)) is not None:
        downs, ups = parts
        rank, inner, outer = len(downs) * downs[0].shape[0], downs[0][0].numel(), ups[0].shape[0]
        return float(module.alpha), {"lora_down.weight": (rank, inner), "lora_up.weight": (outer, rank)}
    shapes = {end: tuple(weight.shape) for end, weight in module.named_parameters()}
    if name == "FullModule":
        return None, {_SAME_NAMES[end]: shape for end, shape in shapes.items()}
    if name == "NormModule":
        return None, shapes
    return float(module.on_input if name == "IA3Module" else module.alpha), shapes


@torch.no_grad()
def begin(module: Any) -> None:
    """The first values of the recorded problem."""
    key = key_of(module)
    if (parts := halves(module)) is not None:
        for ending, tensors, axis in (("lora_down.weight", parts[0], 0), ("lora_up.weight", parts[1], 1)):
            whole = torch.cat([tensor.data for tensor in tensors], dim=axis)
            begun = start(key, ending, whole)
            for tensor, part in zip(tensors, begun.split(tensors[0].shape[axis], dim=axis), strict=True):
                tensor.data.copy_(part)
        return
    for ending, weight in module.named_parameters():
        if not ending.startswith("org_module."):
            weight.data.copy_(start(key, ending, weight.data))


@contextlib.contextmanager
def block(number: int) -> Iterator[None]:
    """DyLoRA draws this one of two blocks of two ranks: sd-scripts among ranks, LyCORIS among blocks."""
    randint = random.randint
    random.randint = lambda low, high: number * (2 if high > 1 else 1)  # type: ignore[assignment]
    try:
        yield
    finally:
        random.randint = randint


def unlisted(module: Any) -> None:
    """LyCORIS' full keeps a bias in a list, and adds to it: a TypeError at f49d30d."""
    if isinstance(module.org_bias, list):
        module.org_bias = module.org_bias[0]


def layer_of(module: Any) -> nn.Module:
    held = module.org_module
    found = held[0] if isinstance(held, list) else held
    assert isinstance(found, nn.Module)
    return found


def learned(module: Any, case: dict[str, Any], name: str) -> list[list[float]]:
    """What every module has learned after the steps, in the order of their names."""
    base = tiny_base("sd15")
    network, apply_text, apply_unet = created(module, case, [Encoder(base.text_encoders[0])], base.unet)
    modules = modules_of(network)
    layers = {key_of(it): layer_of(it) for it in modules}
    before = {}
    with torch.no_grad():
        for key, layer in layers.items():
            before[key] = layer(input_of(layer, f"{key} probe"))
    for it in modules:
        begin(it)
    inputs = {key: input_of(layer, f"{key} input") for key, layer in layers.items()}
    probes = {key: input_of(layer, f"{key} probe") for key, layer in layers.items()}
    if type(modules[0]).__name__ == "FullModule":
        for it in modules:
            unlisted(it)
            layer_of(it).forward = it.forward
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            network.apply_to(Encoder(base.text_encoders[0]), base.unet, apply_text, apply_unet)
    groups = groups_of(network, case)
    decay = [a.split("=")[1] for a in case.get("optimizer_args", []) if a.startswith("weight_decay=")]
    if name == "AdamW":
        optimizer: Any = torch.optim.AdamW(groups, weight_decay=float(decay[0]) if decay else 0.01)
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, nesterov=True)
    network.train()
    for step in range(STEPS):
        with block(BLOCKS[step]):
            total = sum(loss(key, layer(inputs[key])) for key, layer in layers.items())
            total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), block(1):
        return [figures(key, layer(probes[key]) - before[key]) for key, layer in sorted(layers.items())]


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Everything without memory but numbers that are given, as an alpha."""
    tensor, cpu = torch.tensor, Tensor.cpu
    torch.tensor = lambda *values, **how: tensor(*values, **{"device": "cpu", **how})  # type: ignore[assignment]
    Tensor.cpu = lambda held: held  # type: ignore[assignment, method-assign]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.tensor, Tensor.cpu = tensor, cpu  # type: ignore[method-assign]


def base_of(family: str, root: Path) -> tuple[list[nn.Module], nn.Module]:
    """Text encoders and sd-scripts' U-Net of the published size."""
    if (family, root) not in BASES:
        sys.path.insert(0, str(root))
        if family == "sdxl":
            unet = importlib.import_module("library.sdxl_original_unet").SdxlUNet2DConditionModel()
        else:
            unets = importlib.import_module("library.original_unet")
            unet = unets.UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
        sys.path.remove(str(root))
        BASES[family, root] = [Encoder(encoder) for encoder in meta_base(family).text_encoders], unet
    return BASES[family, root]


def full_size(module: Any, case: dict[str, Any], family: str, roots: dict[str, Path]) -> dict[str, Any]:
    """Modules and groups on a base of the published size."""
    with on_meta():
        encoders, unet = base_of(family, roots["native" if "native" in module.__file__ else ""])
        network, apply_text, apply_unet = created(module, case, encoders, unet)
    for it in modules_of(network):  # as apply_to does
        if isinstance(getattr(it, "org_module", None), nn.Module):
            del it.org_module
    if not apply_text:
        network.text_encoder_loras = []
    if not apply_unet:
        network.unet_loras = []
    groups = groups_of(network, case)
    trained = {id(weight) for group in groups for weight in group["params"]}
    modules = {
        key_of(it): described(it)
        for it in modules_of(network)
        if any(id(weight) in trained for weight in it.parameters())
    }
    lines = lines_of(modules)
    return {"modules": len(lines), "sha256": digest(lines), "values": trained_values(groups)}


def prepared(module: Any, name: str) -> Any:
    """A module that finds the layers of the tiny base."""
    if name == LYCORIS:
        for preset in module.PRESET.values():
            if "CrossAttention" in preset.get("unet_target_module", ()):
                preset["unet_target_module"] = [*preset["unet_target_module"], "Attention"]
    if name == "networks.oft":
        module.OFTNetwork.UNET_TARGET_REPLACE_MODULE_ATTN_ONLY = ["Attention"]
    if name in ("networks.loha", "networks.lokr"):
        found = sys.modules["networks.network_base"]
        known = found.ArchConfig(  # type: ignore[attr-defined]
            unet_target_modules=["Transformer2DModel"],
            te_target_modules=["CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"],
            unet_prefix="lora_unet",
            te_prefixes=["lora_te"],
            unet_conv_target_modules=["ResnetBlock2D", "Downsample2D", "Upsample2D"],
        )
        module.detect_arch_config = lambda *_: known
    return module


@contextlib.contextmanager
def draws() -> Iterator[None]:
    """torch.rand gives known numbers."""
    rand = torch.rand
    torch.rand = lambda *sizes, **_: drawn(*(sizes[0] if isinstance(sizes[0], tuple) else sizes))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rand = rand


def single(label: str, roots: dict[str, Path]) -> dict[str, Any]:
    """Output and gradients of one layer in training."""
    who, shape, arguments = SINGLE[label]
    arguments = dict(arguments)
    chosen = arguments.pop("block", 0)
    layer = single_layer(shape)
    if who.startswith("networks."):
        found = module_of(roots, who)
        names = {
            "networks.dylora": "DyLoRAModule",
            "networks.loha": "LoHaModule",
            "networks.lokr": "LoKrModule",
        }
        made = getattr(found, names.get(who, "LoRAModule"))
    else:
        module_of(roots, LYCORIS)
        made = getattr(sys.modules[f"lycoris.modules.{_FILES[who]}"], who)
    with contextlib.redirect_stdout(io.StringIO()):
        module = made("x", layer, 1.0, RANK, ALPHA, **arguments)
    if (parts := halves(module)) is not None:
        for ending, tensors, axis in (("lora_down.weight", parts[0], 0), ("lora_up.weight", parts[1], 1)):
            whole = filled(ending, torch.cat([tensor.data for tensor in tensors], dim=axis))
            for tensor, part in zip(tensors, whole.split(tensors[0].shape[axis], dim=axis), strict=True):
                tensor.data.copy_(part)
    else:
        for ending, weight in module.named_parameters():
            named = _SAME_NAMES.get(ending, ending) if who == "FullModule" else ending
            if not ending.startswith("org_module."):
                weight.data.copy_(filled(named, weight.data))
    if who == "FullModule":
        unlisted(module)
        layer.forward = module.forward
    else:
        module.apply_to()
    module.requires_grad_(True)
    module.train()
    with draws(), block(chosen):
        output = layer(input_of(layer, "single"))
    loss("single", output).backward()
    gradients = {
        ending: figures(ending, weight.grad)
        for ending, weight in sorted(module.named_parameters())
        if weight.grad is not None
    }
    return {"output": figures("single", output), "gradients": gradients}


def main(sd_scripts: Path, native: Path, lycoris: Path, output: Path) -> None:
    sys.modules.setdefault("cv2", types.ModuleType("cv2"))
    logging.disable(logging.CRITICAL)
    roots = {"": sd_scripts, "native": native, "lycoris": lycoris}
    found: dict[str, Any] = {"sizes": {}, "learned": {}}
    if output.exists():
        found = json.loads(output.read_text())
    for label, text in EVERY_CASE.items():
        case = tomllib.loads(text)
        name = case["network_module"]
        families = [family for family in FAMILIES if family in label] or [*FAMILIES]
        if name in ("networks.loha", "networks.lokr"):  # they end with an error for SD1.5
            families = ["sdxl"]
        if label.startswith("dylora") and len(families) > 1:
            families = [
                "sd15"
            ]  # gives both text encoders of SDXL the same names, so the first is not trained
        if label not in found["sizes"]:
            print(label, file=sys.stderr)
            found["sizes"][label] = {
                family: full_size(module_of(roots, name), case, family, roots) for family in families
            }
        if label in CASES and label not in found["learned"]:
            found["learned"][label] = {
                optimizer: learned(prepared(module_of(roots, name), name), case, optimizer)
                for optimizer in OPTIMIZERS
                if (label, optimizer) in LEARNED
            }
        output.write_text(as_json(found))
    found["single"] = {label: single(label, roots) for label in SINGLE}
    output.write_text(as_json(found))


def as_json(found: dict[str, Any]) -> str:
    """One line for each case, in the order of the cases."""
    parts = []
    for part, cases in found.items():
        lines = [
            f"{json.dumps(label)}: {json.dumps(cases[label])}"
            for label in (*EVERY_CASE, *SINGLE)
            if label in cases
        ]
        parts.append(json.dumps(part) + ": {\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:5]))
