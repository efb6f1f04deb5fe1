"""Values that front ends write and sd-scripts takes, which are none of its documented ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.kohya.read import KohyaFile, read_kohya


def read(folder: Path, line: str) -> KohyaFile:
    path = folder / "k.toml"
    path.write_text(f'network_module = "networks.lora"\n{line}\n', encoding="utf-8")
    return read_kohya(path)


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("bucket_reso_steps = 1", "bucket_reso_steps", 8),  # 13 of kohya_ss' own 44 presets
        ("max_token_length = 255", "max_token_length", 225),  # lora-scripts' own value
    ],
)
def test_the_nearest_value_that_works_is_used_and_said(
    tmp_path: Path, line: str, name: str, expected: int
) -> None:
    file = read(tmp_path, line)
    assert getattr(file.config, name) == expected
    assert any(said.startswith(f"{line} → {expected}") for said in file.translated)


@pytest.mark.parametrize("line", ["bucket_reso_steps = 64", "max_token_length = 150"])
def test_usual_values_are_not_touched(tmp_path: Path, line: str) -> None:
    assert not any(line in said for said in read(tmp_path, line).translated)
