"""Card: which networks are on the GPU, decided in one place from who is needed now.

Work is done in phases: encode text, encode images, train, denoise, decode, score. A phase names the networks that it
needs and the memory that it needs beside them. If both fit, nothing moves. Otherwise networks that the phase does not
need go to RAM first, as few bytes as possible; they come back when a phase needs them. The decision is made from the
card's free memory before the work begins, never by running out of memory.

Owns where a network's frozen weights are. Weights that are trained stay where they are, so that optimizers and
buffers that share their memory remain valid. Does not own how much memory work needs (``trainer.bases.needs``,
``trainer.memory.phases``). On a CPU nothing ever moves.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from trainer.oom import release

if TYPE_CHECKING:
    import torch
    from torch import nn

SPARE_BYTES = (
    300_000_000  # assumed: rounding of the allocator, cuBLAS, and what another program takes meanwhile
)

Work = int | Callable[[], int | None]


@dataclass(eq=False)
class Phase:
    """A piece of work, and the networks that it needs on the card. ``work_bytes``: None if not known, then it has the
    card to itself. ``in_ram``: networks that compute in RAM meanwhile."""

    name: str
    networks: tuple[nn.Module, ...]
    work_bytes: int | None
    in_ram: tuple[nn.Module, ...] = ()

    def needs(self, network: nn.Module) -> bool:
        return any(network is own for own in self.networks)

    def keeps_away(self, network: nn.Module) -> bool:
        return any(network is own for own in self.in_ram)


class Card:
    """The networks of one device. There is one for each device in a process: ``card_of``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moves = device.type == "cuda"
        self.spare_bytes = SPARE_BYTES
        self._phases: list[Phase] = []
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._away: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    # Who there is

    def add(self, network: nn.Module, name: str) -> None:
        """Take a network on. From now on, only the card moves it. On a CPU it is moved there and stays."""
        if not self.moves:
            _send(network, self.device, keep_trained=False)
        self._names[network] = name
        is_here = next(network.parameters()).device == self.device
        (self._away.discard if is_here else self._away.add)(network)

    def is_here(self, network: nn.Module) -> bool:
        return network not in self._away

    def residents(self) -> list[str]:
        """The names of the networks on the card."""
        return [name for network, name in self._names.items() if self.is_here(network)]

    def resident_bytes(self) -> int:
        """Bytes of the networks on the card. All but trained weights leave it where a phase needs the room."""
        return sum(nbytes(network) for network in self._names if self.is_here(network))

    @property
    def phase_name(self) -> str:
        """What is done now; empty between phases."""
        return self._phases[-1].name if self._phases else ""

    # Who is needed

    @contextlib.contextmanager
    def phase(
        self, name: str, *networks: nn.Module, work: Work | None = 0, in_ram: tuple[nn.Module, ...] = ()
    ) -> Iterator[None]:
        """A piece of work with these networks on the card, and ``work`` bytes free beside them.

        ``work`` may be a function, which is called only if the card may move something. None: everything that is not
        needed leaves the card. Phases may be nested; after an inner one, the outer one finds its networks again. An
        inner phase that needs no other networks changes nothing: the outer one has planned for it.
        """
        if not self.moves or self._is_planned(networks, in_ram):
            yield
            return
        now = Phase(name, networks, work() if callable(work) else work, in_ram)
        self._phases.append(now)
        try:
            self._settle(now)
            yield
        finally:
            self._phases.remove(now)
            if self._phases:
                self._settle(self._phases[-1])

    def require(self, *networks: nn.Module) -> None:
        """Bring networks that are needed at once, unless the phase computes with them in RAM."""
        if not self.moves:
            return
        missing = [n for n in networks if n in self._away and not self._stays_away(n)]
        if missing:
            self._make_room(networks, sum(map(nbytes, missing)))
            for network in missing:
                self.come(network)

    def space(self, *networks: nn.Module) -> int | None:
        """Bytes for work if only these networks were on the card; None where memory is not counted (CPU)."""
        if not self.moves:
            return None
        others = 0
        if not self._is_planned(networks, ()):  # inside a phase that has them, nothing moves
            others = sum(frozen_bytes(n) for n in self._names if self.is_here(n) and n not in networks)
        missing = sum(nbytes(n) for n in networks if n in self._away)
        return max(0, self.free_bytes() + others - missing - self.spare_bytes)

    # Deciding and moving

    def _is_planned(self, networks: tuple[nn.Module, ...], in_ram: tuple[nn.Module, ...]) -> bool:
        """Whether the running phase has these networks on the card already, or computes with them in RAM."""
        if not self._phases or not networks or in_ram:
            return False
        outer = self._phases[-1]
        return all(outer.needs(n) or outer.keeps_away(n) for n in networks)

    def _stays_away(self, network: nn.Module) -> bool:
        return bool(self._phases) and self._phases[-1].keeps_away(network)

    def _settle(self, now: Phase) -> None:
        """What a phase needs is on the card, with room for its work."""
        for network in now.in_ram:
            if self.is_here(network):
                self.leave(network)
        if now.work_bytes is None:
            for network in list(self._names):
                if self.is_here(network) and not now.needs(network):
                    self.leave(network)
            release(self.device)
        missing = [network for network in now.networks if network in self._away]
        if now.networks:
            self._make_room(now.networks, sum(map(nbytes, missing)) + (now.work_bytes or 0))
        for network in missing:
            self.come(network)

    def _make_room(self, needed: tuple[nn.Module, ...], wanted_bytes: int) -> None:
        """Send networks to RAM until so many bytes are free, or none is left that may go. Those that no outer phase
        needs go first; of these the smallest one that is enough, else the largest."""
        moved = False
        while (short := wanted_bytes + self.spare_bytes - self.free_bytes()) > 0:
            here = [n for n in self._names if self.is_here(n) and n not in needed and frozen_bytes(n)]
            unused = [n for n in here if not any(phase.needs(n) for phase in self._phases)]
            choice = sorted(unused or here, key=frozen_bytes)
            if not choice:
                break
            self.leave(next((n for n in choice if frozen_bytes(n) >= short), choice[-1]))
            moved = True
        if moved:
            release(self.device)

    # What a device can do; tests replace these

    def free_bytes(self) -> int:
        """Bytes that can be allocated now: free on the card, or cached by PyTorch and not in use."""
        import torch

        free = int(torch.cuda.mem_get_info(self.device)[0])
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + int(cached)

    def total_bytes(self) -> int | None:
        """The card's memory; None on a CPU."""
        if not self.moves:
            return None
        import torch

        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def leave(self, network: nn.Module) -> None:
        """Move the frozen weights of a network to RAM."""
        _send(network, "cpu", keep_trained=True)
        self._away.add(network)

    def come(self, network: nn.Module) -> None:
        """Move the weights of a network to the device."""
        _send(network, self.device, keep_trained=False)
        self._away.discard(network)


def _send(network: nn.Module, place: torch.device | str, *, keep_trained: bool) -> None:
    import torch

    place = torch.device(place)
    for parameter in network.parameters():
        if parameter.device != place and not (keep_trained and parameter.requires_grad):
            parameter.data = parameter.data.to(place)
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != place:
                module._buffers[name] = buffer.to(place)


def nbytes(network: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def frozen_bytes(network: nn.Module) -> int:
    """Bytes that leave the card with a network: weights that are not trained."""
    tensors = (*(p for p in network.parameters() if not p.requires_grad), *network.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def card_of(device: torch.device | str) -> Card:
    """The one card of a device in this process."""
    import torch

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _card(device)


@cache
def _card(device: torch.device) -> Card:
    return Card(device)
