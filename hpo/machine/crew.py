"""How many workers a command starts on this machine, and the device of each.

Owns the rule: without ``--workers`` and ``--device`` one worker on every free GPU; with ``--workers`` as many as asked
for, each on a GPU of its own, or on the CPU with a share of its cores.  Opens no CUDA context and takes no lock, as
the process that asks does not work on a device itself.
"""

from __future__ import annotations

from hpo.machine import nvidia, registry
from hpo.machine.device import (
    BUSY_SHARE,
    ON_CPU,
    Say,
    Seen,
    cards_seen,
    cuda_trouble,
    kernel_trouble,
    used_shares,
)
from hpo.machine.threads import allowed_cores
from hpo.machine.wheel import Trouble
from trainer.errors import ConfigError, MachineError


def worker_devices(
    workers: int | None, given: str | None, say: Say, most: int | None = None
) -> tuple[str, ...]:
    """The device of each worker; empty if this process is the only one, and chooses its device itself.

    ``workers`` and ``given``: the values of --workers and --device.  ``most``: without --workers, no more than that,
    as there is no more to do.  Raises ConfigError for more workers than there is room for, and MachineError if too few
    GPUs are free.
    """
    if workers == 1 or (workers is None and given is not None):
        return ()
    if given == "cpu":
        return _on_cpu(workers or 1)
    if given is not None and ":" in given:
        raise ConfigError(
            f"--workers {workers}: {given} is one GPU, for one worker", "leave out --device, or --workers"
        )
    trouble = cuda_trouble(asks=bool(nvidia.traces()))
    if trouble is not None and (workers is None or nvidia.traces() or given is not None):
        if workers is None:
            return ()  # it says so itself, or uses the CPU
        raise MachineError(
            f"--workers {workers}: no GPU can be used: {trouble.what}", f"{trouble.todo}; or {ON_CPU}"
        )
    if trouble is not None:
        return _on_cpu(workers or 1)
    seen = cards_seen()
    cards = [card for card in seen if kernel_trouble(card) is None]
    if workers is not None and not cards:
        why = next(
            (found for card in seen if (found := kernel_trouble(card))), Trouble("none is visible", "")
        )
        raise MachineError(f"--workers {workers}: no GPU can be used: {why.what}", ON_CPU)
    return _on_all(cards, say, most) if workers is None else _on_gpus(cards, workers)


def _on_cpu(workers: int) -> tuple[str, ...]:
    cores = allowed_cores()
    if workers > cores:
        raise ConfigError(
            f"--workers {workers}: this machine has {cores} CPU core{'s'[: cores != 1]} for them",
            f"give --workers {cores} or less",
        )
    return ("cpu",) * workers


def _on_gpus(cards: list[Seen], workers: int) -> tuple[str, ...]:
    if workers > len(cards):
        raise ConfigError(
            f"--workers {workers}: a worker needs a GPU of its own, and {len(cards)} "
            f"{'is' if len(cards) == 1 else 'are'} usable here",
            f"give --workers {len(cards)} or less; or --device cpu, where each gets a share of the cores",
        )
    taken = _taken(cards)
    free = [card.device for card in cards if card.device not in taken]
    if workers > len(free):
        who = ", ".join(f"{device} by {user}" for device, user in taken.items())
        raise MachineError(
            f"--workers {workers}: only {len(free)} of {len(cards)} GPUs are free (in use: {who})",
            f"wait for it, stop it, or give --workers {len(free)}" if free else "wait for it, or stop it",
        )
    used = used_shares()
    first = sorted(free, key=lambda device: _is_busy(cards, device, used))[:workers]
    return tuple(sorted(first, key=free.index))


def _on_all(cards: list[Seen], say: Say, most: int | None) -> tuple[str, ...]:
    if len(cards) < 2:
        return ()
    taken, used = _taken(cards), used_shares()
    free = [card.device for card in cards if card.device not in taken]
    busy = [device for device in free if _is_busy(cards, device, used)]
    chosen = tuple(device for device in free if device not in busy)[:most]
    if len(chosen) < 2:
        return ()
    for device, user in taken.items():
        say(f"{device} is left out: it is in use by {user}")
    for device in busy:
        say(f"{device} is left out: other programs use much of its memory")
    return chosen


def _taken(cards: list[Seen]) -> dict[str, str]:
    """Device → who uses it, of the cards that other processes of this tool use."""
    users = {card.device: registry.user_of_gpu(card.uuid) for card in cards if card.uuid}
    return {device: user for device, user in users.items() if user}


def _is_busy(cards: list[Seen], device: str, used: dict[str, float]) -> bool:
    uuid = next(card.uuid for card in cards if card.device == device)
    return used.get(uuid, 0.0) > BUSY_SHARE
