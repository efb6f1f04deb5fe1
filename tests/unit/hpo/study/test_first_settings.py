"""A setting that was added after the first stored format changes no stored hash while it is at its default."""

import json
import zipfile

from hpo.study.firstsettings import FIRST, counting_settings
from hpo.study.result import config_sha256, deciding
from tests.places import ROOT
from trainer.config import SETTINGS, TrainConfig


def test_the_first_settings_are_those_of_the_stored_study() -> None:
    with zipfile.ZipFile(ROOT / "tests" / "stored" / "begun-3c18213.zip") as archive:
        stored = json.loads(archive.read("runs/begun/trial_0000/params.json"))["train"]
    assert FIRST == stored.keys() <= SETTINGS.keys()
    assert deciding(TrainConfig(**stored).as_dict()) == deciding(stored)


def test_a_later_setting_counts_once_it_is_set() -> None:
    plain, changed = TrainConfig(), TrainConfig(optimizer_args="betas=(0.9, 0.99)")
    assert "optimizer_args" not in counting_settings(plain.as_dict())
    assert counting_settings(changed.as_dict())["optimizer_args"] == "betas=(0.9, 0.99)"
    assert config_sha256(plain) != config_sha256(changed)
