"""torch_compile: as many graphs as a U-Net has widths, whatever differs between steps and trials, and the same
results.  The graphs are traced and run without a compiler of machine code; ``-m slow`` compiles them too."""

import functools

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.bases.base import TextStates
from trainer.compute import fp8
from trainer.compute.speed import faster, without_graphs
from trainer.data import preflight
from trainer.events import Step
from trainer.loop import loop
from trainer.loop.loop import train

WIDTHS = 2  # of the transformer blocks of tiny_base("sd15")


@pytest.fixture
def compiled(monkeypatch):
    """Training with torch_compile, and nothing compiled before."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(loop, "faster", functools.partial(faster, backend="eager"))
    yield
    torch._dynamo.reset()


def trained(base, **values):
    """Losses and weights of a run of a few steps; the last batch of an epoch is smaller."""
    usual: dict[str, object] = {
        "train_batch_size": 4,
        "max_train_steps": 2,
        "max_train_epochs": None,
        "mixed_precision": "no",
    }
    config = tiny_config(**{**usual, **values})
    adapter = inject(base, config)
    try:
        events = list(train(config, base, adapter, tiny_prepared(base, config, images=6)))
        return [event.loss for event in events if isinstance(event, Step)], adapter.state()
    finally:
        adapter.remove()


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def test_graphs_are_made_once_for_all_steps_batches_ranks_buckets_and_trials(compiled):
    base = tiny_base("sd15")
    for network_dim, alpha, dropout, more in (
        (2, 2, 0.3, {}),
        (4, 1, 0.1, {"rank_dropout": 0.2}),
        (3, 3, 0.5, {"micro_batch_size": 2}),
    ):
        values = {"network_dim": network_dim, "network_alpha": alpha, "network_dropout": dropout, **more}
        losses, weights = trained(base, torch_compile=True, **values)
        assert graphs() == WIDTHS
        plain_losses, plain = trained(base, **values)
        assert losses == pytest.approx(plain_losses, abs=1e-5)
        assert max(float((weights[key] - plain[key]).abs().max()) for key in plain) < 1e-5
    assert all(block._compiled_call_impl is None for block in base.unet.modules())
    config = tiny_config(torch_compile=True, network_dropout=0.1)
    adapter = inject(base, config)
    with faster(base, config, backend="eager"):
        for height, width in ((8, 16), (24, 8), (16, 24)):
            states = TextStates(torch.randn(2, 77, 16, requires_grad=True))
            found = base.predict(torch.randn(2, 4, height, width), torch.tensor([1, 500]), states, [])
            found.square().mean().backward()
            assert graphs() == WIDTHS
    assert any(weight.grad is not None for weight in adapter.trainable())
    assert not without_graphs(config)


@pytest.mark.parametrize(
    "values",
    [{"network_type": "LoHa"}, {"network_type": "DoRA"}, {"module_dropout": 0.5}, {"fp8_base": True}],
    ids=["LoHa", "DoRA", "module_dropout", "fp8"],
)
def test_blocks_with_layers_that_cannot_be_in_a_graph_compute_without_one(compiled, values):
    base = tiny_base("sd15")
    if "fp8_base" in values:
        fp8.convert(base.unet)
    losses, weights = trained(base, torch_compile=True, max_train_steps=1, **values)
    assert graphs() == 0
    config = tiny_config(torch_compile=True, **values)
    (said,) = (
        line for line in preflight.notes(base, config, tiny_prepared(base, config).dataset) if "torch" in line
    )
    assert str(next(iter(values.values()))) in said or next(iter(values)) in said
    plain_losses, plain = trained(base, max_train_steps=1, **values)
    assert losses == plain_losses and all(torch.equal(weights[key], plain[key]) for key in plain)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_learns_the_same(backend, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(loop, "faster", functools.partial(faster, backend=backend))
    base = tiny_base("sd15")
    for rank in (2, 5):
        values = {"network_dim": rank, "network_dropout": 0.2, "gradient_checkpointing": True}
        losses, weights = trained(base, torch_compile=True, **values)
        assert graphs() == WIDTHS
        plain_losses, plain = trained(base, **values)
        assert losses == pytest.approx(plain_losses, abs=1e-4)
        assert max(float((weights[key] - plain[key]).abs().max()) for key in plain) < 1e-4
    torch._dynamo.reset()
