"""Optimizers and schedules of kohya files: what sd-scripts makes of each spelling is what is stored."""

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.kohya.read import KohyaFile, from_kohya, read_kohya, read_own


def read(tmp_path: Path, text: str) -> KohyaFile:
    path = tmp_path / "kohya.toml"
    path.write_text('pretrained_model_name_or_path = "sd15"\nnetwork_module = "networks.lora"\n' + text)
    return read_kohya(path)


PRODIGY = 'optimizer_type = "Prodigy"\nlearning_rate = 1.0\n'


@pytest.mark.parametrize(
    "text",
    [
        'optimizer_args = ["betas=[0.9, 0.999]"]',
        'optimizer_type = "AdamW8bit"\noptimizer_args = ["amsgrad=False", "block_wise=True"]',
        'optimizer_type = "Lion8bit"\noptimizer_args = ["betas=[0.9,0.99]"]',
        'optimizer_args = ["fused=True", "foreach=None"]',
        PRODIGY + 'optimizer_args = ["d0=1e-6", "beta3=None", "decouple=True", "d_coef=1"]',
        'optimizer_type = "Adafactor"\noptimizer_args = ["relative_step=False", "scale_parameter=False", '
        '"warmup_init=False", "clip_threshold=1.0"]',
    ],
)
def test_a_default_that_is_written_out_changes_nothing(tmp_path: Path, text: str) -> None:
    file = read(tmp_path, text)
    assert not file.refused and file.config.optimizer_args == ""


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ('optimizer_args = ["betas=(0.9, 0.99)", "eps=1e-6"]', "betas=(0.9, 0.99) eps=1e-06"),
        (
            PRODIGY + 'optimizer_args = ["d_coef=2", "use_bias_correction=True"]',
            "d_coef=2 use_bias_correction=True",
        ),
        (
            'optimizer_type = "Adafactor"\noptimizer_args = ["relative_step=False"]',
            "scale_parameter=True",
        ),
        ('optimizer_type = "Adafactor"', "scale_parameter=True relative_step=True"),
        (
            'optimizer_type = "adafactor"\noptimizer_args = ["relative_step=False", "warmup_init=True"]',
            "scale_parameter=True relative_step=True warmup_init=True",
        ),
        (PRODIGY + 'lr_scheduler = "cosine"\nlr_warmup_steps = 10', "safeguard_warmup=False"),
    ],
)
def test_what_differs_from_ours_is_stored(tmp_path: Path, text: str, stored: str) -> None:
    file = read(tmp_path, text)
    assert not file.refused and file.config.optimizer_args == stored
    assert file.given["optimizer_args"] == stored


def test_what_sd_scripts_leaves_to_the_library_is_said(tmp_path: Path) -> None:
    """transformers' scale_parameter=True makes updates of a new LoRA a thousand times smaller than False."""
    file = read(tmp_path, 'optimizer_type = "Adafactor"\noptimizer_args = ["relative_step=False"]')
    assert "optimizer_args scale_parameter = not given → true, as sd-scripts does" in file.translated


def test_our_own_files_keep_their_adafactor(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('optimizer_type = "Adafactor"\n')
    config, _ = read_own(path)
    assert config.optimizer_args == "" and not config.has_relative_steps


def test_relative_steps_replace_the_schedule_as_in_sd_scripts(tmp_path: Path) -> None:
    file = read(
        tmp_path, 'optimizer_type = "Adafactor"\nlr_scheduler = "cosine"\nlr_warmup_steps = 9\nunet_lr = 1e-4'
    )
    assert file.config.lr_scheduler == "adafactor" and file.config.has_relative_steps
    assert file.config.lr_warmup_steps == 0
    said = " ".join((*file.translated, *file.without_effect))
    assert "it chooses its rate itself" in said and "lr_scheduler: " in said and "lr_warmup_steps: " in said


def test_of_an_argument_given_twice_the_later_counts_and_that_is_said(tmp_path: Path) -> None:
    file = read(tmp_path, 'optimizer_args = ["weight_decay=0.1", "weight_decay=0.2"]')
    assert file.config.weight_decay == 0.2
    assert any("0.2: the later value counts" in line for line in file.translated)


@pytest.mark.parametrize(
    "line", ['optimizer_args = ["weight_decay=0.01,eps=1e-08"]', 'lr_scheduler_args = ["T_max=9,eta_min=0"]']
)
def test_arguments_that_share_an_entry_are_told_to_part(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="more than one argument") as caught:
        read(tmp_path, line)
    assert "one argument per entry" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        ('lr_warmup_steps = "10%"', 0.1),
        ("lr_warmup_steps = 0.1", 0.1),
        ("lr_warmup_steps = 100", 100),
        ("lr_warmup_steps = 100.0", 100),
        ('lr_warmup_steps = "100%"\nmax_train_steps = 700', 700),
        ("lr_warmup_steps = 1.0\nmax_train_steps = 700", 700),
    ],
)
def test_warm_up_is_a_number_of_steps_or_a_share(tmp_path: Path, line: str, steps: float) -> None:
    file = read(tmp_path, f'lr_scheduler = "cosine"\n{line}')
    assert not file.refused and file.config.lr_warmup_steps == steps
    assert bool(file.differs) == ("100.0" in line)


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('lr_scheduler_type = "torch.optim.lr_scheduler.StepLR"\nlr_scheduler_args = ["step_size=9"]', "StepLR",
         "step_size=9"),
        ('lr_scheduler_type = "CosineAnnealingLR"\nlr_scheduler = "constant"\nlr_scheduler_args = ["T_max=9"]',
         "CosineAnnealingLR", "T_max=9"),
        ('lr_scheduler = "polynomial"\nunet_lr = 1e-3\nlearning_rate = 1e-4', "polynomial", "lr_end=1e-07"),
        ('lr_scheduler = "polynomial"\nunet_lr = 1e-4\ntext_encoder_lr = 1e-5\nlearning_rate = 1e-4', "polynomial", ""),
        ('lr_scheduler = "cosine"\nlr_scheduler_args = ["last_epoch=-1"]', "cosine", ""),
        ('lr_scheduler_type = "LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts"\n'
         'lr_scheduler_args = ["gamma=0.9", "min_lr=1e-6"]', "RexAnnealingWarmRestarts", "gamma=0.9 min_lr=1e-06"),
        ('optimizer_type = "AdamWScheduleFree"\nlr_scheduler = "cosine"\nlr_warmup_steps = 9', "cosine", ""),
    ],
)  # fmt: skip
def test_schedules_are_stored_as_they_run(tmp_path: Path, text: str, name: str, arguments: str) -> None:
    file = read(tmp_path, text)
    assert not file.refused
    assert (file.config.lr_scheduler, file.config.lr_scheduler_args) == (name, arguments)


def test_an_optimizer_without_a_schedule_has_no_warm_up(tmp_path: Path) -> None:
    file = read(
        tmp_path, 'optimizer_type = "RAdamScheduleFree"\nlr_scheduler = "cosine"\nlr_warmup_steps = 9'
    )
    assert not file.config.warms_up and any("uses no schedule" in line for line in file.without_effect)


def test_loraplus_counts_inside_network_args_only(tmp_path: Path) -> None:
    inside = read(tmp_path, 'network_args = ["loraplus_lr_ratio=16", "loraplus_text_encoder_lr_ratio=4"]')
    assert inside.config.loraplus_ratios == (16, 4) and not inside.refused
    outside = read(tmp_path, "loraplus_lr_ratio = 16")
    assert outside.config.loraplus_ratios == (1, 1)
    assert any("belongs into network_args" in line for line in outside.without_effect)


def test_a_table_of_arguments_is_read_in_our_own_files(tmp_path: Path) -> None:
    """In a file of sd-scripts it is a section like any other, whose keys sd-scripts does not know (test_door.py)."""
    path = tmp_path / "own.toml"
    for text in ("optimizer_args = {betas = [0.9, 0.99]}", "[optimizer_args]\nbetas = [0.9, 0.99]"):
        path.write_text(text)
        assert read_own(path)[0].optimizer_args == "betas=(0.9, 0.99)"


def test_what_set_says_is_known_before_a_file_is_translated(tmp_path: Path) -> None:
    """--set optimizer_type and lr_scheduler decide which arguments and defaults the file's are measured by."""
    table = {"network_module": "networks.lora", "optimizer_args": ["momentum=0.8"], "lr_scheduler": "foo"}
    ours = {"optimizer_type": "sgdnesterov", "lr_scheduler": "constant"}
    file = from_kohya(tmp_path / "a.toml", table, ours=ours)
    assert not file.refused
    assert (file.config.optimizer_type, file.config.optimizer_args) == ("SGDNesterov", "momentum=0.8")
    assert file.config.weight_decay == 0.0
    rates = {"network_module": "networks.lora", "lr_scheduler": "polynomial", "learning_rate": 1e-4}
    assert (
        from_kohya(tmp_path / "a.toml", rates, ours={"unet_lr": 1e-3}).config.lr_scheduler_args
        == "lr_end=1e-07"
    )
