"""8-bit optimizers follow their 32-bit counterparts, on tensors that bitsandbytes quantizes (from 4,096 elements)."""

import pytest
import torch

from trainer.config import TrainConfig
from trainer.loop.optimizers import make

STEPS = 60


class Lion(torch.optim.Optimizer):
    """Lion as in its paper (arXiv 2302.06675, algorithm 2), β = 0.9 and 0.99."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("m", torch.zeros_like(weight))
                update = (0.9 * momentum + 0.1 * weight.grad).sign()
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                momentum.mul_(0.99).add_(0.01 * weight.grad)


def curve(make, width):
    """Losses and weights of a least-squares fit of a (width, 64) matrix with noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(width, 64, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(width, 64))
    optimizer = make([{"params": [weight], "lr": 2e-2, "name": "unet", "base_lr": 2e-2}])
    losses = []
    for _ in range(STEPS):
        inputs = torch.randn(32, width, generator=generator)
        loss = (inputs @ (weight - goal)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weight.detach(), optimizer


@pytest.mark.parametrize(
    "name, reference",
    [
        ("AdamW8bit", lambda groups: make(groups, TrainConfig(optimizer_type="AdamW", weight_decay=0.01))),
        ("Lion8bit", lambda groups: Lion(groups, 2e-2, 0.01)),
    ],
)
def test_an_8_bit_optimizers_curve_is_its_32_bit_ones(name, reference):
    config = TrainConfig(optimizer_type=name, weight_decay=0.01)
    losses, weight, optimizer = curve(lambda groups: make(groups, config), 64)
    quantized = [t for t in optimizer.state[optimizer.param_groups[0]["params"][0]].values()]
    assert any(torch.is_tensor(t) and t.dtype == torch.uint8 for t in quantized), "nothing was quantized"
    expected, exact, _ = curve(reference, 64)
    assert expected[-1] < 0.5 * expected[0]
    assert losses == pytest.approx(expected, rel=0.05)
    assert (weight - exact).norm() < 0.05 * exact.norm()
    assert not torch.equal(weight, exact)


def test_small_tensors_are_not_quantized():
    """Makes the test above meaningful: below 4,096 elements, the state stays 32-bit."""
    config = TrainConfig(optimizer_type="AdamW8bit", weight_decay=0.01)
    _, weight, optimizer = curve(lambda groups: make(groups, config), 32)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert not any(torch.is_tensor(t) and t.dtype == torch.uint8 for t in state.values())
    _, exact, _ = curve(lambda groups: make(groups, config.with_values({"optimizer_type": "AdamW"})), 32)
    torch.testing.assert_close(weight, exact, rtol=1e-4, atol=1e-5)
