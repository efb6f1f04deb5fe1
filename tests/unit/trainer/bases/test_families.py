"""Families are data: no code outside trainer/bases checks the name of a family, and each property is defined once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.study.config import SHIPPED
from hpo.transfer.profile import read_family
from tests.places import ROOT
from trainer.bases import detect
from trainer.bases.base import Base
from trainer.bases.families import FAMILIES, KNOWN_BASES, is_miniature, known_base, published_name
from trainer.bases.load import CLASSES

TITLES = [family.title for family in FAMILIES.values()]
STARTS = [family.kohya_version_start for family in FAMILIES.values()]
WORDS = {*FAMILIES, *KNOWN_BASES, *TITLES, *STARTS, "mini-"}
# Methods that test a part of a text: a.startswith("mini-").
ASKS = ("startswith", "endswith", "removeprefix", "removesuffix", "find", "get", "count", "index")
# The room of the families, and where "sdxl" is a key of another program's files.
WRITES_THEM = ("trainer/bases", "trainer/kohya/frontends", "trainer/kohya/unknown.py")


def asked_words(tree: ast.AST) -> Iterator[int]:
    """Lines where the name of a family decides something: in a comparison, as a key of a table, in a list, or
    as a constant. As an argument, a default or a word in a text, it only names a base."""
    for node in ast.walk(tree):
        asked: list[ast.AST | None] = []
        match node:
            case ast.Compare():
                asked = [node.left, *node.comparators]
            case ast.Dict():
                asked = list(node.keys)
            case ast.List() | ast.Tuple() | ast.Set():
                asked = list(node.elts)
            case ast.Subscript():
                asked = [node.slice]
            case ast.Assign():
                asked = [node.value]
            case ast.MatchValue():
                asked = [node.value]
            case ast.Call(func=ast.Attribute(attr=name)) if name in ASKS:
                asked = list(node.args)
        yield from (word.lineno for word in asked if isinstance(word, ast.Constant) and word.value in WORDS)


@pytest.mark.parametrize(
    "line",
    [
        'a = base == "sdxl"',
        'a = base in ("sd15", "other")',
        'STEPS = {"sd15": 64}',
        'a = base.startswith("mini-")',
        'a = version.startswith("sdxl")',
        'a = STEPS["mini-sd15"]',
        'WANTED = "SDXL"',
        'match a:\n    case "sd15":\n        pass',
    ],
)
def test_the_search_for_asked_words_finds_them(line: str) -> None:
    assert list(asked_words(ast.parse(line)))


def test_no_code_outside_the_bases_asks_for_a_family_by_its_name() -> None:
    found = []
    for room in ("hpo", "evaluation", "trainer"):
        for path in sorted((ROOT / room).rglob("*.py")):
            place = path.relative_to(ROOT)
            if not any(place.is_relative_to(own) for own in WRITES_THEM):
                found += [f"{place}:{line}" for line in asked_words(ast.parse(path.read_text()))]
    assert not found, "ask trainer.bases instead: a fact of its FAMILIES or KNOWN_BASES"


def test_a_family_has_a_class_and_configurations_that_agree_with_its_facts() -> None:
    assert CLASSES.keys() == FAMILIES.keys()
    for name, facts in FAMILIES.items():
        assert facts.name == name and issubclass(CLASSES[name], Base)
        assert detect.family_of_folder(facts.configs) == name
        unet = detect.read_json(facts.configs / "unet" / "config.json")
        vae = detect.read_json(facts.configs / "vae" / "config.json")
        assert unet["cross_attention_dim"] == facts.context_width
        assert unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1) == facts.resolution_px
        assert bool(unet.get("use_linear_projection")) is facts.linear_projections
        assert {path.parent.name for path in facts.configs.glob("text_encoder*/config.json")} == {
            *facts.text_encoders
        }
        assert len(facts.text_encoders) == len(facts.tokenizers) == len(facts.text_prefixes)
        assert facts.kohya_version.startswith(facts.kohya_version_start)


@pytest.mark.parametrize("name", KNOWN_BASES)
def test_a_short_name_is_known_by_name_by_id_and_before_its_files_are_here(name: str) -> None:
    base = KNOWN_BASES[name]
    assert detect.family_of_spec(name) == detect.family_of_spec(published_name(name)) == base.family
    assert known_base(published_name(name)) is base
    assert detect.family_of_folder(base.configs) == base.family
    assert is_miniature(name) is base.is_miniature is (published_name(name) == name)
    assert not base.study or (SHIPPED / f"{base.study}.toml").is_file()


@pytest.mark.parametrize("path", sorted((SHIPPED / "families").glob("*.toml")), ids=lambda path: path.stem)
def test_what_transfer_knows_of_a_family_agrees_with_its_base(path: Path) -> None:
    family = read_family(path.stem)
    base = KNOWN_BASES[family.base]
    assert family.architecture == base.family
    assert family.text_encoders == len(FAMILIES[base.family].text_encoders)
    assert family.native_resolution_px == base.settings["resolution"]
    assert all(source in KNOWN_BASES for source in family.sources)


@pytest.mark.parametrize(
    ("spec", "metadata", "family"),
    [
        ("somebody/anime-xl-v1.5", {}, "sdxl"),
        ("somebody/photo-v1.5", {}, "sd15"),
        ("somebody/photo", {"ss_base_model_version": "sdxl_base_v0-9"}, "sdxl"),
        ("somebody/anime-xl", {"ss_base_model_version": "sd_v1"}, "sd15"),
        ("somebody/photo", {"ss_base_model_version": "sd_v2"}, None),
    ],
)
def test_a_base_that_is_not_here_is_told_by_metadata_before_its_name(
    spec: str, metadata: dict[str, str], family: str | None
) -> None:
    assert detect.family_of_spec(spec, metadata) == family
