"""Tests of evaluation.images.sampling on a tiny random base."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.images.images import SampledImage, invalid_reason
from evaluation.images.sampling import default_config, file_name, generator, initial_noise, sample
from evaluation.images.settings import SampleConfig
from evaluation.prompts.prompts import Prompt, PromptSet
from tests.outofmemory import FORMS
from tests.tiny import tiny_base, tiny_config
from trainer.adapters import lorafile
from trainer.adapters.adapter import inject
from trainer.bases.base import Base
from trainer.errors import ConfigError, OutOfMemory

PROMPTS = PromptSet(tuple(Prompt(f"zkw {n}", f"cat {n}", "altered") for n in range(3)), (0, 1))
CONFIG = SampleConfig(width_px=64, height_px=64, steps=3, batch_size=4)


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("sd15")


class Counted:
    """Counts the U-Net calls of a base."""

    def __init__(self, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        inner = base.predict

        def predict(*args: Any) -> torch.Tensor:
            self.calls += 1
            return inner(*args)

        monkeypatch.setattr(base, "predict", predict)


def pixels(images: list[SampledImage]) -> np.ndarray:
    return np.stack([i.pixels_HW3 for i in images]).astype(int)


def test_repeated_sampling_is_bitwise_equal(base: Base) -> None:
    first, second = sample(base, PROMPTS, CONFIG), sample(base, PROMPTS, CONFIG)
    assert (pixels(first) == pixels(second)).all()
    assert [(i.prompt_id, i.seed) for i in first] == [
        (p.id, s) for p in PROMPTS.prompts for s in PROMPTS.seeds
    ]
    assert len({i.pixels_HW3.tobytes() for i in first}) == 6, "prompts and seeds must matter"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_batch_size_does_not_change_the_images(family: str) -> None:
    base = tiny_base(family)
    one, four, many = (sample(base, PROMPTS, dataclasses.replace(CONFIG, batch_size=n)) for n in (1, 4, 32))
    assert abs(pixels(one) - pixels(four)).max() <= 1
    assert abs(pixels(one) - pixels(many)).max() <= 1


def test_adding_a_prompt_shifts_no_other_image(base: Base) -> None:
    more = PromptSet((Prompt("new", "new", "style"), *PROMPTS.prompts), (5, *PROMPTS.seeds))
    found = {(i.prompt_id, i.seed): i.pixels_HW3.astype(int) for i in sample(base, more, CONFIG)}
    for image in sample(base, PROMPTS, CONFIG):
        assert abs(found[image.prompt_id, image.seed] - image.pixels_HW3).max() <= 1


def test_noise_depends_on_prompt_id_and_seed_alone(base: Base) -> None:
    draws = [torch.randn(4, generator=generator(p, s)) for p, s in (("a", 1), ("a", 1), ("a", 2), ("b", 1))]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2]) and not draws[0].equal(draws[3])
    first, second = PROMPTS.prompts[:2]
    noise = initial_noise(base, [(first, 0), (second, 0), (first, 1), (first, 0)], CONFIG)
    assert noise[0].equal(noise[3]) and len({n.numpy().tobytes() for n in noise}) == 3


def test_sampling_leaves_the_global_random_numbers_alone(base: Base) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sample(base, PROMPTS, CONFIG)
    assert torch.get_rng_state().equal(before)


def test_the_class_words_images_share_the_noise_of_their_prompts(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    inner = base.encode_text
    monkeypatch.setattr(
        base, "encode_text", lambda texts, clip_skip=None: (asked.extend(texts), inner(texts))[1]
    )
    as_class = sample(base, PROMPTS, CONFIG, as_class=True)
    assert asked and not any("zkw" in text for text in asked)
    same_text = PromptSet(tuple(Prompt(p.text, p.text, p.kind) for p in PROMPTS.prompts), PROMPTS.seeds)
    assert [i.prompt_id for i in as_class] == [i.prompt_id for i in sample(base, PROMPTS, CONFIG)]
    assert (
        pixels(sample(base, same_text, CONFIG, as_class=True)) == pixels(sample(base, PROMPTS, CONFIG))
    ).all()


def test_an_interrupted_call_goes_on_at_the_first_unfinished_chunk(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample(base, PROMPTS, CONFIG)

    def stop(done: int, total: int) -> None:
        assert (done, total) == (4, 6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(base, PROMPTS, CONFIG, tmp_path, identity="w", on_image=stop)
    counted = Counted(base, monkeypatch)
    resumed = sample(base, PROMPTS, CONFIG, tmp_path, identity="w")
    assert counted.calls == CONFIG.steps, "only the second chunk is drawn"
    assert (pixels(resumed) == pixels(whole)).all()
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(
        file_name(i.prompt_id, i.seed) for i in whole
    )


def test_a_damaged_or_missing_picture_redraws_its_whole_chunk(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample(base, PROMPTS, CONFIG, tmp_path, identity="w")
    names = [file_name(i.prompt_id, i.seed) for i in whole]
    (tmp_path / names[0]).write_bytes((tmp_path / names[0]).read_bytes()[:-20])
    (tmp_path / names[5]).unlink()
    counted = Counted(base, monkeypatch)
    again = sample(base, PROMPTS, CONFIG, tmp_path, identity="w")
    assert counted.calls == 2 * CONFIG.steps and (pixels(again) == pixels(whole)).all()
    assert all((tmp_path / name).is_file() for name in names)


@pytest.mark.parametrize("identity", ["other weights", ""])
def test_pictures_of_other_or_unknown_weights_are_never_taken_over(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, identity: str
) -> None:
    sample(base, PROMPTS, CONFIG, tmp_path, identity="w" if identity else "")
    (tmp_path / "notes.png").write_bytes(b"the user's own")
    counted = Counted(base, monkeypatch)
    sample(base, PROMPTS, CONFIG, tmp_path, identity=identity)
    assert counted.calls == 2 * CONFIG.steps
    fewer = PromptSet(PROMPTS.prompts[:2], (0,))
    sample(base, fewer, CONFIG, tmp_path, identity=identity)
    assert len(list(tmp_path.glob("*_*.png"))) == 2, "pictures of other prompts must be gone"
    assert (tmp_path / "notes.png").is_file()


def test_non_finite_latents_are_flagged(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "predict", lambda noisy, *rest: torch.full_like(noisy, float("nan")))
    images = sample(base, PROMPTS, CONFIG)
    assert {invalid_reason(i) for i in images} == {"not finite"}


def test_running_out_of_memory_is_said_as_such(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(base, "predict", fail)
    with pytest.raises(OutOfMemory, match="while sampling an image of 64×64 px"):
        sample(base, PROMPTS, CONFIG)


@pytest.mark.parametrize("form", ["cublas at first use", "cudnn plans"])
def test_where_memory_runs_out_fewer_images_are_drawn_at_once(
    base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    expected = sample(base, PROMPTS, CONFIG)
    decode, seen = base.decode_latents, []

    def limited(latents: torch.Tensor) -> Any:
        seen.append(len(latents))
        if len(latents) > 2:
            raise FORMS[form]()
        return decode(latents)

    monkeypatch.setattr(base, "decode_latents", limited)
    monkeypatch.setattr(base, "drawn_at_once", {})
    found = sample(base, PROMPTS, CONFIG, tmp_path, identity="weights")
    assert [(i.prompt_id, i.seed) for i in found] == [(i.prompt_id, i.seed) for i in expected]
    for one, other in zip(found, expected, strict=True):
        assert int(np.abs(one.pixels_HW3.astype(int) - other.pixels_HW3).max()) <= 1
    assert seen.count(4) == 1 and max(seen[1:]) == 2  # the size that fits is kept
    seen.clear()
    assert len(sample(base, PROMPTS, CONFIG, tmp_path, identity="weights")) == len(found)
    assert seen == []  # stored under the chunks of the settings
    sample(base, PROMPTS, CONFIG)  # another trial with the same base
    assert seen == [2] * 3, "the size that fitted is remembered"
    small = dataclasses.replace(CONFIG, width_px=32)
    sample(base, PROMPTS, small)
    assert seen[3] == 4, "images of another size are tried for themselves"


def test_the_default_size_is_the_bases_own() -> None:
    config = default_config(tiny_base("sdxl"), steps=5)
    assert (config.width_px, config.height_px, config.steps, config.batch_size) == (128, 128, 5, 32)
    assert default_config(tiny_base("sd15"), width_px=512, height_px=512).batch_size == 8


@pytest.mark.parametrize(
    "wrong", [{"sampler": "euler_a"}, {"steps": 0}, {"cfg": 0.5}, {"width_px": 63}, {"batch_size": 0}]
)
def test_settings_that_cannot_mean_anything_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(CONFIG, **wrong)


def test_each_text_is_encoded_once_a_call_whatever_the_batch_size(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    inner = base.encode_text
    monkeypatch.setattr(
        base, "encode_text", lambda texts, clip_skip=None: (asked.append(texts), inner(texts))[1]
    )
    sample(base, PROMPTS, dataclasses.replace(CONFIG, batch_size=1))
    assert sorted(asked) == sorted([[CONFIG.negative], *([p.text] for p in PROMPTS.prompts)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "float"])
def test_the_live_adapter_and_its_file_draw_the_same_bytes(
    family: str, precision: str, tmp_path: Path
) -> None:
    base = tiny_base(family)
    config = tiny_config(save_precision=precision)
    adapter = inject(base, config)
    with torch.no_grad():
        for number, weight in enumerate(
            adapter.trainable()
        ):  # as after training: values that fp16 and bf16 cannot represent
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    rough = sample(base, PROMPTS, CONFIG)
    adapter.round_to(precision)
    live = sample(base, PROMPTS, CONFIG)
    lorafile.write(tmp_path / "l.safetensors", adapter, config)
    adapter.remove()
    attached = lorafile.attach(base, lorafile.read(tmp_path / "l.safetensors"))
    stored = sample(base, PROMPTS, CONFIG)
    attached.remove()
    assert (pixels(live) == pixels(stored)).all()
    assert (pixels(live) != pixels(sample(base, PROMPTS, CONFIG))).any(), "the adapter must be seen"
    assert abs(pixels(rough) - pixels(live)).max() <= 8, "rounding is no other picture"


def test_the_batch_size_is_no_part_of_a_scores_identity() -> None:
    assert dataclasses.replace(CONFIG, batch_size=1).hash == CONFIG.hash
    assert dataclasses.replace(CONFIG, steps=4).hash != CONFIG.hash
