"""Dry-run every training file of a folder: how many are accepted, and why the others are not.

    python -m tests.bench.bench_presets FOLDER [--base sd15|sdxl|…] [--list] [--json FILE]

Every TOML, JSON and script in the folder is given to ``hpo train --dry-run``, in one process, with a generated dataset
and with a miniature base of the family that the file seems to mean. Folders of a dataset file are replaced by the
generated one; other paths of another machine are not counted as refusals. ``write_presets`` writes such a folder.

A file is "not ours" if the form reader names it as something else (a preset for FLUX, a workflow …), or if it is for
SD 2.x. Of the others, a file is "accepted" if nothing in it is refused. Warnings are counted apart. That the miniature
base predicts noise is no refusal of a file for a v-prediction base.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomlkit
from PIL import Image
from rich.console import Console

from hpo.train import TrainRequest
from hpo.train.dryrun import dry_run
from trainer.errors import ToolError
from trainer.kohya.frontends import Found, recognise
from trainer.kohya.frontends.found import leaves

KINDS = (".toml", ".json", ".sh", ".bat", ".ps1")
SDXL = re.compile(r"sdxl|\bxl\b|[_-]xl|xl[_-]|illustrious|noob|pony|animagine", re.IGNORECASE)
# Findings about this machine and the generated dataset, which say nothing about the settings.
ELSEWHERE = re.compile(
    r"does not exist|cannot read|no such file|Windows path|cannot be written|is not a folder|has no images|"
    r"has no masks|needs the package|is not on this machine and cannot be downloaded|says that it predicts noise"
)
OTHER_FAMILY = re.compile(r"SD 2\.x bases are not supported")


@dataclass(frozen=True)
class Verdict:
    path: Path
    form: str
    outcome: str  # "accepted", "refused" or "not ours"
    reasons: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", help="one base for all files, instead of mini-sd15 or mini-sdxl")
    parser.add_argument("--list", action="store_true", help="one line for each file")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file")
    arguments = parser.parse_args(words)
    paths = sorted(p for p in arguments.folder.rglob("*") if p.suffix.lower() in KINDS and p.is_file())
    paths = [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(arguments.folder).parts)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), arguments.base)
        verdicts = [bench.judge(path) for path in paths]
    _show(verdicts, arguments.folder, arguments.list)
    if arguments.json:
        rows = [{**vars(verdict), "path": str(verdict.path)} for verdict in verdicts]
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


class Bench:
    """A place with a tiny dataset, where files are dry-run."""

    def __init__(self, scratch: Path, base: str | None) -> None:
        self.scratch, self.base = scratch, base
        self.images = scratch / "images" / "10_kai figure"
        self.images.mkdir(parents=True)
        for number in range(4):
            picture = Image.new("RGB", (512, 512 + 64 * number), (number * 60, 90, 200))
            picture.save(self.images / f"{number}.png", compress_level=1)
            for suffix in (".txt", ".caption"):
                (self.images / f"{number}{suffix}").write_text("kai, standing in a garden", encoding="utf-8")

    def judge(self, path: Path) -> Verdict:
        try:
            found = recognise(path)
        except ToolError as error:
            return Verdict(path, "", "not ours", (f"{_without_path(error.message, path)} – {error.hint}",))
        request = self.request(path, found)
        out = io.StringIO()
        ended: ToolError | None = None
        with contextlib.suppress(OSError):
            try:
                dry_run(request, Console(file=io.StringIO(), width=200), out.write)
            except ToolError as error:
                ended = error
        plan = json.loads(out.getvalue()) if out.getvalue().strip() else {}
        entries = plan.get("findings", [])
        findings = [f"{entry['what']} – {entry['hint']}" for entry in entries if entry["exit_code"]]
        warnings = tuple(
            _without_path(entry["what"], request.file) for entry in entries if not entry["exit_code"]
        )
        if ended is not None and not findings:
            findings = [f"{ended.message} – {ended.hint}"]
        reasons = [_without_path(text, request.file) for text in findings if not ELSEWHERE.search(text)]
        reasons = [part for reason in reasons for part in _parts(reason)]
        unknown = tuple(str(line).split(" = ")[0].split(":")[0] for line in plan.get("unknown", []))
        outcome = "refused" if reasons else "accepted"
        if sd2 := [reason for reason in reasons if OTHER_FAMILY.search(reason)]:
            outcome, reasons = "not ours", sd2
        return Verdict(path, found.form, outcome, tuple(reasons), unknown, warnings)

    def request(self, path: Path, found: Found) -> TrainRequest:
        text = path.read_text(encoding="utf-8", errors="replace")
        self._write_captions(found)
        is_sdxl = bool(SDXL.search(path.name) or _says_sdxl(text))
        base = self.base or ("mini-sdxl" if is_sdxl else "mini-sd15")
        if found.dataset is not None:  # its own folders are elsewhere: the same file with ours
            path = self._with_our_folders(path, found)
            return TrainRequest(path, base=base, output=self.scratch / "out", dry_run=True, as_json=True)
        data = self.images.parent
        return TrainRequest(
            path, data=data, base=base, output=self.scratch / "out", dry_run=True, as_json=True
        )

    def _write_captions(self, found: Found) -> None:
        """Captions with the ending that a file asks for; none if it asks for none."""
        tables = [found.settings, *((found.dataset or {}).get("general", {}),)]
        for name, ending in (pair for table in tables for pair in leaves(table)):
            if (
                name == "caption_extension"
                and isinstance(ending, str)
                and re.fullmatch(r"\.\w[\w-]*", ending)
            ):
                for picture in self.images.glob("*.png") if "none" not in ending else ():
                    picture.with_suffix(ending).write_text("kai, standing in a garden", encoding="utf-8")

    def _with_our_folders(self, path: Path, found: Found) -> Path:
        assert found.dataset is not None
        table = json.loads(json.dumps({**found.settings, **found.dataset}, default=str))
        for dataset in table["datasets"]:
            for subset in dataset.get("subsets", []) if isinstance(dataset, dict) else []:
                for name in ("image_dir", "conditioning_data_dir"):
                    if name in subset:
                        subset[name] = str(self.images)
        copy = self.scratch / f"{path.stem[:80]}.toml"
        copy.write_text(tomlkit.dumps(table), encoding="utf-8")
        return copy


def _says_sdxl(text: str) -> bool:
    """Whether a file means SDXL: a choice of a front end, the name of its base, or its script."""
    named = re.search(r"pretrained_model_name_or_path\"?\s*[=:]\s*[\"']?([^\"'\n]*)", text)
    return bool(
        re.search(
            r"\"?sdxl\"?\s*[=:]\s*true|sdxl-lora|sdxl_train_network|no_half_vae\"?\s*[=:]\s*true",
            text,
            re.IGNORECASE,
        )
        or (named and SDXL.search(named[1]))
    )


def _without_path(text: str, path: Path) -> str:
    return text.replace(str(path), "FILE")


def _parts(reason: str) -> Iterator[str]:
    """The single reasons in one that lists several."""
    if match := re.match(r"FILE has (?:settings that are not supported|\d+ mistakes): (.*) – ", reason):
        yield from re.split(r"; (?=\w[\w ]*(?: = |: ))", match[1])
    else:
        yield reason


def _show(verdicts: Sequence[Verdict], folder: Path, all_files: bool) -> None:
    if all_files:
        for verdict in verdicts:
            print(
                f"{verdict.outcome:9} {verdict.path.relative_to(folder)}  {'; '.join(verdict.reasons)[:200]}"
            )
        print()
    count = Counter(verdict.outcome for verdict in verdicts)
    ours = count["accepted"] + count["refused"]
    share = f"{100 * count['accepted'] / ours:.1f} %" if ours else "–"
    print(
        f"{len(verdicts)} files: {count['accepted']} accepted ({share} of {ours}), {count['refused']} refused, "
        f"{count['not ours']} not ours"
    )
    _table("forms", Counter(verdict.form or "not ours" for verdict in verdicts))
    _table("refused because", _files_per(verdicts, "refused"))
    _table("not ours", _files_per(verdicts, "not ours"))
    _table("warnings", Counter(_kind(warning) for v in verdicts for warning in v.warnings))
    _table("unknown keys", Counter(key for verdict in verdicts for key in verdict.unknown), 400)


def _files_per(verdicts: Sequence[Verdict], outcome: str) -> Counter[str]:
    """In how many files each reason occurs; values are shortened, so that a reason is one line."""
    chosen = [verdict for verdict in verdicts if verdict.outcome == outcome]
    return Counter(kind for verdict in chosen for kind in {_kind(reason) for reason in verdict.reasons})


def _kind(reason: str) -> str:
    return re.sub(r"(= )['\"]?([^:]{24})[^:]*?(:)", r"\1\2…\3", reason)[:170]


def _table(title: str, count: Counter[str], most: int = 60) -> None:
    if count:
        print(f"\n{title}")
        for name, number in count.most_common(most):
            print(f"{number:5}  {name}")


if __name__ == "__main__":
    main()
