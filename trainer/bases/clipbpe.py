"""CLIP's tokenizer, built from the BPE table in the open_clip package, so no vocabulary is shipped or downloaded.

Single files in the original layout contain no tokenizer; all SD1.5 and SDXL models use this one.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

from trainer.bases.families import KNOWN_BASES, is_miniature
from trainer.errors import MachineError

MERGES = 48_894  # lines 1 to 48,894 of the table are CLIP's merges: 49,408 tokens including bytes and special tokens
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_letters() -> list[str]:
    """A printable character for each of the 256 bytes, in vocabulary order (GPT-2's byte alphabet)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(rest))]


def clip_tokenizer(pad_id: int | None = None) -> Any:
    """CLIP's tokenizer, 77 tokens long.  ``pad_id`` is 0 for SDXL's second encoder; by default it pads
    with the end token."""
    from transformers import CLIPTokenizer

    merges = _merges()
    letters = byte_letters()
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    if pad_id is not None:
        tokenizer.pad_token_id = pad_id
    return tokenizer


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a base: from its folder for a miniature, otherwise CLIP's. Reads no weights."""
    from transformers import CLIPTokenizer

    if is_miniature(name):
        folder = KNOWN_BASES[name].folder / "tokenizer"
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    return clip_tokenizer()


def _merges() -> list[tuple[str, str]]:
    package = importlib.util.find_spec("open_clip")  # located but not imported, which would take seconds
    if package is None or package.origin is None:
        raise MachineError("the package open-clip-torch is not installed", "pip install open-clip-torch")
    table = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(table.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    pairs = [tuple(line.split()) for line in lines]
    assert len(pairs) == MERGES and all(len(pair) == 2 for pair in pairs)
    return [(first, second) for first, second in pairs]
