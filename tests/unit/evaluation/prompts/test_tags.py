"""Prompts as tags: for captions that are tags, of their own attributes, and scored without praise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from evaluation.images.sampling import _text
from evaluation.prompts.kinds import CONFIRM_COUNTS, CONFIRM_SEEDS
from evaluation.prompts.prompts import PromptSet, generate, load_prompts, make_prompt, save_prompts
from evaluation.prompts.tags import are_tags, kind_of, tag_templates, tags_of
from evaluation.prompts.templates import QUALITY
from hpo.search.workbench import load, write_definition
from hpo.study.config import SHIPPED, Inputs, build_study, read_study
from hpo.study.folder import StudyFolder, read_json
from hpo.study.scoring import prompt_sets, worded
from tests.tiny_search import draw_images
from trainer.data import Dataset, Item
from trainer.errors import ConfigError

CAPTIONS = (
    "zkw, 1girl, solo, long hair, blue eyes, red dress, sitting, outdoors, tree",
    "zkw, 1girl, solo, long hair, school uniform, standing, classroom, smile",
    "zkw, 1girl, long_hair, white_shirt, looking_at_viewer, simple_background",
    "zkw, 1girl, jacket, jeans, walking, city, night",
    "1girl, zkw, upper body, hat, beach, ocean, day",
)
SENTENCES = (
    "a photo of zkw girl in a red dress, standing on a beach, smiling at the camera",
    "zkw girl, who wears a blue hat, sits in a park",
)


def words(text: str) -> int:
    return len(text.replace(",", " ,").split())


def made(captions: Any = CAPTIONS, **changes: Any) -> PromptSet:
    usual: dict[str, Any] = {"trigger": "zkw", "class_word": "girl", "count_tokens": words, "words": "tags"}
    return generate(captions, **{**usual, **changes})


@pytest.mark.parametrize(
    ("captions", "is_tags"),
    [
        (CAPTIONS, True),
        (SENTENCES, False),
        (["zkw girl", "zkw girl"], False),  # too little to tell
        (["", "  "], False),
        (["1girl, zkw, holding a very large umbrella, smile, rain, night"], True),
        ([*CAPTIONS[:2], *SENTENCES], False),  # half of them
        ([*CAPTIONS[:3], *SENTENCES, ""], True),
    ],
)
def test_captions_of_short_parts_are_tags(captions: list[str], is_tags: bool) -> None:
    assert are_tags(captions) is is_tags


def test_another_separator_is_used_where_the_study_has_one() -> None:
    captions = [caption.replace(",", ";") for caption in CAPTIONS]
    assert are_tags(captions, ";") and not are_tags(captions)
    templates = tag_templates(captions, "zkw", "girl", ";")
    assert templates == tag_templates(CAPTIONS, "zkw", "girl")


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("red dress", "outfit"), ("black_boots", "outfit"), ("glasses", "outfit"), ("hair ribbon", "outfit"),
        ("looking at viewer", "pose"), ("sitting on bench", "pose"), ("arms_up", "pose"), ("upper body", "pose"),
        ("night sky", "background"), ("white background", "background"), ("trees", "background"),
        ("blue eyes", ""), ("long hair", ""), ("short hair", ""), ("hair flower", ""), ("solo", ""), ("1girl", ""),
    ],
)  # fmt: skip
def test_what_a_tag_says(tag: str, kind: str) -> None:
    assert kind_of(tag) == kind


def test_altered_prompts_combine_what_occurs_in_the_captions_as_no_caption_does() -> None:
    known = {tag for caption in CAPTIONS for tag in tags_of(caption)}
    templates = tag_templates(CAPTIONS, "zkw", "girl")["altered"]
    assert len(set(templates)) == 40
    for text in templates:
        *quality, trigger, subject, outfit, pose, background = text.split(", ")
        assert (*quality, trigger, subject) == (*QUALITY, "{trigger}", "1girl")
        assert [kind_of(tag) for tag in (outfit, pose, background)] == ["outfit", "pose", "background"]
        assert outfit in known and (pose in known or pose in ("close-up", "from above"))
        assert not any({outfit, pose, background} <= set(tags_of(caption)) for caption in CAPTIONS)
    used = [text.split(", ")[4] for text in templates[:12]]
    assert {used.count(tag) for tag in set(used)} == {2}, "each of the six outfits as often as the others"


def test_the_same_captions_give_the_same_prompts_in_any_order() -> None:
    mixed = list(CAPTIONS)
    random.Random(3).shuffle(mixed)
    assert made(mixed) == made() and made(mixed).hash == made().hash
    assert made(CAPTIONS[:-1]).hash != made().hash


def test_search_and_confirmation_are_disjoint_and_complete() -> None:
    search = made()
    confirm = made(counts=CONFIRM_COUNTS, seeds=CONFIRM_SEEDS, exclude=search)
    assert (len(search.prompts), len(confirm.prompts)) == (16, 24) and not search.notes + confirm.notes
    assert not {p.id for p in search.prompts} & {p.id for p in confirm.prompts}
    alone = made([], class_word="vase")
    rest = made([], class_word="vase", counts=CONFIRM_COUNTS, seeds=CONFIRM_SEEDS, exclude=alone)
    assert (len(alone.prompts), len(rest.prompts)) == (16, 24), "without any caption"
    style = made(words="tags-style", class_word="style", counts={"altered": 15, "class-only": 1})
    more = made(
        words="tags-style", class_word="style", counts={"altered": 22, "class-only": 2}, exclude=style
    )
    assert (len(style.prompts), len(more.prompts)) == (16, 24) and not style.notes + more.notes


@pytest.mark.parametrize(
    ("trigger", "class_word", "captions", "subject", "class_only"),
    [
        ("zkw", "woman", CAPTIONS, "zkw, 1girl", "1girl"),
        ("zkw", "elf", CAPTIONS, "zkw, elf, 1girl", "elf, 1girl"),
        ("zkw", "vase", ["zkw, red, table, no humans"], "zkw, vase", "vase"),
        (None, "girl", CAPTIONS, "1girl", "1girl"),
    ],
)
def test_the_subject_is_named_as_in_the_captions(
    trigger: str | None, class_word: str, captions: list[str], subject: str, class_only: str
) -> None:
    found = made(captions, trigger=trigger, class_word=class_word)
    for prompt in found.prompts:
        head = ", ".join((*QUALITY, class_only if prompt.kind == "class-only" else subject))
        assert prompt.kind == "train-like" or prompt.text.startswith(head + ", ")


def test_quality_is_drawn_also_by_the_base_and_never_scored(tmp_path: Path) -> None:
    found = made([*CAPTIONS, "zkw, 1girl, masterpiece, Best Quality, cape, forest"])
    for prompt in found.prompts:
        assert not any(tag in prompt.scored_text.lower() for tag in (*QUALITY, "zkw"))
        plain = prompt.text.replace("zkw", "girl")
        assert (_text(prompt, False), _text(prompt, True)) == (prompt.text, plain)
    save_prompts(found, tmp_path / "p.toml")
    assert 'quality = ["masterpiece", "best quality"]' in (tmp_path / "p.toml").read_text()
    again = load_prompts(tmp_path / "p.toml", trigger=None, class_word=None, count_tokens=words)
    assert again == found and again.hash == found.hash
    hand = make_prompt("masterpiece, {trigger} {class}", "altered", "zkw", "girl")
    assert hand.scored_text == "masterpiece, girl" == hand.class_text, "as ever, where no file says otherwise"
    text = (tmp_path / "p.toml").read_text().replace('"masterpiece", ', "3, ")
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError, match="is not a list of tags"):
        load_prompts(tmp_path / "p.toml", trigger=None, class_word=None, count_tokens=words)


@pytest.mark.parametrize("each", [1, 2])
def test_no_generated_prompt_has_more_than_40_tokens(each: int) -> None:
    long = [
        f"zkw, 1girl, holding {'very ' * n}long sword, {'old ' * n}armor, ancient {'ruined ' * n}castle"
        for n in range(1, 20)
    ]
    found = made([*CAPTIONS, *long], count_tokens=lambda text: each * words(text))
    assert len(found.prompts) == 16
    assert max(each * words(p.text) for p in found.prompts) <= 40
    assert all("zkw" in p.text for p in found.prompts if p.asks_for_subject)


# A study


def dataset(captions: Any) -> Dataset:
    items = (Item(Path(f"{n}.png"), c, 1, 64, 64, str(n)) for n, c in enumerate(captions))
    return Dataset(Path("d"), tuple(items), "zkw", "girl")


@pytest.mark.parametrize(
    ("sets", "captions", "forms"),
    [
        ((), CAPTIONS, ("tags", "tags")),
        ((), SENTENCES, ("natural", "natural")),
        (("prompts.words=natural",), CAPTIONS, ("natural", "natural")),
        (("prompts.words=tags",), SENTENCES, ("tags", "tags")),
        (("confirmation.words=natural",), CAPTIONS, ("tags", "natural")),
        (("study.preset=style",), CAPTIONS, ("tags-style", "tags-style")),
        (("study.preset=style",), SENTENCES, ("natural-style", "natural-style")),
        (("study.preset=style", "prompts.words=tags"), SENTENCES, ("tags-style", "tags-style")),
    ],
)
def test_the_captions_decide_the_form_unless_the_study_does(
    sets: tuple[str, ...], captions: Any, forms: tuple[str, str]
) -> None:
    study = read_study(SHIPPED / "sd15-character.toml", sets=sets)
    found = worded(study, dataset(captions))
    assert (found.prompts.words, found.confirmation.words) == forms
    stored = build_study("study", json.loads(json.dumps(found.sections)))
    assert (stored.prompts.words, stored.confirmation.words) == forms, "decided once"
    search, later = prompt_sets(Inputs("sd15"), study, dataset(captions), words)
    assert later is not None and (search.quality == QUALITY) is forms[0].startswith("tags")
    assert (later.quality == QUALITY) is forms[1].startswith("tags")


def test_a_study_says_and_keeps_the_form_of_its_prompts(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "data", count=10, size_px=64)
    for number in range(10):
        (data / f"{number}.txt").write_text(CAPTIONS[number % 5])
    study = read_study(SHIPPED / "mini.toml", sets=("prompts.words=auto", "confirmation.words=auto"))
    said: list[str] = []
    inputs = Inputs("mini-sd15", data, trigger="zkw", class_word="girl", device="cpu")
    bench = load(inputs, study, StudyFolder(tmp_path / "s"), said.append)
    (line,) = [text for text in said if text.startswith("the captions are")]
    first = next(p.text for p in bench.prompts.prompts if p.kind == "altered")
    assert line == (
        f"the captions are tags, so the prompts are, too: {first!r}; for sentences instead: "
        "--set prompts.words=natural"
    )
    write_definition(bench, {})
    stored = read_json(bench.folder.facts)
    assert stored is not None and stored["sections"]["prompts"]["words"] == "tags"
    auto = tmp_path / "auto.toml"
    text = (SHIPPED / "mini.toml").read_text(encoding="utf-8").replace('"miniature"', '"auto"')
    auto.write_text(text, encoding="utf-8")
    kept = read_study(auto, before=stored["sections"])
    assert (kept.prompts.words, kept.confirmation.words) == ("tags", "tags")
    assert read_study(auto).prompts.words == "auto"
