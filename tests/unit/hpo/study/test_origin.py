"""Where settings come from and where they can go: the comment of a transfer, and the sources of families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpo.study.config import SHIPPED
from hpo.study.families import families_from
from hpo.study.folder import StudyFolder
from hpo.study.origin import Origin, origin_comment, origin_of
from hpo.terminal.following import after_search
from hpo.transfer.profile import read_family


@pytest.mark.parametrize("name", ["s", "sd15-luca", "my study, trial 7", "a trial 2"])
def test_a_comment_is_read_as_it_was_written_in_every_version(name: str) -> None:
    assert origin_of(origin_comment(Origin(name, 12), "2")) == Origin(name, 12)
    assert origin_of(f"{name} trial 12, mapping 1") == Origin(name, 12)


@pytest.mark.parametrize(
    "comment", ["", "my own words", "s trial 12", "study s, trial x, transferred (rules 2)"]
)
def test_another_comment_names_no_origin(comment: str) -> None:
    assert origin_of(comment) is None


def begun(root: Path, base: str) -> StudyFolder:
    folder = StudyFolder(root / "runs" / "x")
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.facts.write_text(json.dumps({"base": base}))
    return folder


@pytest.mark.parametrize("path", sorted((SHIPPED / "families").glob("*.toml")), ids=lambda path: path.stem)
def test_a_search_is_followed_by_the_transfer_to_every_shipped_family(path: Path, tmp_path: Path) -> None:
    for source in read_family(path.stem).sources:
        folder = begun(tmp_path, source)
        assert after_search(folder, 3) == f"hpo transfer {folder.words} --to {path.stem}"


def test_a_family_of_ones_own_follows_a_search_on_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = begun(tmp_path, "mini-sdxl")
    assert after_search(folder, 3).startswith("hpo train ")
    own = tmp_path / "studies" / "families"
    own.mkdir(parents=True)
    (own / "larger.toml").write_text('sources = ["mini-sdxl"]\n')
    (own / "broken.toml").write_text("sources = [")
    (own / "odd.toml").write_text("sources = 3\n")
    assert after_search(folder, 3) == f"hpo transfer {folder.words} --to larger"
    assert families_from("mini-sd15") == ["mini-sdxl"]
    (own / "mini-sdxl.toml").write_text('sources = ["sd15"]\n')
    assert families_from("mini-sd15") == [], (
        "a file in the current folder replaces the shipped one, as for --to"
    )
