"""``hpo``: the group of all commands, and how errors are printed.

Each command parses its options, calls one function and prints.  Importing this module loads neither torch nor Optuna.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from hpo.cli import best, clean, folders, machine, notify, status, studies, tools, trainings, watch
from hpo.cli.start import announced_imports
from hpo.cli.streams import open_closed, show_everything
from hpo.cli.supervised import as_worker_if_long
from trainer.errors import ConfigError, Interrupted, MachineError, ToolError
from trainer.text import clean_text


def print_error(error: ToolError) -> None:
    """Print two lines: what is wrong and what to do; and a line for each command to choose from.  Control characters
    are removed."""
    if isinstance(error, Interrupted):
        what, then = "", "next: "
    else:
        what, then = "error: ", "hint: "
    click.echo(what + clean_text(error.message), err=True)
    if error.hint:
        click.echo(then + clean_text(error.hint), err=True)
    for command in error.commands:
        click.echo(f"  {clean_text(command)}", err=True)


def _end_with(error: ToolError) -> None:
    from hpo.night import failed

    print_error(error)
    failed(error)


def _refuse(error: click.UsageError) -> NoReturn:
    from hpo.cli.usage import as_error

    refused = as_error(error)
    print_error(refused)
    sys.exit(refused.exit_code)


def _unwritable(error: UnicodeEncodeError) -> ToolError:
    """A file name that the system's encoding (LC_ALL=C) cannot hold. Output never raises this (``streams``)."""
    return MachineError(
        f"{error.object!a} cannot be a file name: the system's encoding is {error.encoding}",
        "set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8",
    )


# Errors of the system that can happen to any file, and what to do.  Others, such as a missing file, are bugs.
_OF_SYSTEM = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link leads to itself; remove it",
    errno.EIO: "the disk reports an error; check the system log",
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.EROFS: "the disk is mounted read-only; use a folder on another disk",
    errno.EMFILE: "this process may open more files after: ulimit -n 4096",
    errno.ENFILE: "close other programs, then run the command again",
    errno.ESTALE: "the network disk was away; run the command again",
}


def _of_system(error: OSError) -> ToolError | None:
    """The error for a file that the system refuses; None for any other."""
    hint = _OF_SYSTEM.get(error.errno or 0)
    if hint is None or error.filename is None:
        return None
    kind = ConfigError if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else MachineError
    return kind(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}", hint)


_OUTPUT_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Commands(click.Group):
    """A click group that prints this tool's errors, and click's own, as two lines and sets the exit code."""

    def __call__(self, *args: Any, **more: Any) -> Any:
        """The command line of a process: a long command is carried out by a worker.  With words of its own, it is
        carried out in this process."""
        open_closed()
        with contextlib.nullcontext() if args or more else as_worker_if_long():
            return super().__call__(*args, **more)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        try:
            return super().make_context(*args, **more)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _refuse(error)

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> Any:
        """Note the command line: the steps of a study are recorded with it, and repeated by ``hpo resume``."""
        from hpo.study import INVOCATION, Invocation

        show_everything()
        words = tuple(sys.argv[1:] if args is None else args)
        token = INVOCATION.set(Invocation(words, os.getcwd()))
        try:
            return super().main(args, *more, **named)
        finally:
            INVOCATION.reset(token)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with announced_imports():
                return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _refuse(error)
        except ToolError as error:
            _end_with(error)
            sys.exit(error.exit_code)
        except click.Abort:  # Ctrl-C or Ctrl-D at a question; to Python it is a RuntimeError
            click.echo("\nnothing was done", err=True)
            sys.exit(130)
        except (RuntimeError, MemoryError) as error:
            from trainer.oom import named

            known = named(error, "out of memory", "close other programs that use the GPU or much memory")
            if known is None:
                raise
            _end_with(known)
            sys.exit(known.exit_code)
        except KeyboardInterrupt:
            from hpo.study import INVOCATION

            said = INVOCATION.get()
            click.echo("stopped at once", err=True)
            if said is not None:
                click.echo("next: " + clean_text(shlex.join(["hpo", *said.stored])), err=True)
            sys.exit(130)
        except UnicodeEncodeError as error:
            if error.encoding != sys.getfilesystemencoding():
                raise
            print_error(_unwritable(error))
            sys.exit(MachineError.exit_code)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(0)
        except OSError as error:
            if (known := _of_system(error)) is not None:
                print_error(known)
                sys.exit(known.exit_code)
            if error.errno not in _OUTPUT_FULL or error.filename is not None:
                raise
            sys.stdout = io.StringIO()  # what is left in its buffer cannot be written either
            print_error(
                MachineError(
                    f"the output cannot be written: {error.strerror}",
                    "free some space where it is redirected to, then run the command again",
                )
            )
            sys.exit(MachineError.exit_code)


def version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        click.echo(f"hpo {installed('lora-hpo')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=version, help="Show the version."
)
def main() -> None:
    """Find the best LoRA settings for your images: search on SD1.5, score generated images, transfer to SDXL."""


for command in (
    studies.search,
    status.status,
    watch.watch,
    studies.confirm,
    studies.dashboard,
    folders.resume,
    folders.studies,
    folders.delete,
    best.best,
    best.importance,
    clean.clean,
    studies.transfer,
    trainings.plan,
    trainings.train,
    trainings.evaluate,
    trainings.compare,
    tools.inspect,
    tools.export,
    tools.dataset,
    notify.notify,
    machine.doctor,
):
    main.add_command(command)
