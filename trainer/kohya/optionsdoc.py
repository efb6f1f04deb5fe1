"""The tables of docs/kohya.md, generated from the reader: ``python -m trainer.kohya.optionsdoc docs/kohya.md``.

Owns the form of the tables. Does not own names (``optionnames``) or states (``optionstates``); the words around the
tables stand in the page itself.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from trainer.kohya import keys, optionnames
from trainer.kohya.optionstates import (
    STATES,
    TRANSLATED,
    OptionState,
    dataset_states,
    network_states,
    option_states,
)
from trainer.kohya.settingsdoc import table
from trainer.tomlfile import as_text

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
_OPTIONS = """## Options

Of `train_network.py` and `sdxl_train_network.py`, on the command line or in `--config_file`. *Translated* shows what a
value becomes, by an example.

"""
_DATASETS = """## Dataset files

Of `--dataset_config`. A key of a dataset may also stand in `[general]`.

"""
_NETWORKS = """## Arguments of networks

Of `network_args`. `networks.loha` and `networks.lokr`, which newer versions have, read those of `networks.lora`;
`networks.lora_fa` reads them without LoRA+.

"""
_FRONT_ENDS = """## Keys of front ends

These are in many files, but sd-scripts does not read them for a LoRA of SD1.5 or SDXL.

"""


def generated() -> str:
    """The counts and all tables."""
    options, datasets, networks = option_states(), dataset_states(), network_states()
    arguments = [state for states in networks.values() for state in states]
    others = sorted(keys.KNOWN_KEYS - set(optionnames.OPTIONS))
    counts = [
        _counted("options", options),
        _counted("keys of dataset files", datasets),
        _counted("arguments of networks", arguments),
    ]
    places = {name: ", ".join(where) for name, where in optionnames.DATASET_KEYS.items()}
    return "\n".join(
        (
            table(("sd-scripts has", "number", *STATES), counts),
            _OPTIONS + table(("option", "state", "why"), map(_row, options)),
            _DATASETS
            + table(
                ("key", "of a", "state", "why"),
                ((name, places[state.name], *rest) for state in datasets for name, *rest in (_row(state),)),
            ),
            _NETWORKS
            + table(
                ("module", "argument", "state", "why"),
                ((f"`{module}`", *_row(state)) for module, states in networks.items() for state in states),
            ),
            _FRONT_ENDS + table(("key", "state", "why"), map(_row, option_states(others))),
        )
    )


def page(text: str) -> str:
    """The page with new tables. Raises ValueError if it has no place for them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{generated()}{END}{after}"


def _counted(what: str, states: Iterable[OptionState]) -> tuple[str, ...]:
    found = Counter(state.state for state in states)
    return (what, str(found.total()), *(str(found[state]) for state in STATES))


def _row(state: OptionState) -> tuple[str, str, str]:
    why = f"`{as_text(state.value)}` → {state.why}" if state.state == TRANSLATED else state.why
    return f"`{state.name}`", state.state, why


def main(path: Path) -> None:
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
