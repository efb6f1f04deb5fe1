"""What only shows when base, settings and images are together is said before any work."""

from dataclasses import replace

import pytest

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.data import cache, preflight
from trainer.errors import ConfigError
from trainer.loop import loop


def test_a_clip_skip_beyond_the_encoders_layers_is_refused_before_anything_is_done():
    base = tiny_base("sd15")  # two layers
    preflight.check(base, tiny_config(clip_skip=2))
    deep = tiny_config(clip_skip=3)  # would read the embeddings
    with pytest.raises(ConfigError, match="clip_skip = 3, but the text encoder of tiny-sd15 has 2 layers"):
        preflight.check(base, deep)
    prepared = tiny_prepared(base, deep)
    with pytest.raises(ConfigError, match="clip_skip"):
        cache.prepare(base, prepared.dataset, deep)
    adapter = inject(base, deep)
    with pytest.raises(ConfigError, match="clip_skip"):
        next(loop.train(deep, base, adapter, prepared))


def test_sdxl_says_that_it_reads_no_clip_skip():
    base, config = tiny_base("sdxl"), tiny_config(clip_skip=3, resolution=128)
    preflight.check(base, config)
    dataset = tiny_prepared(base, tiny_config()).dataset
    assert preflight.notes(base, config, dataset) == (
        "clip_skip = 3 is ignored: sdxl always uses the second-to-last layer",
    )
    assert preflight.notes(base, tiny_config(resolution=128), dataset) == ()


def test_a_base_that_is_made_for_twice_the_size_is_said_to_be_one():
    base = tiny_base("sdxl")
    dataset = tiny_prepared(base, tiny_config()).dataset
    (note,) = preflight.notes(base, tiny_config(resolution=64), dataset)
    assert note == "tiny-sdxl is SDXL made for 128 px; these settings train 64 px"


def test_captions_that_are_cut_are_named():
    base, config = tiny_base("sd15"), tiny_config()
    dataset = tiny_prepared(base, config).dataset
    first, second, *others = dataset.items
    fits, cut = replace(first, caption="x " * 75), replace(second, caption="x " * 76)
    assert preflight.notes(base, config, replace(dataset, items=(fits, cut, *others))) == (
        "1 captions are longer than 75 tokens, the rest is not read: image_1.png",
    )


def test_a_setting_that_the_family_does_not_have_is_refused_and_clip_skip_is_not():
    rates = tiny_config(text_encoder_lr2=1e-5)
    preflight.check(tiny_base("sdxl"), rates)
    preflight.check(tiny_base("sdxl"), tiny_config(clip_skip=2))
    with pytest.raises(ConfigError, match=r"text_encoder_lr2 is for SDXL, and tiny-sd15 is SD1\.5"):
        preflight.check(tiny_base("sd15"), rates)
