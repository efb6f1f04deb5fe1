"""Records what sd-scripts' own functions do, for tests/parity/trainer/kohya/test_rates.py:

    python -m tests.bench.record_optimizers SD_SCRIPTS LORA_EASY > tests/data/optimizers_sd_scripts.json

SD_SCRIPTS is a checkout of github.com/kohya-ss/sd-scripts (48d368f), LORA_EASY one of
github.com/derrian-distro/LoRA_Easy_Training_scripts_Backend (162e56d, its two schedules). Needs the versions of
sd-scripts' requirements.txt: transformers 4.54.1, diffusers 0.32.1, lion-pytorch 0.2.3, schedulefree 1.4, prodigyopt
1.1.2; and dadaptation 3.2, came-pytorch 0.1.3, bitsandbytes 0.50.2. Functions are taken from the files one by one,
because importing them needs the whole of sd-scripts.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import logging
import sys
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tests.optimizercases import (
    CASES,
    GROUPS,
    LORAPLUS_CASES,
    RECORDED_STEPS,
    SCHEDULE_CASES,
    STEPS,
    gradient,
    layers,
    weights,
)
from tests.optimizercases import figures as figures_of

SKIPPED = ("network_module", "network_args")
USUAL = {
    "optimizer_type": "",
    "use_8bit_adam": False,
    "use_lion_optimizer": False,
    "fused_backward_pass": False,
    "gradient_accumulation_steps": 1,
    "optimizer_args": None,
    "learning_rate": 2e-6,
    "unet_lr": None,
    "text_encoder_lr": None,
    "max_grad_norm": 1.0,
    "lr_scheduler": "constant",
    "lr_scheduler_type": "",
    "lr_scheduler_args": None,
    "lr_warmup_steps": 0,
    "lr_decay_steps": 0,
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1,
    "lr_scheduler_timescale": None,
    "lr_scheduler_min_lr_ratio": None,
    "max_train_steps": STEPS,
}


def functions(file: Path, names: tuple[str, ...], known: dict[str, Any]) -> dict[str, Any]:
    """These functions (also methods) of a file, compiled alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    space = dict(known)
    exec(compile(ast.Module(found[: len(names)], []), str(file), "exec"), space)
    return space


def sd_scripts(root: Path) -> dict[str, Any]:
    import diffusers.optimization as diffusers
    import transformers
    import transformers.optimization

    known = {
        "argparse": argparse,
        "ast": ast,
        "importlib": importlib,
        "torch": torch,
        "transformers": transformers,
        "Optimizer": torch.optim.Optimizer,
        "Any": Any,
        "Optional": Any,
        "logger": logging.getLogger("sd-scripts"),
        "SchedulerType": transformers.optimization.SchedulerType,
        "TYPE_TO_SCHEDULER_FUNCTION": transformers.optimization.TYPE_TO_SCHEDULER_FUNCTION,
        "DiffusersSchedulerType": diffusers.SchedulerType,
        "DIFFUSERS_TYPE_TO_SCHEDULER_FUNCTION": diffusers.TYPE_TO_SCHEDULER_FUNCTION,
    }
    names = ("get_optimizer", "is_schedulefree_optimizer", "get_dummy_scheduler", "get_scheduler_fix")
    known["Optional"] = __import__("typing").Optional
    return functions(root / "library" / "train_util.py", names, known)


def run(label: str, case: str, space: dict[str, Any]) -> dict[str, Any]:
    """Rates of every step for both groups, and figures of the weights after some steps."""
    file = tomllib.loads(case)
    args = Namespace(**{**USUAL, **{key: value for key, value in file.items() if key not in SKIPPED}})
    trained = weights()
    rates = {
        "unet": args.learning_rate if args.unet_lr is None else args.unet_lr,
        "text_encoder": args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr,
    }
    groups = [{"params": trained[name], "lr": rates[name]} for name in GROUPS]
    with contextlib.redirect_stdout(io.StringIO()):
        name, arguments, optimizer = space["get_optimizer"](args, groups)
        optimizer._step_count = 0  # LORA_EASY's schedules count on it; torch 2.15 has no such attribute
        schedule = space["get_scheduler_fix"](args, optimizer, 1)
    is_free = args.optimizer_type.lower().endswith("schedulefree")
    steps, found = [], {}
    for step in range(STEPS):
        steps.append([float(rate) for rate in schedule.get_last_lr()])
        for index, weight in enumerate(w for group in GROUPS for w in trained[group]):
            weight.grad = gradient(index, weight)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 in RECORDED_STEPS:
            if is_free:
                optimizer.eval()
            found[str(step + 1)] = [figures_of(w.detach()) for group in GROUPS for w in trained[group]]
            if is_free:
                optimizer.train()
    told = f"{name}({arguments})" if arguments else name
    found = {} if label in SCHEDULE_CASES else found
    return {"written": told, "rates": rounded(steps), "weights": rounded(found)}


def rounded(value: Any) -> Any:
    """Every number with nine digits: more than fp32 has."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else float(f"{value:.9g}")


def loraplus(root: Path) -> dict[str, Any]:
    """Parameter groups of sd-scripts' LoRANetwork: description → rate and number of tensors."""
    known = {"logger": logging.getLogger("sd-scripts"), "get_block_index": None}
    space = functions(root / "networks" / "lora.py", ("prepare_optimizer_params",), known)
    found = {}
    for name, (ratios, rates) in LORAPLUS_CASES.items():
        network = Namespace(
            requires_grad_=lambda _: None,
            text_encoder_loras=layers("lora_te", 2),
            unet_loras=layers("lora_unet", 3),
            block_lr=False,
            loraplus_lr_ratio=ratios[0],
            loraplus_unet_lr_ratio=ratios[1],
            loraplus_text_encoder_lr_ratio=ratios[2],
        )
        groups, descriptions = space["prepare_optimizer_params"](network, *rates)
        found[name] = {
            text: [group["lr"], len(group["params"])]
            for text, group in zip(descriptions, groups, strict=True)
        }
    return found


def main(sd_scripts_root: Path, lora_easy_root: Path) -> None:
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, str(lora_easy_root / "custom_scheduler"))
    space = sd_scripts(sd_scripts_root)
    found = {name: run(name, case, space) for name, case in CASES.items()}
    json.dump({"cases": found, "loraplus": loraplus(sd_scripts_root)}, sys.stdout, indent=None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
