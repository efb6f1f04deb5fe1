"""Every schedule equals diffusers' get_scheduler (which kohya uses), step by step."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from trainer.config import SCHEDULER_NAMES, TrainConfig
from trainer.loop.schedules import FACTORS, RATES, rate


def reference_rates(name: str, total: int, warmup: int, cycles: int, power: float, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, num_cycles=cycles, power=power
    )
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


OF_DIFFUSERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@pytest.mark.parametrize("name", OF_DIFFUSERS)
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("cycles, power", [(1, 1.0), (3, 2.0), (0, 0.0)])
def test_rates_equal_diffusers_step_by_step(name, warmup, cycles, power):
    total, lr = 50, 3e-4
    config = TrainConfig(
        learning_rate=lr,
        lr_scheduler=name,
        lr_warmup_steps=warmup,
        lr_scheduler_num_cycles=cycles,
        lr_scheduler_power=power,
    )
    # diffusers' cosine has 0.5 cycles by default; sd-scripts never passes num_cycles to it
    if name == "cosine":
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        expected = []
        for _ in range(total):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    else:
        expected = reference_rates(name, total, warmup, cycles, power, lr)
    ours = [lr * rate(config, total, step) for step in range(total)]
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_every_schedule_that_can_be_chosen_is_in_the_table():
    assert {*FACTORS, *RATES} == set(SCHEDULER_NAMES) and not {*FACTORS} & {*RATES}
