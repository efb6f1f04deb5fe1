"""A dry run ends with the code of the run and tells everything that is wrong in one go."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from hpo.cli.main import main
from hpo.train.command import TrainRequest, read_request
from hpo.train.plan import show
from tests.tiny import save_folder, tiny_base
from tests.tiny_run import TINY
from tests.tiny_search import draw_images
from trainer.config import SETTINGS as SETTINGS_NAMES
from trainer.errors import ConfigError, DataError
from trainer.findings import Findings, piece, report

SETTINGS = (
    TINY + 'learning_rate = 1e-3\ntrain_batch_size = 2\nmax_train_epochs = 1\nsave_precision = "float"\n'
)
KOHYA = SETTINGS + 'network_module = "networks.lora"\ncaption_extension = ".txt"\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tiny_base("sd15"), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw_images(tmp_path / "images" / "1_zkw figure", count=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    return tmp_path


def hpo(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def nothing(place: Path) -> None:
    pass


def no_caption(place: Path) -> None:
    """Nor a name of the folder that could be one."""
    sorted(place.rglob("*.txt"))[0].unlink()
    (place / "images" / "1_zkw figure").rename(place / "images" / "1_")


def empty_caption(place: Path) -> None:
    sorted(place.rglob("*.txt"))[1].write_text(" \n")


def broken_image(place: Path) -> None:
    sorted(place.rglob("*.png"))[2].write_bytes(b"\x89PNG")


def no_images(place: Path) -> None:
    shutil.rmtree(place / "images")


def output_is_a_file(place: Path) -> None:
    (place / "out").write_text("")


def foreign_lora(place: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (place / "out").mkdir()
    save_file({"a": torch.zeros(1)}, place / "out" / "lora.safetensors")


WRONG: dict[str, tuple[str, tuple[str, ...], Callable[[Path], None]]] = {
    "nothing wrong": (SETTINGS, (), nothing),
    "unknown key": (SETTINGS + "netwrk_dim = 3\n", (), nothing),
    "wrong value": (SETTINGS + "min_snr_gamma = -3\n", (), nothing),
    "contradiction": (SETTINGS + "text_encoder_frozen = true\nunet_lr = 0.0\n", (), nothing),
    "two contradictions": (SETTINGS + "zero_terminal_snr = true\nmasked_loss = true\n", (), nothing),
    "not TOML": ("learning_rate = = 1\n", (), nothing),
    "kohya: refused key": (KOHYA + 'resume = "state"\n', (), nothing),
    "kohya: unknown key": (KOHYA + "colour_aug = true\n", ("--strict",), nothing),
    "kohya: bad list": (KOHYA + 'optimizer_args = ["weight_decay"]\n', (), nothing),
    "--set unknown": (SETTINGS, ("--set", "netwrk_dim=3"), nothing),
    "--set value": (SETTINGS, ("--set", "network_dim=0"), nothing),
    "output name": (SETTINGS, ("--set", "output_name=a/b"), nothing),
    "setting of SDXL": (SETTINGS + "text_encoder_lr1 = 1e-5\n", (), nothing),
    "no caption": (SETTINGS, (), no_caption),
    "empty caption": (SETTINGS, (), empty_caption),
    "broken image": (SETTINGS, (), broken_image),
    "no images": (SETTINGS, (), no_images),
    "caption ending": (SETTINGS, ("--set", "caption_extension=.caption"), nothing),
    "output is a file": (SETTINGS, (), output_is_a_file),
    "another LoRA in the way": (SETTINGS, (), foreign_lora),
    "device": (SETTINGS, ("--device", "cuda:7"), nothing),
    "base is missing": (SETTINGS, ("--base", "models/absent.safetensors"), nothing),
    "base is unknown": (SETTINGS, ("--base", "mini-sd"), nothing),
    "base is no model": (SETTINGS, ("--base", "settings.toml"), nothing),
    "base is not here": (SETTINGS, ("--base", "someone/something"), nothing),
    "clip_skip": (SETTINGS + "clip_skip = 12\n", (), nothing),
    "v on a noise base": (SETTINGS + "v_parameterization = true\n", (), nothing),
    "no LoRA to continue": (SETTINGS, ("--set", "network_weights=absent.safetensors"), nothing),
}


def command(base: Path, words: tuple[str, ...]) -> tuple[str, ...]:
    usual = ("train", "settings.toml", "--data", "images", "--output", "out")
    if "--base" not in words:
        usual += ("--base", str(base))
    if "--device" not in words:
        usual += ("--device", "cpu")
    return (*usual, *words)


def message_of(result: Result) -> str:
    return next((line[7:] for line in result.stderr.splitlines() if line.startswith("error: ")), "")


@pytest.mark.parametrize("name", list(WRONG))
def test_a_dry_run_ends_as_the_run_does(name: str, base: Path, place: Path) -> None:
    text, words, spoil = WRONG[name]
    (place / "settings.toml").write_text(text)
    spoil(place)
    before = sorted(place.rglob("*"))
    dry = hpo(*command(base, words), "--dry-run", "--json")
    assert sorted(place.rglob("*")) == before
    run = hpo(*command(base, words))
    assert dry.exit_code == run.exit_code, (dry.output, run.output)
    assert (run.exit_code == 0) == (name == "nothing wrong"), run.output
    said = message_of(run)
    if dry.stdout.strip():
        findings = json.loads(dry.stdout)["findings"]
        # a run ends before the checks that load something, so it may have fewer findings
        first = said.partition(" findings; the first: ")[2] or said
        assert [f["what"] for f in findings][:1] == ([first] if first else [])
        assert not findings or findings[0]["exit_code"] == run.exit_code
    else:  # the file itself cannot be read
        assert message_of(dry) == said


def test_a_sound_dry_run_ends_with_the_command_of_the_run(base: Path, place: Path) -> None:
    (place / "settings.toml").write_text(SETTINGS)
    words = command(base, ("--set", "network_dim=2"))
    assert hpo(*words, "--dry-run").stdout.splitlines()[-1] == f"next: {shlex.join(['hpo', *words])}"
    assert "next:" not in hpo(*words, "--dry-run", "--set", "network_dim=0").stdout


def test_a_terminal_shows_the_settings_that_have_a_value_and_a_pipe_all(base: Path, place: Path) -> None:
    (place / "settings.toml").write_text(KOHYA.replace("resolution = 64", 'resolution = "64"'))
    file = read_request(TrainRequest(place / "settings.toml", base=str(base), data=place / "images"))
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
        show(console, file, None, "output")
        shown[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("learning_rate", "resolution", "train_data_dir"):
        assert name in shown[True] and name in shown[False]
    assert "noise_offset" not in shown[True] and "noise_offset" in shown[False]
    left_out = len(SETTINGS_NAMES) - len(file.origins)
    assert f"and {left_out} settings with sd-scripts' defaults" in shown[True]
    assert "64 → 64" not in shown[True]


def test_missing_sample_prompts_are_a_warning(base: Path, place: Path) -> None:
    (place / "settings.toml").write_text(SETTINGS)
    words = ("--set", "sample_prompts=absent.txt", "--set", "sample_every_n_epochs=1")
    result = hpo(*command(base, words), "--dry-run", "--json")
    assert result.exit_code == 0
    (found,) = json.loads(result.stdout)["findings"]
    assert found["exit_code"] == 0 and "warning: sample_prompts = absent.txt does not exist" in found["what"]
    assert "absent.txt does not exist" in " ".join(hpo(*command(base, words), "--dry-run").stdout.split())


def test_what_is_assumed_of_a_base_that_says_nothing_is_told(base: Path, place: Path) -> None:
    silent = shutil.copytree(base, place / "silent")
    schedule = silent / "scheduler" / "scheduler_config.json"
    known = json.loads(schedule.read_text())
    del known["prediction_type"]
    schedule.write_text(json.dumps(known))
    (place / "settings.toml").write_text(SETTINGS + "v_parameterization = true\nzero_terminal_snr = true\n")
    result = hpo(*command(base, ("--base", "silent")), "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    said = "silent does not say what it predicts: v-prediction with zero terminal SNR is assumed"
    assert any(said in line for line in json.loads(result.stdout)["translated"])
    run = hpo(*command(base, ("--base", "silent", "--set", "max_train_steps=1")))
    assert run.exit_code == 0 and said in " ".join(run.stdout.split()), run.output


def test_a_vae_is_checked_before_anything_is_loaded(base: Path, place: Path) -> None:
    (place / "settings.toml").write_text(SETTINGS)
    (place / "x.safetensors").write_bytes(b"<html>")
    for name, code in (("absent.safetensors", 2), ("x.safetensors", 4), (str(base), 0)):
        result = hpo(*command(base, ("--set", f"vae={name}")), "--dry-run", "--json")
        assert result.exit_code == code, result.output


def test_everything_that_is_wrong_is_told_in_one_go_the_cheap_first(base: Path, place: Path) -> None:
    (place / "settings.toml").write_text(KOHYA + 'colour_aug = true\nmin_snr_gamma = -3\nresume = "state"\n')
    no_caption(place)
    empty_caption(place)
    broken_image(place)
    words = ("--set", "v_parameterization=true", "--set", "clip_skip=12", "--set", "netwrk_dim=2", "--strict")
    result = hpo(*command(base, words), "--dry-run", "--json")
    found = [(f["what"], f["exit_code"]) for f in json.loads(result.stdout)["findings"]]
    for number, part in enumerate(
        (
            "unknown setting netwrk_dim",
            "min_snr_gamma = -3",
            "colour_aug = true: did you mean color_aug?",
            "resume = state",
            "1 images have no caption",
            "1 captions are empty",
            "is not a PNG",
            "clip_skip = 12",
            "v_parameterization is set, but",
        )
    ):
        assert part in found[number][0], (part, found)
    assert [code for _, code in found] == [2, 2, 2, 2, 3, 3, 3, 2, 2]
    assert result.exit_code == 2 and "9 findings; the first: " in result.stderr
    shown = " ".join(hpo(*command(base, words), "--dry-run").stdout.split())
    assert "colour_aug" in shown and "v_parameterization is set" in shown


def test_a_missing_base_and_bad_captions_are_both_told(base: Path, place: Path) -> None:
    (place / "settings.toml").write_text(SETTINGS)
    empty_caption(place)
    words = command(base, ("--base", "absent.safetensors", "--dry-run", "--json"))
    result = hpo(*words)
    assert [f["exit_code"] for f in json.loads(result.stdout)["findings"]] == [3, 2]
    assert result.exit_code == 3


def test_pieces_raise_where_nobody_collects() -> None:
    with pytest.raises(DataError), piece():
        raise DataError("a")
    with pytest.raises(ConfigError, match="first"):
        report([ConfigError("first"), ConfigError("second")])
    found = Findings()
    with found.looking():
        with piece():
            raise DataError("a")
        report([ConfigError("first"), ConfigError("second"), DataError("a")])
    assert [error.message for error in found.errors] == ["a", "first", "second"]
    with pytest.raises(Exception, match="3 findings") as caught:
        found.require_none()
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]


def test_all_mistakes_of_a_dataset_file_come_at_once_beside_those_of_the_settings(
    place: Path, base: Path
) -> None:
    (place / "d.toml").write_text(
        '[[datasets]]\nbatch_size = "1"\nfoo = 1\n'
        '[[datasets.subsets]]\nimage_dir = "images/1_zkw figure"\nnum_repeats = "2"\nbar = 2\n'
        '[[datasets.subsets]]\nimage_dir = "C:/x"\n'
    )
    (place / "k.toml").write_text(KOHYA + "clip_skip = 13\n")
    result = hpo("train", "k.toml", "--base", str(base), "--dataset", "d.toml", "--dry-run", "--json")
    whats = " | ".join(finding["what"] for finding in json.loads(result.stdout)["findings"])
    assert result.exit_code == 2
    for what in ('batch_size = "1"', "foo", 'num_repeats = "2"', "bar", "C:/x", "clip_skip = 13"):
        assert what in whats, what
    assert "train_batch_size" not in whats, "the key of the file is named"


def test_a_folder_on_the_command_line_replaces_one_that_is_none_here(place: Path, base: Path) -> None:
    (place / "k.toml").write_text(KOHYA + "output_dir = 'C:\\Users\\me\\loras'\nclip_skip = 13\n")
    words = ("train", "k.toml", "--base", str(base), "--data", "images", "--dry-run")
    alone = hpo(*words)
    assert alone.exit_code == 2 and "Windows path" in alone.output and "clip_skip = 13" in alone.output
    assert hpo(*words, "--output", "here", "--set", "clip_skip=2").exit_code == 0
