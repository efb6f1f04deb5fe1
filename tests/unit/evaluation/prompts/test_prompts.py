"""Tests of evaluation.prompts.prompts."""

from functools import partial
from pathlib import Path

import pytest

from evaluation.prompts.kinds import CONFIRM_COUNTS, CONFIRM_SEEDS, SEARCH_COUNTS
from evaluation.prompts.prompts import (
    Prompt,
    PromptSet,
    generate,
    load_prompts,
    make_prompt,
    save_prompts,
    scored_text,
    shorten,
)
from evaluation.prompts.templates import TEMPLATES
from hpo.study.config import SHIPPED, Inputs, read_study
from hpo.study.scoring import prompt_sets, say_notes, subject_items
from hpo.study.sections import PRESETS
from tests import ranking
from tests.places import ROOT
from tests.tiny_search import draw_images
from trainer.bases.miniature import subjects
from trainer.data.dataset import Dataset, Item, read_dataset
from trainer.errors import ConfigError

CAPTIONS = [f"zkw girl number {word} in a park" for word in range(10)]


def words(text: str) -> int:
    return len(text.split())


def load(path: Path, content: str, trigger: str | None = "zkw", class_word: str | None = "girl") -> PromptSet:
    path.write_text(content, encoding="utf-8")
    return load_prompts(path, trigger=trigger, class_word=class_word, count_tokens=words)


@pytest.mark.parametrize(
    ("text", "scored"),
    [
        ("a photo of zkw on a beach", "a photo of girl on a beach"),
        ("a photo of zkw girl on a beach", "a photo of girl on a beach"),
        ("ZKW girl, red hair", "girl, red hair"),
        ("zkw, girl, red hair", "girl, red hair"),
        ("girl zkw in the snow", "girl in the snow"),
        ("a zkwish girl", "a zkwish girl"),
        ("a dog", "a dog"),
    ],
)
def test_the_trigger_is_replaced_by_the_class_word_in_the_text_that_is_scored(text: str, scored: str) -> None:
    assert scored_text(text, "zkw", "girl") == scored


def test_scored_text_always_comes_from_the_rendered_text(tmp_path: Path) -> None:
    made = generate(CAPTIONS, trigger="zkw", class_word="girl", count_tokens=words)
    for prompt in made.prompts:
        assert prompt.scored_text == scored_text(prompt.text, "zkw", "girl")
        assert "zkw" not in prompt.scored_text
    with pytest.raises(ConfigError, match="unknown key scored_text"):
        load(tmp_path / "p.toml", '[[prompts]]\ntext = "a"\nscored_text = "b"')


def test_adding_a_prompt_changes_no_other_prompts_id() -> None:
    few = PromptSet(
        (make_prompt("a {class}", "altered", None, "cat"), make_prompt("b", "altered", None, "cat")), (0,)
    )
    more = PromptSet((make_prompt("new", "style", None, "cat"), *few.prompts), (0,))
    assert {p.id for p in few.prompts} < {p.id for p in more.prompts}
    assert few.hash != more.hash


@pytest.mark.parametrize("world", list(TEMPLATES))
def test_a_search_set_has_16_prompts_with_two_seeds_and_one_class_prompt_with_eight(world: str) -> None:
    made = generate(CAPTIONS, trigger="zkw", class_word="girl", count_tokens=words, words=world)
    assert len(made.prompts) == sum(SEARCH_COUNTS.values()) == 16 and len(made.seeds) == 2
    assert made.image_count == 15 * 2 + 8
    (only,) = [p for p in made.prompts if p.kind == "class-only"]
    assert made.seeds_of(only) == tuple(range(8)) and made.seeds_of(made.prompts[0]) == (0, 1)
    kinds = [p.kind for p in made.prompts]
    assert kinds.count("train-like") == 6 and kinds.count("class-only") == 1
    assert not any("zkw" in p.text for p in made.prompts if p.kind == "class-only")


@pytest.mark.parametrize("world", list(TEMPLATES))
def test_a_confirmation_set_shares_no_prompt_and_no_seed_with_the_search_set(world: str) -> None:
    captions = [f"zkw girl {n}" for n in range(40)]
    search = generate(captions, trigger="zkw", class_word="girl", count_tokens=words, words=world)
    confirm = generate(
        captions,
        trigger="zkw",
        class_word="girl",
        count_tokens=words,
        words=world,
        counts=CONFIRM_COUNTS,
        seeds=CONFIRM_SEEDS,
        exclude=search,
    )
    assert len(confirm.prompts) == 24 and len(confirm.seeds) == 4
    assert not {p.id for p in search.prompts} & {p.id for p in confirm.prompts}
    assert not set(search.seeds) & set(confirm.seeds)


PHOTOS = [f"zkw girl, {what}, {where}" for what in ("standing", "smiling", "red coat", "side view")
          for where in ("in a park", "at home", "on a street", "by the sea", "in the snow")]  # fmt: skip


@pytest.mark.parametrize("world", list(TEMPLATES))
@pytest.mark.parametrize("captions", [0, 1, 5, 10, 20])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_has_16_prompts_and_24_others_for_confirming(
    preset: str, captions: int, world: str
) -> None:
    make = partial(
        generate, PHOTOS[:captions], trigger="zkw", class_word="girl", count_tokens=words, words=world
    )
    plan = PRESETS[preset]
    search = make(counts=plan.counts)
    confirm = make(counts=plan.confirm_counts, seeds=CONFIRM_SEEDS, exclude=search)
    assert (len(search.prompts), len(confirm.prompts)) == (16, 24) and len(confirm.seeds) == 4
    assert not search.notes and not confirm.notes
    assert not {p.id for p in search.prompts} & {p.id for p in confirm.prompts}


@pytest.mark.parametrize("name", [p.stem for p in SHIPPED.glob("*.toml")])
def test_the_shipped_studies_ask_for_what_their_presets_ask(name: str) -> None:
    study = read_study(SHIPPED / f"{name}.toml")
    if not study.prompts.words.startswith("miniature"):
        assert study.prompts.counts == study.preset.counts
        assert study.confirmation.counts == study.preset.confirm_counts


@pytest.mark.parametrize("kind", list(subjects.SUBJECTS))
def test_the_miniatures_own_sets_are_as_large_as_planned(kind: str, tmp_path: Path) -> None:
    study = read_study(SHIPPED / "mini.toml")
    data = read_dataset(subjects.write_subject(kind, tmp_path / kind).parent, study.train)
    for made, plan in zip(
        prompt_sets(Inputs("mini-sd15"), study, data, words),
        (study.prompts, study.confirmation),
        strict=True,
    ):
        assert made is not None and not made.notes
        assert len(made.prompts) == sum(plan.counts.values())
    if kind == "character":  # the recorded study (tests/ranking.py) drew them
        texts = {p.text for s in prompt_sets(Inputs("mini-sd15"), study, data, words) for p in s.prompts}
        found = ranking.read()
        assert texts == {t for on in found.on.values() for t in on["trial 0"].prompts.texts}


def test_what_is_lacking_is_said_for_the_confirmation_too() -> None:
    few = {"altered": len(TEMPLATES["natural"]["altered"])}
    make = partial(generate, [], trigger="zkw", class_word="girl", count_tokens=words, class_seeds=0)
    search = make(counts=few)
    confirm = make(counts={"altered": 2, "style": 9}, exclude=search)
    said: list[str] = []
    say_notes(search, confirm, said.append)
    assert said == ["confirmation prompts: 9 of 11 planned prompts: there are no more captions or templates"]


def test_regularisation_images_make_no_prompts() -> None:
    """Their captions have no trigger: such a prompt does not contain the subject but would be scored for likeness."""
    study = read_study(SHIPPED / "sd15-character.toml")
    own = [Item(Path(f"{n}.png"), f"zkw girl {n}", 1, 64, 64, str(n)) for n in range(4)]
    class_images = [Item(Path(f"r{n}.png"), f"girl {n}", 1, 64, 64, f"r{n}", is_reg=True) for n in range(40)]
    with_reg, without = (
        prompt_sets(Inputs("sd15"), study, Dataset(Path("d"), tuple(items), "zkw", "girl"), words)
        for items in (own + class_images, own)
    )
    assert with_reg == without
    assert [i.path.name for i in subject_items(Dataset(Path("d"), (*class_images, *own)))] == [
        f"{n}.png" for n in range(4)
    ]


def test_a_search_says_what_its_sets_lack_and_what_its_images_are(tmp_path: Path) -> None:
    from evaluation.score.safeguards import embed_copies
    from hpo.search.session import _data_line
    from hpo.search.workbench import load as load_bench
    from hpo.study.folder import StudyFolder

    data = subjects.write_subject("character", tmp_path / "images").parent
    draw_images(tmp_path / "class" / "1_figure", count=5, size_px=64)
    sets = (f'reg_data_dir="{tmp_path / "class"}"', "confirmation.counts={ altered = 70 }")
    study = read_study(SHIPPED / "mini.toml", sets=sets)
    said: list[str] = []
    bench = load_bench(
        Inputs("mini-sd15", data, device="cpu"), study, StudyFolder(tmp_path / "s"), said.append
    )
    assert any(line.startswith("confirmation prompts: ") and "of 70 planned" in line for line in said), said
    line = _data_line(bench)
    assert line.startswith(
        "24 training images and 5 regularization images, trigger luca, class figure; 8 ref"
    )
    assert "38 images per trial (15 prompts × 2 seeds, 1 × 8)" in line
    assert not any("zkw" in prompt.text for prompt in bench.prompts.prompts)
    assert bench.evaluator.safeguards is not None
    own = [item.path for item in bench.data.items if not item.is_reg]
    alone = embed_copies(own, [Path(p) for p in bench.reference_items], bench.evaluator.safeguards.encoders)
    assert bench.evaluator.safeguards.copies.features_TD.equal(alone.features_TD)


def test_the_size_of_a_set_multiplies_out() -> None:
    made = generate(CAPTIONS, trigger="zkw", class_word="girl", count_tokens=words)
    assert made.size == "15 prompts × 2 seeds, 1 × 8" and made.image_count == 15 * 2 + 8
    pair = PromptSet((Prompt("a", "a", "altered"), Prompt("b", "b", "altered")), (3,))
    assert pair.size == "2 prompts × 1 seed"


def test_the_choice_of_captions_does_not_depend_on_their_order() -> None:
    forth, back = (
        generate(c, trigger="zkw", class_word="girl", count_tokens=words) for c in (CAPTIONS, CAPTIONS[::-1])
    )
    assert forth.hash == back.hash


def test_too_few_captions_are_filled_up_from_templates() -> None:
    made = generate(CAPTIONS[:2], trigger="zkw", class_word="girl", count_tokens=words)
    kinds = [p.kind for p in made.prompts]
    assert kinds.count("train-like") == 2 and len(kinds) == 16


def test_a_long_caption_is_shortened_at_a_clause_and_it_is_said() -> None:
    clause = "word " * 19 + "word"
    assert shorten(f"{clause}, {clause}, {clause}", words) == f"{clause}, {clause}"
    assert words(shorten("word " * 90, words)) == 40
    assert shorten("short, text", words) == "short, text"
    made = generate([f"zkw girl, {clause}, {clause}"], trigger="zkw", class_word="girl", count_tokens=words)
    assert "1 captions were shortened to 40 tokens" in made.notes[0]
    assert all(words(p.text) <= 40 for p in made.prompts)


def test_a_caption_that_is_cut_keeps_its_trigger() -> None:
    """Such a prompt is scored for likeness, so it must contain the subject."""
    clause = "word " * 19 + "word"
    captions = [f"{clause}, {clause}, zkw girl", f"{clause}, {clause}, nobody"]
    made = generate(captions, trigger="zkw", class_word="girl", count_tokens=words)
    first, second = sorted((p for p in made.prompts if p.kind == "train-like"), key=lambda p: -len(p.text))
    assert second.text == f"zkw girl, {clause}" and second.scored_text == f"girl, {clause}"
    assert first.text == f"{clause}, {clause}", "a caption without the trigger is drawn as it was trained"
    tight = generate(["a " * 60 + "zkw"], trigger="zkw", class_word="girl", count_tokens=words)
    assert words(tight.prompts[0].text) == 40 and tight.prompts[0].text.startswith("zkw girl, a a")


def test_a_hand_written_prompt_over_75_tokens_is_refused(tmp_path: Path) -> None:
    assert load(tmp_path / "p.txt", "word " * 75 + "\nother").prompts[0].text == " ".join(["word"] * 75)
    with pytest.raises(ConfigError, match=r"76 tokens.*truncated at 75"):
        load(tmp_path / "p.txt", "word " * 76 + "\nother")


def test_a_missing_class_word_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--class"):
        generate(CAPTIONS, trigger="zkw", class_word=None, count_tokens=words)
    for text in ("a photo of zkw", "a {class}", "{trigger} in the snow"):
        with pytest.raises(ConfigError, match="--class"):
            load(tmp_path / "p.txt", f"{text}\nother", class_word=None)


def test_a_toml_file_reads_back_to_the_same_hash(tmp_path: Path) -> None:
    made = generate(CAPTIONS, trigger="zkw", class_word="girl", count_tokens=words, seeds=(3, 4, 5))
    path = tmp_path / "prompts.toml"
    save_prompts(made, path)
    again = load_prompts(path, trigger=None, class_word=None, count_tokens=words)
    assert again == made and again.hash == made.hash


def test_prompt_files_fill_in_trigger_and_class(tmp_path: Path) -> None:
    text = load(tmp_path / "p.txt", "# a comment\n\na {trigger} {class} in red\nzkw asleep\n")
    assert [p.text for p in text.prompts] == ["a zkw girl in red", "zkw asleep"]
    assert [p.scored_text for p in text.prompts] == ["a girl in red", "girl asleep"]
    toml = load(
        tmp_path / "p.toml", 'seeds = [7]\n[[prompts]]\ntext = "a"\nkind = "style"\n[[prompts]]\ntext = "b"'
    )
    assert toml.seeds == (7,) and [p.kind for p in toml.prompts] == ["style", "altered"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("seeds = [", "not valid TOML"),
        ("promts = []", "did you mean prompts"),
        ('[[prompts]]\ntext = "a"\nkind = "styles"', "did you mean style"),
        ('[[prompts]]\ntext = "a {red|blue} cat"', "not known.*{trigger}"),
        ('[[prompts]]\ntext = "a"\n[[prompts]]\ntext = "a"', "appears twice"),
        ('[[prompts]]\ntext = "a"', "at least 2"),
        ('[[prompts]]\nkind = "style"', "without a text"),
        ('[[prompts]]\ntext = " "', "is empty"),
        ('[[prompts]]\ntext = "zkw"\nkind = "class-only"', "contains the trigger"),
        ('seeds = [1, 1]\n[[prompts]]\ntext = "a"\n[[prompts]]\ntext = "b"', "repeated"),
        ('seeds = [1.5]\n[[prompts]]\ntext = "a"\n[[prompts]]\ntext = "b"', "whole numbers"),
        ('seeds = 3\n[[prompts]]\ntext = "a"', "wrong form"),
        ("prompts = 3", "wrong form"),
        ("seeds = [[0]]", "wrong form"),
        ("seeds = [" + "9" * 400 + "]", "wrong form"),
        ("seeds = " + "[" * 5000, "not valid TOML"),
        ("seeds = " + "9" * 5000, "not valid TOML"),
        ("trigger = 5", "trigger = 5 is not a text"),
        ("class = [1]", "is not a text"),
    ],
)
def test_a_wrong_prompt_file_is_refused(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "p.toml", content)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    found = load(tmp_path / "p.txt", "\ufeffa cat\na dog")
    assert [p.text for p in found.prompts] == ["a cat", "a dog"]
    assert load(tmp_path / "p.toml", '\ufeff[[prompts]]\ntext = "a"\n[[prompts]]\ntext = "b"').seeds == (0, 1)


def test_the_example_in_the_documentation_is_a_prompt_file(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    examples = [part.partition("```")[0] for part in page.split("```toml\n")[1:]]
    example = next(text for text in examples if "[[prompts]]" in text)
    found = load(tmp_path / "p.toml", example, trigger=None, class_word=None)
    assert found.prompts[0].scored_text == "a photo of girl on a beach"


def test_a_prompt_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_prompts(tmp_path / "none.txt", trigger=None, class_word=None, count_tokens=words)


def test_a_prompts_own_seeds_change_the_hash_but_no_id_and_survive_the_file(tmp_path: Path) -> None:
    made = generate(CAPTIONS, trigger="zkw", class_word="girl", count_tokens=words)
    plain = generate(CAPTIONS, trigger="zkw", class_word="girl", count_tokens=words, class_seeds=2)
    assert [p.id for p in made.prompts] == [p.id for p in plain.prompts] and made.hash != plain.hash
    assert plain.jobs == tuple((p, s) for p in plain.prompts for s in (0, 1))
    save_prompts(made, tmp_path / "p.toml")
    again = load_prompts(tmp_path / "p.toml", trigger=None, class_word=None, count_tokens=words)
    assert again == made and again.hash == made.hash
    for bad in ("[]", "[1, 1]", "[-1]", "[0.5]", "3"):
        text = f'[[prompts]]\ntext = "a"\nseeds = {bad}\n[[prompts]]\ntext = "b"'
        with pytest.raises(ConfigError, match="seeds"):
            load(tmp_path / "bad.toml", text)


def test_likeness_is_asked_of_every_kind_but_class_only() -> None:
    assert Prompt("a", "a", "style").asks_for_subject and not Prompt("a", "a", "class-only").asks_for_subject
    with pytest.raises(ConfigError, match="every prompt is class-only"):
        PromptSet((Prompt("a", "a", "class-only"), Prompt("b", "b", "class-only")), (0,))


def test_a_file_of_sample_prompts_is_told_from_prompts_that_are_scored(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(
        "# --w 64 in a remark\nzed man --w 512 --n bad\nzed man -- a dash\n --w 64\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="in line 2, 4, which would be drawn as text"):
        load_prompts(path, trigger=None, class_word=None, count_tokens=words)
