"""A base that has the compute type already is trained without autocast."""

from __future__ import annotations

import pytest
import torch

from tests.pretendcard import pretend_card
from tests.tiny import in_type, tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import Adapter, inject
from trainer.events import Step
from trainer.loop.loop import train


def losses(family: str, kind: torch.dtype) -> list[float]:
    """Losses of a run on the pretend card, whose autocast has CUDA's lists."""
    with pretend_card():
        base = tiny_base(family)
        in_type(base, kind)
        base.to("cuda")
        precision = "bf16" if kind == torch.bfloat16 else "no"
        config = tiny_config(mixed_precision=precision, max_train_epochs=3, train_batch_size=2)
        adapter = inject(base, config)
        prepared = tiny_prepared(base, config)
        return [event.loss for event in train(config, base, adapter, prepared) if isinstance(event, Step)]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_losses_are_as_near_to_fp32_as_those_with_autocast(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in bf16, as when images are drawn, against norms in fp32: both differ by bf16's rounding. Tolerance: 0.5 %
    between the two."""
    without, exact = losses(family, torch.bfloat16), losses(family, torch.float32)
    monkeypatch.setattr(Adapter, "needs_autocast", True)
    with_autocast = losses(family, torch.bfloat16)
    assert without != with_autocast
    assert without == pytest.approx(with_autocast, rel=5e-3)
    assert without == pytest.approx(exact, rel=1e-2)
    assert with_autocast == pytest.approx(exact, rel=1e-2)
