"""Study files: shipped ones are sound, mistakes are named, --set reaches every part, changes are noticed."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hpo.search.enqueue import as_proposal
from hpo.study.config import build_study, find_study, read_study, study_name
from hpo.study.folder import StudyFolder
from hpo.study.sections import BELOW_ZERO
from hpo.study.storage import create_study, open_study
from hpo.study.unchanged import as_begun, check_unchanged, difference
from tests.tiny_search import STUDY
from trainer.errors import ConfigError, ToolError

SHIPPED = ("mini", "sd15-character", "sd15-character-small", "sd15-object", "sd15-style")


def study(**changes: Any) -> Any:
    return build_study("test", {**copy.deepcopy(STUDY), **changes})


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_is_valid_to_its_last_edge(name: str) -> None:
    found = read_study(find_study(name, "sd15"))
    assert found.config(found.baseline).network_dim in (16, 32)


def test_the_default_study_searches_its_twelve_settings() -> None:
    space = read_study(find_study(None, "sd15")).space
    decided = {
        "learning_rate", "text_encoder_lr_ratio", "network_dim_log2", "network_alpha_ratio", "optimizer_type",
        "lr_scheduler", "warmup_ratio", "gradient_accumulation_steps", "images_seen", "min_snr_gamma",
        "noise_offset", "network_dropout",
    }  # fmt: skip
    assert {p.name for p in space} == decided
    assert find_study(None, "mini-sd15").name == "mini.toml"


def test_a_study_file_in_the_current_folder_wins_over_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.toml").write_text("")
    assert find_study("mini", "sd15") == Path("mini.toml")


def test_a_mistyped_study_name_is_suggested() -> None:
    with pytest.raises(ConfigError) as caught:
        find_study("sd15-charcter", "sd15")
    assert caught.value.hint == "did you mean sd15-character?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainn": {}}, "unknown section trainn"),
        ({"train": {"network_dims": 8}}, "unknown setting network_dims"),
        ({"train": {**STUDY["train"], "learning_rate": 1e-3}}, "fixed in .train. and searched"),
        (
            {"train": {**STUDY["train"], "max_train_steps": 5}},
            "in .train., max_train_epochs has no effect",
        ),
        ({"train": {**STUDY["train"], "seed": 3}}, "set by --seed"),
        ({"space": {}}, "is empty"),
        ({"baseline": {"learning_rate": 5.0}}, "learning_rate = 5.0 is outside the study's"),
        ({"baseline": {"noise_offset": 0.1}}, "is not searched"),
        ({"sampling": {"steps": 0}}, "steps = 0 in .sampling."),
        ({"sampling": {"step": 5}}, "unknown key step"),
        ({"prompts": {"seeds": [1, 1]}}, "seeds = .1, 1. in .prompts."),
        ({"prompts": {"counts": {"portrait": 3}}}, "counts = "),
        ({"study": {"seed": -1}}, "seed = -1"),
        ({"study": "x"}, "is not a section"),
    ],
)
def test_a_mistake_in_a_study_file_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(**changes)


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[train]\nresolution = \n")
    with pytest.raises(ConfigError, match=r"x\.toml is not valid TOML.*line 2"):
        read_study(path)


def test_set_fixes_a_searched_setting_and_takes_it_out_of_the_space() -> None:
    found = build_study("t", STUDY, sets=["network_dim=8", "sampling.steps=3", "study.clip=mini-clip"])
    assert found.train.network_dim == 8
    assert "network_dim_log2" not in found.space.describe()
    assert found.sampling.steps == 3 and found.study.clip == "mini-clip"


def test_set_changes_a_range() -> None:
    found = build_study("t", STUDY, sets=["learning_rate={low=1e-3,high=1e-2,log=true}"])
    assert found.space.describe()["learning_rate"] == "0.001 … 0.01, log"


def test_steps_given_by_set_replace_searched_epochs() -> None:
    found = build_study("t", STUDY, sets=["max_train_steps=2"])
    assert "max_train_epochs" not in found.space.describe()
    assert found.train.max_train_steps == 2


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("network_dims=8", "unknown setting network_dims", "did you mean network_dim"),
        ("network_dim", "has no value", "key=value"),
        ("network_alpha_ratio=1", "cannot be fixed to a single value", "set network_alpha instead"),
        ("seed=3", "cannot be set with --set", "--seed"),
        ("smapling.steps=3", "no section smapling", "did you mean sampling"),
        ("network_dim=abc", "not a number", "rank"),
        ("network_dim=0", "outside its limits", "from 1 to"),
    ],
)
def test_a_mistake_in_set_is_named(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_study("t", STUDY, sets=[text])
    assert hint in caught.value.hint


def test_the_same_command_finds_the_same_folder() -> None:
    assert study_name(None, "mini", "mini-sd15", None) == "mini-sd15"
    assert study_name(None, "sd15-character", "sd15", Path("/x/My Images")) == "sd15-character-my-images"
    assert study_name("abc", "mini", "mini-sd15", None) == "abc"


@pytest.mark.parametrize("name", ["a/b", "..", "", "Ä", "a" * 65, "ok\n", "<script>"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="study name"):
        study_name(name, "mini", "mini-sd15", None)


def test_a_changed_definition_is_refused_with_what_changed() -> None:
    """W15 · weight 5 · The definition of a study is changed between two calls → Refused with what changed, so
    that no results are mixed.
    """
    before = study().frozen()
    now = build_study("t", STUDY, sets=["learning_rate={low=1e-3,high=1e-2,log=true}", "noise_offset=0.05"])
    lines = difference(before, now.frozen())
    assert "[space] learning_rate: was 0.0001 … 0.1, log, is now 0.001 … 0.01, log" in lines
    assert "[train] noise_offset: was 0.0, is now 0.05" in lines
    with pytest.raises(ConfigError, match="was started with a different definition") as caught:
        check_unchanged(before, now.frozen(), "x")
    assert caught.value.hint == (
        "undo the change, or start a new study under another name: hpo search NAME … --fork-from x "
        "(it takes over the finished trials that fit)"
    )


def test_settings_without_influence_on_results_may_change() -> None:
    sets = ["gradient_checkpointing=true", "vae_batch_size=1"]
    assert difference(study().frozen(), build_study("t", STUDY, sets=sets).frozen()) == []


KOHYA = """
[model]
pretrained_model_name_or_path = "/models/v1-5.safetensors"
[network]
network_module = "networks.lora"
network_dim = 4
network_alpha = 2
[optimizer]
learning_rate = 3e-3
optimizer_args = ["weight_decay=0.1"]
[training]
max_train_epochs = 3
train_batch_size = 2
"""


def test_a_users_kohya_file_becomes_a_proposal(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(KOHYA)
    proposal, notes = as_proposal(path, study(), lambda config: 10)
    expected = {
        "learning_rate": 3e-3,
        "network_dim_log2": 2,
        "network_alpha_ratio": 0.5,
        "max_train_epochs": 3,
    }
    assert proposal == expected
    assert any("train_batch_size = 2 is ignored; the study uses 4" in note for note in notes)


def with_ratio() -> Any:
    table = copy.deepcopy(STUDY)
    table["space"]["text_encoder_lr_ratio"] = {"low": 0.1, "high": 1.0, "log": True}
    return table


@pytest.mark.parametrize(
    ("text", "unet", "text_encoder"),
    [
        ("learning_rate = 1e-4\nunet_lr = 3e-4\ntext_encoder_lr = 1e-4", 3e-4, 1e-4),
        ("unet_lr = 3e-4\ntext_encoder_lr = 6e-5", 3e-4, 6e-5),
        ("learning_rate = 1e-4\nunet_lr = 2e-4", 2e-4, 1e-4),
        ("learning_rate = 0\nunet_lr = 2e-4\ntext_encoder_lr = 1e-4", 2e-4, 1e-4),
    ],
)
def test_an_enqueued_file_is_trained_at_its_own_two_rates(
    tmp_path: Path, text: str, unet: float, text_encoder: float
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text + "\nmax_train_epochs = 2\nnetwork_dim = 4\nnetwork_alpha = 4")
    found = build_study("t", with_ratio())
    proposal, notes = as_proposal(path, found, lambda config: 10)
    trained = found.config(proposal)
    assert trained.effective_unet_lr == pytest.approx(unet)
    assert trained.effective_text_encoder_lr == pytest.approx(text_encoder)
    assert not [note for note in notes if "rate" in note]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1e-3\nunet_lr = 0", "does not train the U-Net"),
        ("learning_rate = 1e-3\nnetwork_train_unet_only = true", "does not train the text encoder"),
        ("learning_rate = 1e-3\ntext_encoder_lr = 0", "does not train the text encoder"),
    ],
)
def test_an_enqueued_file_with_a_rate_of_0_is_refused_with_the_reason(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text + "\nmax_train_epochs = 2\nnetwork_dim = 4\nnetwork_alpha = 4")
    with pytest.raises(ConfigError, match=message):
        as_proposal(path, build_study("t", with_ratio()), lambda config: 10)


def test_a_text_encoder_that_is_off_fits_a_range_that_begins_at_0(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "learning_rate = 1e-3\nnetwork_train_unet_only = true\nmax_train_epochs = 2\nnetwork_dim = 4\n"
        "network_alpha = 4"
    )
    found = build_study("t", with_ratio(), sets=["text_encoder_lr_ratio={low=0.0,high=1.0}"])
    proposal, _ = as_proposal(path, found, lambda config: 10)
    assert not found.config(proposal).trains_text_encoder


def test_a_rate_that_the_study_fixes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(KOHYA + "text_encoder_lr = 5e-5\n")
    _, notes = as_proposal(path, study(), lambda config: 10)
    assert "mine.toml: the text encoder learning rate 5e-05 is ignored; the study uses 0.003" in notes


def test_a_users_file_outside_the_ranges_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("network_dim = 128\nnetwork_alpha = 128\nlearning_rate = 1e-3\nmax_train_epochs = 2\n")
    with pytest.raises(ConfigError, match=r"mine\.toml: network_dim_log2 = 7 is outside"):
        as_proposal(path, study(), lambda config: 10)


def test_a_dim_that_is_no_power_of_two_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("network_dim = 96\nnetwork_alpha = 96\nlearning_rate = 1e-3\nmax_train_epochs = 2\n")
    with pytest.raises(ConfigError, match="network_dim = 96 is not a power of two"):
        as_proposal(path, study(), lambda config: 10)


@pytest.mark.parametrize(
    ("sets", "message", "hint"),
    [
        (["clip_skip={low=1,high=2}"], "clip_skip has no value", "--set baseline.clip_skip"),
        (["conv_dim=[4, 8]"], "conv_dim has no value", "--set baseline.conv_dim"),
        (["unet_lr={low=1e-4,high=1e-3}"], "unet_lr has no value", "--set baseline.unet_lr"),
        (["unet_lr=0", "text_encoder_lr_ratio={low=0.1,high=1.0}"], "which is 0", "above 0"),
        (["learning_rate={low=1e-4,high=" + "9" * 400 + "}"], "64 bits|beyond", "64 bits"),
        (["learning_rate=" + "9" * 5000], "is not a valid value", "shorter"),
        (["learning_rate=" + "[" * 5000], "is not a valid value", "shorter"),
    ],
)
def test_a_set_that_cannot_be_searched_is_one_line_and_what_to_do(
    sets: list[str], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_study("t", STUDY, sets=sets)
    assert hint in caught.value.hint


def test_a_setting_that_was_unset_can_be_searched_with_a_value_for_trial_0() -> None:
    found = build_study("t", STUDY, sets=["clip_skip={low=1,high=2}", "baseline.clip_skip=2"])
    assert found.config(found.baseline).clip_skip == 2


@pytest.mark.parametrize(
    "content",
    [
        "x = " + "[" * 5000,
        "x = " + "9" * 5000,
        "[space]\nlearning_rate = {low = 1" + "0" * 400 + ", high = 1}",
        "[space]\nlearning_rate = {low = 0x" + "f" * 5000 + ", high = 1}",
        '[space]\nlearning_rate = {low = 1e-4, high = 1e-3, inactive_when = "constant"}',
    ],
)
def test_no_monstrous_study_file_raises_anything_but_a_named_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"x\.toml"):
        read_study(path, sets=["lr_scheduler=constant"])


def test_a_study_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf" + find_study("mini", "mini-sd15").read_bytes())
    assert read_study(path).study.seed == 42


def test_min_snr_is_turned_off_with_0_wherever_it_is_written() -> None:
    assert build_study("t", STUDY, sets=["min_snr_gamma=0"]).train.min_snr_gamma is None
    found = build_study("t", STUDY, sets=["min_snr_gamma={low=0,high=5}", "baseline.min_snr_gamma=0"])
    assert found.config(found.baseline).min_snr_gamma is None
    assert found.config({**found.baseline, "min_snr_gamma": 2.5}).min_snr_gamma == 2.5


def test_what_a_fixed_setting_leaves_without_effect_is_not_searched() -> None:
    path = find_study("sd15-character", "sd15")
    names = {p.name for p in read_study(path).space}
    assert names - {p.name for p in read_study(path, sets=["unet_lr=1e-4"]).space} == {"learning_rate"}
    constant = read_study(path, sets=["lr_scheduler=constant"])
    assert names - {p.name for p in constant.space} == {"lr_scheduler", "warmup_ratio"}
    cosine = read_study(path, sets=["lr_scheduler=cosine"])
    assert names - {p.name for p in cosine.space} == {"lr_scheduler"}
    two = read_study(path, sets=['lr_scheduler=["cosine"]'])
    assert {p.name for p in two.space} == names
    # without a rate of its own the text encoder takes learning_rate: it is searched for that
    assert "learning_rate" in build_study("t", STUDY, sets=["unet_lr=1e-4"]).space.describe()


def test_a_file_that_searches_what_has_no_effect_is_refused() -> None:
    fixed = {"train": {**STUDY["train"], "unet_lr": 1e-4, "text_encoder_lr": 1e-5}}
    with pytest.raises(ConfigError, match=r"with unet_lr in .train., learning_rate has no effect"):
        study(**fixed)


def test_a_file_that_is_no_study_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"notes\.txt is not a \.toml file"):
        find_study(str(tmp_path / "notes.txt"), "sd15")


def test_a_base_may_be_renamed_but_not_changed() -> None:
    check_unchanged({"base": "a 123"}, {"base": "b 123", "compute type": "torch.float32"}, "x")
    with pytest.raises(ConfigError, match="base: was a 123"):
        check_unchanged({"base": "a 123"}, {"base": "a 124"}, "x")
    with pytest.raises(ConfigError, match=r"compute type: was torch\.bfloat16"):
        check_unchanged({"compute type": "torch.bfloat16"}, {"compute type": "torch.float32"}, "x")


def test_warm_up_in_steps_becomes_a_share_of_the_users_steps(tmp_path: Path) -> None:
    table = copy.deepcopy(STUDY)
    table["space"]["warmup_ratio"] = {"low": 0.0, "high": 0.5}
    path = tmp_path / "mine.toml"
    path.write_text("lr_warmup_steps = 20\nlearning_rate = 1e-3\nnetwork_alpha = 4\n")
    proposal, notes = as_proposal(path, build_study("t", table), lambda config: 100)
    assert proposal["warmup_ratio"] == pytest.approx(0.2)
    assert proposal["network_dim_log2"] == 2  # kohya's default: 4
    assert any("sets the length in steps" in note for note in notes)


def test_no_mutation_of_a_study_file_raises_anything_but_a_named_error() -> None:
    """D9 · weight 1 · A study file with any mistake in it → One line that says what is wrong and what to do,
    never a traceback.
    """
    text = find_study("mini", "mini-sd15").read_text(encoding="utf-8")
    draw = random.Random(0)
    for _ in range(150):
        characters = list(text)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(characters))
            characters[place] = draw.choice(["", "=", "[", '"', "0", "-", "x", "{", "\n", "1e9", "true"])
        try:
            table = tomllib.loads("".join(characters))
        except tomllib.TOMLDecodeError:
            continue
        try:
            build_study("mutant", table)
        except ToolError:
            continue


def test_no_wrong_type_raises_anything_but_a_named_error() -> None:
    values: list[Any] = [
        None,
        True,
        -1,
        1.5,
        float("nan"),
        float("inf"),
        "x",
        [],
        [1],
        {},
        {"low": "a"},
        [[1]],
    ]
    table = tomllib.loads(find_study("mini", "mini-sd15").read_text(encoding="utf-8"))
    for section, body in table.items():
        for key in body:
            for value in values:
                changed = copy.deepcopy(table)
                changed[section][key] = value
                try:
                    build_study("mutant", changed)
                except ToolError:
                    continue


@pytest.mark.parametrize("name", ["what?", "50%3F", "a#b", "a b&c=d", "ünï"])
def test_a_study_lies_where_its_folder_is_whatever_the_path(tmp_path: Path, name: str) -> None:
    root = tmp_path / name / "study"
    root.mkdir(parents=True)
    folder = StudyFolder(root)
    study = create_study(folder, {"data": "x"})
    study.enqueue_trial({"x": 1})
    assert folder.database.is_file() and [path.name for path in tmp_path.iterdir()] == [name]
    assert len(open_study(folder).trials) == 1


def test_a_limit_that_did_not_exist_when_a_study_began_stays_off_unless_its_file_sets_it() -> None:
    then = json.dumps({"copy_rate": 0.05, "diversity": 0.6, "prior": 1.0})
    own = study()
    assert as_begun(own, None).limits.shown == 0.1, "not begun"
    told = {BELOW_ZERO: "signed"}
    for facts in ({"limits": then, **told}, {}):  # {}: begun before limits were recorded
        old = as_begun(own, facts)
        assert old.limits.shown is None and old.limits.copy_rate == own.limits.copy_rate
        assert json.dumps(old.limits.as_dict()) == then, "so its facts are those it began with"
        assert old == dataclasses.replace(own, limits=old.limits)
    assert as_begun(own, {"limits": json.dumps(own.limits.as_dict()), **told}) == own
    wanted = study(limits={"shown": 0.1})
    assert as_begun(wanted, {"limits": then}).limits.shown == 0.1
    with pytest.raises(ConfigError, match=r"limits: was .* is now .*shown"):
        check_unchanged({"limits": then}, {"limits": json.dumps(wanted.limits.as_dict())}, "x")
