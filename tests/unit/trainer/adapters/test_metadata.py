"""What the metadata of a LoRA promises: counted as sd-scripts counts, and read as it is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.metadata import (
    DATASET_KEY,
    ENTRIES,
    Saved,
    dataset_metadata,
    kohya_settings,
    tells_training,
    training_metadata,
)
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.kohya.keys import KNOWN_KEYS


@pytest.fixture
def images() -> Dataset:
    """Four images three times each, and one regularisation image eight times."""
    config = tiny_config()
    found = tiny_prepared(tiny_base("sd15"), config, images=4, repeats=3).dataset
    regularisation = replace(found.items[0], sha256="reg", caption="a person", repeats=8, is_reg=True)
    return replace(found, items=(*found.items, regularisation))


@pytest.mark.parametrize("saved", [None, Saved(step=2, epoch=1)])
def test_training_and_regularisation_images_are_counted_apart(images: Dataset, saved: Saved | None) -> None:
    found = dataset_metadata(tiny_config(), images, saved)
    assert (found["ss_num_train_images"], found["ss_num_reg_images"]) == ("12", "8")
    tags = json.loads(found["ss_tag_frequency"])[""]
    assert tags["a photo of sks"] == 4 and "a person" not in tags


def test_a_file_of_a_run_says_where_it_was_saved_and_of_which_images(images: Dataset) -> None:
    config = tiny_config(max_train_epochs=5)
    only = replace(images, items=images.items[:4])
    end, middle = dataset_metadata(config, only), dataset_metadata(config, only, Saved(step=2, epoch=1))
    assert (middle["ss_steps"], middle["ss_epoch"]) == ("2", "1")
    assert (end["ss_steps"], end["ss_epoch"]) == (end["ss_max_train_steps"], "5")
    assert middle["ss_max_train_steps"] == end["ss_max_train_steps"]
    assert (middle[DATASET_KEY], middle["ss_num_reg_images"]) == (only.content_hash, "0")
    assert not {DATASET_KEY, "ss_num_reg_images", "ss_dataset_dirs"} & end.keys()


def test_every_key_is_in_the_table_once() -> None:
    keys = [entry.key for entry in ENTRIES]
    settings = [entry.setting for entry in ENTRIES if entry.setting]
    assert len(set(keys)) == len(keys) and len(set(settings)) == len(settings)
    assert set(settings) <= KNOWN_KEYS


WRITTEN_AS_SET = (
    "learning_rate",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "resolution",
    "train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "min_snr_gamma",
    "noise_offset",
    "lr_scheduler",
    "loss_type",
    "keep_tokens",
    "shuffle_caption",
    "debiased_estimation_loss",
)


@given(
    st.floats(1e-6, 1.0),
    st.integers(1, 64),
    st.sampled_from([None, 1.0, 5.0]),
    st.sampled_from(["constant", "cosine"]),
    st.booleans(),
)
def test_settings_are_read_as_they_were_written(
    rate: float, dim: int, gamma: float | None, scheduler: str, is_shuffled: bool
) -> None:
    config = TrainConfig(
        learning_rate=rate,
        network_dim=dim,
        min_snr_gamma=gamma,
        lr_scheduler=scheduler,
        shuffle_caption=is_shuffled,
        resolution=640,
    )
    metadata = training_metadata(tiny_base("sd15"), config)
    assert tells_training(metadata)
    found = kohya_settings(metadata)
    assert set(found) <= KNOWN_KEYS
    for name in WRITTEN_AS_SET:
        expected = "640,640" if name == "resolution" else getattr(config, name)
        assert found.get(name) == expected, name
    assert found["optimizer_type"] == config.optimizer_type
    assert found["max_train_epochs"] == config.max_train_epochs


def test_what_tells_of_the_base_alone_tells_no_training() -> None:
    assert not tells_training(
        {"ss_base_model_version": "sd_v1", "ss_sd_model_name": "x", "modelspec.title": "x"}
    )
