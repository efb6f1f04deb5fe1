"""Sensors whose figures a test decides."""

from __future__ import annotations

from dataclasses import replace

from hpo.health.reading import Gpu, Reading

SAFE = Reading(
    ram_used=40.0,
    ram_available_bytes=20 * 10**9,
    swap_bytes=0,
    disk_free_bytes=500 * 10**9,
    gpu=Gpu(celsius=62.0, busy=97.0, used_bytes=11 * 10**9, total_bytes=16_900_000_000),
    process_busy=100.0,
)


class Told:
    """``reading`` is what the next look measures."""

    def __init__(self, reading: Reading = SAFE) -> None:
        self.reading = reading
        self.looks = 0

    def read(self) -> Reading:
        self.looks += 1
        return self.reading

    def gpu(self, **values: float) -> None:
        assert self.reading.gpu is not None
        self.reading = replace(self.reading, gpu=replace(self.reading.gpu, **values))

    def machine(self, **values: float) -> None:
        self.reading = replace(self.reading, **values)
