"""Names and texts of strangers in commands: nothing leaves its folder or acts on a terminal, a page, a spreadsheet."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import os
import random
import re
from dataclasses import MISSING, fields
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner, Result
from markdown_it import MarkdownIt
from PIL import Image

from hpo.cli.main import main
from hpo.cli.tables import as_plain_cell
from hpo.search.dashboard import note_text
from hpo.study.folder import StudyFolder
from hpo.study.result import Result as TrialResult
from hpo.study.storage import create_study
from trainer.text import clean_text

NAMES = (
    "../../x", "/abs/x", "..", ".", "", "a/b", "a\\b", "CON", "ok\n", "a\0b", "x" * 600, "-x", "<script>", "\u202egnp",
    "\x1b]0;t\x07", "é", "a b",
)  # fmt: skip
TEXTS = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</td></tr></table><h1>x", "javascript:alert(1)",
    "[x](javascript:alert(1))", "![x](http://evil.example/x.png)", "http://evil.example www.evil.example", "&lt;b&gt;",
    "<!-- ", "`<b>`", "| a | b |", "$\\href{javascript:alert(1)}{x}$", "~~x~~", "# x", "<http://evil.example>",
    "\x1b]8;;http://evil.example\x07x\x1b]8;;\x07", "\x1b[2J", "\x9b31m", "[/x]", "[bold red]x", "\u202egnp", "a\nb",
)  # fmt: skip
FORMULAS = ('=HYPERLINK("http://evil.example","x")', "+1+1", "-2+3", "@SUM(1)", " =1+1", "\t=1+1")


def hpo(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def acts(output: str) -> set[str]:
    """Characters that a terminal acts on."""
    return {c for c in output if c not in "\n\t" and clean_text(c) != c}


def draw(folder: Path, number: int = 5) -> Path:
    folder.mkdir(parents=True)
    noise = random.Random(1)
    for i in range(number):
        Image.frombytes("RGB", (64, 64), noise.randbytes(64 * 64 * 3)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"luca man {i}")
    return folder


def test_no_name_leads_out_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D10 · weight 5 · Names that lead elsewhere (`../../x`, `/abs`, links) for studies, files and images → Refused.
    Nothing outside the folder of the study or the dataset is read or written.
    """
    place = tmp_path / "deep" / "place"
    data = draw(place / "data")
    monkeypatch.chdir(place)
    before = tree(tmp_path)
    for name in NAMES:
        commands = [
            ("search", "--base", "mini-sd15", "--trials", "1", "--device", "cpu", "--", name),
            *((command, "--", name) for command in ("status", "best", "confirm", "clean", "delete")),
            ("transfer", "--to", "mini-sdxl", "--", name),
            ("export", "csv", "--", name),
        ]
        if name not in ("CON", "é", "a b", "-x", "<script>", "\u202egnp"):  # a file may be called so
            setting = f"output_name={json.dumps(name)}"
            words = ("--base", "mini-sd15", "--data", data, "--class", "man", "--dry-run", "--device", "cpu")
            commands.append(("train", *words, "--set", setting) if name else ("status", "--", name))
        for words in commands:
            result = hpo(*words)
            assert isinstance(result.exception, SystemExit) and result.exit_code == 2, (words, result.output)
            assert not acts(result.output), words
    assert tree(tmp_path) == before
    secret = draw(tmp_path / "secret", 1)
    for link in (data / "0.txt", data / "0.png"):
        kept = link.read_bytes()
        link.unlink()
        link.symlink_to(secret / link.name)
        result = hpo("dataset", "check", data, "--json")
        assert result.exit_code == 3 and "link out of the dataset folder" in result.output
        link.unlink()
        link.write_bytes(kept)
    assert hpo("dataset", "check", data).exit_code == 0


class Elements(html.parser.HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, *(name for name, _ in attrs)))


def as_html(markdown: str) -> str:
    """The note as the most permissive reader shows it: HTML, tables, strike-through."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


def note(text: str) -> str:
    given = {"number": 1, "state": "infeasible", "reason": text, "message": text}
    empty = {field.name: 0.0 for field in fields(TrialResult) if field.default is MISSING}
    result = TrialResult(**{**empty, **given})
    return note_text(result, {text: text, "optimizer_type": text}, None)


def test_a_dashboards_note_has_no_element_of_its_texts() -> None:
    """D11 · weight 5 · Scripts, links and markup in settings, names and messages that the dashboard shows → Shown as
    the text that they are: no element, link or picture comes from them.
    """
    clean = Elements(as_html(note("plain"))).found
    assert ("table",) in clean
    for text in TEXTS:
        page = as_html(note(text))
        assert Elements(page).found <= clean, (text, page)
        written = note(text)
        assert not re.search(r"(?<!\\)://|www\.", written), "GitHub's Markdown makes links of addresses"
        assert not acts(page)
    assert Elements(as_html("<img src=x onerror=alert(1)>")).found == {("img", "src", "onerror")}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a study whose trials hold every text, as somebody else's study may."""
    runs = tmp_path_factory.mktemp("hostile") / "runs"
    folder = StudyFolder(runs / "theirs")
    folder.root.mkdir(parents=True)
    study = create_study(folder, {})
    for number, text in enumerate((*TEXTS, *FORMULAS)):
        settings = {"optimizer_type": text, text: text, "learning_rate": 1e-4, "seed": "-5"}
        about = {"settings": settings, "reason": text, "message": text, "role": text, "se": 0.01}
        about |= {"score": number / 100, "prompt_following": 0.5, "likeness": 0.5}
        state = optuna.trial.TrialState.FAIL if number % 2 else optuna.trial.TrialState.COMPLETE
        values = None if number % 2 else [number / 100]
        study.add_trial(optuna.trial.create_trial(state=state, values=values, user_attrs=about))
    return runs


def test_nothing_in_a_study_or_a_dataset_acts_on_the_terminal(hostile: Path, tmp_path: Path) -> None:
    """D12 · weight 3 · Escape sequences and markup of strangers in names, captions, settings and metadata → Printed
    without what a terminal would act on, in tables, errors and --json.
    """
    shown = 0
    for words in (
        ("status", "theirs"), ("status", "theirs", "--json"), ("status", "theirs", "--all"), ("best", "theirs"),
        ("best", "theirs", "--json"), ("importance", "theirs"), ("studies",), ("export", "csv", "theirs"),
    ):  # fmt: skip
        result = hpo(*words, "--runs", hostile)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
        assert not acts(result.output), words
        shown += "alert(1)" in result.output
    assert shown >= 3, "the texts were shown, so that this can fail"
    data = draw(tmp_path / "data", 2 * len(TEXTS))
    for number, text in enumerate(TEXTS):
        (data / f"{number}.txt").write_text(text, newline="")
        other, name = str(number + len(TEXTS)), f"{number} {text.replace('/', '_')[:40]}"
        os.rename(data / f"{other}.png", data / f"{name}.png")
        (data / f"{other}.txt").unlink()
        (data / f"{name}.txt").write_bytes(b"\xff\xfe" if number % 2 else b"")
    for words in (("dataset", "check", data), ("dataset", "check", data, "--json")):
        result = hpo(*words)
        assert isinstance(result.exception, SystemExit) and "onerror" in result.output, result.exception
        assert not acts(result.output)


def test_no_cell_of_a_table_is_a_formula(hostile: Path) -> None:
    """D13 · weight 3 · A setting or message that a spreadsheet would run as a formula (`=HYPERLINK(…)`) → `hpo export
    csv` writes it with a quote in front, so that it is shown as text. Numbers stay numbers.
    """
    rows = list(csv.reader(io.StringIO(hpo("export", "csv", "theirs", "--runs", hostile).stdout)))
    assert len(rows) == 1 + len(TEXTS) + len(FORMULAS)
    cells = [cell for row in rows for cell in row]
    formulas = [cell for cell in cells if cell.lstrip().startswith(("=", "+", "-", "@"))]
    assert set(formulas) == {"-5"}, formulas
    for text in FORMULAS:
        assert f"'{clean_text(text)}" in cells
    assert [as_plain_cell(value) for value in (-1, -0.5, None, "-5", "1e-4")] == [
        -1,
        -0.5,
        None,
        "-5",
        "1e-4",
    ]
