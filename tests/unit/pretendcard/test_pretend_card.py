"""The pretend card behaves as CUDA does: what it refuses, counts and runs out of."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.pretendcard import FORMS, GB, CardTensor, State, WouldSynchronize, pretend_card
from tests.pretendcard.autocast import unknown_operators
from trainer.oom import is_out_of_memory


@pytest.fixture
def card() -> Iterator[State]:
    with pretend_card(GB) as card:
        yield card


def on_card(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


# Devices


def test_tensors_say_cuda_and_compute_what_the_cpu_does(card: State) -> None:
    plain = torch.randn(3, 4)
    there = plain.to("cuda")
    assert there.device == torch.device("cuda", 0) and there.is_cuda and not there.is_cpu
    assert there.get_device() == 0 and isinstance(there, CardTensor)
    assert torch.equal((there @ there.T).softmax(-1).cpu(), (plain @ plain.T).softmax(-1))
    assert torch.zeros_like(there).device.type == there.new_zeros(2).device.type == "cuda"
    assert torch.tensor([1, 2], device="cuda").sum().item() == 3
    assert there[torch.tensor([2, 0])].device.type == "cuda"  # indices may be on the CPU
    assert (there * torch.tensor(2.0)).device.type == "cuda"  # and so may single numbers
    assert plain.type_as(there).device.type == "cuda" and there.type_as(plain).device.type == "cpu"
    assert repr(there).endswith("device='cuda:0')")


MIXED: dict[str, Callable[[], Any]] = {
    "elements": lambda: on_card(3) + torch.ones(3),
    "product": lambda: on_card(3, 3) @ torch.ones(3, 3),
    "list": lambda: torch.cat([on_card(3), torch.ones(3)]),
    "number in a list": lambda: torch.stack([on_card(1)[0], torch.ones(())]),
    "layer": lambda: nn.Linear(3, 3)(on_card(2, 3)),
    "norm": lambda: functional.group_norm(on_card(1, 4, 2, 2), 2, torch.ones(4), torch.zeros(4)),
    "embedding": lambda: functional.embedding(torch.zeros(2, dtype=torch.long), on_card(4, 4)),
    "in place": lambda: torch.ones(3).add_(on_card(3)),
    "foreach": lambda: torch._foreach_add([on_card(3)], [torch.ones(3)]),
    "another card": lambda: on_card(3) + torch.ones(3, device="cuda:1"),
}


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(name: str) -> None:
    with (
        pretend_card(GB, devices=2),
        pytest.raises(RuntimeError, match="Expected all tensors to be on the same"),
    ):
        MIXED[name]()


def test_what_else_cuda_refuses(card: State) -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        on_card(2).numpy()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        np.asarray(on_card(2))
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")]
    with pytest.raises(torch.AcceleratorError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:1")
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        on_card(2).pin_memory()


def test_generators_belong_to_a_device(card: State) -> None:
    own = torch.Generator("cuda").manual_seed(5)
    assert own.device == torch.device("cuda", 0) and isinstance(own, torch.Generator)
    drawn = torch.randn(3, device="cuda", generator=own)
    assert torch.equal(drawn.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(5)))
    on_card(3).bernoulli_(0.5, generator=own)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        on_card(3).bernoulli_(0.5, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.randn(3, generator=own)


def test_modules_move_and_their_parameters_stay_the_same_objects(card: State) -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight
    layer(torch.ones(1, 3)).sum().backward()
    layer.to("cuda")
    assert layer.weight is weight and weight.device.type == "cuda" and isinstance(weight, nn.Parameter)
    assert weight.requires_grad and weight.grad is not None and weight.grad.device.type == "cuda"
    weight.grad = None
    double = copy.deepcopy(layer)
    assert isinstance(double.weight, nn.Parameter) and double.weight.device.type == "cuda"
    weight.data = weight.data.to(torch.bfloat16)
    assert weight.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32
    layer.cpu()
    assert layer.weight is weight and type(weight) is nn.Parameter and weight.device.type == "cpu"


def test_gradients_cross_devices(card: State) -> None:
    """Networks whose parts are on two devices, as with a text encoder on the CPU."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 1).to("cuda")
    second(first(torch.ones(2, 3)).to("cuda")).sum().backward()
    assert first.weight.grad is not None and type(first.weight.grad) is Tensor
    assert second.weight.grad is not None and second.weight.grad.device.type == "cuda"


def test_optimizers_take_their_cuda_path(card: State) -> None:
    """Lists of tensors in one kernel, as they are by default on CUDA only."""
    layer = nn.Linear(3, 2).to("cuda")
    layer(on_card(1, 3)).sum().backward()
    plain, fused = torch.optim.AdamW(layer.parameters()), torch.optim.AdamW(layer.parameters(), fused=True)
    for optimizer, name in ((plain, "_foreach_addcdiv_"), (fused, "_fused_adamw_")):
        with card.count() as counts:
            optimizer.step()
        assert counts.ops[name] == 1 and not counts.syncs
    assert fused.state[layer.weight]["step"].device.type == "cuda"
    assert torch.nn.utils.get_total_norm([layer.weight.grad]).device.type == "cuda"  # type: ignore[list-item]


def test_a_thread_sees_the_card(card: State) -> None:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2).to("cuda") + on_card(2)))
    thread.start()
    thread.join()
    assert found[0].device.type == "cuda"


def test_torch_is_as_before_afterwards() -> None:
    before = torch.cuda.is_available(), torch.Generator, torch.cuda.mem_get_info, threading.Thread.run
    with pytest.raises(ZeroDivisionError), pretend_card():
        assert torch.cuda.is_available() and torch.cuda.mem_get_info() == (16 * GB, 16 * GB)
        raise ZeroDivisionError
    assert before == (
        torch.cuda.is_available(),
        torch.Generator,
        torch.cuda.mem_get_info,
        threading.Thread.run,
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert type(torch.ones(2) + 1) is Tensor


# Autocast


def test_every_operator_that_pytorch_casts_for_cuda_is_cast() -> None:
    assert unknown_operators() == set()


def test_autocast_is_that_of_cuda(card: State) -> None:
    x, w = on_card(2, 4), nn.Parameter(on_card(4, 4))
    half = on_card(2, 4).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        low = functional.linear(x, w)
        assert low.dtype == (half @ x.T).dtype == torch.bfloat16
        image = functional.conv2d(on_card(1, 4, 2, 2), on_card(4, 4, 1, 1))
        assert image.dtype == torch.bfloat16
        query = low[None, None]
        assert functional.scaled_dot_product_attention(query, query, query).dtype == torch.bfloat16
        for result in (
            functional.layer_norm(half, (4,)),
            functional.group_norm(image, 2),
            half.softmax(-1),
            half.sum(),
            half.exp(),
            half**2,
            functional.mse_loss(half, half),
        ):
            assert result.dtype == torch.float32
        assert (half * 2).dtype == torch.bfloat16 and (half + x).dtype == torch.float32
        assert (
            functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == torch.float32
        )  # the CPU's is off
    low.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    assert functional.linear(x, w).dtype == torch.float32


def test_a_weight_is_cast_once_in_an_autocast_block(card: State) -> None:
    x, w = on_card(2, 4).bfloat16(), nn.Parameter(on_card(4, 4))
    for _ in range(2):
        with card.count() as counts, torch.autocast("cuda", torch.bfloat16):
            for _ in range(3):
                functional.linear(x, w)
        assert counts.ops["_to_copy"] == 1


# Counting


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "number": lambda x: float(x.sum()),
    "truth": lambda x: bool((x > 0).all()),
    "list": lambda x: x.tolist(),
    "copy": lambda x: x.cpu(),
    "copy by to": lambda x: x.to("cpu", torch.float64),
    "copy into": lambda x: torch.empty(3).copy_(x),
    "copy there": lambda x: torch.ones(3).to("cuda"),
    "copy there unpinned": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "pinned but blocking": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "made from a list": lambda x: torch.tensor([1.0], device="cuda"),
    "mask": lambda x: x[x > 0],
    "mask set": lambda x: x.__setitem__(x > 0, x.clone()),
    "nonzero": lambda x: x.nonzero(),
    "indices": lambda x: x[torch.tensor([0])],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "format": lambda x: f"{x.sum():.3f}",
}
DOES_NOT_WAIT: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + 1).relu_().sum(),
    "factory": lambda x: torch.zeros(3, device="cuda"),
    "full": lambda x: torch.full((3,), 2.0, device="cuda"),
    "pinned": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "pinned factory": lambda x: x.copy_(torch.ones(3, pin_memory=True), non_blocking=True),
    "back": lambda x: x.to("cpu", non_blocking=True),
    "back into pinned": lambda x: torch.ones(3, pin_memory=True).copy_(x, non_blocking=True),
    "shape": lambda x: x.shape[0] + x.numel(),
    "cast": lambda x: x.to(torch.bfloat16).float(),
    "the cpu's own": lambda x: torch.ones(3).sum().item(),
    "mask set to a number": lambda x: x.__setitem__(x > 0, 1.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_card_is_counted_and_can_be_forbidden(card: State, name: str) -> None:
    x = on_card(3)
    with card.count() as counts:
        WAITS[name](x)
    assert len(counts.syncs) == 1
    assert counts.syncs[0].place.startswith("tests/unit/pretendcard/test_pretend_card.py:")
    with pytest.raises(WouldSynchronize, match="called a synchronizing CUDA operation"), card.forbid_syncs():
        WAITS[name](x)


@pytest.mark.parametrize("name", DOES_NOT_WAIT)
def test_what_does_not_wait(card: State, name: str) -> None:
    x = on_card(3)
    with card.count() as counts, card.forbid_syncs():
        DOES_NOT_WAIT[name](x)
    assert not counts.syncs


def test_bytes_and_launches_are_counted(card: State) -> None:
    with card.count() as outer:
        with card.count() as counts:
            x = torch.ones(10, 10).to("cuda")
            x.half().cpu()
        assert (counts.to_card_bytes, counts.to_host_bytes) == (400, 200)
        assert (counts.uploads, counts.downloads) == (1, 1) and counts.launches == 1
        with card.count() as counts:
            x.T[1:].unsqueeze(0).expand(2, -1, -1).detach()  # views
            torch.empty(3, device="cuda")
        assert counts.launches == 0
    assert outer.launches == 1
    many = [on_card(4) for _ in range(800)]
    with card.count() as counts:
        torch._foreach_mul_(many, 2.0)
    assert counts.launches == 2  # 770 tensors fit into one
    with card.count() as counts:
        functional.conv2d(on_card(1, 2, 4, 4), on_card(2, 2, 1, 1), on_card(2))
    assert counts.ops["convolution"] == 2  # the bias is a kernel of its own


# Memory


def test_memory_lives_as_long_as_a_storage(card: State) -> None:
    used = torch.cuda.memory_allocated
    x = torch.zeros(1000, device="cuda")
    assert used() == 4096  # in blocks of 512 bytes
    view = x[10:].view(-1, 9)
    del x
    assert used() == 4096
    weight = nn.Parameter(view.clone())
    (weight * 2).sum().backward()
    assert used() == 3 * 4096
    del view, weight
    gc.collect()
    assert used() == 0 and torch.cuda.max_memory_allocated() >= 3 * 4096
    free, total = torch.cuda.mem_get_info()
    assert total == GB and free < GB  # the cache keeps it
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] == GB


def test_a_full_card_raises_what_the_allocator_raises() -> None:
    with pretend_card(10_000) as card:
        held = torch.zeros(2000, device="cuda")
        with pytest.raises(
            torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 7\.81 KiB\. GPU 0"
        ):
            held + 1
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2000).to("cuda")
        del held
        assert card.memories[0].used == 0
        torch.zeros(2000, device="cuda")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_out_of_memory_comes_at_the_nth_allocation(card: State, form: str) -> None:
    where, kind, text = FORMS[form]
    x, image = on_card(4, 4), on_card(1, 1, 4, 4)
    kernel = on_card(1, 1, 1, 1)
    card.run_out(at=2, form=form)
    held = [x + 1, x + 1]
    with pytest.raises(kind) as raised:
        held.append(x + 1)
        assert where != "any"
        _ = x @ x if where == "matmul" else functional.conv2d(image, kernel)
    assert str(raised.value).startswith(text or "CUDA out of memory.")
    x @ x  # it is over
    if form == "allocator":
        assert is_out_of_memory(raised.value)


def test_what_is_saved_can_be_loaded(card: State) -> None:
    file = io.BytesIO()
    with card.count() as counts:
        torch.save({"a": on_card(2) + 1, "b": torch.ones(1)}, file)
    assert len(counts.syncs) == 1 and counts.to_host_bytes == 8
    file.seek(0)
    found = torch.load(file, weights_only=True, map_location="cpu")
    assert found["a"].tolist() == [2.0, 2.0] and type(found["a"]) is Tensor


def test_two_cards_have_a_memory_each() -> None:
    with pretend_card(GB, devices=2) as card:
        x = torch.zeros(1000, device="cuda:1")
        assert (torch.cuda.memory_allocated(0), torch.cuda.memory_allocated("cuda:1")) == (0, 4096)
        assert card.touched == {1}
        torch.cuda.set_device(1)
        assert on_card(2).device.index == 1 and x.to("cuda").device.index == 1
        assert x.to("cuda:0").device.index == 0
