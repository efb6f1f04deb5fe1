"""kohya's files: every key is used, translated, without effect, or refused; none is ignored silently."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError, ToolError
from trainer.kohya import keys as kohyakeys
from trainer.kohya import optionnames
from trainer.kohya.read import KohyaFile, read_kohya, read_own

# A file as written by GUIs: sections, empty values, machine settings.
KNOWN_GOOD = """
[model]
pretrained_model_name_or_path = "v1-5-pruned-emaonly.safetensors"
v2 = false
vae = ""

[dataset]
train_data_dir = "/data/zed"
resolution = "512,512"
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0

[[datasets]]
[[datasets.subsets]]
image_dir = "/data/zed"

[network]
network_module = "networks.lora"
network_dim = 64
network_alpha = 32
network_args = ["conv_dim=8"]

[training]
learning_rate = 0.0003
unet_lr = 3e-4
text_encoder_lr = [5e-5, 1e-5]
optimizer_type = "adamw8bit"
optimizer_args = ["weight_decay=0.1", "betas=(0.9, 0.999)"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_scheduler_args = []
lr_warmup_steps = 100
max_train_epochs = 12
max_train_steps = 5000
train_batch_size = 8
gradient_accumulation_steps = 2
min_snr_gamma = 0
noise_offset = 0.05
mixed_precision = "bf16"
save_precision = "fp16"
xformers = true
seed = 42
max_token_length = 75
cache_latents = true
output_dir = "/out"
output_name = "zed"
save_every_n_epochs = 2
logging_dir = "/log"
"""


# A file from the LoRA tab of kohya_ss: keys sorted, empty lists, percentages converted to steps.
FRONT_END = """
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
cache_latents_to_disk = true
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 10
gradient_accumulation_steps = 1
gradient_checkpointing = true
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
huggingface_repo_type = "model"
huggingface_repo_visibility = "private"
learning_rate = 0.0001
logging_dir = "/data/log"
loss_type = "l2"
lowvram = true
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 160
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = 1600
min_bucket_reso = 256
mixed_precision = "fp16"
network_alpha = 16
network_args = []
network_dim = 32
network_module = "networks.lora"
noise_offset = 0.05
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "/data/out"
output_name = "zed"
pretrained_model_name_or_path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
prior_loss_weight = 1
resolution = "512,512"
sample_prompts = "/data/out/prompt.txt"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "fp16"
seed = 1234
text_encoder_lr = [5e-5, 5e-5]
train_batch_size = 2
train_data_dir = "/data/img"
unet_lr = 0.0001
vae_batch_size = 4
wandb_run_name = "zed"
xformers = true
"""


def test_a_file_of_the_graphical_front_end_is_read_whole(tmp_path: Path) -> None:
    file = read(tmp_path, FRONT_END)
    assert file.require_all().config.noise_offset == 0.05
    assert (file.config.max_train_steps, file.config.text_encoder_lr, file.config.seed) == (1600, 5e-5, 1234)
    unused = {line.split(":")[0] for line in file.without_effect}
    assert {"epoch", "noise_offset_type", "lowvram"} <= unused


def read(tmp_path: Path, text: str) -> KohyaFile:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return read_kohya(path)


def test_a_known_good_file_becomes_the_settings_it_means(tmp_path: Path) -> None:
    file = read(tmp_path, KNOWN_GOOD)
    assert file.refused == () and file.require_all() is file
    expected = {
        "resolution": 512,
        "network_dim": 64,
        "network_alpha": 32.0,
        "conv_dim": 8,
        "conv_alpha": 1.0,  # sd-scripts' default, not network_alpha
        "unet_lr": 3e-4,
        "text_encoder_lr": 5e-5,
        "optimizer_type": "AdamW8bit",
        "weight_decay": 0.1,
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 3,
        "max_train_epochs": 12,
        "max_train_steps": None,
        "min_snr_gamma": None,
        "caption_extension": ".txt",
        "keep_tokens": 1,
        "bucket_no_upscale": False,
        "max_bucket_reso": 1024,
        "output_name": "zed",
        "vae_batch_size": 1,
    }
    config = file.config.as_dict()
    assert {name: config[name] for name in expected} == expected
    assert file.given["network_dim"] == 64 and "vae_batch_size" not in file.given


def test_what_was_translated_or_has_no_effect_is_said_once_per_key(tmp_path: Path) -> None:
    file = read(tmp_path, KNOWN_GOOD)
    translated = "\n".join(file.translated)
    for part in (
        "resolution = 512,512 → 512",
        "text_encoder_lr = [5e-05, 1e-05] → 5e-05",
        "optimizer_type = adamw8bit → AdamW8bit",
        "optimizer_args weight_decay = 0.1",
        "network_args conv_dim = 8",
        "xformers = true → SDPA",
        "max_train_steps = 5000 → ignored",
    ):
        assert part in translated
    unused = {line.split(":")[0] for line in file.without_effect}
    assert unused == {"datasets", "cache_latents"}
    assert file.output_dir == "/out"


def test_every_line_of_a_file_is_accounted_for(tmp_path: Path) -> None:
    """Each key with an effect is a setting, or appears in one of the three lists."""
    file = read(tmp_path, KNOWN_GOOD)
    said = " ".join((*file.translated, *file.without_effect, *file.refused))
    harmless = {
        "v2",
        "vae",
        "caption_dropout_rate",
        "lr_scheduler_args",
        "max_token_length",
        "network_module",
        "output_dir",  # KohyaFile.output_dir
    }
    for line in KNOWN_GOOD.splitlines():
        key = line.split(" = ")[0].strip("[] ")
        if " = " in line and key not in harmless and key != "image_dir":
            assert key in file.given or key in said, key


def test_zeros_dropouts_and_safeguards_are_said(tmp_path: Path) -> None:
    zero = read(tmp_path, 'network_args = ["conv_dim=0", "conv_alpha=0"]')
    said = "network_args conv_dim = 0 → conv_dim = 0: layers of resnets, but not their 3×3 convolutions"
    assert any(line.startswith(said) for line in zero.translated)
    lycoris = read(tmp_path, 'network_module = "lycoris.kohya"\nnetwork_args = ["dropout=0.1"]')
    assert any(line.startswith("network_args dropout = 0.1: LyCORIS") for line in lycoris.without_effect)
    prodigy = 'optimizer_type = "Prodigy"\nlr_scheduler = "cosine"\n'
    given = 'optimizer_args = ["safeguard_warmup=True"]\n'
    for text, said in (
        (given, []),
        ("lr_warmup_steps = 9\n", ["not given → false, as sd-scripts does"]),
        (given + "lr_warmup_steps = 9\n", ["true → the same as without it in Prodigy"]),
        ("", []),
    ):
        lines = [line for line in read(tmp_path, prodigy + text).translated if "safeguard" in line]
        assert [line.partition(" = ")[2] for line in lines] == said


def test_missing_keys_take_kohyas_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, "resolution = 512").config
    assert (config.network_dim, config.network_alpha) == (4, 1.0)
    assert (config.learning_rate, config.max_train_steps, config.max_train_epochs) == (2e-6, 1600, None)
    assert (config.caption_extension, config.optimizer_type, config.lr_scheduler) == (
        ".caption",
        "AdamW",
        "constant",
    )
    assert (config.enable_bucket, config.mixed_precision, config.train_batch_size) == (False, "no", 1)


@pytest.mark.parametrize(
    ("optimizer", "decay"), [("AdamW", 0.01), ("Lion8bit", 0.0), ("Prodigy", 0.0), ("PagedAdamW8bit", 0.01)]
)
def test_weight_decay_is_the_optimizers_own_default(tmp_path: Path, optimizer: str, decay: float) -> None:
    assert read(tmp_path, f'optimizer_type = "{optimizer}"').config.weight_decay == decay


def test_our_own_file_takes_our_defaults_flat_or_in_sections(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    for text in ("network_dim = 8\nseed = 3\n", "[network]\nnetwork_dim = 8\n[training.more]\nseed = 3\n"):
        path.write_text(text)
        config, given = read_own(path)
        assert given == {"network_dim": 8, "seed": 3}
        assert config == TrainConfig(network_dim=8, seed=3)
    path.write_text("network_dmi = 8")
    with pytest.raises(ConfigError, match="network_dmi") as caught:
        read_own(path)
    assert "network_dim" in caught.value.hint


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("unet_Ir = 1e-4", "unet_lr"),
        ("networkdim = 8", "network_dim"),
        ("save_every_n_epoch = 1", "save_every"),
    ],
)
def test_a_typing_error_is_not_swallowed(tmp_path: Path, typo: str, meant: str) -> None:
    (line,) = read(tmp_path, typo).unknown
    assert line.startswith(typo.split()[0]) and "did you mean" in line and meant in line


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('network_module = "networks.lora_flux"', "network_module"),
        ('network_module = "lycoris.kohya"\nnetwork_args = ["algo=tlora"]', "algo"),
        (
            'optimizer_type = "somewhere.LPFAdamW"',
            "classes of other packages are not used; supported optimizers: AdamW,",
        ),
        ('optimizer_type = "AdmW"', "optimizer_type = AdmW: did you mean AdamW"),
        ('optimizer_type = "os.system"', "optimizer_type"),
        ('optimizer_type = "prodigyplus.ProdigyPlusScheduleFree"', "use Prodigy or"),
        ('optimizer_args = ["betaz=(0.9, 0.99)"]', "no such argument; did you mean betas"),
        ('lr_scheduler = "cosin"', "did you mean cosine"),
        ('lr_scheduler_type = "builtins.print"', "lr_scheduler_type"),
        ('lr_scheduler = "adafactor"', "lr_scheduler"),
        ("lr_warmup_steps = 1.0\nmax_train_epochs = 2", "lr_warmup_steps"),
        ('resume = "state"', "resume"),
        ("initial_step = 100", "initial_step"),
        ("initial_epoch = 2", "initial_epoch"),
        ("datasets = [{resolution = 768}]", "resolution"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 9", "num_repeats"),
    ],
)
def test_what_would_give_another_result_is_refused_with_a_reason(tmp_path: Path, line: str, key: str) -> None:
    file = read(tmp_path, line)
    assert len(file.refused) == 1 and key in file.refused[0] and ": " in file.refused[0]
    with pytest.raises(ConfigError, match=key) as caught:
        file.require_all()
    assert caught.value.hint


@pytest.mark.parametrize(
    "line",
    [
        "v2 = false",
        'loss_type = "l2"',
        "max_timestep = 1000",
        "min_timestep = 0",
        "flip_aug = false",
        "scale_weight_norms = 0.0",
        'vae = ""',
        "vae = false",
        "train_inpainting = true\nfused_backward_pass = true\nskip_until_initial_step = true",
        "stop_text_encoder_training = 200",
        "network_args = []",
        'network_args = ["rank_dropout=0"]',
        'optimizer_type = "Adafactor"\noptimizer_args = ["relative_step=False", "scale_parameter=False"]',
        "max_token_length = 75",
        "validation_split = 0.0",
        "initial_epoch = 1\ninitial_step = 0\nskip_until_initial_step = false",
        "stop_text_encoder_training = 0",
        "loraplus_lr_ratio = 0\nloraplus_unet_lr_ratio = 0.0\nloraplus_text_encoder_lr_ratio = 0",
        "datasets = []",
        "lr_warmup_steps = 100",
        'lr_scheduler = "cosine"\nlr_scheduler_num_cycles = 0',
        'network_args = ["conv_dim=0", "conv_alpha=0"]',
    ],
)
def test_values_that_ask_for_nothing_are_accepted(tmp_path: Path, line: str) -> None:
    assert read(tmp_path, line).refused == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use_8bit_adam = true", {"optimizer_type": "AdamW8bit"}),
        ("use_lion_optimizer = true", {"optimizer_type": "Lion", "weight_decay": 0.0}),
        ("network_dim = 16\nnetwork_alpha = 0", {"network_alpha": 16.0}),
        ("full_bf16 = true", {"mixed_precision": "bf16", "full_bf16": True}),
        ('full_fp16 = true\nmixed_precision = "no"', {"mixed_precision": "fp16"}),
        ('caption_extention = ".txt"', {"caption_extension": ".txt"}),
        ("network_train_text_encoder_only = true\nunet_lr = 1e-4", {"unet_lr": 0.0}),
        ("resolution = 768", {"resolution": 768}),
        ("resolution = [640, 640]", {"resolution": 640}),
        ("text_encoder_lr = 1e-5", {"text_encoder_lr": 1e-5}),
        ('network_args = ["conv_dim=4", "conv_alpha=2.0"]', {"conv_dim": 4, "conv_alpha": 2.0}),
        ("max_train_steps = 500", {"max_train_steps": 500, "max_train_epochs": None}),
        ("lr_warmup_steps = 0.05", {"lr_warmup_steps": 0.05}),
        ('optimizer_type = "torch.optim.AdamW"', {"optimizer_type": "AdamW"}),
        ('optimizer_type = "bitsandbytes.optim.AdamW8bit"', {"optimizer_type": "AdamW8bit"}),
        ('network_args = ["conv_dim=0", "conv_alpha=0"]', {"conv_dim": 0}),
        ('network_args = ["conv_dim=4", "conv_alpha=0"]', {"conv_dim": 4, "conv_alpha": 4.0}),
    ],
)
def test_translations_keep_their_meaning(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    config = read(tmp_path, text).config.as_dict()
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flip_aug = true\nmax_token_length = 225", {"flip_aug": True, "max_token_length": 225}),
        ('loss_type = "huber"\nhuber_c = 0.2', {"loss_type": "huber", "huber_c": 0.2}),
        (
            "scale_weight_norms = 0\nsave_every_n_steps = 0",
            {"scale_weight_norms": None, "save_every_n_steps": None},
        ),
        ("max_train_epochs = 12\nsave_n_epoch_ratio = 4", {"save_every_n_epochs": 3}),
        (
            'network_args = ["down_lr_weight=0,.5,1", "mid_lr_weight=2", "up_lr_weight=sine+.25"]',
            {"down_lr_weight": "0,0.5,1", "mid_lr_weight": "2", "up_lr_weight": "sine+.25"},
        ),
        (
            'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_args = ["algo=lokr", "preset=attn-mlp"]',
            {"network_type": "LoKr", "conv_dim": None},
        ),
        (
            'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_args = ["dora_wd=True", "conv_dim=4"]',
            {"network_type": "DoRA", "conv_dim": 4, "conv_alpha": 1.0},
        ),
        (
            'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_alpha = 2',
            {"network_type": "LoCon", "conv_dim": 8, "conv_alpha": 2.0},
        ),
        (
            'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_dropout = 0.5\n'
            'network_args = ["dropout=0.1", "conv_dim=0", "conv_alpha=0"]',
            {"network_dropout": 0.0, "conv_dim": 0, "lycoris_preset": "full"},
        ),
        (
            'network_module = "lycoris.kohya"\nnetwork_args = ["algo=loha", "dropout=0.1", "preset=attn-mlp"]',
            {"network_type": "LoHa", "network_dropout": 0.0},
        ),
    ],
)
def test_a_key_means_the_same_here(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    config = read(tmp_path, text).require_all().config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network_dim = 0", "network_dim = 0 is outside its limits"),
        ('learning_rate = "1e-4"', 'learning_rate = "1e-4" is a text, not a number'),
        ("resolution = 512.5", "resolution = 512.5 is not a whole number"),
        ('resolution = "wide"', "resolution = wide is not a size"),
        ("network_args = [3]", "network_args"),
        ("a = 1\nb = ", "is not valid TOML"),
        ("seed = " + "9" * 400, "seed"),
        ("seed = " + "9" * 5000, "is not valid TOML"),
        ("x = " + "[" * 5000, "is not valid TOML"),
    ],
)
def test_wrong_values_and_broken_files_are_one_line_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_files_that_cannot_be_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_kohya(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_kohya(tmp_path)
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_kohya(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than 1 MB"):
        read_kohya(tmp_path / "a.toml")


def test_settings_of_the_base_captions_and_samples_are_used(tmp_path: Path) -> None:
    file = read(
        tmp_path,
        'vae = "someone/a-vae"\nweighted_captions = true\nno_metadata = true\nsample_prompts = ["a cat", "a dog"]\n'
        "sample_every_n_epochs = 2\nsample_every_n_steps = 100",
    )
    config = file.require_all().config
    assert (config.vae, config.weighted_captions, config.no_metadata) == ("someone/a-vae", True, True)
    assert config.sample_prompts == "a cat\na dog\n"
    # sd-scripts draws by epoch if both are given
    assert (config.sample_every_n_epochs, config.sample_every_n_steps) == (2, None)
    assert any("sample_every_n_steps = 100" in line for line in file.translated)


def test_the_four_classes_of_keys_do_not_overlap() -> None:
    classes = [
        set(SETTINGS),
        set(kohyakeys.REFUSED),
        set(kohyakeys.NO_EFFECT_REASON),
        set(kohyakeys.TRANSLATED),
    ]
    assert sum(map(len, classes)) == len(set().union(*classes))
    assert set(kohyakeys.KOHYA_DEFAULTS) <= set(SETTINGS)
    front_end = {
        *("epoch", "noise_offset_type", "lowvram", "clip_l", "t5xxl", "stop_text_encoder_training"),
        *(
            "train_inpainting",
            "loraplus_lr_ratio",
            "loraplus_unet_lr_ratio",
            "loraplus_text_encoder_lr_ratio",
        ),
    }
    other_scripts = {
        *("blocks_to_swap", "logit_mean", "logit_std", "mode_scale", "weighting_scheme"),
        *("text_encoder_batch_size", "use_safetensors"),
    }
    beside = front_end | other_scripts | {"datasets"}
    assert beside.isdisjoint(optionnames.OPTIONS)
    assert beside | set(optionnames.OPTIONS) == kohyakeys.KNOWN_KEYS


def test_no_mutation_of_a_file_raises_anything_but_a_tool_error(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "config.toml"
    values = [
        "true",
        "-1",
        "1e400",
        "nan",
        '""',
        "[]",
        "[1]",
        "{a=1}",
        "1979-05-27",
        '"x"',
        '["a=1"]',
        "9" * 50,
    ]
    lines = KNOWN_GOOD.strip().splitlines()
    for _ in range(1500):
        changed = list(lines)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(changed))
            if " = " in changed[place] and draw.random() < 0.7:
                changed[place] = changed[place].split(" = ")[0] + " = " + draw.choice(values)
            else:
                line = changed[place]
                cut = draw.randint(0, len(line))
                changed[place] = line[:cut] + chr(draw.randint(1, 300)) + line[cut + 1 :]
        path.write_text("\n".join(changed), encoding="utf-8")
        for reader in (read_kohya, read_own):
            try:
                reader(path)
            except ToolError as error:
                assert error.message and "\n" not in error.message


json_values = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(max_size=5).filter(lambda t: "\n" not in t)
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(kohyakeys.KNOWN_KEYS)), json_values, min_size=1, max_size=8))
def test_any_value_of_any_key_is_understood_or_refused(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any]
) -> None:
    import tomlkit

    path = tmp_path_factory.getbasetemp() / "any.toml"
    try:
        path.write_text(tomlkit.dumps(table), encoding="utf-8")
    except (UnicodeEncodeError, ValueError):
        return
    try:
        file = read_kohya(path)
    except ToolError as error:
        assert error.message and error.exit_code == 2
    else:
        said = " ".join((*file.translated, *file.without_effect, *file.refused))
        for key, value in table.items():
            quiet = key in kohyakeys.REFUSED or not value or key in ("network_module", "optimizer_type")
            used = key in file.given or (key == "output_dir" and file.output_dir is not None)
            assert quiet or used or key in said, key
