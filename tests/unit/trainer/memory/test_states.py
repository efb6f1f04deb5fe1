"""The planned optimizer state is what the library keeps after a step."""

import pytest
import torch

from trainer.config import TrainConfig
from trainer.loop.optimizers import make
from trainer.memory.stacks import _eight_bit
from trainer.memory.states import optimizer_bytes
from trainer.optimizers import OPTIMIZER_NAMES

SHAPES = [(80, 64), (5, 8), (40, 8, 3, 3), (24,)]
ARGUMENTS = [
    ("Adafactor", "beta1=0.9"),
    ("AdamW", "amsgrad=True"),
    ("Prodigy", "slice_p=11"),
    ("SGD", "momentum=0.9"),
    ("AdamW8bit", "min_8bit_size=16384"),
]


@pytest.mark.parametrize(("name", "arguments"), [*((name, "") for name in OPTIMIZER_NAMES), *ARGUMENTS])
def test_the_planned_state_is_what_the_library_keeps(name, arguments):
    config = TrainConfig(optimizer_type=name, learning_rate=1.0, optimizer_args=arguments)
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    groups = [{"params": weights, "lr": 1.0, "base_lr": 1.0, "name": "unet"}]
    optimizer = make(groups, config)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for weight in weights:
        weight.grad = torch.randn(weight.shape)
    optimizer.step()
    for weight, shape in zip(weights, SHAPES, strict=True):
        state = {key: value for key, value in optimizer.state[weight].items() if torch.is_tensor(value)}
        kept = sum(
            value.numel() * value.element_size()
            for key, value in state.items()
            if value.dim() > 0 and not key.startswith("qmap")  # a table of 1 KB that all tensors share
        )
        assert optimizer_bytes(name, shape, arguments) == kept, (shape, state.keys())


@pytest.mark.parametrize(("arguments", "is_proposed"), [("betas=(0.9, 0.99)", True), ("amsgrad=True", False)])
def test_an_8_bit_optimizer_is_only_proposed_where_it_takes_the_arguments(arguments, is_proposed):
    config = TrainConfig(optimizer_type="AdamW", optimizer_args=arguments)
    assert bool(list(_eight_bit(config, None))) == is_proposed
