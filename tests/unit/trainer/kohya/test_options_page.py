"""docs/kohya.md: each option of sd-scripts has one state, which the reader itself gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from trainer.kohya import optionnames, optionsdoc, optionstates
from trainer.kohya.keys import KNOWN_KEYS
from trainer.kohya.optionstates import NO_EFFECT, REFUSED, STATES, TRANSLATED, UNKNOWN, USED, OptionState

PAGE = Path(__file__).parents[4] / "docs" / "kohya.md"
MOST_REFUSED = 6


@pytest.fixture(scope="module")
def options() -> tuple[OptionState, ...]:
    return optionstates.option_states()


@pytest.fixture(scope="module")
def datasets() -> tuple[OptionState, ...]:
    return optionstates.dataset_states()


def test_the_page_is_what_the_reader_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == optionsdoc.page(text), "python -m trainer.kohya.optionsdoc docs/kohya.md"


def test_sd_scripts_options_are_196_with_one_kind_each() -> None:
    """As many as the two parsers have: 62 switches, 39 whole numbers, 23 numbers, 66 texts, 6 lists."""
    kinds = (
        optionnames.FLAGS,
        optionnames.WHOLE_NUMBERS,
        optionnames.NUMBERS,
        optionnames.TEXTS,
        optionnames.LISTS,
    )
    assert [len(kind) for kind in kinds] == [62, 39, 23, 66, 6]
    assert len(set(optionnames.OPTIONS)) == len(optionnames.OPTIONS) == 196
    assert len(optionnames.DATASET_KEYS) == 41


def test_every_option_stands_in_its_table_once_with_one_state() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in KNOWN_KEYS)
    text = page.split("## Options")[1]
    tables = [part.split("\n## ")[0] for part in (text, text.split("## Dataset files")[1])]
    for part, names in zip(tables, (optionnames.OPTIONS, optionnames.DATASET_KEYS), strict=True):
        rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| `")]
        assert [row[0].strip("| `") for row in rows] == list(names)
        for row in rows:
            assert sum(cell in STATES for cell in row) == 1 and row[-1].strip(" |"), row


def test_nothing_is_unknown_and_at_most_six_are_refused(
    options: tuple[OptionState, ...], datasets: tuple[OptionState, ...]
) -> None:
    networks = [state for states in optionstates.network_states().values() for state in states]
    everything = [*options, *datasets, *networks]
    assert [state for state in everything if state.state == UNKNOWN or not state.why] == []
    refused = {state.name for state in everything if state.state == REFUSED}
    assert len(refused) <= MOST_REFUSED, refused


@pytest.mark.parametrize(
    ("name", "state", "why"),
    [
        ("learning_rate", USED, "learning rate"),
        ("lr_scheduler_args", USED, "arguments"),
        ("xformers", TRANSLATED, "SDPA"),
        ("network_train_text_encoder_only", TRANSLATED, "unet_lr = 0"),
        ("config_file", NO_EFFECT, "command line only"),
        ("wandb_api_key", NO_EFFECT, "train.jsonl"),
        ("v2", REFUSED, "SD 2.x"),
    ],
)
def test_states_are_the_readers(options: tuple[OptionState, ...], name: str, state: str, why: str) -> None:
    found = next(option for option in options if option.name == name)
    assert found.state == state and why in found.why


def test_what_the_reader_does_not_know_is_unknown() -> None:
    (found,) = optionstates.option_states(["no_such_option"])
    assert found.state == UNKNOWN


def test_the_counts_are_those_of_the_rows(options: tuple[OptionState, ...]) -> None:
    found = Counter(state.state for state in options)
    row = " | ".join(str(found[state]) for state in STATES)
    assert f"| options | {len(options)} | {row} |" in PAGE.read_text(encoding="utf-8")
