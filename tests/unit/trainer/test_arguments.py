"""Arguments in every spelling that people write: read as sd-scripts reads them, or refused with what to write."""

import pytest

from trainer.arguments import NUMBER, PAIR, WHOLE, Argument, canonical, check_arguments, parse
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.optimizers import read_written
from trainer.overrides import read_setting

TWO = {"weight_decay": 0.01, "betas": (0.9, 0.999)}


@pytest.mark.parametrize(
    "value",
    [
        ["weight_decay=0.01", "betas=(0.9, 0.999)"],
        ["weight_decay=0.01", "betas=[0.9, 0.999]"],
        ["weight_decay=0.01", "betas=0.9,0.999"],
        ["weight_decay = 0.01", " betas = ( 0.9 , 0.999 ) "],
        ["weight_decay=0.01", "betas=(0.9,", "0.999)"],  # split at spaces by a GUI
        ["weight_decay=0.01", "betas=0.9,", "0.999"],
        "weight_decay=0.01 betas=(0.9, 0.999)",
        "weight_decay = 0.01 betas = (0.9, 0.999)",
        "weight_decay=0.01 betas=0.9,0.999",
        '"weight_decay=0.01" "betas=(0.9, 0.999)"',  # kohya_ss
        "'weight_decay=0.01' 'betas=[0.9, 0.999]'",
        ['"weight_decay=0.01"', '"betas=(0.9, 0.999)"'],
        {"weight_decay": 0.01, "betas": [0.9, 0.999]},
    ],
)
def test_every_spelling_is_the_same_arguments(value):
    assert parse("optimizer_args", value).values == TWO


@pytest.mark.parametrize(
    ("value", "entries"),
    [
        (["weight_decay=0.01,eps=1e-08"], ['"weight_decay=0.01"', '"eps=1e-08"']),
        (["weight_decay=0.1 betas=0.9,0.99"], ['"weight_decay=0.1"', '"betas=0.9,0.99"']),
        (["betas=(0.9, 0.99), eps=1e-8"], ['"betas=(0.9, 0.99)"', '"eps=1e-8"']),
        ("weight_decay=0.1, eps=1e-8", ['"weight_decay=0.1"', '"eps=1e-8"']),
        (["weight_decay=0.1,", "eps=1e-8"], ['"weight_decay=0.1"', '"eps=1e-8"']),
    ],
)
def test_two_arguments_in_one_entry_are_shown_apart(value, entries):
    with pytest.raises(ConfigError, match="more than one argument") as caught:
        parse("optimizer_args", value)
    assert "write one argument per entry" in caught.value.hint
    assert all(entry in caught.value.hint for entry in entries)


@pytest.mark.parametrize("value", [3, [3], ["betas"], ["=1"], "betas", ["1=2"], [["a=1"]], True, ["a.b=1"]])
def test_what_is_no_list_of_arguments_is_named(value):
    with pytest.raises(ConfigError, match="is not a list of key=value") as caught:
        parse("optimizer_args", value)
    assert "optimizer_args = [" in caught.value.hint


def test_of_the_same_argument_twice_the_later_counts_and_the_earlier_is_told():
    found = parse("optimizer_args", ["eps=1e-8", "eps=1e-6", "betas=(0.9, 0.99)", "betas=[0.9, 0.99]"])
    assert found.values == {"eps": 1e-6, "betas": (0.9, 0.99)} and found.repeated == (("eps", 1e-8),)


def test_the_stored_text_reads_as_itself():
    text = canonical("optimizer_args", ["betas=[.9, 0.99]", "beta3=None", "decouple=True", "form='1-sqrt'"])
    assert text == "betas=(0.9, 0.99) beta3=None decouple=True form='1-sqrt'"
    assert canonical("optimizer_args", text) == text
    assert canonical("x", ["step_rules='1:5,0.1:9,0.01'"]) == canonical("x", ["step_rules=1:5,0.1:9,0.01"])


TABLE = {
    "betas": Argument(PAIR, low=0, high=1, high_is_excluded=True),
    "eps": Argument(NUMBER, low=0, low_is_excluded=True),
    "steps": Argument(WHOLE, low=1, can_be_none=True),
}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("betas", 0.9, "two numbers from 0 below 1"),
        ("betas", (0.9, 1.0), "two numbers from 0 below 1"),
        ("betas", (0.9, True), "two numbers"),
        ("eps", 0, "a number above 0"),
        ("eps", "1e-8x", "a number above 0"),
        ("eps", float("nan"), "a number"),
        ("steps", 1.5, "a whole number from 1 or None"),
        ("beta", (0.9, 0.99), "did you mean betas?"),
        ("zzz", 1, "arguments of X: betas, eps, steps"),
    ],
)
def test_a_wrong_argument_is_told_with_what_it_must_be(name, value, said):
    sound, wrong = check_arguments("optimizer_args", "X", {name: value}, TABLE)
    assert sound == {} and wrong[0][:2] == (name, value) and said in wrong[0][2]


def test_a_whole_number_with_a_point_is_whole():
    assert check_arguments("optimizer_args", "X", {"steps": 4.0}, TABLE)[0] == {"steps": 4}


# as a setting


@pytest.mark.parametrize("value", ["betas=(0.9,0.99)", ["betas=[0.9, 0.99]"], {"betas": [0.9, 0.99]}])
def test_our_own_files_take_a_text_a_list_or_a_table(value):
    assert TrainConfig(optimizer_args=value).optimizer_args == "betas=(0.9, 0.99)"


@pytest.mark.parametrize("text", ['optimizer_args=["betas=(0.9, 0.99)"]', "optimizer_args=betas=(0.9, 0.99)"])
def test_set_takes_them_too(text):
    name, value = read_setting(text)
    assert TrainConfig().with_values({name: value}).optimizer_args == "betas=(0.9, 0.99)"


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"optimizer_args": "betass=(0.9, 0.99)"}, "AdamW8bit has no such argument", "did you mean betas?"),
        (
            {"optimizer_args": "betas=2"},
            "optimizer_args betas = 2 does not fit",
            "AdamW8bit needs two numbers",
        ),
        ({"optimizer_args": "weight_decay=0.1"}, "setting of its own", "weight_decay = 0.1"),
        ({"optimizer_type": "Admw"}, "optimizer_type = Admw is not known", "did you mean AdamW?"),
        ({"optimizer_type": "adamw8bits"}, "is not known", "did you mean AdamW8bit?"),
        ({"lr_scheduler": "cosin"}, "is not known", "did you mean cosine?"),
        ({"lr_scheduler_args": "gamma=0.9"}, "cosine has no such argument", "num_cycles"),
        ({"lr_scheduler": "StepLR"}, "step_size does not fit", "StepLR needs it"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": "step_rules='1,2:x'"},
            "step_rules",
            "1:100",
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs one lowest rate", "lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "adafactor"}, "for Adafactor with relative steps", "relative_step=True"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": "lr_end=1.0"}, "lr_end = 1", "learning_rate"),
        (
            {"optimizer_type": "Adafactor", "optimizer_args": "warmup_init=True"},
            "relative_step",
            "relative_step",
        ),
        (
            {"optimizer_type": "DAdaptLion", "text_encoder_lr": 0.5},
            "DAdaptLion adapts one",
            "text_encoder_lr",
        ),
        ({"optimizer_type": "Prodigy", "loraplus_lr_ratio": 16}, "Prodigy adapts one", "LoRA\\+"),
    ],
)
def test_what_does_not_fit_is_refused(values, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig(**values)
    assert hint.replace("\\", "") in caught.value.hint


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("adamw", "AdamW"),
        ("ADAMW8BIT", "AdamW8bit"),
        ("torch.optim.AdamW", "AdamW"),
        ("lion_pytorch.Lion", "Lion"),
    ],
)
def test_names_are_taken_in_any_case_and_as_classes_of_the_table(given, meant):
    assert TrainConfig(optimizer_type=given).optimizer_type == meant


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer_type": "AdamW", "optimizer_args": "eps=" + "9" * 400},
        {"lr_scheduler": "StepLR", "lr_scheduler_args": f"step_size={'9' * 400}"},
    ],
)
def test_a_number_that_no_float_can_hold_is_an_error_in_words(values):
    with pytest.raises(ConfigError, match="does not fit"):
        TrainConfig(**values)


def test_no_lowest_rate_of_a_polynomial_is_none_whatever_the_rate():
    rates = {"learning_rate": 0.0, "unet_lr": 1e-4, "text_encoder_lr": 1e-4}
    assert TrainConfig(lr_scheduler="polynomial", lr_scheduler_args="lr_end=None", **rates)


def test_text_that_never_becomes_an_argument_is_read_at_once():
    assert read_written("torch.optim.AdamW(" + "a" * 300_000 + ")") == ("AdamW", [])
