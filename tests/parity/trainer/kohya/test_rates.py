"""What a file of sd-scripts asks for is what its own functions do: rates of every step and weights after n equal
gradients, for each optimizer and schedule, with two parameter groups.

Recorded from sd-scripts 48d368f and LoRA_Easy_Training_scripts_Backend 162e56d on the CPU (the versions of the
libraries and the command: tests/bench/record_optimizers.py). Everything here goes through the reader of kohya files.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.optimizercases import (
    CASES,
    GROUPS,
    LORAPLUS_CASES,
    OPTIMIZER_CASES,
    RECORDED_STEPS,
    STEPS,
    figures,
    gradient,
    weights,
)
from tests.tiny import tiny_base
from trainer.adapters.adapter import inject
from trainer.adapters.metadata import kohya_settings
from trainer.config import TrainConfig
from trainer.kohya.read import read_kohya
from trainer.loop.optim import build_optimizer, in_training, set_rates_of_step
from trainer.loop.optimizers import make
from trainer.optimizers import written

RECORDED = json.loads((Path(__file__).parents[3] / "data" / "optimizers_sd_scripts.json").read_text())


def read(tmp_path: Path, text: str) -> TrainConfig:
    path = tmp_path / "kohya.toml"
    path.write_text(f'pretrained_model_name_or_path = "sd15"\nmax_train_steps = {STEPS}\n{text}')
    file = read_kohya(path)
    assert not file.refused
    return file.config


def trained(config: TrainConfig) -> tuple[dict[str, list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """The weights of the recording in our groups: the optimizer of this configuration."""
    found = weights()
    full = {"unet": config.effective_unet_lr, "text_encoder": config.effective_text_encoder_lr}
    groups = [{"params": found[n], "name": n, "lr": full[n], "base_lr": full[n]} for n in GROUPS]
    return found, make(groups, config)


@pytest.mark.parametrize("name", CASES)
def test_the_rate_of_every_step_is_that_of_sd_scripts(name: str, tmp_path: Path) -> None:
    config = read(tmp_path, CASES[name])
    _, optimizer = trained(config)
    expected = RECORDED["cases"][name]["rates"]
    if config.has_relative_steps:
        return  # the rate is the optimizer's own: the weights below tell
    for step in range(STEPS):
        found = set_rates_of_step(optimizer, config, STEPS, step)
        assert [found[group] for group in GROUPS] == pytest.approx(expected[step], rel=1e-6, abs=1e-12), step


@pytest.mark.parametrize("name", OPTIMIZER_CASES)
def test_the_weights_after_equal_gradients_are_those_of_sd_scripts(name: str, tmp_path: Path) -> None:
    config = read(tmp_path, CASES[name])
    found, optimizer = trained(config)
    ordered = [weight for group in GROUPS for weight in found[group]]
    before = [figures(weight.detach()) for weight in ordered]
    for step in range(STEPS):
        set_rates_of_step(optimizer, config, STEPS, step)
        with in_training(optimizer, ordered, None):
            for index, weight in enumerate(ordered):
                weight.grad = gradient(index, weight)
            optimizer.step()
        if step + 1 in RECORDED_STEPS:
            for index, (weight, start) in enumerate(zip(ordered, before, strict=True)):
                expected = RECORDED["cases"][name]["weights"][str(step + 1)][index]
                moved = [new - old for new, old in zip(figures(weight.detach()), start, strict=True)]
                wanted = [new - old for new, old in zip(expected, start, strict=True)]
                # fp32 holds the weight itself to 6e-8, so a move is known to that share of the weight; a sum in
                # which signs cancel is known to that share of the largest figure (processors add differently)
                known = 3e-7 * max(map(abs, start)) + 2e-5 * max(map(abs, wanted)) + 1e-9
                assert moved == pytest.approx(wanted, rel=2e-4, abs=known), index


@pytest.mark.parametrize("name", OPTIMIZER_CASES)
def test_what_sd_scripts_writes_into_a_lora_is_read_back(name: str, tmp_path: Path) -> None:
    """ss_optimizer, as recorded, gives the optimizer that the file gave; so does what this tool writes."""
    config = read(tmp_path, CASES[name])
    for text in (
        RECORDED["cases"][name]["written"],
        written(config.optimizer_type, config.optimizer_args, config.weight_decay),
    ):
        settings = kohya_settings({"ss_optimizer": text, "ss_lr_scheduler": config.lr_scheduler})
        arguments = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        rates = f"learning_rate = {config.learning_rate}\nlr_warmup_steps = {int(config.lr_warmup_steps)}\n"
        again = read(tmp_path, rates + arguments)
        expected = (config.optimizer_type, config.optimizer_args, config.weight_decay)
        found = (again.optimizer_type, again.optimizer_args, again.weight_decay)
        assert found == expected or set(found[1].split()) == set(expected[1].split()), text


@pytest.mark.parametrize("name", LORAPLUS_CASES)
def test_loraplus_groups_have_the_rates_of_sd_scripts(name: str) -> None:
    (common, unet, text), (text_lr, unet_lr, lr) = LORAPLUS_CASES[name]
    config = TrainConfig(
        optimizer_type="AdamW", learning_rate=lr, unet_lr=unet_lr, text_encoder_lr=text_lr,
        loraplus_lr_ratio=common, loraplus_unet_lr_ratio=unet, loraplus_text_encoder_lr_ratio=text,
        network_dim=2, network_alpha=2,
    )  # fmt: skip
    adapter = inject(tiny_base("sd15"), config)
    optimizer = build_optimizer(config, adapter)
    spelled = {"textencoder": "text_encoder"}
    expected = {}
    for group, (rate, _) in RECORDED["loraplus"][name].items():
        component, *plus = group.split()
        expected[" ".join([spelled.get(component, component), *plus])] = rate
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(expected)
    ups = {
        id(weight) for layer in adapter.layers for end, weight in layer.weights.items() if "lora_up" in end
    }
    for group in optimizer.param_groups:
        plus = group["name"].endswith(" plus")
        other = any(name == f"{group['name']} plus" for name in expected)
        kinds = {id(weight) in ups for weight in group["params"]}
        assert kinds == ({True} if plus else {False} if other else {False, True})
