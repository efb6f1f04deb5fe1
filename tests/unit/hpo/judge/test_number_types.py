"""fp16, bf16 and fp32 on both families, with VAEs that overflow in fp16: sampled, scored, evaluated and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evaluation.images.images import SampledImage, invalid_reason
from hpo.cli.main import main
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import Workbench
from tests.tiny import make_vae_overflow, save_folder, tiny_base
from tests.tiny_run import JUDGING, MINI_CLIP, THREE_CHECKPOINTS, loud_base
from tests.tiny_search import draw_images, make_search, tiny_bench

FAMILIES = ("sd15", "sdxl")
OVERFLOWS = "overflows in fp16: its images are decoded in fp32"
SAMPLES = ("sample_prompts=prompts.txt", "sample_every_n_epochs=3")


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*words, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def train(family: str, *sets: str) -> str:
    words = [word for text in (*SAMPLES, *sets) for word in ("--set", text)]
    base = f"tiny-{family}"
    return run(
        "train", "settings.toml", "--base", base, "--data", "images", "--output", f"out-{family}", *words
    )


def reasons(folder: Path) -> set[str | None]:
    """What is wrong with the images of a folder."""
    paths = list(folder.rglob("*.png"))
    assert paths
    return {invalid_reason(SampledImage("p", 0, np.asarray(Image.open(path)))) for path in paths}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "images" / "1_zkw figure", count=4)
    draw_images(tmp_path / "images" / "held_out", count=3, seed=2)
    (tmp_path / "settings.toml").write_text(THREE_CHECKPOINTS)
    (tmp_path / "sd15-character.toml").write_text(f"[study]\n{JUDGING}")
    (tmp_path / "prompts.txt").write_text("zkw figure --s 2\nzkw figure in red --s 2\n")
    for family in FAMILIES:
        loud_base(tmp_path / f"tiny-{family}", family, overflows=True)
    return tmp_path


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_a_chain_draws_images_in_every_number_type(place: Path, precision: str) -> None:
    clip = ("--clip", str(MINI_CLIP))
    for family in FAMILIES:
        told = precision == "fp16" and family == "sd15"  # SDXL's VAE is never in fp16
        output = train(family, f"mixed_precision={precision}")
        assert output.count(OVERFLOWS) == told and "warning" not in output
        assert reasons(place / f"out-{family}" / "sample") == {None}
        output = run("evaluate", f"out-{family}", *clip)
        assert output.count(OVERFLOWS) == told
        evaluation = place / f"out-{family}" / "zkw.run" / "evaluation"
        rows = json.loads((evaluation / "evaluation.json").read_text())["search"]["checkpoints"]
        assert any(row["value"] is not None for row in rows)
        assert not any("invalid" in row["reason"] for row in rows)
        for samples in evaluation.rglob("samples"):
            assert reasons(samples) == {None}
        assert bool(list((evaluation / "base").rglob("vae-overflows.txt"))) == told
    run("compare", "out-sd15", "out-sdxl", *clip)
    for samples in place.rglob("evaluation/**/samples"):
        assert reasons(samples) == {None}
    if precision == "fp16":
        output = run("evaluate", "out-sd15", *clip)
        assert OVERFLOWS not in output, "a later process knows it from the first"


def half_bench(place: Path) -> tuple[Workbench, list[str]]:
    bench, said = tiny_bench(place / "runs" / "half", place / "images"), list[str]()
    make_vae_overflow(bench.base.vae)
    torch.nn.Module.to(bench.base.vae, torch.float16)
    bench.base.say = said.append
    return bench, said


def test_a_search_says_once_that_the_vae_overflows_and_a_resumed_one_knows_it(tmp_path: Path) -> None:
    draw_images(tmp_path / "images")
    bench, said = half_bench(tmp_path)
    make_search(bench, SearchLimits(1)).run()
    assert [OVERFLOWS in text for text in said] == [True]
    again, said = half_bench(tmp_path)
    make_search(again, SearchLimits(2)).run()
    assert said == [] and again.base.vae_overflows
    for number in (0, 1):
        trial = bench.folder.trial(number)
        assert reasons(trial.root / "samples") == {None} and trial.grid.is_file()


def test_images_that_show_nothing_are_named_wherever_they_are_drawn(place: Path) -> None:
    base = tiny_base("sd15")
    with torch.no_grad():
        base.vae.decoder.conv_out.weight.zero_()
    output_of_good = train("sd15")
    assert "warning" not in output_of_good
    save_folder(base, place / "tiny-sd15")
    output = train("sd15", "output_name=grey")
    assert (
        "warning: 2 of 2 images are invalid (2 uniform): grey_e000003_00_42.png, grey_e000003_01_42.png"
        in output
    )
    output = run("evaluate", "out-sd15/grey.safetensors", "--clip", str(MINI_CLIP), code=4)
    assert "the untrained base draws images that show nothing" in output and "uniform" in output
