"""Findings: everything that is wrong, in one go, from checks that each raise at the first mistake.

Usually a check raises and its caller ends. Inside ``Findings.looking()`` errors are kept instead: the block ends, and
the caller goes on with its next check. A check that can go on after a mistake puts each of its parts into ``piece()``;
its parts then raise as usual if nobody collects. Order is kept, and equal findings are kept once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from trainer.errors import ConfigError, Interrupted, ToolError


class Findings:
    """The errors found so far, in the order in which a run would have raised them."""

    def __init__(self) -> None:
        self.errors: list[ToolError] = []

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Keep the error that ends this block, and those of its pieces."""
        token = _collector.set(self)
        try:
            yield
        except Interrupted:
            raise
        except ToolError as error:
            self.add(error)
        finally:
            _collector.reset(token)

    def add(self, error: ToolError) -> None:
        if not any(type(error) is type(known) and error.message == known.message for known in self.errors):
            self.errors.append(error)

    def require_none(self) -> None:
        """Raise what a run would end with, if there is anything: the first finding, and how many there are."""
        if not self.errors:
            return
        first = self.errors[0]
        if len(self.errors) == 1:
            raise first
        raise _Several(first, len(self.errors))

    def require_none_together(self, where: str) -> None:
        """Raise all findings as one error, if there are any. Its exit code is that of the first."""
        if len(self.errors) < 2:
            self.require_none()
            return
        lines = [f"{e.message} ({e.hint})" if e.hint else e.message for e in self.errors]
        error = ConfigError(f"{where} has {len(lines)} mistakes: {'; '.join(lines)}", "correct all of them")
        error.exit_code = self.errors[0].exit_code
        raise error

    def as_json(self, warnings: Iterable[str] = ()) -> list[dict[str, Any]]:
        """The findings for scripts. ``warnings`` end no run: their exit code is 0."""
        found = [{"what": e.message, "hint": e.hint, "exit_code": e.exit_code} for e in self.errors]
        return found + [{"what": f"warning: {line}", "hint": "", "exit_code": 0} for line in warnings]


class _Several(ToolError):
    """Several findings: the exit code is that of the first, because the run would end there."""

    def __init__(self, first: ToolError, count: int) -> None:
        super().__init__(f"{count} findings; the first: {first.message}", first.hint)
        self.exit_code = first.exit_code


_collector: ContextVar[Findings | None] = ContextVar("findings", default=None)


def collecting() -> bool:
    """Whether errors are kept at the moment."""
    return _collector.get() is not None


@contextlib.contextmanager
def piece() -> Iterator[None]:
    """One of several checks. Its error is kept while findings are collected, and raised otherwise."""
    found = _collector.get()
    if found is None:
        yield
        return
    with found.looking():
        yield


def report(errors: Iterable[ToolError]) -> None:
    """Raise the first of these errors; while findings are collected, all of them are kept before."""
    errors = list(errors)
    if not errors:
        return
    if (found := _collector.get()) is not None:
        for error in errors:
            found.add(error)
    raise errors[0]
