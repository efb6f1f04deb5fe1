"""``hpo plan``: predictions without a GPU, beside what users measured."""

import json
import math
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console

from hpo.cli import plantable
from hpo.cli.main import main
from hpo.cli.plan import _hundredths, attempt_row, table_of
from hpo.cli.plantable import ADAPTER_ROWS, FULL_ROWS, ROWS, Cell, predicted_cells
from tests.places import ROOT
from tests.tiny import save_folder, tiny_base
from trainer.memory import Attempt

# Three rows that share no trace, one for each way to save: CI predicts these, `pytest -m slow` all of them.
CI_ROWS = ("LoRA dim 32, full bf16", "LoRA dim 128, checkpointing", "LoRA dim 32, fp8 base, checkpointing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tiny_base("sd15"), tmp_path_factory.mktemp("base") / "tiny")


def plan(*words):
    return CliRunner().invoke(main, ["plan", *map(str, words)], catch_exceptions=False)


def test_the_table_has_the_users_twenty_cells():
    assert len(ADAPTER_ROWS) == 14 and sum(len(row.measured_gb) for row in ADAPTER_ROWS) == 20
    assert len(FULL_ROWS) == 2
    assert all(row.config(batch).train_batch_size == batch for row in ROWS for batch in row.measured_gb)


def test_the_page_lists_every_row_with_the_users_figures():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for row in ROWS:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {row.name} |"))
        assert all(f"/ {measured_gb:g}" in line for measured_gb in row.measured_gb.values())


def test_the_table_is_whole_at_80_columns():
    cells = [Cell(row, batch, gb, int(gb * 1e9)) for row in ROWS for batch, gb in row.measured_gb.items()]
    printed = StringIO()
    Console(width=80, file=printed).print(table_of(cells))
    text = printed.getvalue()
    assert "…" not in text and "47.7/47.7" in text and "44.0/44.0*" in text
    assert len(text.splitlines()) < 30


def test_a_peak_just_above_the_limit_is_shown_as_more_than_it():
    limit = 7_750_000_000
    assert _hundredths(limit, math.floor) == "7.75"
    peaks = {peak: attempt_row(Attempt({}, peak, peak <= limit), 80).plain for peak in (limit - 1, limit + 1)}
    assert "7.74 GB  fits" in peaks[limit - 1] and "7.76 GB  too much" in peaks[limit + 1]


def test_the_table_says_which_options_have_no_effect_on_it(monkeypatch):
    monkeypatch.setattr(plantable, "predicted_cells", lambda: iter([Cell(ROWS[2], 1, 17.4, 17_000_000_000)]))
    said = plan("--table", "--base", "sd15", "--vram", "8").output
    assert "without effect: --base, --vram" in " ".join(said.split())
    assert "effect" not in plan("--table").output


@pytest.mark.parametrize("name", CI_ROWS)
def test_three_rows_need_no_more_than_users_measured(name):
    (row,) = (row for row in ROWS if row.name == name)
    for cell in predicted_cells((row,)):
        assert cell.is_below, cell


@pytest.mark.slow
def test_all_twenty_cells_need_no_more_than_users_measured():
    cells = list(predicted_cells(ADAPTER_ROWS))
    assert len(cells) == 20
    assert [cell.row.name for cell in cells if not cell.is_below] == []


def test_a_plan_shows_the_breakdown_and_that_it_fits(folder):
    result = plan("--base", folder)
    assert result.exit_code == 0, result.output
    for words in (
        "base: unet",
        "optimizer state",
        "CUDA context",
        "peak",
        "fits into 16 GB without changes",
        "decode",
    ):
        assert words in result.output


def test_a_plan_for_scripts_has_parts_that_add_up_and_the_moves(folder, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('network_dim = 512\ntrain_batch_size = 8\noptimizer_type = "AdamW"\nresolution = 64\n')
    given = json.loads(plan(file, "--base", folder, "--json").output)
    assert [phase["name"] for phase in given["phases"]][2:5] == ["train", "denoise", "decode"]
    assert given["phases"][2]["peak_bytes"] == given["stack"]["peak_bytes"]
    assert sum(given["given"]["parts"].values()) == given["given"]["peak_bytes"]
    assert given["moves"] == [] and given["config"]["network_dim"] == 512


def test_a_plan_names_what_has_to_change(folder):
    words = ("--base", folder, "--vram", 1, "--set", "train_batch_size=128", "--set", "resolution=256")
    result = plan(*words, "--set", "network_train_unet_only=true")
    assert result.exit_code == 0, result.output
    assert (
        "gradient_checkpointing: false → true" in result.output
        and "peak with these changes:" in result.output
    )


def test_a_plan_that_cannot_fit_ends_in_two_lines_and_a_code(folder):
    result = plan("--base", folder, "--vram", 0.5)  # CUDA itself takes more
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and lines[0].startswith("error: ") and "does not fit into 0.5 GB" in lines[0]
    assert lines[1].startswith("hint: ") and len(lines) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no base model and no settings file given"),
        (("--base", "nowhere/base"), "there is no base"),
        (("--base", "sdxl", "--set", "netwrk_dim=3"), "unknown setting netwrk_dim"),
    ],
)
def test_mistakes_are_told_in_two_lines(words, message):
    result = plan(*words)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and message in lines[0] and len(lines) == 2


@pytest.mark.parametrize("amount", ["nan", "inf", "-inf", "1e999", "0"])
@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--base", "sdxl", "--vram"),
        ("transfer", "--to", "sdxl", "--vram"),
        ("search", "--max-hours"),
        ("search", "--hours"),
    ],
)
def test_an_amount_is_a_finite_number(words, amount):
    result = CliRunner().invoke(main, [*words, amount], catch_exceptions=False)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {words[-1]} ")
