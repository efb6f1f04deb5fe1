"""The tensors of every form of LoRA for two small layers, and a recorder of what LyCORIS and PEFT make of them.

    python -m tests.parity.trainer.adapters.forms tests/data/lora_forms.json

needs lycoris-lora (recorded with 4.1.3) and peft (0.21.2); the tests need neither.  The values of all tensors are a
sine, so no random generator is involved.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LINEAR, CONV = (12, 8), (6, 4, 3, 3)
R = 2


def wave(*shape: int, at: int) -> Tensor:
    """Values between -0.4 and 0.4 that depend on the shape and ``at`` only."""
    count = math.prod(shape)
    return (torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + at * 1.3) * 0.4).float().reshape(shape)


def layer_of(shape: tuple[int, ...]) -> nn.Linear | nn.Conv2d:
    """The base's layer: with a bias."""
    layer: nn.Linear | nn.Conv2d
    layer = (
        nn.Linear(shape[1], shape[0])
        if len(shape) == 2
        else nn.Conv2d(shape[1], shape[0], shape[2], padding=1)
    )
    with torch.no_grad():
        layer.weight.copy_(wave(*shape, at=90))
        assert layer.bias is not None
        layer.bias.copy_(wave(shape[0], at=91))
    return layer.requires_grad_(False)


def _named(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        name.replace("__", "."): wave(*shape, at=number)
        for number, (name, shape) in enumerate(shapes.items(), 1)
    }


ALPHA = {"alpha": torch.tensor(1.5)}
_LOHA = {"hada_w1_a": (12, R), "hada_w1_b": (R, 8), "hada_w2_a": (12, R), "hada_w2_b": (R, 8)}
_LORA = {"lora_up__weight": (12, R), "lora_down__weight": (R, 8)}
_PER_OUTPUT = {"dora_scale": wave(12, 1, at=40) + 1.0}
# form → (shape of the layer, tensors as LyCORIS names them)
LYCORIS: dict[str, tuple[tuple[int, ...], dict[str, Tensor]]] = {
    "locon": (LINEAR, _named(**_LORA) | ALPHA),
    "locon, 3x3": (CONV, _named(lora_up__weight=(6, R, 1, 1), lora_down__weight=(R, 4, 3, 3)) | ALPHA),
    "locon, Tucker": (
        CONV,
        _named(lora_up__weight=(6, R, 1, 1), lora_down__weight=(R, 4, 1, 1), lora_mid__weight=(R, R, 3, 3))
        | ALPHA,
    ),
    "locon, DoRA per output": (LINEAR, _named(**_LORA) | ALPHA | _PER_OUTPUT),
    "locon, DoRA per input": (LINEAR, _named(**_LORA) | ALPHA | {"dora_scale": wave(1, 8, at=41) + 1.0}),
    "loha": (LINEAR, _named(**_LOHA) | ALPHA),
    "loha, Tucker": (
        CONV,
        {
            name: tensor * 4
            for name, tensor in _named(
                hada_w1_a=(R, 6),
                hada_w1_b=(R, 4),
                hada_w2_a=(R, 6),
                hada_w2_b=(R, 4),
                hada_t1=(R, R, 3, 3),
                hada_t2=(R, R, 3, 3),
            ).items()
        }
        | ALPHA,
    ),
    "loha, DoRA": (LINEAR, _named(**_LOHA) | ALPHA | _PER_OUTPUT),
    "lokr": (LINEAR, _named(lokr_w1=(3, 2), lokr_w2_a=(4, R), lokr_w2_b=(R, 4)) | ALPHA),
    "lokr, both whole": (LINEAR, _named(lokr_w1=(3, 2), lokr_w2=(4, 4)) | ALPHA),
    "lokr, both in halves": (
        LINEAR,
        _named(lokr_w1_a=(3, R), lokr_w1_b=(R, 2), lokr_w2_a=(4, R), lokr_w2_b=(R, 4)) | ALPHA,
    ),
    "lokr, 3x3": (CONV, _named(lokr_w1=(2, 2), lokr_w2=(3, 2, 3, 3)) | ALPHA),
    "lokr, Tucker": (
        CONV,
        _named(lokr_w1=(2, 2), lokr_t2=(R, R, 3, 3), lokr_w2_a=(R, 3), lokr_w2_b=(R, 2)) | ALPHA,
    ),
    "lokr, DoRA": (LINEAR, _named(lokr_w1=(3, 2), lokr_w2_a=(4, R), lokr_w2_b=(R, 4)) | ALPHA | _PER_OUTPUT),
    "full": (LINEAR, _named(diff=(12, 8), diff_b=(12,))),
    "full, 3x3": (CONV, _named(diff=(6, 4, 3, 3), diff_b=(6,))),
    "ia3, outputs": (LINEAR, _named(weight=(12,)) | {"on_input": torch.tensor(0)}),
    "ia3, inputs": (LINEAR, _named(weight=(8,)) | {"on_input": torch.tensor(1)}),
    "ia3, 3x3": (CONV, _named(weight=(1, 6, 1, 1)) | {"on_input": torch.tensor(0)}),
    "diag-oft": (LINEAR, _named(oft_blocks=(4, 3, 3)) | {"alpha": torch.tensor(0.0)}),
    "diag-oft, limited": (LINEAR, _named(oft_blocks=(4, 3, 3)) | {"alpha": torch.tensor(0.05)}),
    "diag-oft, rescaled, 3x3": (
        CONV,
        _named(oft_blocks=(3, 2, 2)) | {"rescale": wave(6, 1, 1, 1, at=42) + 1.0, "alpha": torch.tensor(0.0)},
    ),
    "boft": ((16, 8), _named(oft_blocks=(3, 4, 4, 4)) | {"alpha": torch.tensor(0.0)}),
    "glora": (
        LINEAR,
        _named(a1__weight=(8, R), a2__weight=(R, 8), b1__weight=(12, R), b2__weight=(R, 8)) | ALPHA,
    ),
    "glora, 3x3": (
        CONV,
        _named(
            a1__weight=(4, R, 1, 1), a2__weight=(R, 4, 1, 1), b1__weight=(6, R, 1, 1), b2__weight=(R, 4, 3, 3)
        )
        | ALPHA,
    ),
}
# form → (shape of the layer, tensors as PEFT names them, settings)
PEFT: dict[str, tuple[tuple[int, ...], dict[str, Tensor], dict[str, Any]]] = {
    "lora": (LINEAR, _named(lora_A__weight=(R, 8), lora_B__weight=(12, R)), {"lora_alpha": 3}),
    "lora, rsLoRA": (
        LINEAR,
        _named(lora_A__weight=(R, 8), lora_B__weight=(12, R)),
        {"lora_alpha": 3, "use_rslora": True},
    ),
    "lora, bias": (
        LINEAR,
        _named(lora_A__weight=(R, 8), lora_B__weight=(12, R), lora_B__bias=(12,)),
        {"lora_alpha": 3, "lora_bias": True},
    ),
    "dora": (
        LINEAR,
        _named(lora_A__weight=(R, 8), lora_B__weight=(12, R))
        | {"lora_magnitude_vector": wave(12, at=43) + 1.0},
        {"lora_alpha": 3, "use_dora": True},
    ),
    "ia3, outputs": (LINEAR, {"ia3_l": wave(12, 1, at=44) + 1.0}, {}),
    "ia3, inputs": (LINEAR, {"ia3_l": wave(1, 8, at=44) + 1.0}, {}),
    "oft": (LINEAR, {"oft_R.weight": wave(2, 6, at=45) * 0.2}, {}),
    "oft, 3x3": (CONV, {"oft_R.weight": wave(9, 6, at=45) * 0.2}, {}),
}


def _lycoris(form: str) -> dict[str, Any]:
    from lycoris import modules  # type: ignore[import-not-found]

    shape, tensors = LYCORIS[form]
    layer = layer_of(shape)
    algo, _, detail = form.partition(", ")
    kind = {
        "locon": modules.LoConModule,
        "loha": modules.LohaModule,
        "lokr": modules.LokrModule,
        "full": modules.FullModule,
        "ia3": modules.IA3Module,
        "diag-oft": modules.DiagOFTModule,
        "boft": modules.ButterflyOFTModule,
        "glora": modules.GLoRAModule,
    }[algo]
    options: dict[str, Any] = {"lora_dim": R, "alpha": 1.5}
    options |= {"use_tucker": True} if "Tucker" in detail else {}
    options |= {"weight_decompose": True, "wd_on_out": "input" not in detail} if "DoRA" in detail else {}
    options |= {"train_on_input": "inputs" in detail} if algo == "ia3" else {}
    if "oft_blocks" in tensors:
        options = {
            "lora_dim": tensors["oft_blocks"].shape[-1],
            "constraint": float(tensors["alpha"]),
            "rescaled": "rescale" in tensors,
        }
    module = kind("x", layer, 1.0, **options)
    if algo == "lokr":
        module.use_w1, module.use_w2 = "lokr_w1" in tensors, "lokr_w2" in tensors
        module.tucker = "lokr_t2" in tensors
        module.scale = 1.0 if module.use_w1 and module.use_w2 else 1.5 / R
    names = {"diff": "weight", "diff_b": "bias"} if algo == "full" else {}
    for name, tensor in tensors.items():
        if name in ("alpha", "on_input"):
            continue
        owner_name, _, last = names.get(name, name).rpartition(".")
        owner = module.get_submodule(owner_name)
        own = getattr(owner, last, None)
        assert own is None or form.startswith("lokr") or own.shape == tensor.shape, (form, name, own.shape)
        setattr(owner, last, nn.Parameter(tensor.clone()))
    with torch.no_grad():
        if algo in ("loha", "lokr"):  # as their forward; their get_merged_weight scales twice
            merged, bias = layer.weight + module.get_weight(shape), None
            merged = module.apply_weight_decompose(merged) if module.wd else merged
        else:
            merged, bias = module.get_merged_weight(multiplier=1.0, shape=shape)
    assert layer.bias is not None
    own_bias = layer.bias if bias is None else bias
    return {"weight": merged.float().flatten().tolist(), "bias": own_bias.float().flatten().tolist()}


def _peft(form: str) -> dict[str, Any]:
    from peft import IA3Config, LoraConfig, OFTConfig, inject_adapter_in_model, set_peft_model_state_dict

    shape, tensors, settings = PEFT[form]
    model = nn.Sequential()
    model.add_module("x", layer_of(shape))
    config: Any
    if form.startswith("ia3"):
        config = IA3Config(target_modules=["x"], feedforward_modules=["x"] if "inputs" in form else [])
    elif form.startswith("oft"):
        config = OFTConfig(target_modules=["x"], oft_block_size=4, r=0, bias="none")
    else:
        config = LoraConfig(r=R, target_modules=["x"], **settings)
    inject_adapter_in_model(config, model)
    set_peft_model_state_dict(model, {f"x.{name}": tensor.clone() for name, tensor in tensors.items()})
    given = wave(2, *((shape[1],) if len(shape) == 2 else (shape[1], 5, 5)), at=80)
    if (
        form == "oft, 3x3"
    ):  # merged: PEFT's forward adds overlapping patches, which no change of the weight does
        model.get_submodule("x").merge()  # type: ignore[operator]
    with torch.no_grad():
        return {"output": model(given).flatten().tolist()}


if __name__ == "__main__":
    found = {f"lycoris: {form}": _lycoris(form) for form in LYCORIS} | {
        f"peft: {form}": _peft(form) for form in PEFT
    }
    rounded = {
        form: {what: [round(value, 7) for value in values] for what, values in record.items()}
        for form, record in found.items()
    }
    Path(sys.argv[1]).write_text(
        "{\n" + ",\n".join(f"{json.dumps(f)}: {json.dumps(r)}" for f, r in rounded.items()) + "\n}\n"
    )
