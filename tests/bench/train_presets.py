"""Train training files of a folder on the miniature, for a few steps: stopped once, resumed, and read back.

    python -m tests.bench.train_presets FOLDER [--files N] [--steps N] [--json FILE]

Of all TOML and JSON files in the folder that ``bench_presets`` accepts, those are taken that differ most: in the folder
they lie in, base, optimizer, schedule, kind of network, loss and noise. Each is trained by ``hpo train`` with its own
settings, but at 64 px and for a few steps: once as a whole, and once stopped by Ctrl-C (SIGINT) and resumed by the same
command. It is well if every step has a gradient, both LoRAs have the same weights, and ``hpo inspect`` reads the file.
Its warnings are shown: with clip_skip = 2, for example, the last layer of the text encoder is not trained.
``write_presets`` writes such a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file

from hpo.train import TrainRequest
from hpo.train.command import read_request
from tests.bench.bench_presets import Bench
from tests.places import ROOT
from trainer.config import TrainConfig
from trainer.errors import ToolError
from trainer.kohya.frontends import recognise

STEPS = 8
SMALL = {"resolution": 64, "min_bucket_reso": 64, "max_bucket_reso": 128, "bucket_reso_steps": 32}
PATHS = ("vae", "in_json", "network_weights", "sample_prompts", "reg_data_dir", "conditioning_data_dir")
PROGRAM = [sys.executable, "-u", "-m", "hpo.cli"]
LOOK_EVERY_SECONDS = 0.01
LONGEST_SECONDS = 600.0
# Settings by which files are chosen: many different values make a file worth training.
FEATURES = (
    "optimizer_type",
    "lr_scheduler",
    "network_type",
    "loss_type",
    "min_snr_gamma",
    "noise_offset",
    "multires_noise_iterations",
    "gradient_accumulation_steps",
    "shuffle_caption",
    "network_train_unet_only",
    "clip_skip",
)


@dataclass(frozen=True)
class Outcome:
    """``stopped_after`` is the step after which the run was interrupted, ``farthest`` the largest difference of a
    weight between the whole run and the resumed one, ``loss`` that of the last step."""

    file: str
    base: str
    optimizer: str
    schedule: str
    network: str
    stopped_after: int
    farthest: float
    loss: float
    inspected: str
    seconds: float
    wrong: str = ""
    warnings: tuple[str, ...] = ()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=10, help="how many files to train")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    arguments = parser.parse_args(words)
    folder, to = arguments.folder.absolute(), arguments.json and arguments.json.absolute()
    # Files that name folders of their own (logging_dir) write them into the current one.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        bench = Bench(Path(scratch), None)
        chosen = choose(bench, folder, arguments.files)
        outcomes = []
        for request, config in chosen:
            outcomes.append(train(request, config, Path(scratch), arguments.steps))
            show(outcomes[-1], folder)
    well = sum(not outcome.wrong for outcome in outcomes)
    print(f"{well} of {len(outcomes)} files were trained, resumed and read back")
    if to:
        to.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1), "utf-8")
    return 0 if outcomes and well == len(outcomes) else 1


# Choosing


def choose(bench: Bench, folder: Path, count: int) -> list[tuple[TrainRequest, TrainConfig]]:
    """Accepted files that differ most, one after the other: of each program (folder) in turn, that which adds as many
    new values as any."""
    left = {path: found for path in _files(folder) if (found := _read(bench, path)) is not None}
    seen: set[tuple[str, str]] = set()
    programs: Counter[str] = Counter()
    chosen = []
    while left and len(chosen) < count:
        new = {path: len(_features(path, folder, *left[path]) - seen) for path in left}
        of = {path: path.relative_to(folder).parts[0] for path in left}
        path = min(left, key=lambda path: (programs[of[path]], -new[path], str(path)))
        programs[of[path]] += 1
        seen |= _features(path, folder, *left[path])
        chosen.append(left.pop(path))
    return chosen


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix in (".toml", ".json") and path.is_file() and not hidden:
            yield path


def _read(bench: Bench, path: Path) -> tuple[TrainRequest, TrainConfig] | None:
    """What is to be run for a file, and its settings; None if it is not accepted."""
    if bench.judge(path).outcome != "accepted":
        return None
    with contextlib.suppress(ToolError):
        request = bench.request(path, recognise(path))
        return request, read_request(request).config
    return None


def _features(path: Path, folder: Path, request: TrainRequest, config: TrainConfig) -> set[tuple[str, str]]:
    """The values by which a file differs from others."""
    found = {(name, str(getattr(config, name))) for name in FEATURES}
    return found | {("base", str(request.base)), ("folder", str(path.relative_to(folder).parent))}


# Training


def train(request: TrainRequest, config: TrainConfig, scratch: Path, steps: int) -> Outcome:
    """A file trained as a whole, and stopped and resumed."""
    began = time.monotonic()
    places = {name: scratch / f"{name} {time.monotonic_ns()}" for name in ("whole", "stopped")}
    stopped, wrong, farthest, loss, inspected = 0, "", 0.0, float("nan"), ""
    warnings: tuple[str, ...] = ()
    try:
        _done(_command(request, config, places["whole"], steps))
        command = _command(request, config, places["stopped"], steps)
        stopped = _stop(command, places["stopped"], steps)
        said = _done(command)
        if f"resuming from step {stopped}" not in said:
            raise RuntimeError(f"it did not resume: {said[-300:]}")
        whole, resumed = (next(place.glob("*.safetensors")) for place in places.values())
        farthest = _farthest(whole, resumed)
        inspected, warnings = _inspect(resumed)
        if farthest > 0.0:
            wrong = f"the resumed run differs by {farthest:g}"
        log = _steps_of(places["stopped"])
        loss = log[-1]["loss"]
        if [int(step["step"]) for step in log if step["grad_norm"] > 0.0] != list(range(1, steps + 1)):
            wrong = f"not every step has a gradient {wrong}".rstrip()
    except (RuntimeError, StopIteration) as error:
        wrong = str(error) or "no LoRA was written"
    return Outcome(
        str(request.file),
        str(request.base),
        config.optimizer_type,
        config.lr_scheduler,
        config.network_type,
        stopped,
        farthest,
        loss,
        inspected,
        round(time.monotonic() - began, 1),
        wrong,
        warnings,
    )


def _command(request: TrainRequest, config: TrainConfig, output: Path, steps: int) -> list[str]:
    """The command for a file, without what it names on another machine."""
    command = [*PROGRAM, "train", str(request.file), "--base", str(request.base), "--output", str(output)]
    command += ["--data", str(request.data)] if request.data else []
    lost = {name: "none" for name in PATHS if (value := getattr(config, name)) and not Path(value).exists()}
    blocks = (
        {"network_dim": 4} if config.network_type == "OFT" else {}
    )  # they must divide the miniature's layers
    for name, value in {**SMALL, **lost, **blocks, "max_train_steps": steps}.items():
        command += ["--set", f"{name}={value}"]
    return command


def _start(command: list[str], errors: int = subprocess.STDOUT) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def _done(command: list[str], errors: int = subprocess.STDOUT) -> str:
    """What a command says, to its end. Raises RuntimeError if it fails."""
    process = _start(command, errors)
    said, _ = process.communicate(timeout=LONGEST_SECONDS)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {said.strip()[-400:]}")
    return said


def _stop(command: list[str], output: Path, steps: int) -> int:
    """Interrupt a run after its first steps, as Ctrl-C does: the step after which it stopped. Raises RuntimeError."""
    process = _start(command)
    while process.poll() is None and not _steps_of(output):
        time.sleep(LOOK_EVERY_SECONDS)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=LONGEST_SECONDS)
    match = re.search(rf"stopped after step (\d+)/{steps}", said)
    if process.returncode != 130 or match is None:
        raise RuntimeError(f"it was not interrupted (exit code {process.returncode}): {said.strip()[-400:]}")
    return int(match[1])


def _steps_of(output: Path) -> list[dict[str, float]]:
    """The steps in a run's log."""
    lines = [line for log in output.glob("*.run/train.jsonl") for line in log.read_text("utf-8").splitlines()]
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in events if event["event"] == "step"]


def _farthest(one: Path, other: Path) -> float:
    """The largest difference of a weight. Raises RuntimeError for other tensors."""
    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys():
        raise RuntimeError("the resumed run has other tensors")
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def _inspect(lora: Path) -> tuple[str, tuple[str, ...]]:
    """(kind and ranks, warnings) of a file, as ``hpo inspect --json`` reads it."""
    facts = json.loads(_done([*PROGRAM, "inspect", str(lora), "--json"], subprocess.DEVNULL))
    ranks = ", ".join(facts.get("ranks", {}))
    return f"{facts['kind']}, {sum(facts['modules'].values())} modules, rank {ranks}", tuple(
        facts["warnings"]
    )


def show(outcome: Outcome, folder: Path) -> None:
    file = Path(outcome.file)
    name = file.relative_to(folder) if file.is_relative_to(folder) else file.name
    print(
        f"{'wrong' if outcome.wrong else 'well '}  {name}  {outcome.base}  {outcome.network}  {outcome.optimizer}  "
        f"{outcome.schedule}  stopped after {outcome.stopped_after}  {outcome.inspected}  {outcome.seconds:.0f} s"
        + "".join(f"\n       {text}" for text in (outcome.wrong, *outcome.warnings) if text),
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
