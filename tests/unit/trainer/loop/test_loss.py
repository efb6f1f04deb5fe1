"""The loss formulas on values that can be computed by hand."""

import torch

from tests.tiny import SCHEDULER
from trainer.bases.base import alphas_cumprod
from trainer.config import TrainConfig
from trainer.loop.loss import add_noise, min_snr_weight, offset_noise, sample_losses

ALPHAS = alphas_cumprod(SCHEDULER)


def test_min_snr_leaves_noisy_steps_alone_and_damps_clean_ones():
    steps = torch.tensor([0, 999])
    snr = ALPHAS[steps] / (1 - ALPHAS[steps])
    weights = min_snr_weight(steps, ALPHAS, 5.0)
    assert snr[0] > 5 > snr[1]
    torch.testing.assert_close(weights, torch.stack([5 / snr[0], torch.ones(())]))


def test_each_sample_has_its_own_mean():
    predicted, target = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    target[1] = 3.0
    steps = torch.tensor([10, 900])
    assert sample_losses(predicted, target, steps, ALPHAS, TrainConfig()).tolist() == [0.0, 9.0]
    weighted = sample_losses(predicted, target, steps, ALPHAS, TrainConfig(min_snr_gamma=5.0))
    torch.testing.assert_close(weighted[1], 9.0 * min_snr_weight(steps, ALPHAS, 5.0)[1])


def test_offset_noise_moves_a_whole_channel():
    noise = torch.zeros(4, 2, 2)
    moved = offset_noise(noise, torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1), 0.1)
    torch.testing.assert_close(moved[:, 0, 0], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert torch.equal(moved[0], moved[0, :1, :1].expand(2, 2))


def test_noise_of_the_last_step_hides_almost_everything():
    x, e = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    assert add_noise(x, e, torch.tensor([999]), ALPHAS).max() < 0.07
    assert add_noise(x, e, torch.tensor([0]), ALPHAS).min() > 0.999
