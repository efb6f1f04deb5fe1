"""The commands: quick to start, and every mistake is one line of what, one of what to do, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hpo.cli.main import main
from hpo.cli.tools import dataset, export
from tests.tiny_search import draw_images


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder beside a sound dataset; whatever a command leaves in it is seen."""
    draw_images(tmp_path / "images" / "1_zkw figure", 10)  # two of them are held out
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    yield here


def hpo(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def refused(here: Path, code: int, message: str, *words: str) -> str:
    """The command ends with this code and message, on two lines, and leaves no file.  Returns the hint."""
    result = hpo(*words)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == code, result.output
    assert lines[0].startswith("error: ") and message in lines[0], lines
    assert len(lines) == 2 and lines[1].startswith("hint: "), lines
    assert "\x1b" not in result.stderr
    assert list(here.iterdir()) == []
    return lines[1]


def search(*words: str) -> tuple[str, ...]:
    return ("search", "--base", "mini-sd15", "--data", "../images", "--trials", "2", *words)


def test_help_loads_neither_torch_nor_optuna() -> None:
    for module in ("hpo.cli", "hpo.cli.main"):
        code = f"import sys, {module}; print([m for m in ('torch', 'optuna', 'numpy', 'rich') if m in sys.modules])"
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "[]"


def test_a_shared_option_reads_the_same_in_every_command() -> None:
    """Name, type and the place of a value; help may say what it is for there."""
    seen: dict[str, tuple[object, ...]] = {}
    for command in [*main.commands.values(), *dataset.commands.values(), *export.commands.values()]:
        for option in command.params:
            if set(option.opts) & {
                "--runs",
                "--device",
                "--data",
                "--set",
                "--class",
                "--trigger",
                "--json",
                "--clip",
            }:
                facts = (option.name, option.opts, repr(option.type), option.metavar, option.default)
                assert seen.setdefault(option.opts[0], facts) == facts, command.name
    assert len(seen) == 8


def test_every_command_explains_itself() -> None:
    names = {"search", "status", "confirm", "dashboard", "dataset", "plan", "transfer", "train"}
    names |= {
        "inspect",
        "evaluate",
        "compare",
        "export",
        "resume",
        "studies",
        "delete",
        "doctor",
        "best",
        "clean",
        "importance",
        "notify",
        "watch",
    }
    assert set(main.commands) == names
    for words in ([], *([name] for name in sorted(names)), ["dataset", "demo"], ["export", "kohya"]):
        result = hpo(*words, "--help")
        assert result.exit_code == 0 and "Usage:" in result.output
    assert hpo("--version").output.startswith("hpo 0.")


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["--set", "learning_rat=1"], 2, "unknown setting learning_rat", "did you mean learning_rate?"),
        (
            ["--set", "learning_rate={low=1e-4,high=20.0}"],
            2,
            "learning_rate = 20.0 is outside its limits",
            "0 to 10",
        ),
        (["--set", "network_dim=0"], 2, "network_dim = 0 is outside its limits", "1 to 1000000"),
        (["a/b"], 2, "study name 'a/b'", "a–z"),
        (["../up"], 2, "study name '../up'", "a–z"),
        (["\x1b[31mred"], 2, "study name", "a–z"),
        (["--definition", "mimi"], 2, "no study file mimi", "did you mean mini?"),
        (["--definition", "missing.toml"], 2, "no study file missing.toml", "shipped"),
        (["--data", "../nowhere"], 2, "../nowhere", "folder"),
        (["--device", "cuda:7"], 5, "device cuda:7 cannot be used", "leave out --device"),
        (["--device", "meta"], 2, "--device 'meta' is not a device", "cpu, cuda"),
    ],
)
def test_a_mistake_is_two_lines_and_leaves_nothing(
    place: Path, words: list[str], code: int, message: str, hint: str
) -> None:
    assert hint in refused(place, code, message, *search(*words))


def test_a_folder_without_images_is_refused(place: Path) -> None:
    (place.parent / "empty folder").mkdir()
    refused(place, 3, "no images", *search("--data", "../empty folder"))


def test_images_without_captions_are_refused(place: Path) -> None:
    for caption in (place.parent / "images" / "1_zkw figure").glob("*.txt"):
        caption.unlink()
    (place.parent / "images" / "1_zkw figure").rename(
        place.parent / "images" / "1_"
    )  # no words in its name either
    refused(place, 3, "caption", *search("--trigger", "zkw", "--class", "figure"))


def test_a_corrupt_image_is_named(place: Path) -> None:
    path = place.parent / "images" / "1_zkw figure" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    refused(place, 3, "3.png", *search())


def test_plain_images_without_a_class_word_name_the_flag(place: Path) -> None:
    (place.parent / "images" / "1_zkw figure").rename(place.parent / "plain")
    assert "--class" in refused(place, 2, "no class word is given", *search("--data", "../plain"))


def test_references_that_are_trained_on_are_refused(place: Path) -> None:
    words = search("--references", "../images/1_zkw figure")
    refused(place, 3, "is also a training image", *words)
    refused(place, 3, "contains 0 images", *search("--references", "../images"))


def test_references_that_are_no_images_are_named(place: Path) -> None:
    folder = place.parent / "references"
    draw_images(folder, seed=9)
    (folder / "folder.png").mkdir()
    (folder / "0.png").write_bytes(b"no image")
    refused(place, 3, "0.png is not a PNG", *search("--references", "../references"))
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to("nowhere.png")
    refused(place, 3, "0.png is not a file", *search("--references", "../references"))


def test_what_is_cheap_to_check_is_checked_before_a_base_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.search import workbench

    def load_base(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr(workbench, "load_base", load_base)
    refused(place, 2, "cannot read the prompt file", *search("--prompts", "../nowhere.txt"))
    (place.parent / "p.txt").write_bytes(b"\xff\xfe\x00")
    refused(place, 2, "cannot read the prompt file", *search("--prompts", "../p.txt"))
    refused(place, 2, "no scorer 'ViT-B-23'", *search("--clip", "ViT-B-23"))
    refused(place, 2, "sampler 'euler' is not known", *search("--set", "sampling.sampler=euler"))
    for name in (0, 1):
        (place.parent / "images" / "1_zkw figure" / f"{name}.png").unlink()
    refused(place, 3, "likeness needs at least 2", *search())


def test_a_runs_folder_that_is_a_file_is_refused(place: Path) -> None:
    (place.parent / "runs").write_text("x")
    words = ("search", "--base", "mini-sd15", "--trials", "1", "--runs", "../runs")
    refused(place, 5, "cannot write", *words)


def test_no_images_at_all_name_the_flag(place: Path) -> None:
    assert "--data" in refused(
        place, 2, "no training images given", "search", "--base", "sd15", "--trials", "1"
    )


def test_a_pickle_is_refused_unopened(place: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(place / "opened"),)

    (place.parent / "model.ckpt").write_bytes(pickle.dumps(Canary()))
    refused(place, 4, "model.ckpt", *search("--base", "../model.ckpt", "--definition", "mini"))


def test_a_file_that_is_no_base_is_refused(place: Path) -> None:
    (place.parent / "model.safetensors").write_bytes(b"\x10" + b"\0" * 40)
    refused(place, 4, "model.safetensors", *search("--base", "../model.safetensors", "--definition", "mini"))


def test_sd15_without_network_says_at_once_what_to_do(place: Path) -> None:
    started = time.monotonic()
    hint = refused(place, 4, "stable-diffusion-v1-5", *search("--base", "sd15"))
    assert "HF_ENDPOINT" in hint and "mini-sd15" in hint
    assert time.monotonic() - started < 60  # hub retries alone are 47 s, on an idle machine


def test_an_enqueued_file_that_is_no_configuration_is_refused(place: Path) -> None:
    (place.parent / "x.toml").write_text("x = [")
    refused(place, 2, "x.toml is not valid TOML", *search("--enqueue", "../x.toml"))


@pytest.mark.parametrize("words", [("status",), ("status", "x"), ("dashboard",), ("dashboard", "a/b")])
def test_commands_on_studies_that_are_not_there_say_so(place: Path, words: tuple[str, ...]) -> None:
    refused(place, 2, "study", *words)


def test_a_demo_dataset_has_captions_and_held_out_images(place: Path) -> None:
    result = hpo("dataset", "demo", "character", "luca")
    assert result.exit_code == 0 and "hpo search --base mini-sd15 --data luca" in result.output
    (folder,) = [p for p in Path("luca").iterdir() if p.name != "held_out"]
    images = sorted(folder.glob("*.png"))
    assert len(images) == 24 and all(p.with_suffix(".txt").is_file() for p in images)
    assert len(list(Path("luca/held_out").glob("*.png"))) == 8
    assert Image.open(images[0]).size == (128, 128)


def test_the_command_to_go_on_with_can_be_pasted(place: Path) -> None:
    assert "--data 'my luca' --trials" in hpo("dataset", "demo", "character", "my luca").output


@pytest.fixture
def study(place: Path) -> Path:
    """A finished tiny study under runs/."""
    from hpo.search.sampled import SearchLimits
    from tests.tiny_search import make_search, tiny_bench

    bench = tiny_bench(place / "runs" / "tiny", place.parent / "images")
    make_search(bench, SearchLimits(2)).run()
    return bench.folder.root


def test_status_shows_the_table_of_the_last_study(study: Path) -> None:
    result = hpo("status")
    assert result.exit_code == 0
    assert result.stderr == "study tiny, the one last worked on\n"
    lines = result.stdout.splitlines()
    assert lines[0].split("\t")[:2] == ["trial", "state"]
    assert [line.split("\t")[1] for line in lines[1:3]] == ["complete"] * 2
    assert lines[-2] == "# scores above are search scores; confirm with: hpo confirm tiny"
    assert lines[-1].startswith("# study=tiny complete=2/2 infeasible=0 failed=0 best=")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_dashboard_serves_every_trials_grid_and_note(study: Path) -> None:
    import json

    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "hpo.cli", "dashboard", "tiny", "--port", str(port), "--host", "0.0.0.0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = [server.stdout.readline(), server.stdout.readline()]
        assert "no password" in said[0] and f":{port}/dashboard/studies/1" in said[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies/1") as answer:
            trials = json.load(answer)["trials"]
        assert [t["state"] for t in trials] == ["Complete", "Complete"]
        for trial in trials:
            (artifact,) = trial["artifacts"]
            image = f"/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}"
            assert f"![samples]({image})" in trial["note"]["body"]
            assert "**score " in trial["note"]["body"] and "learning" in trial["note"]["body"]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{image}") as answer:
                assert answer.headers["Content-Type"] == "image/png"
                number = f"trial_{trial['number']:04d}"
                assert answer.read() == (study / number / "grid.png").read_bytes()
    finally:
        server.terminate()
        server.wait()


def test_a_port_in_use_is_named(study: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = hpo("dashboard", "tiny", "--port", str(server.getsockname()[1]))
    assert result.exit_code == 5 and "--port" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_an_error_in_words() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "hpo.cli", "inspect", "--help"]
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 5 and "the output cannot be written: No space left" in ended.stderr
    assert "Traceback" not in ended.stderr
