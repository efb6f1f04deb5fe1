"""What a training can give back where RAM is short: the part of its cache that is on disk too.

There is nothing else to halve.  Images are read one batch ahead, by the process itself and only on a GPU, so there are
no loader processes and no queue of batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.data import Store


def halve(store: Store | None) -> tuple[str, int]:
    """Keep half as many latents and captions in memory.  What was done, in words, and the bytes that are given back."""
    freed = store.halve() if store is not None else 0
    if freed:
        return (
            f"half of the cached images and captions are read from disk from now on ({freed / 1e6:.1f} MB)",
            freed,
        )
    return "nothing is left to give back: close other programs, or set cache_latents_to_disk = true", 0
