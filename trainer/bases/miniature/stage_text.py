"""The miniature's tokenizer (a real CLIPTokenizer with its own small vocabulary) and its text encoders.

The first text encoder is mini-clip's text tower, as SD1.5's is OpenAI CLIP's; it serves mini-sd15 and, as text
encoder 1, mini-sdxl. The second is wider, has a projection, and is trained against the same image tower (stage clip).
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.bases.miniature import captions

CONTEXT = 77
EMBED = 128
WIDTH_1, LAYERS_1, HEADS_1 = 128, 3, 4
WIDTH_2, LAYERS_2, HEADS_2 = 160, 4, 5
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(p) > 1 for p in pieces):
        counts = Counter(pair for p in pieces for pair in itertools.pairwise(p))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for p in pieces:
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = [p[i] + p[i + 1]]
                i += 1
    return merges


def new_tokenizer(pad_token: str = EOS) -> CLIPTokenizer:
    symbols = byte_symbols()
    merges = learn_merges(captions.corpus_words())
    names = [*symbols, *(s + "</w>" for s in symbols)]
    names += [a + b for a, b in merges]
    names = [*dict.fromkeys(names), BOS, EOS]  # <|endoftext|> keeps the largest id: pooling takes the argmax
    return CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        model_max_length=CONTEXT,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=pad_token,
    )


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=CONTEXT,
        projection_dim=EMBED,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder_2(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(tokenizer, WIDTH_2, LAYERS_2, HEADS_2))


def text_encoder_from_open_clip(state: dict[str, Tensor], tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """open_clip's text tower under transformers' names (the fused q, k, v matrix is cut in three)."""
    model = CLIPTextModel(text_config(tokenizer, WIDTH_1, LAYERS_1, HEADS_1))
    new = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for part in ("weight", "bias"):
        new[f"final_layer_norm.{part}"] = state[f"ln_final.{part}"]
        for i in range(LAYERS_1):
            old, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            fused = state[f"{old}.attn.in_proj_{part}"]
            for name, piece in zip("qkv", fused.chunk(3), strict=True):
                new[f"{layer}.self_attn.{name}_proj.{part}"] = piece
            new[f"{layer}.self_attn.out_proj.{part}"] = state[f"{old}.attn.out_proj.{part}"]
            new[f"{layer}.layer_norm1.{part}"] = state[f"{old}.ln_1.{part}"]
            new[f"{layer}.layer_norm2.{part}"] = state[f"{old}.ln_2.{part}"]
            new[f"{layer}.mlp.fc1.{part}"] = state[f"{old}.mlp.c_fc.{part}"]
            new[f"{layer}.mlp.fc2.{part}"] = state[f"{old}.mlp.c_proj.{part}"]
    prefix = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    missing, unexpected = model.load_state_dict({prefix + k: v for k, v in new.items()}, strict=False)
    assert not unexpected and all("position_ids" in m for m in missing), (missing, unexpected)
    return model.eval()


def token_ids(tokenizer: CLIPTokenizer, captions: list[str], *, shortest: bool = False) -> Tensor:
    """(B, L) ids; `shortest` cuts the padding that no caption of the batch needs."""
    padding = "longest" if shortest else "max_length"
    return tokenizer(
        captions, padding=padding, max_length=CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids


def pooled(hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    return hidden_BLD[torch.arange(len(ids_BL)), ids_BL.argmax(-1)]
