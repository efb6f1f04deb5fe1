"""The final run as `hpo transfer` writes it: which files stay, what lies beside them, what it says at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpo.cli.main import main
from tests.tiny import save_folder, tiny_base
from tests.tiny_search import draw_images

FINAL_RUN = """
resolution = 128
bucket_no_upscale = false
min_bucket_reso = 64
network_dim = 2
network_alpha = 2
optimizer_type = "AdamW"
text_encoder_lr1 = 6e-5
text_encoder_lr2 = 3e-5
max_token_length = 225
train_batch_size = 1
gradient_accumulation_steps = 8
max_train_epochs = 10
save_every_n_epochs = 2
save_last_n_epochs = 3
logging_dir = "log"
output_name = "zkw"
"""


def test_every_second_epoch_is_saved_and_the_last_three_stay_beside_the_final_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "images" / "1_zkw figure", count=1)
    save_folder(tiny_base("sdxl"), tmp_path / "base")
    (tmp_path / "transfer").mkdir()
    (tmp_path / "transfer" / "sdxl.toml").write_text(FINAL_RUN)
    words = ["train", "transfer/sdxl.toml", "--base", "base", "--data", "images", "--device", "cpu"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in Path("output").glob("*.safetensors"))
    assert files == [*(f"zkw-00000{n}.safetensors" for n in (4, 6, 8)), "zkw.safetensors"]
    assert list(Path("log/zkw").glob("events.out.tfevents.*"))
    memory = json.loads(Path("output/zkw.run/memory.json").read_text())
    assert memory["bucket_px"] == [128, 128] and memory["measured_bytes"] is None
    last = result.output.rstrip().splitlines()[-1]
    assert last.startswith("to score the checkpoints: hpo evaluate output --device cpu with --references DIR")
    again = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "trained already" in again.output
