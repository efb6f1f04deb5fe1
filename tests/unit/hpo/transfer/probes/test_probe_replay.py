"""Replay of a recorded grid: the regrets are correct on curves with a known best rate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpo.transfer.probes.design import DESIGNS, LADDER
from tests.bench import bench_probe_grid as bench
from tests.bench import bench_transfer_table as transfer_table


def drawn(short_shift: float = 0.0) -> dict[bench.Cell, bench.Scored]:
    """A grid of parabolas with the maximum at 4e-3.  ``short_shift``: octaves by which short runs prefer more."""
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
        assert bench.better_design(bench.compare(cells)) == LADDER


def test_the_docs_show_the_recorded_comparison() -> None:
    text = bench.DOCS.read_text(encoding="utf-8")
    assert bench.between(text, bench.BEGIN, bench.END, bench.table(bench.read_grid())) == text


def test_a_finished_cell_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "grid.jsonl"
    cell = next(bench.wanted(["mini-sd15"]))
    row = '{"base": "mini-sd15", "horizon": 0.25, "rate": 0.0005, "text_encoder": true, "seed": 7000, '
    file.write_text(row + '"score": 0.5, "prompts": [0.5]}\n')
    assert bench.read_grid(file) == {cell: bench.Scored(0.5, (0.5,))}


def test_the_docs_show_the_filled_cells_of_the_transfer_table() -> None:
    text = transfer_table.DOCS.read_text(encoding="utf-8")
    begin, end = transfer_table.BEGIN, transfer_table.END
    assert bench.between(text, begin, end, transfer_table.table(transfer_table.read_cells())) == text


def test_the_transfer_table_shows_missing_cells_and_paired_gains() -> None:
    """Likeness 0.36 and 0.64 with the prompt following of the base give scores of 0.6 and 0.8."""
    scale = {
        "base_t_P": [0.3, 0.3],
        "chance_t_P": [0.1, 0.1],
        "base_i_P": [0.2, 0.4],
        "asks_for_subject": [True, True],
        "real_i": 0.8,
        "t_unit_se": 0.01,
        "i_unit_se": 0.01,
    }
    own = {"t_P": [0.3, 0.3], "i_P": [0.2 + 0.36 * 0.6, 0.4 + 0.36 * 0.4], "scale": scale}
    cells = {transfer_table.Cell("transferred", "character", 8000): own}
    better = {**own, "i_P": [0.2 + 0.64 * 0.6, 0.4 + 0.64 * 0.4]}
    cells[transfer_table.Cell("direct search", "character", 8000)] = better
    rows = transfer_table.table(cells).splitlines()
    direct = next(row for row in rows if "| direct search" in row)
    assert "| 0.800 (0.800 to 0.800) | 1.00 | 0.64 | +0.200 (+0.200 to +0.200) | 1 of 2 |" in direct
    assert "missing" in next(row for row in rows if "random trial" in row)


def test_a_direct_search_gets_the_same_compute() -> None:
    """12 source trials of 120 samples and 6 probes of a quarter: 3.5 whole target trials at six times the cost."""
    assert transfer_table.direct_trials(12 * 120, 6, 120, 6.0) == round(12 / 6 + 6 / 4)
