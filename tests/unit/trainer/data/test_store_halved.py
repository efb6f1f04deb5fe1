"""A cache that is halved keeps half in memory, and training reads the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_base
from tests.tiny_search import draw_images
from trainer.config import TrainConfig
from trainer.data import cache, read_dataset
from trainer.data.store import Store
from trainer.errors import MachineError


def in_memory(store: Store) -> int:
    return len(store._memory)


def filled(folder: Path | None, count: int = 64) -> Store:
    store = Store(folder)
    for number in range(count):
        store.put(f"key {number}", {"latent": torch.full((4, 8, 8), float(number))})
    return store


def test_half_of_it_stays_and_every_value_is_the_same(tmp_path: Path) -> None:
    store = filled(tmp_path)
    shelf = store.shelf(lambda tensors: tensors["latent"])
    for number in range(64):
        shelf.add(str(number), f"key {number}", {"latent": torch.full((4, 8, 8), float(number))})
    freed = store.halve()
    assert 20 <= in_memory(store) <= 44 and freed == (64 - in_memory(store)) * 4 * 8 * 8 * 4
    assert len(list(shelf)) == in_memory(store) and len(shelf) == 64 and "63" in shelf and "64" not in shelf
    assert all(torch.equal(shelf[str(n)], torch.full((4, 8, 8), float(n))) for n in range(64))
    assert len(list(shelf)) == in_memory(store), "what was read again does not stay"
    before = in_memory(store)
    assert store.halve() > 0 and in_memory(store) < before
    store.get("key 1", lambda tensors: True)
    later = filled(tmp_path)
    assert in_memory(later) == 64


def test_what_is_on_no_disk_stays(tmp_path: Path) -> None:
    assert filled(None).halve() == 0
    store = filled(tmp_path)
    store.put("only here", {"latent": torch.zeros(3)}, on_disk=False)
    for _ in range(12):
        store.halve()
    assert list(store._memory) == ["only here"]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path)
    shelf = store.shelf(lambda tensors: tensors["latent"])
    shelf.add("a", "key 1", {"latent": torch.zeros(3)})
    for _ in range(12):
        store.halve()
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(MachineError, match="is gone or damaged"):
        shelf["a"]
    with pytest.raises(KeyError):
        shelf["never there"]


def test_a_prepared_dataset_trains_the_same_latents_and_captions(tmp_path: Path) -> None:
    base = tiny_base("sd15")
    draw_images(tmp_path / "images" / "1_zkw figure", count=6)
    config = TrainConfig().with_values(
        {"resolution": 64, "min_bucket_reso": 32, "bucket_reso_steps": 32, "network_train_unet_only": True}
    )
    data = read_dataset(tmp_path / "images", config)
    plain = cache.prepare(base, data, config, tmp_path / "cache")
    halved = cache.prepare(base, data, config, tmp_path / "cache")
    assert halved.store is not None and halved.store.halve() > 0
    assert halved.states is not None and plain.states is not None and not halved.encodes_anew
    for item in data.items:
        assert torch.equal(plain.latents[item.key], halved.latents[item.key])
        one, other = plain.text([item.caption]), halved.text([item.caption])
        assert one is not None and other is not None and torch.equal(one.hidden_BLD, other.hidden_BLD)


def test_few_keys_are_halved_until_none_is_left(tmp_path: Path) -> None:
    """By chance, half as much may still be everything; that is not the end."""
    for count in range(1, 6):
        store = filled(tmp_path / str(count), count)
        while (before := in_memory(store)) > 0:
            assert store.halve() > 0 and in_memory(store) < before
        assert store.halve() == 0


def test_a_shelf_gets_what_is_not_in_memory_as_a_dict_would(tmp_path: Path) -> None:
    store = filled(tmp_path, 4)
    shelf = store.shelf(lambda tensors: tensors["latent"])
    for number in range(4):
        shelf.add(str(number), f"key {number}", {"latent": torch.full((4, 8, 8), float(number))})
    while store.halve():
        pass
    assert in_memory(store) == 0
    found = [shelf.get(str(number)) for number in range(4)]
    assert [None if one is None else float(one.mean()) for one in found] == [0.0, 1.0, 2.0, 3.0]
    assert shelf.get("never there") is None and shelf.get("never there", 3) == 3
