"""``hpo export csv`` and ``parquet``: where a study's table of trials is written.

Does not own its columns; see ``hpo.study.frame``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpo.study import database_errors, frame, open_study
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.text import clean_text

FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet computes

if TYPE_CHECKING:
    import pandas

    from hpo.study import StudyFolder


def write_csv(folder: StudyFolder, output: Path | None) -> None:
    """To a file, or to standard output."""
    table = _table(folder)
    for name in table.columns:
        if not is_numeric(table[name]):
            table[name] = table[name].map(as_plain_cell)
    header = [as_plain_cell(clean_text(name)) for name in table.columns]
    text = table.to_csv(index=False, header=header, lineterminator="\n")
    if output is None:
        click.echo(text, nl=False)
        return
    write_atomic(output, text)
    _say(output, folder)


def write_parquet(folder: StudyFolder, output: Path | None) -> None:
    """To a file: a table for pandas, polars or DuckDB.  Raises ConfigError without the library that writes it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "Parquet files need pyarrow, which is not installed",
            f"pip install pyarrow (170 MB), or write CSV: hpo export csv {folder.words}",
        )
    output = output or Path(f"{folder.name}.parquet")
    table = _table(folder)
    for (
        name
    ) in table.columns:  # one type a column: a setting can be a number in one trial and a word in another
        if table[name].dtype == object:
            table[name] = table[name].map(lambda cell: None if _is_missing(cell) else str(cell))
    write_atomic(output, table.to_parquet(index=False, engine="pyarrow"))
    _say(output, folder)


def is_numeric(column: pandas.Series) -> bool:
    return column.dtype.kind in "biufcmM"


def as_plain_cell(cell: Any) -> Any:
    """A text that a spreadsheet would compute as a formula (=HYPERLINK(…)), with a quote in front: OWASP's rule against
    CSV injection.  Numbers, and texts that are numbers, stay."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _is_missing(cell: object) -> bool:
    return cell is None or cell != cell


def _table(folder: StudyFolder) -> pandas.DataFrame:
    with database_errors(folder):
        return frame(open_study(folder), folder)


def _say(output: Path, folder: StudyFolder) -> None:
    click.echo(clean_text(f"written: {output}, the trials of study {folder.name}"), err=True)
