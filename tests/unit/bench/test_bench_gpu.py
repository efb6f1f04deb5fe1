"""The GPU bench in its small form: the same code on a tiny base, without figures of memory; and how
sd-scripts is started and watched, on processes that write what tqdm writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import bench_gpu, sd_scripts
from tests.bench.bench_gpu import CELLS, main
from trainer.bases.families import KNOWN_BASES

ONE = "LoRA dim 32, checkpointing, batch 1"
BAR = """
import sys, time
from tqdm import tqdm
sys.stderr.write("a warning of a library\\n" * 20_000)
for n in tqdm(range(3), smoothing=0, desc="steps"):
    time.sleep(0.1)
"""


def test_it_has_the_users_20_cells_in_14_rows():
    assert len(CELLS) == 20 and len({cell.row for cell in CELLS}) == 14


def test_a_small_run_fills_its_cells_and_finishes_what_is_left(tmp_path, capsys):
    words = ["--smoke", "--out", str(tmp_path), "--steps", "1", "--only", ONE]
    main(words)
    cells = json.loads((tmp_path / "cells.json").read_text())
    for kind in ("ours", "diffusers"):
        cell = cells[f"{kind}: {ONE}"]
        assert cell["steps"] == 1 and cell["step_seconds"] > 0 and cell["peak_bytes"] is None
    assert f"| {ONE} | 9.4 | not measured, " in capsys.readouterr().out
    before = (tmp_path / "cells.json").read_text()
    main(words)
    assert (tmp_path / "cells.json").read_text() == before
    cells[f"ours: {ONE}"] = {"failed": "it ended with -9: "}
    cells[f"diffusers: {ONE}"] = {"skipped": "out of memory"}
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    main(words)
    again = json.loads((tmp_path / "cells.json").read_text())
    assert again[f"ours: {ONE}"]["step_seconds"] > 0  # a crash is tried again, what does not fit is not
    assert again[f"diffusers: {ONE}"] == {"skipped": "out of memory"}


@pytest.mark.parametrize("name", [ONE, "LoRA dim 32, fp8 base, checkpointing, batch 1"])
def test_the_peak_is_counted_when_loading_and_8_bit_conversion_are_over(name, monkeypatch):
    calls: list[str] = []
    for owner, what in ((bench_gpu.fp8, "convert"), (bench_gpu, "release"), (bench_gpu, "forget_peak")):
        own = getattr(owner, what)
        monkeypatch.setattr(owner, what, lambda it, own=own, what=what: calls.append(what) or own(it))
    (cell,) = (cell for cell in CELLS if cell.name == name)
    bench_gpu.measure("ours", cell, "", 1, None, True)
    assert calls == ["convert"] * cell.fp8 + ["release", "forget_peak"]


# sd-scripts


def test_sd_scripts_gets_a_base_that_it_can_read(tmp_path, monkeypatch):
    (tmp_path / "base.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert sd_scripts.model_of("base.safetensors") == str(tmp_path / "base.safetensors")
    assert sd_scripts.model_of("sdxl") == KNOWN_BASES["sdxl"].hub
    assert sd_scripts.model_of("org/name") == "org/name"
    assert sd_scripts.model_of("mini-sdxl") is None


def test_words_without_a_meaning_end_before_anything_is_measured(tmp_path, capsys):
    for words in (["--sd-scripts", str(tmp_path)], ["--sd-scripts", "scripts", "--base", "mini-sdxl"]):
        with pytest.raises(SystemExit):
            main(["--smoke", "--out", str(tmp_path / "out"), *words])
        assert "sdxl_train_network.py" in capsys.readouterr().err
    (tmp_path / sd_scripts.SCRIPT).touch()
    with pytest.raises(SystemExit):
        main(["--smoke", "--out", str(tmp_path), "--sd-scripts", str(tmp_path), "--base", "mini-sdxl"])
    assert "sd-scripts reads sdxl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_its_words_are_those_of_every_release():
    (cell,) = (cell for cell in CELLS if cell.name.startswith("LoCon 64+32, fp8"))
    words = sd_scripts.arguments(cell.config(False), "base", 5, Path("images"), Path("out"))
    assert "--fp8_base" in words and not any("fp8_base_unet" in word for word in words)
    assert words[-2:] == ["--network_args", "conv_dim=32"] and "--max_train_steps=5" in words


def test_a_process_that_says_much_is_watched_to_its_end(tmp_path):
    free = iter([50, 40, 30, *[45] * 100_000])
    seen = sd_scripts.watch([sys.executable, "-c", BAR], tmp_path, tmp_path / "out", lambda: next(free))
    assert (seen.exit_code, seen.lowest_free_bytes) == (0, 30)
    found = sd_scripts.outcome(seen, 50)
    assert found["peak_bytes"] == 20 and found["steps"] == seen.marks[-1][0] == 3


def test_running_out_of_memory_is_a_result_and_a_crash_is_not(tmp_path):
    def outcome(last: str) -> dict[str, object]:
        command = [sys.executable, "-c", f"raise SystemExit({last!r})"]
        return sd_scripts.outcome(sd_scripts.watch(command, tmp_path, tmp_path / "out", lambda: 1), 1)

    assert outcome("torch.OutOfMemoryError: CUDA out of memory.") == {"skipped": "out of memory"}
    assert outcome("ImportError: no voluptuous") == {"failed": "it ended with 1: ImportError: no voluptuous"}


def test_a_steps_seconds_are_the_middle_one_of_those_after_the_first():
    assert sd_scripts.step_seconds([(0, 0.0), (1, 30.0), (2, 31.0), (3, 32.5), (4, 33.5)]) == 1.0
    assert sd_scripts.step_seconds([(0, 0.0), (2, 10.0), (4, 13.0)]) == 1.5
    assert sd_scripts.step_seconds([(0, 0.0), (1, 30.0)]) is None
