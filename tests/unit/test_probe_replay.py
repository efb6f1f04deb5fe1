"""Replaying a recorded grid: regrets are right on curves whose best rate is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpo.probe import DEFAULT_DESIGN, DESIGNS
from tests.bench import bench_probe_grid as bench


def drawn(short_shift: float = 0.0) -> dict[bench.Cell, bench.Scored]:
    """A grid of parabolas with their top at 4e-3; short runs like a higher rate."""
    cells = {}
    for cell in bench.wanted(list(bench.BASES)):
        top = math.log2(4e-3) + (short_shift if cell.horizon < 1 else 0.0)
        score = 1 - 0.15 * (math.log2(cell.rate) - top) ** 2 - (0.0 if cell.text_encoder else 0.05)
        cells[cell] = bench.Scored(score, tuple(score + 0.01 * n for n in range(-3, 4)))
    return cells


def test_without_probes_the_regret_is_the_error_of_the_transfer() -> None:
    row = bench.replay(drawn(), None, 0)
    by_offset = dict(zip(bench.OFFSETS, row.regret, strict=True))
    assert by_offset[0.0] == 0 and by_offset[1.0] == pytest.approx(0.15)
    assert row.changed == 0


def test_both_designs_repair_a_rate_that_is_an_octave_off() -> None:
    for name, design in DESIGNS.items():
        row = bench.replay(drawn(), design, 8)
        by_offset = dict(zip(bench.OFFSETS, row.regret, strict=True))
        assert (
            by_offset[0.0] < 0.02 and by_offset[1.0] < 0.08 and row.mean < bench.replay(drawn(), None, 0).mean
        ), name


def test_the_horizon_correction_helps_where_short_runs_mislead() -> None:
    cells = drawn(short_shift=0.8)
    grid = DESIGNS["grid"]
    assert bench.replay(cells, grid, 8, horizon=True).mean < bench.replay(cells, grid, 8).mean


def test_the_default_is_the_better_design_of_the_recorded_grid_or_the_grid_is_not_complete() -> None:
    cells = bench.read_grid()
    if any(cell not in cells for cell in bench.wanted(list(bench.BASES))):
        assert "Not recorded yet" in bench.table(cells)
    else:
        assert bench.better_design(bench.compare(cells)) == DEFAULT_DESIGN


def test_the_docs_show_the_recorded_comparison() -> None:
    text = bench.DOCS.read_text(encoding="utf-8")
    assert bench.between(text, bench.BEGIN, bench.END, bench.table(bench.read_grid())) == text


def test_a_finished_cell_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "grid.jsonl"
    cell = next(bench.wanted(["mini-sd15"]))
    row = '{"base": "mini-sd15", "horizon": 0.25, "rate": 0.0005, "text_encoder": true, "seed": 7000, '
    file.write_text(row + '"score": 0.5, "prompts": [0.5]}\n')
    assert bench.read_grid(file) == {cell: bench.Scored(0.5, (0.5,))}
