"""Model files from strangers: cut, changed, oversized, and pickles.  Nothing is loaded before its header is checked."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from evaluation.encoders.scorerfile import check_safetensors
from hpo.cli.inspect import inspect
from tests.faults.zygote import attempt
from trainer.adapters.lorafile import read
from trainer.bases.load import load_base
from trainer.bases.vae import load_vae
from trainer.errors import ModelFileError, ToolError
from trainer.files import atomic_folder, verify_folder
from trainer.tensorfile import load_tensors, read_header

READERS: tuple[Callable[[Path], object], ...] = (
    read_header,
    read,
    inspect,
    check_safetensors,
    lambda path: load_base(str(path)),
    lambda path: load_vae(str(path), {}, torch.float32),
)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    safetensors.torch.save_file(
        {**tensors, f"{name}.alpha": torch.tensor(1.0)}, path, {"ss_network_dim": "2"}
    )
    return path


def test_every_cut_and_every_flip_of_a_file_is_refused_by_name_or_harmless(lora: Path) -> None:
    """D4 · weight 5 · Cut or damaged safetensors files → A file that was cut anywhere is refused by name. Of our own
    files, a single changed byte is found: a damaged checkpoint is never continued.
    """
    content, draw = lora.read_bytes(), random.Random(4)
    for length in range(len(content)):
        lora.write_bytes(content[:length])
        with pytest.raises(ModelFileError, match=r"lora\.safetensors"):
            read(lora)
    for _ in range(400):
        place = draw.randrange(len(content))
        lora.write_bytes(content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :])
        try:
            read_header(lora)
            load_tensors(lora)
        except ToolError:
            continue
    own = lora.parent / "step-000001"
    with atomic_folder(own) as folder:
        (folder / "adapter.safetensors").write_bytes(content)
    for place in range(0, len(content), 7):
        (own / "adapter.safetensors").write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        assert not verify_folder(own)


def _entry(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


def _of(entries: object) -> bytes:
    return json.dumps(entries, separators=(",", ":")).encode()


def _tensors(number: int) -> bytes:
    form = b'"%d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    return b"{" + b",".join(form % (i, 4 * i, 4 * i + 4) for i in range(number)) + b"}"


BOMBS: dict[str, tuple[int | None, Callable[[], bytes]]] = {
    "a length of 2^60": (1 << 60, lambda: b"{}"),
    "99 MB of zeros": (99_000_000, lambda: b"{" + bytes(99_000_000)),
    "99 MB of spaces": (None, lambda: b"{}" + b" " * 99_000_000),
    "a million tensors": (None, lambda: _tensors(10**6)),
    "100,000 tensors": (None, lambda: _tensors(10**5)),
    "3 million lists": (None, lambda: b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"),
    "a list of 2 million numbers": (None, lambda: b'{"a":[' + b"300," * 2_000_000 + b"3]}"),
    "a million sides": (None, lambda: _of({"a": _entry([1] * 10**6, 0, 4)})),
    "5 million brackets": (None, lambda: b'{"a":' + b"[" * 5_000_000),
    "sides that overflow": (None, lambda: _of({"a": _entry([1 << 62, 1 << 62], 0, 4)})),
    "an unknown type": (None, lambda: _of({"a": _entry([1], 0, 4, "F128")})),
    "a name twice": (None, lambda: b'{"a":%s,"a":%s}' % (_of(_entry([1], 0, 4)), _of(_entry([1], 0, 4)))),
    "an end before its start": (None, lambda: _of({"a": _entry([1], 4, 0)})),
}


def _peak() -> int:
    """The largest resident memory of this process since ``_forget_peak``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _refused_without_memory(path: Path) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is used now
    before = _peak()
    with pytest.raises(ModelFileError):
        read_header(path)
    assert _peak() - before < 50e6, f"{(_peak() - before) / 1e6:.0f} MB"


def test_a_header_that_would_fill_the_memory_is_refused_before_it_does(tmp_path: Path) -> None:
    """D5 · weight 3 · A header made to exhaust the memory: huge lengths, a million tensors, sizes that overflow →
    Refused by name before anything is allocated, with less than 50 MB of memory.
    """
    path = tmp_path / "x.safetensors"
    for name, (length, header) in BOMBS.items():
        text = header()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"0000")
        del text
        assert attempt(_refused_without_memory, path) == 0, (
            name
        )  # a process of its own: memory once taken stays
    entry = _entry([1], 0, 4)
    path.write_bytes(struct.pack("<Q", len(text := _of({"a": entry, "b": entry}))) + text + b"0000")
    with pytest.raises(ModelFileError):  # two tensors in one place
        load_tensors(path)


def test_a_header_with_long_metadata_is_read(tmp_path: Path) -> None:
    tags = json.dumps({f"tag {i}, [{{": i for i in range(100_000)})
    header = _of({"__metadata__": {"ss_tag_frequency": tags}, "a": _entry([1], 0, 4)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert read_header(path).metadata["ss_tag_frequency"] == tags


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x.CKPT", "x.safetensors"])
def test_a_pickle_is_refused_by_every_reader_and_never_run(tmp_path: Path, name: str) -> None:
    """D6 · weight 5 · A pickle (.ckpt, .pt, .bin, also renamed to .safetensors) as base, VAE, LoRA or scorer →
    Refused with what to do instead. It is never unpickled, so its code cannot run.
    """
    mark, path = tmp_path / "ran", tmp_path / name
    for write in (
        lambda: path.write_bytes(pickle.dumps(Bomb(mark))),
        lambda: torch.save({"a": Bomb(mark)}, path),
        lambda: torch.save({"a": Bomb(mark)}, path, _use_new_zipfile_serialization=False),
    ):
        write()
        for reader in READERS:
            with pytest.raises(ModelFileError) as caught:
                reader(path)
            assert "safetensors" in f"{caught.value.message} {caught.value.hint}"
    assert not mark.exists()
