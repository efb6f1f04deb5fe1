"""Search, probes, train, evaluate and compare on the pretend card: the commands as a user with a GPU starts them.

The compact form has tiny random bases.  The long one is the README's chain on the miniatures (``slow``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpo.cli.main import main
from hpo.search.workbench import Workbench
from hpo.study.folder import StudyFolder
from hpo.study.storage import create_study
from hpo.transfer.probes.design import Probe
from hpo.transfer.probes.run import in_order
from hpo.transfer.probes.side import ShortRuns, make_side, octave_bounds
from hpo.transfer.probes.study import probe_by_probe
from hpo.transfer.profile import ProfileLimits
from tests.e2e.test_next_lines import SETS as SMALL
from tests.pretendcard import GB, State, pretend_card
from tests.tiny_run import JUDGING, MINI_CLIP, THREE_CHECKPOINTS, loud_base
from tests.tiny_search import Recorder, check_study, draw_images, tiny_bench
from tests.tiny_session import run_session
from trainer.config import TrainConfig
from trainer.files import read_records

STUDY = f"""
[study]
also = ["{MINI_CLIP}"]
{JUDGING}"""


@pytest.fixture
def card() -> Iterator[State]:
    with pretend_card(2 * GB) as card:
        yield card


def hpo(*words: str) -> str:
    result = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert result.exit_code == 0, f"hpo {' '.join(words)}\n{result.output[-3000:]}"
    return result.output


def test_two_bases_are_trained_evaluated_and_compared(
    card: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "images" / "1_zkw figure", count=4)
    draw_images(tmp_path / "images" / "held_out", count=3, seed=2)
    (tmp_path / "sd15-character.toml").write_text(STUDY)
    (tmp_path / "settings.toml").write_text(THREE_CHECKPOINTS)
    for family, more in (
        ("sd15", ("max_train_epochs=2", "mixed_precision=no")),
        ("sdxl", ("max_train_epochs=1", "gradient_checkpointing=true", "fp8_base=true", "text_encoder_lr=0")),
    ):
        base = loud_base(tmp_path / f"tiny-{family}", family)
        words = [
            "train",
            "settings.toml",
            "--base",
            base.name,
            "--data",
            "images",
            "--output",
            f"out-{family}",
        ]
        said = hpo(*words, *(word for each in more for word in ("--set", each)))
        assert f"loading {base.name} on cuda:0" in said
    measured = json.loads(Path("out-sd15/zkw.run/memory.json").read_text())
    assert measured["measured_bytes"] is not None  # by the card's own figures
    with card.count() as counts:
        hpo("evaluate", "out-sd15", "--clip", str(MINI_CLIP))
    assert counts.launches > 500
    assert (tmp_path / "out-sd15" / "best.safetensors").is_file()
    hpo("compare", "out-sd15", "out-sdxl", "--clip", str(MINI_CLIP))

    losses = [
        row["loss"] for row in read_records(Path("out-sd15/zkw.run/train.jsonl")) if row["event"] == "step"
    ]
    words = ["train", "settings.toml", "--base", "tiny-sd15", "--data", "images", "--output", "out-cpu"]
    hpo(*words, "--device", "cpu", "--set", "max_train_epochs=2", "--set", "mixed_precision=no")
    plain = [
        row["loss"] for row in read_records(Path("out-cpu/zkw.run/train.jsonl")) if row["event"] == "step"
    ]
    assert losses == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("no", marks=pytest.mark.slow)])
def test_a_search(card: State, data: Path, tmp_path: Path, precision: str) -> None:
    def loaded(bench: Workbench) -> None:
        bench.base.to("cuda")

    root = tmp_path / "runs" / "tiny"
    root.parent.mkdir()
    with card.count() as counts:
        run_session(root, data, 2, loaded=loaded, sets=(f"mixed_precision={precision}",))
    check_study(StudyFolder(root), 2)
    assert counts.launches > 1000


def test_probes(card: State, data: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        learning_rate=1e-2,
        text_encoder_lr=5e-3,
        network_dim=2,
        network_alpha=2,
        resolution=32,
        min_bucket_reso=32,
        bucket_reso_steps=32,
        optimizer_type="AdamW",
        mixed_precision="bf16",
        train_data_dir=str(data),
    )
    short = ShortRuns(samples=4, sampling={"steps": 2, "cfg": 1.0}, seed=7, words="natural")
    side = make_side(
        "s__tiny", {"transferred": config}, short, 2, octave_bounds(config, ProfileLimits(1e-6, 1e-1))
    )
    bench = tiny_bench(tmp_path / "s__tiny", data, side.study)
    bench.base.to("cuda")
    bench.folder.locks.mkdir(parents=True, exist_ok=True)
    study = create_study(bench.folder, bench.facts())
    bench.measure_anchors(lambda text: None)
    probes = [Probe(), Probe(octaves=-1)]
    found = probe_by_probe(study, bench, side, in_order(probes), Recorder())
    assert [one.probe for one in found] == probes and all(len(one.prompts) == 2 for one in found)


@pytest.mark.slow
def test_the_chain_on_the_miniatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/e2e/test_chain.py, with six images and on a card where bf16 is the default."""
    monkeypatch.chdir(tmp_path)
    sets = [word for text in SMALL for word in ("--set", text)]
    with pretend_card() as card:
        hpo("dataset", "demo", "character", "luca")
        (folder,) = Path("luca").glob("10_*")
        for picture in sorted(folder.glob("*.png"))[6:]:
            picture.unlink()
            picture.with_suffix(".txt").unlink()
        (folder / "manifest.json").unlink()
        folder.rename("luca/2_luca figure")
        said = hpo("search", "--base", "mini-sd15", "--data", "luca", "chain", "--trials", "2", *sets)
        assert "loading mini-sd15 on cuda" in said
        check_study(StudyFolder(Path("runs/chain")), 2)
        hpo("transfer", "--to", "mini-sdxl", "chain", "--trials", "3")
        settings = "runs/chain/transfer/mini-sdxl.toml"
        said = hpo("train", settings, "--set", "save_every_n_epochs=1", "--set", "max_train_epochs=1")
        output = next(line for line in said.splitlines() if line.startswith("next: hpo evaluate")).split()[3]
        hpo("evaluate", output)
        assert "adapter effect" in hpo("compare", "runs/chain/trial_0000", output)
        assert card.touched == {0}
