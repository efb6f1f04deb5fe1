"""The device of this process: the one place that chooses it, and says why.

A GPU is used if there is one, and every process takes one of its own.  A card that is there and cannot be used is
never replaced by the CPU without a word: somebody would lose a night.  Nothing here opens a CUDA context on another
card than the chosen one: properties are read without a context, and the card becomes the current one before any work.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from hpo.machine import nvidia, registry, wheel
from hpo.machine.wheel import Trouble
from trainer.bases import is_miniature
from trainer.errors import ConfigError, MachineError, NoDevice, first_line
from trainer.text import clean_text

Say = Callable[[str], None]
VISIBLE = "CUDA_VISIBLE_DEVICES"
BUSY_SHARE = 0.25  # a card with more of its memory in use by other programs is taken last
ON_CPU = "add --device cpu to use the CPU"
# The device that a supervisor gave to this worker (``hpo.machine.crew``).  It is not what the user asked for, so it is
# not recorded, and it is never shared with another process.
ASSIGNED: ContextVar[str | None] = ContextVar("ASSIGNED", default=None)


@dataclass(frozen=True)
class Seen:
    """A card as PyTorch counts it.  ``capability``: None if it cannot be told, or is not NVIDIA's.

    ``uuid``: "" if it cannot be told; then nothing is agreed with other processes, as numbers mean other cards there.
    """

    index: int
    uuid: str
    name: str
    capability: tuple[int, int] | None

    @property
    def device(self) -> str:
        return f"cuda:{self.index}"


def own_device(
    given: str | None,
    *,
    base: str,
    precision: str = "auto",
    say: Say = lambda line: None,
    local_rank: int = 0,
    ranks: int = 1,
) -> str:
    """The device of this process, checked and made the current one: ``cpu`` or ``cuda:N``.

    ``given``: the value of --device.  ``base``: what is loaded, as a miniature may run on a CPU without a word.
    ``precision``: mixed_precision of the settings.  ``local_rank`` and ``ranks``: of a launcher, which has shared out
    the cards already.  Raises MachineError if no device can be used as asked for, or every GPU is in use.
    """
    if given is not None:
        _check_form(given)
    assigned = ASSIGNED.get()
    if given in (None, "cuda") and assigned is not None:
        return _cpu(base, say) if assigned == "cpu" else _assigned(assigned, precision, say)
    if given == "cpu":
        return given
    found = nvidia.traces()
    trouble = cuda_trouble(asks=bool(found))
    if trouble is None:
        cards = cards_seen()
        trouble = _no_card_fits(cards) if given in (None, "cuda") else None
        if trouble is None:
            return _gpu(cards, given, precision, say, local_rank, ranks)
        found = found or (cards[0].device,)
    if given is not None:
        raise _refused(given, trouble, bool(found))
    if found and hides_all():
        say(f"{VISIBLE} hides all GPUs: the CPU is used")
    elif found and is_miniature(base):
        say(f"warning: the GPU cannot be used, so the CPU is: {trouble.what}; {trouble.todo}")
    elif found:
        raise MachineError(
            f"there is a GPU, but it cannot be used: {trouble.what}", f"{trouble.todo}; or {ON_CPU}"
        )
    return _cpu(base, say)


def _assigned(device: str, precision: str, say: Say) -> str:
    """The GPU that this worker was given.  Raises NoDevice."""
    trouble = cuda_trouble(asks=bool(nvidia.traces()))
    if trouble is not None:
        raise NoDevice(f"device {device} cannot be used: {trouble.what}", trouble.todo)
    try:
        card = _named(cards_seen(), device)
        if not registry.has_gpu(card.uuid) and not registry.take_gpu(card.uuid):
            who = registry.user_of_gpu(card.uuid) or "another process"
            raise NoDevice(f"{device} is in use by {who}", "wait for it, or stop it")
        return _begun(card, precision, say)
    except MachineError as error:
        raise NoDevice(error.message, error.hint) from None


def check_device(device: str) -> None:
    """Refuse a device that does not exist or is not supported.  Takes no lock."""
    _check_form(device)
    if device == "cpu":
        return
    found = nvidia.traces()
    trouble = cuda_trouble(asks=bool(found))
    if trouble is None and device == "cuda":
        trouble = _no_card_fits(cards_seen())
    if trouble is not None:
        raise _refused(device, trouble, bool(found))
    if ":" in device:
        _named(cards_seen(), device)


def _refused(device: str, trouble: Trouble, has_card: bool) -> MachineError:
    """The error for a device that was asked for.  What to do about a card is of use only where there is one."""
    choice = "leave out --device, or give cpu"
    return MachineError(
        f"device {device} cannot be used: {trouble.what}",
        f"{trouble.todo}; or {choice}" if has_card else choice,
    )


def hides_all(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has hidden every GPU on purpose."""
    value = environment.get(VISIBLE)
    return value is not None and (not value.strip() or value.strip().startswith(("-", "NoDevFiles")))


def cuda_trouble(*, asks: bool) -> Trouble | None:
    """Why CUDA cannot be used in this process; None if it can.

    ``asks``: nvidia-smi is asked first, because a driver that hangs would hang this process too.
    """
    import torch

    if asks and not torch.cuda.is_initialized():
        answer = nvidia.ask()
        if answer.timed_out:
            return wheel.explain(answer.reason, torch.version.cuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    said = (str(warning.message) for warning in caught)
    reason = next((text.splitlines()[0] for text in said if "CUDA" in text), "")
    if not reason:
        try:
            torch.cuda.init()
            return None
        except (RuntimeError, AssertionError, AttributeError) as error:
            reason = first_line(error)
    return wheel.explain(clean_text(reason), torch.version.cuda)


def _check_form(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(
            f"device {device!r} is not known", "give cpu, cuda or cuda:1, or leave out --device"
        )


def _cpu(base: str, say: Say) -> str:
    if not is_miniature(base):
        say("warning: no GPU is used: on the CPU everything but the miniature bases takes hours to days")
    return "cpu"


def cards_seen() -> list[Seen]:
    """The cards that PyTorch sees, in its order.  Opens no context."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        try:
            about = torch.cuda.get_device_properties(index)
            capability = None if torch.version.hip else (int(about.major), int(about.minor))
            uuid = str(getattr(about, "uuid", "")).removeprefix("GPU-")
            found.append(Seen(index, uuid, clean_text(str(about.name)), capability))
        except (RuntimeError, AssertionError, AttributeError):
            found.append(Seen(index, "", f"GPU {index}", None))
    return found


def gpu_uuid(device: str) -> str:
    """The UUID of the card that PyTorch calls ``device``; "" for a CPU, and where it is not told."""
    name = "cuda:0" if device == "cuda" else device
    if not name.startswith("cuda"):
        return ""
    return next((card.uuid for card in cards_seen() if card.device == name), "")


def kernel_trouble(card: Seen) -> Trouble | None:
    import torch

    built = torch.cuda.get_arch_list()
    if card.capability is None or not built or wheel.has_kernels(built, card.capability):
        return None
    return wheel.no_kernels(card.name, card.capability, built)


def _no_card_fits(cards: list[Seen]) -> Trouble | None:
    """Why none of the cards can be used; None if one can."""
    troubles = [kernel_trouble(card) for card in cards]
    return None if any(trouble is None for trouble in troubles) else next(iter(troubles), Trouble("", ""))


def _named(cards: list[Seen], device: str) -> Seen:
    """The card that --device names."""
    index = int(device.partition(":")[2])
    for card in cards:
        if card.index == index:
            if trouble := kernel_trouble(card):
                raise MachineError(f"device {device} cannot be used: {trouble.what}", trouble.todo)
            return card
    visible = f" ({VISIBLE} is {os.environ[VISIBLE]})" if VISIBLE in os.environ else ""
    known = ", ".join(card.device for card in cards)
    raise MachineError(
        f"device {device} cannot be used: there is no such GPU{visible}", f"give one of: {known}; or cpu"
    )


def _gpu(cards: list[Seen], given: str | None, precision: str, say: Say, local_rank: int, ranks: int) -> str:
    if ranks > 1:
        if not (given and ":" in given) and local_rank >= len(cards):
            most = len(cards)
            raise MachineError(
                f"process {local_rank + 1} of this machine has no GPU: {most} {'is' if most == 1 else 'are'} visible",
                f"start at most {most}: torchrun --nproc-per-node {most}, accelerate launch --num_processes {most}",
            )
        card = _named(cards, given if given and ":" in given else f"cuda:{local_rank}")
    elif given and ":" in given:
        card = _named(cards, given)
        if not registry.take_gpu(card.uuid):
            who = registry.user_of_gpu(card.uuid) or "another process"
            say(f"warning: {given} is shared with {who}; both need memory there")
    else:
        card = _first_that_works(cards, say)
    return _begun(card, precision, say)


def _begun(card: Seen, precision: str, say: Say) -> str:
    """Make a card the current one.  Raises MachineError."""
    if trouble := _opening_trouble(card):
        raise _unusable(card, trouble)
    if line := _lacking(card, precision):
        say(line)
    return card.device


def _first_that_works(cards: list[Seen], say: Say) -> Seen:
    """A card for this process that could be opened.  A line for each that could not."""
    card = _free(cards, say)
    while trouble := _opening_trouble(card):
        cards = [other for other in cards if other is not card]
        if _no_card_fits(cards):
            raise _unusable(card, trouble)
        say(f"warning: {card.device} cannot be used: {trouble.what}; the next GPU is tried")
        card = _free(cards, say, many=True)
    return card


def _opening_trouble(card: Seen) -> Trouble | None:
    """Make a card the current one and allocate there.  Where that fails: why, and its lock is given back."""
    import torch

    try:
        torch.cuda.set_device(card.index)
        torch.zeros(1, device=card.device)
    except (RuntimeError, AssertionError, ValueError) as error:
        registry.leave_gpu(card.uuid)
        return wheel.explain(first_line(error), torch.version.cuda)
    return None


def _unusable(card: Seen, trouble: Trouble) -> MachineError:
    return MachineError(
        f"device {card.device} cannot be used: {trouble.what}", f"{trouble.todo}; or {ON_CPU}"
    )


def _free(cards: list[Seen], say: Say, *, many: bool = False) -> Seen:
    """The first card that no other process of this tool uses, locked for this process.  ``many``: this machine has
    more cards than these, so the choice is said."""
    for card in cards:
        if registry.has_gpu(card.uuid):
            return card
    usable = [card for card in cards if kernel_trouble(card) is None]
    used = used_shares() if len(usable) > 1 else {}
    taken: list[str] = []
    for card in sorted(usable, key=lambda card: used.get(card.uuid, 0.0) > BUSY_SHARE):
        if not registry.take_gpu(card.uuid):
            taken.append(f"{card.device} by {registry.user_of_gpu(card.uuid) or 'another process'}")
            continue
        if many or len(cards) > 1:
            passed = f" (in use: {', '.join(taken)})" if taken else ""
            say(f"using {card.device}, {card.name}{passed}")
        return card
    raise MachineError(
        f"every GPU is in use: {', '.join(taken)}",
        f"wait for it, or stop it; to share the card, if both fit into its memory: --device {usable[0].device}",
    )


def used_shares() -> dict[str, float]:
    """The share of each card's memory that is in use, by UUID.  Empty if it cannot be told."""
    return {
        card.uuid.removeprefix("GPU-"): card.used_bytes / card.total_bytes
        for card in nvidia.ask().cards
        if card.used_bytes is not None and card.total_bytes
    }


def _lacking(card: Seen, precision: str) -> str:
    """One line on what the card cannot do; "" if there is nothing to say."""
    if card.capability is None:
        return ""
    lacks = wheel.lacks(card.capability, precision)
    return f"{card.name} has {'; '.join(lacks)}" if lacks else ""
