"""What the steps of a run say about it: a sudden slowness, and a loss that swings.

    slow    the median of the last 20 steps is more than ``slow_steps`` times the median of the first 50, and none of
            the 20 is faster than half of that.  The first 5 steps of a process warm up and do not count.  A bucket
            of another size, or a few steps beside a checkpoint, cannot cause it.
    swing   losses are averaged over blocks of 50 steps.  The swing is the largest rise from one of the last 6 blocks
            to a later one: max over i < j of (mean j − mean i).  It counts if it is above ``loss_swing`` and above 4
            of its own standard errors, √(variance of i / 50 + variance of j / 50), so that a noisy loss is no alarm.
            A loss that falls does not swing.

The figures 20, 50, 5, 6 and 4 are assumed.  Tests try them on made-up steps, with the noise of batch size 1.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import combinations
from statistics import fmean, median, pvariance
from typing import NamedTuple

WARM_UP, FIRST, LAST = 5, 50, 20
BLOCK, BLOCKS, ERRORS = 50, 6, 4.0


class SlowSteps:
    """Compares the time of the last steps with that of the first ones of this process's run."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.usual: float | None = None  # seconds
        self._seen = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=LAST)

    def step(self, seconds: float) -> None:
        self._seen += 1
        if self._seen <= WARM_UP:
            return
        if self.usual is None:
            self._first.append(seconds)
            if len(self._first) == FIRST:
                self.usual = median(self._first)
            return
        self._last.append(seconds)

    @property
    def times(self) -> float | None:
        """How many times as long the last steps took.  None until it is known; 1 if some of them were fast."""
        if not self.usual or len(self._last) < LAST:
            return None
        now = median(self._last)
        return now / self.usual if min(self._last) > now / 2 else 1.0


class Block(NamedTuple):
    mean: float
    variance: float


class LossSwing:
    """The rise of the mean loss over the last blocks of steps."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._blocks: deque[Block] = deque(maxlen=BLOCKS)

    def step(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self._losses.append(loss)
        if len(self._losses) == BLOCK:
            self._blocks.append(Block(fmean(self._losses), pvariance(self._losses)))
            self._losses.clear()

    @property
    def swing(self) -> float | None:
        """None until two blocks are whole.  0 if the loss does not rise by more than its noise."""
        if len(self._blocks) < 2:
            return None
        rises = [0.0]
        for before, after in combinations(self._blocks, 2):
            rise = after.mean - before.mean
            if rise > ERRORS * math.sqrt((before.variance + after.variance) / BLOCK):
                rises.append(rise)
        return max(rises)
