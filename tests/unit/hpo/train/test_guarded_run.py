"""A real training whose figures are decided by the test: it waits, gives back memory, stops in time – and the LoRA is
the one of an undisturbed run."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hpo.health.guard import Lookout
from hpo.health.log import health_rows
from hpo.health.reading import Reading
from hpo.study.thresholds import Thresholds
from hpo.train.command import TrainRequest, read_request
from hpo.train.run import run
from tests.healthfigures import Told
from tests.tiny_run import THREE_CHECKPOINTS
from tests.tiny_search import draw_images
from trainer.adapters import lorafile
from trainer.errors import ConfigError, MachineError
from trainer.files import read_records

STEPS = 30


class Steered(Told):
    """Figures that change with the run: ``change`` is called before each look with the number of logged steps."""

    def __init__(self, log: Path, change: Callable[[Steered, int], None]) -> None:
        super().__init__()
        self.log, self.change = log, change

    def read(self) -> Reading:
        self.change(self, len(read_records(self.log)))
        return super().read()


@pytest.fixture
def settings(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "images" / "1_zkw figure", count=8)
    text = re.sub("max_train_epochs = 3", f"max_train_steps = {STEPS}", THREE_CHECKPOINTS)
    text += f'network_train_unet_only = true\npretrained_model_name_or_path = "{base}"\ntrain_data_dir = "images"\n'
    Path("zkw.toml").write_text(text)
    return Path("zkw.toml")


def trained(
    settings: Path, output: str, change: Callable[[Steered, int], None], thresholds: Thresholds | None = None
) -> tuple[str, str]:
    """The weights' fingerprint and what was printed."""
    folder = Path(output)
    sensors = Steered(folder / "zkw.run" / "train.jsonl", change)
    screen = io.StringIO()
    config = read_request(TrainRequest(settings)).config
    lookout = Lookout(thresholds or Thresholds(), sensors, 0.005)
    try:
        lora = run(config, folder, "cpu", Console(file=screen, width=200), lookout)
    except MachineError as error:
        return str(error), screen.getvalue()
    tensors = lorafile.read(lora).tensors
    return str({name: tensor.tolist() for name, tensor in sorted(tensors.items())}), screen.getvalue()


def undisturbed(settings: Path) -> str:
    weights, said = trained(settings, "plain", lambda sensors, steps: None)
    assert "warning" not in said
    return weights


def test_a_hot_gpu_holds_up_the_steps_until_it_is_cool(settings: Path) -> None:
    during: list[int] = []

    def change(sensors: Steered, steps: int) -> None:
        if steps >= 5 and len(during) < 40:
            sensors.gpu(celsius=90.0)
            during.append(steps)
        elif during:
            sensors.gpu(celsius=70.0)

    weights, said = trained(settings, "hot", change)
    assert len(during) == 40 and len(set(during[5:])) == 1, "no step was made in the pause"
    assert "paused: GPU 90 °C, goes on below 75 °C" in said and "goes on after the pause" in said
    assert weights == undisturbed(settings)


def test_little_ram_halves_the_cache(settings: Path) -> None:
    weights, said = trained(
        settings, "ram", lambda sensors, steps: sensors.machine(ram_used=95.0 if steps >= 5 else 40.0)
    )
    assert "RAM is short: half of the cached images and captions are read from disk from now on" in said
    assert "warning: RAM 95 % used (danger above 85 %)" in said
    actions = [row["text"] for row in health_rows(Path("ram/zkw.run")) if row["event"] == "action"]
    assert len(actions) == 1 and weights == undisturbed(settings)


def test_a_disk_that_is_nearly_full_stops_the_run_in_time_and_it_goes_on(settings: Path) -> None:
    def change(sensors: Steered, steps: int) -> None:
        sensors.machine(disk_free_bytes=10**6 if steps >= 5 else 10**12)

    error, said = trained(settings, "full", change)
    assert (
        error.startswith("stopped in time: the disk is nearly full: 0.0 GB are free")
        and "hpo resume" in error
    )
    assert "warning: disk 0.0 GB free" in said
    assert list(Path("full/zkw.run/checkpoints").glob("step-*"))
    done = len(read_records(Path("full/zkw.run/train.jsonl")))
    assert 5 <= done < STEPS
    weights, said = trained(settings, "full", lambda sensors, steps: None)
    assert "resuming from step" in said and weights == undisturbed(settings)


def test_the_sections_of_a_train_file_reach_the_run_and_mistakes_are_named(settings: Path) -> None:
    text = settings.read_text()
    settings.write_text(text + "[health]\ngpu_temperature = [60, 65]\n")
    assert dict(read_request(TrainRequest(settings)).health) == {"gpu_temperature": [60, 65]}
    settings.write_text(text + "[health]\ngpu_temprature = [60, 65]\n")
    with pytest.raises(ConfigError, match="gpu_temprature") as caught:
        read_request(TrainRequest(settings))
    assert "did you mean gpu_temperature" in str(caught.value)


def test_a_file_of_sd_scripts_may_have_the_section_too(tmp_path: Path) -> None:
    file = tmp_path / "kohya.toml"
    file.write_text(
        'pretrained_model_name_or_path = "mini-sd15"\ntrain_data_dir = "x"\nnetwork_module = "networks.lora"\n'
        "[health]\nacts = false\n"
    )
    found = read_request(TrainRequest(file))
    assert found.health == {"acts": False} and not found.unknown
