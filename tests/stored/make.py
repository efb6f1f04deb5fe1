"""How the stored artefacts were made: the tool's own commands on the miniature, ended by real signals.

    python -m tests.stored.make

It begins everything with the code of the checkout it is run in, and writes ``commands.ARCHIVE``.  The archive
in the repository was begun by commit 3c18213 and is never made anew: that later code goes on with it is what
``tests/faults/test_begun_before.py`` proves.  In it are, as kill -9 left them,

* a search of four trials: 0 and 1 complete; 2 with its result on disk, of which Optuna was not told; 3 in training,
  some steps beyond its checkpoint (it was stopped by Ctrl-C once, which saves, then taken up and killed);
* its confirmation: run 0 complete, run 1 trained and in the middle of its images;
* a run of ``hpo train``, some steps beyond its checkpoint.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw

from tests.stored.commands import (
    ARCHIVE,
    BEGUN_TRIALS,
    CONFIRM,
    NAME,
    SEARCH,
    STEPS,
    TRAIN,
    TRIALS,
    environment,
    hpo,
)

HERE = Path(__file__).parent
DEADLINE_SECONDS = 300.0
POLL_SECONDS = 0.001  # shorter than anything that a signal must come into the middle of
STOPPED_AFTER, FURTHER = 6, 4  # steps before Ctrl-C, and steps beyond the checkpoint before kill -9
GROUNDS = {"sand": ((220, 200, 130), (210, 205, 140)), "grass": ((60, 150, 60), (70, 140, 50))}


def draw_images(folder: Path) -> None:
    """A figure in five places on two grounds, 64 × 64 px; two captions, so that few texts are cached."""
    folder.mkdir(parents=True)
    for place in range(5):
        for ground, (light, dark) in GROUNDS.items():
            x, name = 18 + 7 * place, f"{ground}_{place}"
            image = Image.new("RGB", (64, 64), dark if place % 2 else light)
            draw = ImageDraw.Draw(image)
            for side in (-1, 1):
                draw.ellipse((x + 10 * side - 5, 10, x + 10 * side + 5, 20), fill=(40, 60, 220))
            draw.polygon([(x, 24), (x - 16, 58), (x + 16, 58)], fill=(220, 40, 40))
            draw.ellipse((x - 10, 14, x + 10, 34), fill=(240, 220, 60))
            image.save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"a luca figure on {ground}", encoding="utf-8")


@contextmanager
def started(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command at work; it does not outlive the block."""
    print("$ hpo", *words)
    process = subprocess.Popen(hpo(*words), cwd=folder, env=environment(), stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until ``what`` holds; RuntimeError if the process ends first or it takes too long."""
    until = time.monotonic() + DEADLINE_SECONDS
    while not what():
        if process.poll() is not None:
            raise RuntimeError("the command was over before it could be sent a signal: run this once more")
        if time.monotonic() > until:
            raise RuntimeError("the command did not get there in time")
        time.sleep(POLL_SECONDS)


def steps(log: Path) -> int:
    """The last step in a train.jsonl."""
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL


def checkpoint_step(folder: Path) -> int:
    (found,) = folder.glob("step-*")
    return int(found.name.removeprefix("step-"))


def begin_beyond_a_checkpoint(folder: Path, log: Path, checkpoints: Path, *words: str) -> None:
    """A training that Ctrl-C stopped – that saves – and that was taken up again and killed some steps later."""
    with started(folder, *words) as process:
        wait_for(lambda: steps(log) >= STOPPED_AFTER, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) == 130
    saved = checkpoint_step(checkpoints)
    with started(folder, *words) as process:
        wait_for(lambda: steps(log) >= saved + FURTHER, process)
        kill(process)
    assert checkpoint_step(checkpoints) == saved and steps(log) < STEPS


def begin_search(folder: Path) -> None:
    """Two trials in peace; then two workers, of which one is held still while the other comes and goes."""
    subprocess.run(
        hpo(*SEARCH, "--trials", str(BEGUN_TRIALS)),
        cwd=folder,
        env=environment(),
        check=True,
        timeout=DEADLINE_SECONDS,
    )
    words = (*SEARCH, "--trials", str(TRIALS))
    first, second = (folder / "runs" / NAME / f"trial_{number:04d}" for number in (2, 3))
    with started(folder, *words) as worker:
        wait_for(lambda: steps(first / "train.jsonl") > 0, worker)
        worker.send_signal(signal.SIGSTOP)
        begin_beyond_a_checkpoint(folder, second / "train.jsonl", second / "checkpoints", *words)
        worker.send_signal(signal.SIGCONT)
        wait_for((first / "result.json").is_file, worker)
        kill(worker)


def begin_confirmation(folder: Path) -> None:
    run = folder / "runs" / f"{NAME}__confirm" / "trial_0001"
    index = run / "samples" / "samples.json"  # written after each image
    with started(folder, *CONFIRM) as process:
        wait_for(lambda: index.is_file() and len(json.loads(index.read_text())["images"]) == 2, process)
        kill(process)
    assert len(json.loads(index.read_text())["images"]) == 2 == len(list(run.glob("samples/*.png")))
    assert not (run / "result.json").exists() and not (run / "checkpoints").exists()


def pack(folder: Path) -> None:
    """Everything but what is of this machine: names with a process id, SQLite's shared memory (it makes that
    anew from the write-ahead log).  No file may name a folder of it."""
    places = [str(place).encode() for place in (folder, HERE.parents[1], Path.home()) if place != Path("/")]
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if name.suffix == ".db-shm" or any(part.startswith(".tmp-") for part in name.parts):
                continue
            content = path.read_bytes()
            assert not [place for place in places if place in content], (
                f"{name} names a folder of this machine"
            )
            archive.writestr(str(name), content)


def main() -> None:
    if ARCHIVE.exists():
        raise SystemExit(
            f"{ARCHIVE.name} is kept as it is: name another archive, after the code that begins it"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_images(folder / "images" / "1_luca figure")
        for name in ("tiny.toml", "lora.toml"):
            shutil.copy(HERE / name, folder)
        begin_search(folder)
        begin_confirmation(folder)
        run = folder / "output" / f"{NAME}.run"
        begin_beyond_a_checkpoint(folder, run / "train.jsonl", run / "checkpoints", *TRAIN)
        pack(folder)
    print(f"{ARCHIVE.name}: {ARCHIVE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
