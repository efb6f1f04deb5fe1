"""The GPU bench in its small form: the same code on a tiny base, without figures of memory."""

import json

from tests.bench.bench_gpu import CELLS, main


def test_it_has_the_users_20_cells_in_14_rows():
    assert len(CELLS) == 20 and len({cell.row for cell in CELLS}) == 14


def test_a_small_run_fills_its_cells_and_finishes_what_is_left(tmp_path, capsys):
    words = [
        "--smoke",
        "--out",
        str(tmp_path),
        "--steps",
        "1",
        "--only",
        "LoRA dim 32, checkpointing, batch 1",
    ]
    main(words)
    cells = json.loads((tmp_path / "cells.json").read_text())
    for kind in ("ours", "diffusers"):
        cell = cells[f"{kind}: LoRA dim 32, checkpointing, batch 1"]
        assert cell["steps"] == 1 and cell["step_seconds"] > 0 and cell["peak_bytes"] is None
    assert "| LoRA dim 32, checkpointing, batch 1 | 9.4 | not measured, " in capsys.readouterr().out
    before = (tmp_path / "cells.json").read_text()
    main(words)
    assert (tmp_path / "cells.json").read_text() == before
