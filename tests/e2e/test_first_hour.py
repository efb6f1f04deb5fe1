"""The first hour's command without a GPU: every part runs and has something to show, in minutes."""

import json

import pytest

from tests.bench import first_hour

pytestmark = pytest.mark.slow


def test_every_part_of_the_first_hour_runs_without_a_gpu(tmp_path, capsys):
    out = tmp_path / "out"
    first_hour.main(["--cpu", "--out", str(out)])
    kept = json.loads((out / "first_hour.json").read_text())["parts"]
    assert list(kept) == [part.name for part in first_hour.PARTS]
    assert not {name: row["failed"] for name, row in kept.items() if "failed" in row}
    assert kept["tests"]["code"] in (0, 5)
    assert all(form["recognised"] and form["goes_on"] for form in kept["memory"]["forms"].values())
    assert all(row["step_seconds"] > 0 for row in kept["cells"]["cells"].values())
    assert kept["search"]["ratios"][0] > 0
    text = (out / "first_hour.md").read_text()
    assert "Not run yet" not in text and "Failed" not in text
    capsys.readouterr()
    first_hour.main(["--cpu", "--out", str(out)])
    assert "at most" not in capsys.readouterr().out, "finished parts are not repeated"
