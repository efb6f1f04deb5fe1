"""hpo train, inspect and export: real files in, real files out; a stopped run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hpo.train.adapter
import hpo.train.keeper
from hpo.cli.main import main
from hpo.judge.runfiles import find_run
from hpo.train.plan import count_steps
from tests.lorafiles import FILES
from tests.tiny_run import TINY, stop_after
from tests.tiny_search import draw_images
from trainer.adapters.adapter import inject
from trainer.adapters.metadata import DATASET_KEY
from trainer.bases.load import load_base
from trainer.config import TrainConfig
from trainer.data.dataset import read_dataset
from trainer.data.steps import plan
from trainer.events import Step

SETTINGS = (
    TINY
    + """
learning_rate = 1e-3
train_batch_size = 2
max_train_epochs = 3
save_precision = "float"
"""
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: images and settings.toml."""
    draw_images(tmp_path / "images" / "1_zkw figure", count=4)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def hpo_command(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def train(base: Path, *words: str, file: str = "settings.toml", data: str = "images") -> Result:
    return hpo_command("train", file, "--base", str(base), "--data", data, "--device", "cpu", *words)


def weights(path: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def same(first: str, second: str) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_dry_run_tells_everything_and_touches_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    result = train(Path("mini-sd15"), "--dry-run", "--json", "--set", "gradient_accumulation_steps=3")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and sorted(place.rglob("*")) == before
    assert found["findings"] == []
    steps = found["steps"]
    assert (steps["images"], steps["batches_per_epoch"], steps["steps_per_epoch"], steps["total_steps"]) == (
        4,
        2,
        1,
        3,
    )
    assert found["config"]["network_dim"] == 2 and found["origins"]["network_dim"] == "file"
    assert found["origins"]["gradient_accumulation_steps"] == "--set"
    assert found["origins"]["loss_type"] == "this tool's defaults"


def test_a_dry_run_shows_what_a_file_of_sd_scripts_means_and_ends_as_the_run_would(place: Path) -> None:
    (place / "kohya.toml").write_text(
        SETTINGS + 'network_module = "networks.lora"\ncaption_extension = ".txt"\nxformers = true\n'
        'lowram = true\nhuber_c = 0.3\nresume = "state"\n'
    )
    result = train(Path("b"), "--dry-run", file="kohya.toml")
    shown = " ".join(result.stdout.split())
    assert result.exit_code == 2 and "resume" in result.stderr
    for part in (
        "translated xformers = true → SDPA",
        "no effect lowram:",
        "huber_c: only used with loss_type = huber",
        "resume = state",
        "4 samples an epoch in batches of 2 → 2 batches → 2 steps an epoch × 3 epochs → 6 steps",
    ):
        assert part in shown, part


def dry_run(place: Path, text: str, *words: str) -> Result:
    """Of the settings in ``text``, on images that are enlarged."""
    (place / "dry.toml").write_text(f"bucket_no_upscale = false\n{text}")
    return hpo_command("train", "dry.toml", "--dry-run", "--json", *words)


@pytest.mark.parametrize(
    ("base", "text", "message"),
    [
        ("mini-sd15", f"down_lr_weight = '{','.join('1' * 9)}'", "down_lr_weight has 9 values"),
        ("mini-sdxl", f"down_lr_weight = '{','.join('1' * 12)}'", "down_lr_weight has 12 values"),
        ("mini-sd15", "text_encoder_lr1 = 1e-5", "text_encoder_lr1 is for SDXL, and mini-sd15 is SD1.5"),
    ],
)
def test_a_dry_run_knows_the_family_of_its_base(place: Path, base: str, text: str, message: str) -> None:
    result = dry_run(place, text, "--base", base, "--data", "images")
    assert result.exit_code == 2 and message in result.stderr


def test_a_dry_run_says_what_the_family_passes_over(place: Path) -> None:
    words = ("--data", "images", "--base")
    lines = json.loads(dry_run(place, "clip_skip = 2", *words, "mini-sdxl").stdout)["without_effect"]
    assert lines == ["clip_skip = 2 is ignored: sdxl always uses the second-to-last layer"]
    assert json.loads(dry_run(place, "clip_skip = 2", *words, "mini-sd15").stdout)["without_effect"] == []


def test_what_a_folder_of_the_dataset_file_sets_is_not_waited_for(place: Path) -> None:
    def waits(subset: str, text: str = "keep_tokens = 1") -> list[str]:
        (place / "set.toml").write_text(
            f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images/1_zkw figure'\n{subset}\n"
        )
        return json.loads(dry_run(place, text, "--dataset", "set.toml").stdout)["without_effect"]  # type: ignore[no-any-return]

    assert waits("shuffle_caption = true") == []
    assert waits("", "keep_tokens = 1\ntoken_warmup_step = 5") == []
    assert [line.split(":")[0] for line in waits("")] == ["keep_tokens"]


def test_refused_keys_leave_the_images_and_steps_in_the_dry_run(place: Path) -> None:
    described = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images/1_zkw figure'\n"
    (place / "set.toml").write_text(described + 'caption_extension = ".txt"\n')
    text = 'network_module = "networks.lora"\nresume = "state"\n'
    result = dry_run(place, text, "--dataset", "set.toml", "--base", "mini-sd15")
    assert result.exit_code == 2 and json.loads(result.stdout)["steps"]["images"] == 4
    (place / "set.toml").write_text(described + "custom_attributes = {diff_output_preservation = true}\n")
    result = dry_run(place, text, "--dataset", "set.toml", "--base", "mini-sd15")
    assert result.exit_code == 2 and json.loads(result.stdout)["steps"] is None


@pytest.mark.parametrize("values", [{}, {"gradient_accumulation_steps": 3}, {"max_train_steps": 5}])
def test_the_arithmetic_is_that_of_the_loop(place: Path, values: dict[str, Any]) -> None:
    config = TrainConfig(
        resolution=64, enable_bucket=False, train_batch_size=3, lr_warmup_steps=0.25, **values
    )
    data = read_dataset(place / "images", config)
    length = plan(config, data)
    steps = count_steps(config, data)
    found = (steps.steps_per_epoch, steps.total_steps, steps.epochs)
    assert found == (length.steps_per_epoch, length.total_steps, length.total_epochs)


def test_a_run_saves_along_the_way_and_can_be_trained_again_from_its_file(place: Path, base: Path) -> None:
    (place / "prompts.txt").write_text("# remark\nzkw figure --w 64 --h 64 --d 5 --s 2 --l 1\n")
    words = (
        "save_every_n_epochs=1",
        "save_last_n_epochs=1",
        "save_every_n_steps=5",
        "sample_every_n_epochs=3",
        "lr_warmup_steps=0.2",
    )
    sets = [
        word for text in (*words, "sample_prompts=prompts.txt", "logging_dir=log") for word in ("--set", text)
    ]
    result = train(base, "--output", "out", *sets)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "lora-000002.safetensors",
        "lora-step00000005.safetensors",
        "lora.run",
        "lora.safetensors",
        "sample",
    ]
    assert [path.name for path in (place / "out" / "sample").iterdir()] == ["lora_e000003_00_5.png"]
    rows = [json.loads(line) for line in (place / "out/lora.run/train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert len(list((place / "log" / "lora").iterdir())) == 1
    assert not (place / "out/lora.run/checkpoints").exists()
    assert "is trained already" in train(base, "--output", "out", *sets).output
    other = train(base, "--output", "out", "--set", "network_alpha=1")
    assert other.exit_code == 2 and "another" in other.stderr

    metadata = safetensors.safe_open("out/lora-000002.safetensors", "pt").metadata()
    names = ("ss_max_train_steps", "ss_num_epochs", "ss_lr_warmup_steps", "ss_steps", "ss_epoch")
    assert [metadata[name] for name in names] == ["6", "3", "1", "4", "2"]

    (place / "prompts.txt").rename(place / "moved.txt")
    again = train(base, "--output", "again", file="out/lora.safetensors")
    assert again.exit_code == 0 and "prompts.txt does not exist" in again.output, again.output
    (place / "moved.txt").rename(place / "prompts.txt")
    assert same("out/lora.safetensors", "again/lora.safetensors")
    folder = train(base, "--dry-run", "--json", file="out/lora.run")
    assert json.loads(folder.stdout)["config"]["sample_prompts"] == "prompts.txt"


def test_a_run_that_is_stopped_goes_on_to_the_same_file(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(base, "--output", "whole", "--set", "flip_aug=true").exit_code == 0

    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        stopped = train(base, "--output", "parts", "--set", "flip_aug=true")
    assert stopped.exit_code == 75 and "stopped after step 2/6" in stopped.stderr
    assert "next: hpo resume " in stopped.stderr
    assert not (place / "parts/lora.safetensors").exists()
    rest = train(base, "--output", "parts", "--set", "flip_aug=true")
    assert rest.exit_code == 0 and "going on after step 2/6" in rest.output
    assert same("whole/lora.safetensors", "parts/lora.safetensors")
    rows = [json.loads(line) for line in (place / "parts/lora.run/train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_the_board_shows_each_step_once_also_after_a_kill(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and saved after step 2, killed after step 4, gone on with from step 2."""
    original = hpo.train.adapter.StepLog.write
    words = ["--output", "out", "--set", "logging_dir=log", "--set", "validation_split=0.5"]
    words += ["--set", "max_train_epochs=6"]

    def stop(number: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def kill(number: int) -> None:
        raise RuntimeError("killed")

    for last, end in ((2, stop), (4, kill)):

        def ending(self: Any, event: Any, last: int = last, end: Any = end) -> None:
            original(self, event)
            if isinstance(event, Step) and event.step == last:
                end(last)

        with monkeypatch.context() as patch:
            patch.setattr(hpo.train.adapter.StepLog, "write", ending)
            if end is kill:
                with pytest.raises(RuntimeError, match="killed"):
                    train(base, *words)
            else:
                assert train(base, *words).exit_code == 75
    assert train(base, *words).exit_code == 0
    board = EventAccumulator(str(place / "log" / "lora")).Reload()
    assert [scalar.step for scalar in board.Scalars("loss/current")] == [1, 2, 3, 4, 5, 6]
    assert [scalar.step for scalar in board.Scalars("loss/validation")] == [1, 2, 3, 4, 5, 6]


def test_after_a_divergence_the_words_of_the_hint_train_on(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights after step 1, at a rate of 0, are the last ones with a finite loss.  A rate of 10 alone may stay
    finite, as the base normalizes what it gets; with an alpha of a million, the first change overflows."""
    words = [
        "learning_rate=10",
        "network_alpha=1e6",
        "lr_scheduler=constant_with_warmup",
        "lr_warmup_steps=2",
        "max_train_steps=30",
    ]
    sets = [word for setting in words for word in ("--set", setting)]
    original = hpo.train.adapter.StepLog.write

    def stopping(self: Any, event: Any) -> None:
        original(self, event)
        if isinstance(event, Step) and event.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(hpo.train.adapter.StepLog, "write", stopping)
        assert train(base, "--output", "out 1", *sets).exit_code == 75
    said = []
    for _ in range(2):
        result = train(base, "--output", "out 1", *sets)
        assert result.exit_code != 0 and "10 steps in a row" in result.stderr, result.output
        said.append(result.stderr)
    assert said[0] == said[1]  # the same command again comes no further
    named = shlex.split(said[0].rpartition("add ")[2])
    assert named == ["--set", "network_weights=out 1/lora.run/checkpoints/step-000001/adapter.safetensors"]
    again = train(
        base, "--output", "again", *named, "--set", "network_alpha=1e6", "--set", "max_train_steps=2"
    )
    assert again.exit_code == 0, again.output


def test_a_setting_of_the_other_family_is_refused(place: Path, base: Path) -> None:
    result = train(base, "--set", "text_encoder_lr1=1e-5")
    assert result.exit_code == 2 and "text_encoder_lr1 is for SDXL" in result.stderr


# inspect and export


def test_inspect_shows_foreign_files_and_nothing_a_terminal_would_act_on(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    tensors = {
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(8, 640, dtype=torch.float16),
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.zeros(640, 8, dtype=torch.float16),
        "lora_unet_input_blocks_4_1_proj_in.alpha": torch.tensor(4.0),
        "lora_te2_x.lora_down.weight": torch.zeros(4, 8, dtype=torch.float16),
        "lora_te2_x.lora_up.weight": torch.zeros(8, 4, dtype=torch.float16),
        "surplus": torch.zeros(1),
    }
    metadata = {"ss_training_comment": "\x1b[31mred\x07", "ss_tag_frequency": '{"a": 1}'}
    safetensors.torch.save_file(tensors, path, metadata)
    shown = hpo_command("inspect", str(path))
    assert shown.exit_code == 0 and "\x1b" not in shown.output and "\x07" not in shown.output
    found = json.loads(hpo_command("inspect", str(path), "--json").stdout)
    assert found["modules"] == {"U-Net": 1, "second text encoder": 1}
    assert found["ranks"] == {"4": 1, "8": 1} and found["alphas"] == {
        "4": 1,
        "none (readers take the rank)": 1,
    }
    assert (found["kind"], found["family"]) == ("LoRA", "SDXL")
    assert found["other_tensors"] == ["surplus"] and found["metadata"]["ss_tag_frequency"] == {"a": 1}


@pytest.mark.parametrize(
    "name", ["LCM, SDXL", "OneTrainer, bundled embedding", "LyCORIS full and norms", "LyCORIS IA3"]
)
def test_inspect_shows_what_a_file_of_another_tool_is(name: str, tmp_path: Path) -> None:
    file = FILES[name]
    path = file.write(tmp_path / "x.safetensors")
    lines = [line.split(None, 1) for line in hpo_command("inspect", str(path)).output.splitlines()]
    assert ["kind", f"{file.kind} for {file.model}"] in [[*map(str.strip, line)] for line in lines]
    found = json.loads(hpo_command("inspect", str(path), "--json").stdout)
    assert tuple(found["modules"]) == file.parts and bool(found["warnings"]) == bool(file.warns)
    assert all(words in " ".join(found["warnings"]) for words in file.warns)


def test_inspect_tells_of_values_that_are_not_finite(tmp_path: Path) -> None:
    tensors = FILES["kohya SDXL"].tensors()
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    safetensors.torch.save_file(tensors | {name: tensors[name] * torch.nan}, tmp_path / "x.safetensors")
    shown = hpo_command("inspect", str(tmp_path / "x.safetensors"))
    assert shown.exit_code == 0 and "1 of 4 modules hold NaN or infinity" in " ".join(shown.output.split())


def test_inspect_refuses_what_is_no_lora(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    result = hpo_command("inspect", str(tmp_path / "x.safetensors"))
    assert result.exit_code == 4 and "contains no LoRA" in result.stderr


def test_export_writes_what_sd_scripts_reads(place: Path) -> None:
    result = hpo_command("export", "kohya", "settings.toml", "kohya", "--base", "sd15", "--data", "images")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == (
        "accelerate launch --num_cpu_threads_per_process 1 train_network.py "
        f"--config_file {place}/kohya/config.toml --dataset_config {place}/kohya/dataset.toml"
    )
    result = hpo_command(
        "train", "kohya/config.toml", "--dataset", "kohya/dataset.toml", "--dry-run", "--json"
    )
    assert json.loads(result.stdout)["config"]["network_dim"] == 2, result.output


def kohya_lora(path: Path) -> Path:
    """A LoRA for mini-sd15 as sd-scripts leaves it: its keys, fp16, and nothing but its own metadata."""
    base = load_base("mini-sd15")
    adapter = inject(base, TrainConfig(network_dim=2, network_alpha=1))
    tensors = {name: tensor.half() for name, tensor in adapter.state().items()}
    adapter.remove()
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1"}', "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.002", "ss_text_encoder_lr": "0.0005", "ss_max_train_steps": "3", "ss_num_epochs": "1",
        "ss_lr_scheduler": "cosine", "ss_lr_warmup_steps": "1", "ss_seed": "11", "ss_clip_skip": "None",
        "ss_mixed_precision": "no", "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_max_grad_norm": "1.0", "ss_noise_offset": "None", "ss_min_snr_gamma": "5.0",
        "ss_gradient_accumulation_steps": "1", "ss_output_name": "old", "ss_cache_latents": "True",
        "ss_sd_model_name": "mini.safetensors", "ss_base_model_version": "sd_v1", "ss_v2": "False",
        "ss_resolution": "(64, 64)", "ss_enable_bucket": "True", "ss_min_bucket_reso": "64",
        "ss_max_bucket_reso": "128", "ss_bucket_no_upscale": "False", "ss_batch_size_per_device": "2",
        "ss_keep_tokens": "0", "ss_shuffle_caption": "True", "ss_flip_aug": "False", "ss_color_aug": "False",
        "ss_random_crop": "False", "ss_tag_frequency": '{"1_zkw figure": {"zkw figure 0": 1}}',
    }  # fmt: skip
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def test_a_file_of_sd_scripts_is_trained_again_with_its_settings(place: Path) -> None:
    for caption in sorted(place.rglob("*.txt")):
        caption.rename(caption.with_suffix(".caption"))  # sd-scripts' default, which no metadata tells
    for picture in sorted(place.rglob("*.png")):
        Image.open(picture).resize((64, 64)).save(picture)
    old = kohya_lora(place / "old-one.safetensors")
    nameless = hpo_command("train", str(old), "--data", "images", "--dry-run")
    assert nameless.exit_code == 2 and "does not name a base" in nameless.stderr
    assert "its base was mini.safetensors: name it with --base" in nameless.stderr
    result = hpo_command(
        "train", str(old), "--base", "mini-sd15", "--data", "images", "--device", "cpu", "--output", "again"
    )
    assert result.exit_code == 0, result.output
    new = place / "again" / "old.safetensors"
    rows = [
        json.loads(line) for line in (place / "again" / "old.run" / "train.jsonl").read_text().splitlines()
    ]
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    found = safetensors.safe_open(new, "pt").metadata()
    for name in ("ss_network_dim", "ss_unet_lr", "ss_seed", "ss_min_snr_gamma", "ss_max_train_steps"):
        assert float(found[name]) == float(safetensors.safe_open(old, "pt").metadata()[name]), name
    tensors = weights(str(new))
    assert set(weights(str(old))) < set(tensors)  # conv_dim adds the 3×3 convolutions
    ups = [tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")]
    assert all(bool(tensor.any()) for tensor in ups) and all(bool(t.isfinite().all()) for t in ups)


# no_metadata


def test_a_private_lora_says_only_what_it_is_and_its_run_knows_the_rest(place: Path, base: Path) -> None:
    words = ("--output", "out", "--set", "no_metadata=true", "--set", "training_comment=secret")
    (place / "bad.txt").write_text(" --w 64\nzkw --w 99999\n")  # no prompt of it can be drawn
    samples = ("--set", "sample_prompts=bad.txt", "--set", "sample_every_n_steps=1")
    first = train(base, *words, *samples, "--set", "save_every_n_epochs=1", "--set", "max_train_epochs=2")
    assert first.exit_code == 0, first.output
    assert "warning: bad.txt, line 1 has flags without a prompt" in first.output
    assert not (place / "out" / "sample").exists()
    for path in (place / "out").glob("*.safetensors"):
        metadata = safetensors.safe_open(path, "pt").metadata()
        names = {name for name in metadata if not name.startswith(("modelspec.", "sshs_"))}
        assert names == {
            "ss_v2",
            "ss_base_model_version",
            "ss_network_module",
            "ss_network_dim",
            "ss_network_alpha",
            "ss_network_args",
        }
        assert not any(word in str(metadata) for word in ("secret", "zkw", "lora_hpo", "images"))
    run = find_run(place / "out")
    assert run.metadata()["ss_training_comment"] == "secret" and DATASET_KEY in run.metadata()
    assert run.config(None, None).no_metadata
    again = train(base, *words, "--set", "save_every_n_epochs=1", "--set", "max_train_epochs=2")
    assert "is trained already" in again.output
    other = train(base, *words, "--set", "network_alpha=1")
    assert other.exit_code == 2 and "was trained with another" in other.stderr
    assert hpo_command("inspect", str(run.checkpoints[-1].path)).exit_code == 0
    # a file of someone else in its place is not taken for it
    (place / "out/lora-000001.safetensors").replace(place / "out/lora.safetensors")
    foreign = train(base, *words)
    assert foreign.exit_code == 2 and "was not made by this tool" in foreign.stderr
