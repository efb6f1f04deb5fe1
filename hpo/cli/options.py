"""Options shared by several commands, each declared once, and their value types.

Owns names, types, common help texts and the old names of options.  An option whose help differs between
commands takes it as an argument. Does not own the options of a single command; they are declared with that
command.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from hpo.cli.which import complete_name

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]


class UserPath(click.ParamType):
    """A path as the user means it: ``trainer.paths.user_path`` (``~``, spaces around it, paths of another system).

    The shell expands ``~`` only at the start of a word, so ``--runs=~/x`` arrives as it is written."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from trainer.paths import user_path

        text = str(value)
        if not text.strip():
            self.fail("is empty\ngive a path", param, ctx)
        return Path(user_path(text, _shown(param, ctx)))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return click.Path().shell_complete(ctx, param, incomplete)


class Named(click.ParamType):
    """A name, or the path of a file or folder, which is read as ``UserPath`` does. An empty text stays empty."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from trainer.paths import user_path

        return user_path(str(value), _shown(param, ctx))


def _shown(param: click.Parameter | None, ctx: click.Context | None) -> str:
    """The option or argument as the help shows it."""
    if param is None or ctx is None:
        return "the path"
    return param.opts[0] if param.opts[0].startswith("-") else param.make_metavar(ctx).strip("[]")


PATH, NAMED = UserPath(), Named()


class Finite(click.FloatRange):
    """click's FloatRange without NaN and infinity.  "nan" parses as a float and passes every range check."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


class Form(click.ParamType):
    """A text of a certain form, refused while parsing. ``hint``: what to write instead. ``is_secret``: the text is
    not repeated in the message."""

    def __init__(self, name: str, form: str, hint: str, *, is_secret: bool = False) -> None:
        self.name, self.form, self.hint, self.is_secret = name, re.compile(form), hint, is_secret

    def __repr__(self) -> str:
        return f"Form({self.name})"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not self.form.fullmatch(text):
            shown = "" if self.is_secret else f"{text[:80]!r} "
            self.fail(f"{shown}is not {self.name}\n{self.hint}", param, ctx)
        return text


DEVICE = Form("a device", r"cpu|cuda(:\d{1,3})?", "give cpu, cuda or cuda:1, or leave out --device")
CLIP = Form(
    "a scorer",
    r"(?!\s)(?!:)[^\x00-\x1f]+(?<![\s:])",
    "give MODEL, MODEL:TAG, MODEL:FILE (an open_clip model, as ViT-B-32:openai), or a folder",
)
NOTIFY = Form(
    "an Apprise URL",
    r"[A-Za-z][A-Za-z0-9+.-]*://\S+",
    "write SERVICE://…, for example ntfy://TOPIC; see https://github.com/caronc/apprise",
    is_secret=True,
)
STORAGE = Form(
    "the address of a database",
    r"[A-Za-z][A-Za-z0-9+]*:\S+",
    "write postgresql+psycopg://USER@HOST/DATABASE; see docs/scale-out.md",
    is_secret=True,
)
SEED = click.IntRange(0, 2**63 - 1)  # as the setting seed


# of hpo transfer: with fewer, no decision is possible (hpo.transfer.probes.run)
LEAST_TRIALS, MOST_TRIALS = 3, 32


class TargetTrials(click.IntRange):
    """``hpo transfer --trials``: 0 for none, else enough for a decision."""

    def __init__(self) -> None:
        super().__init__(0, MOST_TRIALS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if 0 < number < LEAST_TRIALS:
            hint = f"give {LEAST_TRIALS} to {MOST_TRIALS} (6 is usual), or 0 for none"
            self.fail(f"{number} is too few for a decision\n{hint}", param, ctx)
        return number


def base(help: str, *, required: bool = False) -> Option:
    return click.option("--base", type=NAMED, required=required, metavar="BASE", help=help)


def data(help: str) -> Option:
    return click.option("--data", type=PATH, metavar="DIR", help=help)


def references(help: str) -> Option:
    return click.option("--references", type=PATH, metavar="DIR", help=help)


def class_word(help: str) -> Option:
    return click.option("--class", "class_word", help=help)


def clip(help: str) -> Option:
    return click.option("--clip", type=CLIP, metavar="MODEL[:WEIGHTS]", help=help)


def device(help: str = "cpu, cuda, cuda:1 … Default: the GPU if there is one.") -> Option:
    return click.option("--device", type=DEVICE, metavar="DEVICE", help=help)


def definition(metavar: str, help: str) -> Option:
    return click.option("--definition", "study", type=NAMED, metavar=metavar, help=help)


class Renamed(click.Command):
    """A command that still takes old names of options, and says their new names.

    ``renamed``: old name → new name; "" if the value is an argument now.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        for word in args:
            old, equals, value = word.partition("=")
            if old not in self.renamed:
                words.append(word)
                continue
            new = self.renamed[old]
            click.echo(f"note: {old} is now {new or 'an argument without a name'}; {old} works until the next release",
                       err=True)  # fmt: skip
            words += [new + equals + value] if new else [value] if equals else []
        return super().parse_args(ctx, words)


def sets(help: str = "Override a setting of the file.") -> Option:
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help=help)


def as_json(help: str) -> Option:
    return click.option("--json", "as_json", is_flag=True, help=help)


prompts = click.option(
    "--prompts", type=PATH, metavar="FILE", help="Your own prompts: one per line, or TOML."
)
trigger = click.option("--trigger", help="The subject's trigger word. Default: from the folder name.")
runs = click.option(
    "--runs", type=PATH, default=Path("runs"), show_default=True, help="Folder with the studies."
)
anyway = click.option(
    "--anyway", is_flag=True, help="Go on although no trial is better than the untrained base."
)
study_name = click.argument("name", required=False, metavar="[NAME]", shell_complete=complete_name)


def notifies(command: Command) -> Command:
    """Options of the long commands that send notifications.  The innermost decorator: it runs the command."""

    @click.option(
        "--notify",
        type=NOTIFY,
        multiple=True,
        metavar="URL",
        help="Send a message to this Apprise URL when the command ends or a search converges. Also: HPO_NOTIFY.",
    )
    @click.option(
        "--notify-on",
        default="finished,failed,interrupted,converged,restarted,hung,anomaly,disk",
        show_default=True,
        metavar="EVENTS",
        help="What to send: these, and best (a new best trial).",
    )
    @click.option(
        "--quiet-hours",
        default="",
        metavar="FROM-TO",
        help="Messages wait in these hours (23:00-07:00), except that the command failed. Also: HPO_QUIET_HOURS.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, notify: tuple[str, ...], notify_on: str, quiet_hours: str, **named: Any) -> Any:
        from hpo.study import chosen_events, notifying

        with notifying(notify, chosen_events(notify_on), quiet_hours):
            return command(*args, **named)

    return cast(Command, wrapped)


def watched(command: Command) -> Command:
    """--hang-minutes of the long commands.  The innermost decorator.  Its default is ``hpo.night.HANG_MINUTES``, which
    is not read here: hpo --help loads little."""

    @click.option(
        "--hang-minutes",
        type=Finite(min=0, max=10_000),
        metavar="MIN",
        help="Without a step, image or checkpoint for so long, the work is ended and started again from its last "
        "checkpoint. 0: never. Default: 30.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, hang_minutes: float | None, **named: Any) -> Any:
        from hpo.cli.workers import role_taken
        from hpo.night import HANG_MINUTES, watch

        role_taken()
        watch(60 * (HANG_MINUTES if hang_minutes is None else hang_minutes))
        return command(*args, **named)

    return cast(Command, wrapped)


def judged_by(command: Command) -> Command:
    """Options of hpo evaluate and hpo compare that replace values recorded in the run."""
    for option in reversed(
        (
            data("The images that the LoRA was trained on."),
            references(
                "Images to measure likeness with, not used in training. Default: held_out/, or the study's."
            ),
            prompts,
            clip("Scoring model, as in hpo search."),
            trigger,
            class_word("What the subject is (girl, style, vase). Default: from the folder name."),
            click.option(
                "--base",
                type=NAMED,
                default="",
                metavar="BASE",
                help="The base model. Default: from the run.",
            ),
            definition(
                "NAME|FILE",
                "Where to read the preset, [score], [limits] and prompts: a study file, as in hpo search, or "
                "a study. Default: the study of the run, else the default study of the base.",
            ),
            device(),
        )
    ):
        command = option(command)
    return command
