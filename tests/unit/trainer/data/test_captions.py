"""What a caption becomes each time: kohya's rules, and every text that can come up is known in advance."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import TrainConfig
from trainer.data.captions import CaptionRules, Moment
from trainer.data.dataset import Item
from trainer.data.epoch import caption_for, caption_variants


def rules(**values: Any) -> CaptionRules:
    return CaptionRules.of(TrainConfig(**values))


def made(caption: str, times: int = 200, epoch: int = 0, **values: Any) -> list[str]:
    draw = random.Random(0)
    return [rules(**values).apply(caption, epoch, draw) for _ in range(times)]


@pytest.mark.parametrize(
    ("caption", "values", "expected"),
    [
        ("zed, hat", {}, {"zed, hat"}),
        ("zed", {"caption_prefix": "photo of", "caption_suffix": "here"}, {"photo of zed here"}),
        ("a, b;c", {"secondary_separator": ";"}, {"a, b,c"}),
        ("a {red|blue} hat", {"enable_wildcard": True}, {"a red hat", "a blue hat"}),
        ("a {{red|blue}} hat", {"enable_wildcard": True}, {"a {red|blue} hat"}),
        ("a\nb", {"enable_wildcard": True, "caption_prefix": "x"}, {"x a", "x b"}),
        ("z, a, b", {"shuffle_caption": True, "keep_tokens": 1}, {"z, a, b", "z, b, a"}),
        (
            "z ||| a, b ||| q",
            {"shuffle_caption": True, "keep_tokens_separator": "|||"},
            {"z, a, b, q", "z, b, a, q"},
        ),
        ("z, a", {"caption_tag_dropout_rate": 0.5, "keep_tokens": 1}, {"z, a", "z"}),
        ("z", {"caption_dropout_rate": 0.5}, {"z", ""}),
        ("z", {"caption_dropout_rate": 1}, {""}),
        ("a|b", {"shuffle_caption": True, "caption_separator": "|"}, {"a| b", "b| a"}),
        (
            "zed man; at sea, at dusk; hat",
            {"caption_tag_dropout_rate": 1e-9, "caption_separator": ";"},
            {"zed man; at sea, at dusk; hat"},
        ),
        (
            "zed man; at sea, at dusk; hat",
            {"shuffle_caption": True, "keep_tokens": 1, "caption_separator": ";"},
            {"zed man; at sea, at dusk; hat", "zed man; hat; at sea, at dusk"},
        ),
        (
            "z ||| a; b",
            {"shuffle_caption": True, "keep_tokens_separator": "|||", "caption_separator": ";"},
            {"z; a; b", "z; b; a"},
        ),
        ("zed  red", {"shuffle_caption": True, "keep_tokens": 1, "caption_separator": " "}, {"zed red"}),
        ("zed, red", {"shuffle_caption": True, "keep_tokens": 1, "caption_separator": ", "}, {"zed, red"}),
        (" , z,, a;b, ", {"shuffle_caption": True, "secondary_separator": ";"}, {"z, a,b", "a,b, z"}),
    ],
)
def test_a_caption_becomes_what_kohya_makes_of_it(
    caption: str, values: dict[str, Any], expected: set[str]
) -> None:
    assert set(made(caption, **values)) == expected


def test_every_nth_epoch_is_without_captions() -> None:
    found = [made("z", 1, epoch, caption_dropout_every_n_epochs=3)[0] for epoch in range(6)]
    assert found == ["z", "z", "", "z", "z", ""]


def test_the_share_of_dropped_captions_and_tags_is_as_asked() -> None:
    assert 0.2 < made("z", 2000, caption_dropout_rate=0.25).count("") / 2000 < 0.3
    tags = "".join(made("a, b, c, d", 1000, caption_tag_dropout_rate=0.25)).replace(", ", "")
    assert 0.7 < len(tags) / 4000 < 0.8


texts = st.text(st.sampled_from("ab,{}|\n ;"), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(texts, st.booleans(), st.sampled_from([0.0, 0.5]), st.sampled_from(["", ";"]), st.integers(0, 3))
def test_every_text_that_comes_up_was_listed(
    caption: str, wildcard: bool, dropout: float, separator: str, epoch: int
) -> None:
    values = {"enable_wildcard": wildcard, "caption_dropout_rate": dropout, "secondary_separator": separator}
    listed = rules(**values).variants(caption)
    if listed is not None:
        assert set(made(caption, 20, epoch, **values)) <= set(listed)


def test_tags_that_are_drawn_and_too_many_wildcards_are_not_listed() -> None:
    assert rules(shuffle_caption=True).variants("a, b") is None
    assert rules(caption_tag_dropout_rate=0.1).variants("a, b") is None
    assert rules(enable_wildcard=True).variants("{a|b}" * 6) is None
    assert len(rules(enable_wildcard=True).variants("{a|b}" * 5) or ()) == 32


def test_an_image_keeps_its_folders_own_rules(tmp_path: Any) -> None:
    config = TrainConfig(caption_prefix="run")
    item = Item(tmp_path, "z", 1, 8, 8, "00")
    own = Item(tmp_path, "z", 1, 8, 8, "01", own=(("caption_prefix", "folder"), ("flip_aug", True)))
    assert [caption_for(i, config, 0, 0) for i in (item, own)] == ["run z", "folder z"]
    assert caption_variants([item, own], config) == ("run z", "folder z")


def test_token_warm_up_adds_tags_step_by_step_as_sd_scripts_does() -> None:
    """sd-scripts process_caption: ⌊step · (tags − min) / warmup⌋ + min of the tags that move."""
    rules = CaptionRules.of(TrainConfig(token_warmup_min=1, token_warmup_step=8, keep_tokens=1))
    caption = "zed, a, b, c, d, e"

    def tags(step: int) -> str:
        return rules.apply(caption, 0, random.Random(0), Moment(step, 100))

    assert [tags(step) for step in (0, 1, 2, 4, 7)] == [
        "zed, a", "zed, a", "zed, a, b", "zed, a, b, c", "zed, a, b, c, d",
    ]  # fmt: skip
    assert tags(8) == tags(99) == caption
    assert rules.variants(caption) is None  # so that no caption is encoded in advance
    other = CaptionRules.of(TrainConfig(token_warmup_step=8, caption_separator=";"))
    assert other.apply("zed, man; hat; sea", 0, random.Random(0), Moment(4, 100)) == "zed, man; hat"
    share = CaptionRules.of(TrainConfig(token_warmup_step=0.5))
    assert share.apply("a, b, c", 0, random.Random(0), Moment(49, 100)) == "a, b"
    assert share.apply("a, b, c", 0, random.Random(0), Moment(50, 100)) == "a, b, c"
