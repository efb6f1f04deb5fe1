"""A model of PyTorch's caching allocator: allocated and reserved bytes for a sequence of allocations.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with default settings: sizes in multiples of 512 B;
up to 1 MiB from segments of 2 MiB, below 10 MiB from segments of 20 MiB, else segments rounded up to 2 MiB;
the smallest free block that fits is used and split unless little would be left, and neighbours are merged
when freed. There is one stream. Segments are not released, because the GPU is not full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20
SMALLEST_BYTES = 512
SMALL_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_FROM_BYTES = 10 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
ROUND_SEGMENT_BYTES = 2 * MIB


@dataclass(eq=False)
class _Piece:
    """A part of a segment, linked to its neighbours."""

    start: int
    size: int
    is_small: bool
    is_free: bool = True
    before: _Piece | None = None
    after: _Piece | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.start


class CachingAllocator:
    """Simulates allocation and freeing; ``allocated``, ``reserved`` and their peaks are in bytes."""

    def __init__(self) -> None:
        self.allocated = self.peak_allocated = self.reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._pieces: dict[int, _Piece] = {}
        self._end = 0

    def allocate(self, size_bytes: int) -> int:
        """Allocate a block; returns a handle for ``free``."""
        size = max(SMALLEST_BYTES, -(-size_bytes // SMALLEST_BYTES) * SMALLEST_BYTES)
        is_small = size <= SMALL_BYTES
        free = self._free[is_small]
        place = bisect_left(free, (size, 0))
        if place < len(free):
            piece = self._pieces[free.pop(place)[1]]
        else:
            piece = self._segment(size, is_small)
        left = piece.size - size
        if left >= SMALLEST_BYTES if is_small else left > SMALL_BYTES:
            self._cut(piece, size)
        piece.is_free = False
        self.allocated += piece.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return piece.start

    def free(self, handle: int) -> None:
        piece = self._pieces[handle]
        self.allocated -= piece.size
        piece.is_free = True
        free = self._free[piece.is_small]
        for neighbour in (piece.before, piece.after):
            if neighbour is not None and neighbour.is_free:
                del free[bisect_left(free, neighbour.key)]
        if piece.after is not None and piece.after.is_free:
            self._join(piece, piece.after)
        if piece.before is not None and piece.before.is_free:
            piece = self._join(piece.before, piece)
        insort(free, piece.key)

    def _segment(self, size: int, is_small: bool) -> _Piece:
        if is_small:
            whole = SMALL_SEGMENT_BYTES
        elif size < LARGE_FROM_BYTES:
            whole = LARGE_SEGMENT_BYTES
        else:
            whole = -(-size // ROUND_SEGMENT_BYTES) * ROUND_SEGMENT_BYTES
        self.reserved += whole
        piece = _Piece(self._end, whole, is_small)
        self._pieces[piece.start] = piece
        self._end += whole
        return piece

    def _cut(self, piece: _Piece, size: int) -> None:
        rest = _Piece(piece.start + size, piece.size - size, piece.is_small, True, piece, piece.after)
        if piece.after is not None:
            piece.after.before = rest
        piece.after, piece.size = rest, size
        self._pieces[rest.start] = rest
        insort(self._free[piece.is_small], rest.key)

    def _join(self, first: _Piece, second: _Piece) -> _Piece:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        del self._pieces[second.start]
        return first
