"""What a search is of: the preset by the dataset's words, the command, the study file, a begun study or a question."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpo.search.choice import SearchChoice, choose
from hpo.search.session import SearchRequest
from hpo.search.workbench import load
from hpo.study.config import Inputs, build_study, find_study, read_study
from hpo.study.folder import StudyFolder
from hpo.study.presets import preset_of
from hpo.study.scoring import prompt_sets, worded
from tests.tiny_search import draw_images
from trainer.bases.miniature import subjects
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset, Item, read_dataset
from trainer.errors import ConfigError

A_HOUSE = Dataset(Path("d"), (Item(Path("1.png"), "a house, vexa style", 1, 64, 64, "1"),))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def request(folder: str = "", base: str = "mini-sd15", **words: Any) -> SearchRequest:
    """A search of images in ``folder``, which is drawn if it is not there."""
    data = Path(folder).parts[0] if folder else None
    if folder and not Path(folder).is_dir():
        draw_images(Path(folder), count=2)
    own = {name: words.pop(name) for name in ("trigger", "class_word", "prompts") if name in words}
    return SearchRequest(Inputs(base, Path(data) if data else None, **own), 2, **words)


def begin(chosen: SearchChoice, **inputs: str) -> None:
    """study.json as a search writes it."""
    chosen.folder.root.mkdir(parents=True)
    sections = json.loads(json.dumps(chosen.config.sections))
    chosen.folder.facts.write_text(json.dumps({"sections": sections, "inputs": inputs}))


@pytest.mark.parametrize(
    ("trigger", "class_word", "preset"),
    [
        ("vexa", "style", "style"), ("vexa", "Artstyle", "style"), ("vexa", "ink art style", "style"),
        ("vexa", "styles", "style"), ("vexa_style", None, "style"), ("inkstyle", None, "style"),
        ("luca", "man", "character"), ("x", "hairstyle", "character"), ("x", "style guide", "character"),
        ("luca", None, None), (None, None, None), ("style", "girl", "character"),
    ],
)  # fmt: skip
def test_words_that_say_it_is_a_style(
    trigger: str | None, class_word: str | None, preset: str | None
) -> None:
    assert preset_of(trigger, class_word) == preset


@pytest.mark.parametrize(
    ("base", "folder", "definition", "name"),
    [
        ("mini-sd15", "d/10_vexa style", "mini", "mini-sd15-d"),
        ("mini-sdxl", "d/10_vexa style", "mini-sdxl", "mini-sdxl-d"),
        ("sd15", "d/10_vexa style", "sd15-style", "sd15-style-d"),
        ("sd15", "10_vexa style", "sd15-style", "sd15-style-10-vexa-style"),
    ],
)
def test_a_style_folder_is_searched_as_a_style(base: str, folder: str, definition: str, name: str) -> None:
    chosen = choose(request(folder, base))
    assert chosen.config.preset.style and chosen.config.name == definition and chosen.folder.name == name
    study = worded(chosen.config, A_HOUSE)  # of a real base, the form of the captions decides about tags
    assert study.prompts.words.endswith("-style") and study.confirmation.words.endswith("-style")
    assert chosen.says == (
        "searched as a style: the class word is style (for character or object: --preset)",
    )


@pytest.mark.parametrize("base", ["mini-sd15", "sd15", "mini-sdxl"])
def test_a_subject_is_searched_by_the_usual_study_unchanged(base: str) -> None:
    chosen = choose(request("d/10_luca man", base))
    assert chosen.config == read_study(find_study(None, base))
    assert chosen.inputs == Inputs(base, Path("d")), "what the folder says is left to what reads it"
    assert choose(request(base=base)).says == ()


def test_the_command_says_it_for_any_folder() -> None:
    chosen = choose(request("photos", "sd15", preset="style"))
    assert chosen.config.name == "sd15-style" and chosen.inputs.class_word == "style"
    assert choose(request("photos", "sd15", preset="object", class_word="vase")).config.name == "sd15-object"
    own = choose(request("d/10_vexa style", preset="character"))
    assert not own.config.preset.style and own.config.prompts.words == "miniature"
    by_set = choose(request("photos", sets=('study.preset="style"',)))
    assert by_set.config.preset.style and by_set.config.prompts.words == "miniature-style"
    with pytest.raises(ConfigError, match="no preset styl"):
        choose(request("photos", preset="styl"))
    demo = choose(request(preset="style"))
    assert demo.folder.name == "mini-sd15-style", "the demo style is not the demo character's study"


def test_a_study_file_that_names_its_preset_keeps_it_and_one_that_does_not_follows_the_dataset() -> None:
    table = "[space]\nlearning_rate = { low = 1e-4, high = 1e-2 }\n[baseline]\nlearning_rate = 1e-3\n"
    Path("plain.toml").write_text(table)
    Path("mine.toml").write_text(f'[study]\npreset = "character"\n{table}')
    assert choose(request("d/10_vexa style", study="plain.toml")).config.preset.style
    chosen = choose(request("d/10_vexa style", study="mine.toml"))
    assert not chosen.config.preset.style
    assert "mine.toml says so" in chosen.says[0] and "--preset style" in chosen.says[0]
    assert choose(request("d/10_vexa style", study="mine.toml", preset="style")).config.preset.style
    Path("mini.toml").write_text(f'[study]\npreset = "character"\n{table}')  # wins over the shipped one
    assert not choose(request("d/10_vexa style")).config.preset.style


@pytest.mark.parametrize("base", ["mini-sd15", "sd15"])
def test_a_study_begun_as_a_character_stays_one(base: str) -> None:
    asked = request("d/10_vexa style", base)
    before = choose(replace(asked, preset="character"))
    begin(before)
    chosen = choose(asked)
    assert chosen.folder.root == before.folder.root and chosen.config == before.config
    assert "was started so" in chosen.says[0] and "--preset style" in chosen.says[0]
    if base == "sd15":
        assert choose(replace(asked, preset="style")).folder.name == "sd15-style-d"
    else:
        with pytest.raises(ConfigError, match="was started with preset character"):
            choose(replace(asked, preset="style"))


def test_a_style_study_begun_with_the_former_prompts_keeps_them() -> None:
    asked = request("d/10_vexa style", "sd15", study="sd15-style")
    chosen = choose(asked)
    config = worded(chosen.config, A_HOUSE)
    assert config.prompts.words == "natural-style"
    former = {**config.sections, "prompts": {**config.sections["prompts"], "words": "natural"}}
    begin(replace(chosen, config=replace(config, sections=former)))
    again = choose(asked).config
    assert (again.prompts.words, again.confirmation.words) == ("natural", "natural-style")
    assert build_study("study", again.sections).prompts == again.prompts, "and so does its confirmation"


def test_a_folder_that_does_not_say_it_is_asked_about_once() -> None:
    asked: list[str] = []

    def ask(question: str, answers: tuple[str, ...]) -> str:
        asked.append(question)
        return "object" if any(answers) else "zkw" if answers else "vase"

    chosen = choose(request("photos", "sd15", ask=ask))
    assert (chosen.config.name, chosen.inputs.class_word) == ("sd15-object", "vase")
    assert len(asked) == 3 and "photos" in asked[0] and "trigger" in asked[2]
    assert chosen.inputs.trigger == "zkw"
    assert chosen.says == ("to skip these questions: --preset object --class vase --trigger zkw",)
    assert chosen.answers == (
        "--preset",
        "object",
        "--class",
        "vase",
        "--trigger",
        "zkw",
    )  # for other workers
    answered = replace(chosen.inputs, class_word="vase", trigger="zkw")
    worker = choose(SearchRequest(inputs=answered, preset="object"))
    assert (worker.config, worker.folder, worker.inputs) == (chosen.config, chosen.folder, answered)
    begin(chosen, class_word="vase", trigger="zkw")
    again = choose(request("photos", "sd15", ask=ask))
    assert len(asked) == 3 and again.folder == chosen.folder and again.inputs == chosen.inputs


def test_a_style_needs_no_class_word_and_nobody_is_asked_about_what_is_known_or_missing() -> None:
    def ask(question: str, answers: tuple[str, ...]) -> str:
        return "style" if "photos" in question else "" if "trigger" in question else pytest.fail(question)

    chosen = choose(request("photos", ask=ask))
    assert (chosen.inputs.class_word, chosen.inputs.trigger) == ("style", None)
    assert chosen.says == ("to skip these questions: --preset style",)
    for known in (
        request("photos", ask=ask, preset="style"),
        request("d/10_luca man", ask=ask),
        request(ask=ask),
        SearchRequest(Inputs("mini-sd15", Path("nowhere")), 2, ask=ask),
    ):
        choose(known)
    with pytest.raises(ConfigError, match="no class word is given"):
        choose(request("photos"))
    silent = choose(SearchRequest(Inputs("mini-sd15", Path("nowhere")), 2))
    assert silent.inputs.class_word is None and not silent.config.preset.style


def test_a_styles_prompts_name_a_scene_and_then_the_style(here: Path) -> None:
    place = subjects.write_subject("style", here / "demo").parent
    for base in ("mini-sd15", "sd15"):
        chosen = choose(SearchRequest(Inputs(base, place), 2))
        data = read_dataset(place, TrainConfig())
        search, confirmation = prompt_sets(chosen.inputs, chosen.config, data, lambda text: len(text.split()))
        assert confirmation is not None
        for prompt in (*search.prompts, *confirmation.prompts):
            if prompt.kind == "class-only":
                assert "vexa" not in prompt.text and "style" not in prompt.text
            else:
                scene, style = prompt.text.rsplit(", ", 1)
                assert style == "vexa style" and len(scene.split()) > 2
                assert prompt.scored_text == f"{scene}, style"
    assert sum(p.kind == "altered" for p in search.prompts) == 9


def test_references_stay_those_that_a_study_was_begun_with(here: Path) -> None:
    """Earlier versions did not look for held_out/ next to a folder like 10_luca figure."""
    place = subjects.write_subject("character", here / "demo", 64)
    study = read_study(find_study(None, "mini-sd15"))
    fresh = load(Inputs("mini-sd15", place), study, StudyFolder(here / "fresh"), lambda text: None)
    assert {Path(path).parent.name for path in fresh.reference_items} == {"held_out"}
    assert len(fresh.data.items) == 24
    begun = StudyFolder(here / "begun")
    begun.root.mkdir()
    begun.facts.write_text(
        json.dumps({"references": [str(path) for path in sorted(place.glob("*.png"))[:1]]})
    )
    old = load(Inputs("mini-sd15", place), study, begun, lambda text: None)
    assert {Path(path).parent for path in old.reference_items} == {place} and len(old.data.items) == 20


def test_a_search_without_a_trigger_says_so_and_names_words_that_could_be_it(here: Path) -> None:
    data = draw_images(here / "photos", count=10, size_px=64)
    said: list[str] = []
    study = read_study(find_study(None, "mini-sd15"))
    load(Inputs("mini-sd15", data, class_word="figure"), study, StudyFolder(here / "study"), said.append)
    assert any("no trigger word is known" in line and "zkw, figure" in line for line in said)


def test_a_settings_file_named_like_a_base_is_not_the_default_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = find_study(None, "mini-sdxl").resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini-sdxl.toml").write_text("network_dim = 4\n")
    (tmp_path / usual.name).write_text("network_dim = 4\n")
    assert find_study(None, "mini-sdxl").resolve() == usual
    assert find_study(usual.name, "mini-sdxl").resolve() == tmp_path / usual.name


def begun_before(asked: SearchRequest, **changes: Any) -> SearchChoice:
    """A study as a search writes it, with ``changes`` to its stored sections."""
    chosen = choose(asked)
    sections = {**chosen.config.sections, **changes}
    begin(replace(chosen, config=replace(chosen.config, sections=sections)))
    chosen.folder.database.touch()
    return chosen


def test_a_fork_of_a_study_that_was_begun_in_epochs_has_its_length_in_epochs() -> None:
    """Otherwise none of its trials fits: also in the command that a refused change of the definition prints."""
    asked = request("d/10_luca man", "sd15", name="old")
    now = choose(asked).config.sections
    space, baseline = ({k: v for k, v in now[n].items() if k != "images_seen"} for n in ("space", "baseline"))
    epochs = {"low": 4, "high": 12}
    begun_before(
        asked,
        space={**space, "max_train_epochs": epochs},
        baseline={**baseline, "max_train_epochs": 8},
    )
    for sets in ((), ("network_dim=16",)):
        new = choose(replace(asked, name="new", fork_from="old", sets=sets)).config
        assert new.sections["space"]["max_train_epochs"] == epochs and new.baseline["max_train_epochs"] == 8
        assert "images_seen" not in {p.name for p in new.space}
    plain = choose(replace(asked, name="new")).config
    assert "images_seen" in {p.name for p in plain.space}


def test_a_fork_keeps_the_preset_and_the_prompts_of_its_source() -> None:
    asked = request("d/10_vexa style", "sd15", name="old")
    now = choose(replace(asked, preset="character")).config.sections
    begun_before(replace(asked, preset="character"), prompts={**now["prompts"], "words": "tags"})
    new = choose(replace(asked, name="new", fork_from="old"))
    assert not new.config.preset.style and new.config.prompts.words == "tags"
    assert "study old was started so" in new.says[0]
    assert new.says[0].endswith("use --preset style without --fork-from")
    assert choose(replace(asked, name="new", fork_from="old", preset="style")).config.preset.style
