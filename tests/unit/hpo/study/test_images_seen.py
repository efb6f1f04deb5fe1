"""The length of a trial in images seen: one rule to kohya's steps, its inverse, and studies from before it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hpo.search import cost as costs
from hpo.search.choice import choose
from hpo.search.enqueue import as_proposal
from hpo.search.sampled import SearchLimits
from hpo.search.session import SearchRequest
from hpo.study.changes import longer, shorter
from hpo.study.config import SHIPPED, Inputs, StudyConfig, build_study, find_study, read_study
from hpo.study.space.derived import steps_for
from hpo.study.storage import open_study
from hpo.study.unchanged import check_unchanged
from tests.tiny_search import STUDY, draw_images, make_search, tiny_bench
from trainer.data import Dataset, Item, batches_per_epoch, length_of, plan, total_steps
from trainer.errors import ConfigError
from trainer.files import read_records

SEEN = {"low": 8, "high": 64, "log": True}


def sections(**changes: Any) -> dict[str, Any]:
    """The tiny study with a length in images seen; ``changes`` to sections."""
    table = copy.deepcopy(STUDY)
    del table["space"]["max_train_epochs"], table["baseline"]["max_train_epochs"]
    table["space"]["images_seen"] = SEEN
    table["baseline"]["images_seen"] = 16
    for name, body in changes.items():
        table[name] |= body
    return table


def by_images(sets: tuple[str, ...] = (), **changes: Any) -> StudyConfig:
    return build_study("seen", sections(**changes), sets=sets)


# The rule


@pytest.mark.parametrize(
    ("images", "batch", "accumulation", "steps"),
    [
        (4000, 4, 1, 1000), (4000, 4, 3, 333), (4001, 2, 1, 2001), (4000, 1, 1, 4000),
        (6, 4, 1, 2), (5, 4, 1, 1), (1, 8, 4, 1), (15, 8, 4, 1),
    ],
)  # fmt: skip
def test_images_seen_are_whole_steps_to_the_nearest_and_at_least_one(
    images: int, batch: int, accumulation: int, steps: int
) -> None:
    settings = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert steps_for(images, settings) == steps


def test_batch_and_accumulation_may_be_searched_or_fixed_and_epochs_do_not_count() -> None:
    fixed = by_images()
    assert fixed.config(fixed.baseline).max_train_steps == 4  # 16 images, kohya's batch is 4 here
    both = by_images(
        space={"train_batch_size": {"choices": [1, 2]}, "gradient_accumulation_steps": {"low": 1, "high": 4}},
        baseline={"train_batch_size": 2, "gradient_accumulation_steps": 1},
    )
    config = both.config({**both.baseline, "gradient_accumulation_steps": 3})
    assert (config.max_train_steps, config.max_train_epochs) == (3, None)  # 16 / 6 = 2.67
    settings = both.space.settings(both.baseline, both.train)
    assert settings["max_train_steps"] == 8 and "max_train_epochs" not in settings
    assert both.space.proposal({**both.train.as_dict(), **settings})["images_seen"] == 16


def drawn(count: int, repeats: int = 1, sides: tuple[tuple[int, int], ...] = ((64, 64),)) -> Dataset:
    items = (
        Item(Path(f"{n}.png"), "", repeats, *sides[n % len(sides)], sha256=f"{n:064x}") for n in range(count)
    )
    return Dataset(Path("d"), tuple(items))


def test_a_study_means_the_same_for_25_plain_images_and_for_4000() -> None:
    study = read_study(find_study(None, "sd15"))
    config = study.config(study.baseline)
    assert {total_steps(config, drawn(count)) for count in (25, 400, 4000)} == {1000}
    few, many = (plan(config, drawn(count)) for count in (25, 4000))
    assert (few.total_epochs, many.total_epochs) == (143, 1)  # save_every_n_epochs counts these


@pytest.mark.parametrize("name", ["sd15-character", "sd15-character-small", "sd15-object", "sd15-style"])
def test_every_study_for_sd15_has_its_length_in_images(name: str) -> None:
    study = read_study(SHIPPED / f"{name}.toml")
    lengths = {"images_seen", "max_train_steps", "max_train_epochs"}
    assert lengths & {p.name for p in study.space} == {"images_seen"}
    assert study.config(study.baseline).max_train_epochs is None


def test_trials_train_what_the_rule_says_and_store_kohyas_steps(tmp_path: Path) -> None:
    study = by_images(
        space={"gradient_accumulation_steps": {"low": 1, "high": 3}},
        baseline={"gradient_accumulation_steps": 1},
        train={"train_batch_size": 2, "lr_warmup_steps": 0.1, "lr_scheduler": "cosine"},
    )
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"), study)
    make_search(bench, SearchLimits(3)).run()
    trials = open_study(bench.folder).get_trials(deepcopy=False)
    assert len({t.params["images_seen"] for t in trials}) == 3
    for trial in trials:
        batch = 2 * trial.params["gradient_accumulation_steps"]
        steps = max(1, int(trial.params["images_seen"] / batch + 0.5))
        folder = bench.folder.trial(trial.number)
        rows = [row for row in read_records(folder.steps) if row["event"] == "step"]
        assert len(rows) == steps == trial.user_attrs["settings"]["max_train_steps"]
        train = json.loads(folder.params.read_text())["train"]
        assert (train["max_train_steps"], train["max_train_epochs"]) == (steps, None)


# Mistakes and --set


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (
            {"space": {"max_train_epochs": {"low": 1, "high": 2}}, "baseline": {"max_train_epochs": 1}},
            "with images_seen in .space., max_train_epochs has no effect",
            "remove one",
        ),
        (
            {"space": {"max_train_steps": {"low": 1, "high": 2}}, "baseline": {"max_train_steps": 1}},
            "max_train_steps and images_seen both set|images_seen and max_train_steps both set",
            "only one",
        ),
        ({"train": {"max_train_epochs": 3}}, "max_train_epochs has no effect", "remove one"),
        (
            {"baseline": {"max_train_epochs": 3}},
            "max_train_epochs in .baseline. would mean",
            "images_seen = ",
        ),
        ({"baseline": {"max_train_steps": 3}}, "max_train_steps in .baseline. would mean", "images_seen = "),
        ({"baseline": {"images_seen": 4}}, "images_seen = 4 is outside", "baseline.images_seen"),
        ({"baseline": {"images_seen": "many"}}, "images_seen = many is outside", "baseline.images_seen"),
        ({"space": {"images_seen": {"low": 0, "high": 9}}}, "outside its limits", "from 1 to"),
        ({"space": {"images_seen": {"low": 1.5, "high": 9}}}, "not whole numbers", "use whole numbers"),
    ],
)
def test_a_study_has_one_length(changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        by_images(**changes)
    assert caught.value.hint is not None and hint in caught.value.hint


@pytest.mark.parametrize(
    ("sets", "searched", "length"),
    [
        (("max_train_epochs=3",), set(), (None, 3)),
        (("max_train_steps=7",), set(), (7, 10)),
        (
            ("max_train_epochs={low=1, high=3}", "baseline.max_train_epochs=2"),
            {"max_train_epochs"},
            (None, 2),
        ),
        (("max_train_steps={low=1, high=9}", "baseline.max_train_steps=5"), {"max_train_steps"}, (5, 10)),
        (("images_seen={low=4, high=90}",), {"images_seen"}, (4, None)),
    ],
)
def test_a_length_given_by_set_replaces_images_seen(
    sets: tuple[str, ...], searched: set[str], length: tuple[int | None, int | None]
) -> None:
    study = by_images(sets)
    assert {p.name for p in study.space} == {
        "learning_rate", "network_dim_log2", "network_alpha_ratio", *searched
    }  # fmt: skip
    config = study.config(study.baseline)
    assert (config.max_train_steps, config.max_train_epochs) == length


def test_images_seen_given_by_set_replace_a_length_in_epochs() -> None:
    sets = ("images_seen={low=10, high=20}", "baseline.images_seen=12")
    study = build_study("t", copy.deepcopy(STUDY), sets=sets)
    assert "max_train_epochs" not in study.space.describe() and study.baseline["images_seen"] == 12
    with pytest.raises(ConfigError, match="images_seen: cannot be fixed") as caught:
        by_images(("images_seen=12",))
    assert "max_train_steps" in str(caught.value.hint)


def test_advice_on_the_length_is_in_images(tmp_path: Path) -> None:
    assert longer(by_images(), 1.0, 1000) == (
        "images_seen={low=1000, high=2000, log=true}",
        "baseline.images_seen=1000",
    )
    assert shorter(by_images(), 0.5) == ("images_seen={low=8, high=32, log=true}",)
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"), by_images())  # 4 are trained on
    assert costs.ends(bench).seen == (8, 64) and costs.ends(bench).updates == (2, 16)


# --enqueue


@pytest.fixture
def enqueued(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    def run(text: str, study: StudyConfig, data: Dataset) -> tuple[dict[str, Any], list[str]]:
        path = tmp_path / "mine.toml"
        path.write_text("learning_rate = 1e-3\nnetwork_dim = 4\nnetwork_alpha = 4\n" + text)
        return as_proposal(path, study, lambda config: total_steps(config, data))

    return run


WIDE = ("images_seen={low=4, high=9000, log=true}",)
FOUR_SHAPES = ((64, 64), (64, 128), (128, 64), (96, 64))


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_a_file_in_epochs_is_as_many_epochs_of_these_images(
    enqueued: Callable[..., tuple[dict[str, Any], list[str]]], batch: int
) -> None:
    study, data = by_images((*WIDE, "resolution=64", f"train_batch_size={batch}")), drawn(10, 3, FOUR_SHAPES)
    proposal, notes = enqueued("max_train_epochs = 5\ntrain_batch_size = 3\n", study, data)
    trained = study.config(proposal)
    by_epochs = study.train.with_values({"max_train_epochs": 5})
    batches = batches_per_epoch(by_epochs, data)
    if batch > 1:
        assert batches > -(-30 // batch), "several buckets, with smaller last batches"
    assert trained.max_train_steps == length_of(by_epochs, batches).total_steps == 5 * batches
    assert plan(trained, data).total_epochs == 5
    assert notes[0] == (
        f"mine.toml: 5 epochs of these images are {5 * batches} steps × {batch} images = images_seen "
        f"{5 * batches * batch}"
    )
    assert not [note for note in notes if "max_train_epochs" in note and "ignored" in note]


def test_a_file_in_steps_keeps_its_images(enqueued: Callable[..., tuple[dict[str, Any], list[str]]]) -> None:
    study = by_images(
        WIDE, space={"warmup_ratio": {"low": 0.0, "high": 0.5}}, baseline={"lr_warmup_steps": 0}
    )
    text = "max_train_steps = 101\ntrain_batch_size = 2\nlr_warmup_steps = 5\nlr_scheduler = 'cosine'\n"
    proposal, notes = enqueued(text, study, drawn(10))
    assert proposal["images_seen"] == 202 and study.config(proposal).max_train_steps == 51
    assert proposal["warmup_ratio"] == pytest.approx(5 / 51)
    assert notes[0] == "mine.toml: 101 steps × 2 images = images_seen 202"
    default, _ = enqueued("", study, drawn(10))
    assert default["images_seen"] == 1600, "kohya's own default: 1,600 steps of one image"


def test_a_file_that_is_longer_than_the_range_is_refused(
    enqueued: Callable[..., tuple[dict[str, Any], list[str]]],
) -> None:
    with pytest.raises(
        ConfigError, match=r"mine\.toml: images_seen = 320 is outside the study's range: 8 … 64"
    ):
        enqueued("max_train_epochs = 40\n", by_images(), drawn(8))


# Studies from before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d" / "10_luca man").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / "d" / "10_luca man" / f"{number}.png")
    return tmp_path


def formerly(path: Path) -> str:
    """The text of a study file as it was before images seen were searched."""
    text = path.read_text(encoding="utf-8")
    searched = "images_seen = { low = 1500, high = 12000, log = true }"
    text = text.replace(searched, "max_train_epochs = { low = 6, high = 20 }")
    text = text.replace("images_seen = 4000", "max_train_epochs = 10").replace(
        'words = "auto"', 'words = "natural"'
    )
    assert "images_seen" not in text and text.count("max_train_epochs") == 2
    return text


def begin_as_formerly(file: Path, sets: tuple[str, ...] = ()) -> StudyConfig:
    file.write_text(formerly(SHIPPED / "sd15-character.toml"), encoding="utf-8")
    before = read_study(file, sets=sets)
    file.unlink()
    return before


@pytest.mark.parametrize(
    "sets", [(), ("max_train_epochs={low=2, high=4}", "baseline.max_train_epochs=3"), ("max_train_epochs=5",)]
)
def test_a_study_begun_with_epochs_by_a_shipped_file_goes_on_with_them(
    here: Path, sets: tuple[str, ...]
) -> None:
    before = begin_as_formerly(here / "sd15-character.toml", sets)
    folder = here / "runs" / "sd15-character-d"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps({"sections": before.sections, "inputs": {}}))
    again = choose(SearchRequest(Inputs("sd15", Path("d")), 30, sets=sets)).config
    assert again.space == before.space and again.baseline == before.baseline
    assert list(again.space.describe()) == list(before.space.describe()), "the sampler draws in this order"
    assert again.prompts == before.prompts and again.confirmation == before.confirmation
    check_unchanged(before.frozen(), again.frozen(), "sd15-character-d")
    new = choose(SearchRequest(Inputs("sd15", Path("d")), 30, name="other", sets=sets)).config
    assert ("images_seen" in new.space.describe()) is (not sets) and new.prompts.words == "auto"


def test_a_users_own_file_that_changes_is_a_changed_definition(here: Path) -> None:
    file = here / "mine.toml"
    before = begin_as_formerly(file)
    file.write_text((SHIPPED / "sd15-character.toml").read_text(encoding="utf-8"), encoding="utf-8")
    again = read_study(file, before=before.sections)
    with pytest.raises(ConfigError, match=r"max_train_epochs: was 6 … 20, is now not set") as caught:
        check_unchanged(before.frozen(), again.frozen(), "mine")
    assert "undo the change, or start a new study" in str(caught.value.hint)
    assert "images_seen: was not set, is now 1500 … 12000, log" in caught.value.message
