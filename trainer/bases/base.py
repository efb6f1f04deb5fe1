"""Base: the interface of a base model for the training loop, the cache and the sampler.

Owns what all families share: tokenising, the VAE, the noise schedule, and the modules of a kohya LoRA with
their names. Does not own text conditioning and the U-Net call (``sd15``, ``sdxl``) or reading files (``load``).

Shapes: B batch, C latent channels, H W pixels, h w latent sides, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.bases import needs
from trainer.bases.families import FAMILIES, BaseFamily
from trainer.bases.onto import onto
from trainer.bases.schedule import zero_terminal_snr
from trainer.bases.weighted import apply_weights, weighted_rows
from trainer.card import Card, card_of
from trainer.config import TrainConfig
from trainer.errors import ModelFileError

MAX_TIMESTEPS = 10_000  # assumed: published bases have 1000
WINDOW_TOKENS = 75  # what CLIP reads at once, without start and end tokens


class Sizes(NamedTuple):
    """SDXL's size conditioning of an image, in px: original size, crop offset, target size. Height first."""

    original_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_hw: tuple[int, int]


@dataclass(frozen=True)
class TextStates:
    """Encoded captions: the states for cross-attention, and SDXL's pooled vector."""

    hidden_BLD: Tensor
    pooled_BP: Tensor | None = None

    def rows(self, indices: Sequence[int]) -> TextStates:
        """The states of some captions, in that order; an index may repeat."""
        chosen = torch.as_tensor(list(indices), device=self.hidden_BLD.device)
        return TextStates(
            self.hidden_BLD.index_select(0, chosen),
            None if self.pooled_BP is None else self.pooled_BP.index_select(0, chosen),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextStates:
        """The same states on a device and optionally in another dtype."""
        place = torch.device(device)
        return TextStates(
            onto(self.hidden_BLD, place, dtype),
            None if self.pooled_BP is None else onto(self.pooled_BP, place, dtype),
        )

    @staticmethod
    def join(parts: Sequence[TextStates]) -> TextStates:
        """States of several calls, concatenated along B."""
        pooled = [part.pooled_BP for part in parts if part.pooled_BP is not None]
        return TextStates(
            torch.cat([part.hidden_BLD for part in parts]), torch.cat(pooled) if pooled else None
        )


@dataclass(frozen=True)
class Parts:
    """The components of a base, as loaded from its files."""

    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler_config: dict[str, Any]


class Base(ABC):
    """A frozen text-to-image model. None of its weights is trainable; an ``Adapter`` can be injected and removed."""

    family: ClassVar[str]

    def __init__(self, name: str, identity: str, parts: Parts) -> None:
        self.name = name
        self.identity = identity
        self.unet = parts.unet
        self.vae = parts.vae
        self.text_encoders: list[Any] = list(parts.text_encoders)
        self.tokenizers: list[Any] = list(parts.tokenizers)
        self.scheduler_config = dict(parts.scheduler_config)
        self.prediction_type: str = self.scheduler_config.get("prediction_type", "epsilon")
        self.alphas_cumprod = alphas_cumprod(self.scheduler_config)
        self.latent_scale = _latent_scale(self.vae.config.scaling_factor)
        self.compute_dtype: torch.dtype = next(self.unet.parameters()).dtype
        self.say: Callable[[str], None] = lambda text: None
        self.encoded_in_tiles = False  # whether the last images were
        self.vae_overflows = False  # once an image was not finite in fp16 but is in fp32
        self.on_overflow: list[Callable[[], None]] = []  # called when that is found out
        # images that fit at once where more ran out of memory, by (height, width, guided)
        self.drawn_at_once: dict[tuple[int, int, bool], int] = {}
        self._said: set[str] = set()
        self.card = card_of(next(self.unet.parameters()).device)
        for module in self.modules():
            module.requires_grad_(False).eval()

    # Identity

    @property
    def facts(self) -> BaseFamily:
        """The properties of its family."""
        return FAMILIES[self.family]

    @property
    def device(self) -> torch.device:
        """Where it computes. A network that is not needed may be in RAM meanwhile (``trainer.card``)."""
        return self.card.device if self.card.moves else next(self.unet.parameters()).device

    @property
    def latent_factor_px(self) -> int:
        """Pixels per latent cell along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def native_resolution_px(self) -> int:
        """Side of the square images it was trained on."""
        return int(self.unet.config.sample_size) * self.latent_factor_px

    def modules(self) -> Iterator[nn.Module]:
        """Every network of the base."""
        yield self.unet
        yield self.vae
        yield from self.text_encoders

    def components(self) -> dict[str, Any]:
        """The networks a LoRA can be injected into, under diffusers' names."""
        return {"unet": self.unet, **dict(zip(self.facts.text_encoders, self.text_encoders, strict=False))}

    def to(self, device: torch.device | str) -> Base:
        """Make a device the one that it computes on. Networks that do not fit into a card together stay in RAM until
        they are needed."""
        self.live_on(card_of(device))
        return self

    def live_on(self, card: Card) -> None:
        """Let a card say where each network is."""
        self.card = card
        names = ("unet", "vae", *self.facts.text_encoders)
        for name, module in zip(names, self.modules(), strict=False):
            card.add(module, f"{self.name} {name}")
        for module in (*self.text_encoders, self.vae, self.unet):
            card.require(module)

    def free(self) -> None:
        """Drop the networks to free their memory. The base cannot be used afterwards."""
        self.unet = self.vae = None
        self.text_encoders = []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Text

    def token_ids(self, captions: Sequence[str], encoder: int) -> Tensor:
        """Token ids (B, L) for one text encoder: truncated to its length, padded with the pad id of its tokenizer."""
        return self.token_windows(captions, encoder, None)[:, 0]

    def token_windows(
        self, captions: Sequence[str], encoder: int, max_token_length: int | None, weighted: bool = False
    ) -> Tensor:
        """Token ids (B, W, L) of captions of up to ``max_token_length`` tokens, in W windows of 75 between a
        start and an end token.

        Windows are cut as in sd-scripts (library/strategy_base.py): a window whose text continues ends with the end
        token. If the padding is not the end token (SDXL's second encoder), a window of padding starts with one.
        """
        tokenizer = self._tokenizer(encoder)
        windows, inner = self._windows(encoder, max_token_length)
        length = windows * inner + 2
        if weighted:
            rows, _ = weighted_rows(tokenizer, captions, length)
        else:
            rows = tokenizer(list(captions), truncation=True, max_length=length)["input_ids"]
        pad, end = self.tokenizers[encoder].pad_token_id, tokenizer.eos_token_id
        place = next(self.text_encoders[encoder].parameters()).device
        ids_BL = onto(torch.tensor([row + [pad] * (length - len(row)) for row in rows]), place)
        if windows == 1:
            return ids_BL[:, None]
        middle_BWL = ids_BL[:, 1:-1].reshape(len(rows), windows, inner).clone()
        first_BW1 = ids_BL[:, :1, None].expand(-1, windows, 1)
        last_BW1 = ids_BL[:, -1:, None].expand(-1, windows, 1)
        if pad != end:
            ending = middle_BWL[..., -1:]
            last_BW1 = torch.where((ending != end) & (ending != pad), end, last_BW1)
            middle_BWL[..., 0] = torch.where(middle_BWL[..., 0] == pad, end, middle_BWL[..., 0])
        return torch.cat([first_BW1, middle_BWL, last_BW1], dim=-1)

    def _windows(self, encoder: int, max_token_length: int | None) -> tuple[int, int]:
        """How many windows a caption fills, and the tokens of one without start and end tokens."""
        positions = self.text_encoders[encoder].config.max_position_embeddings
        windows = 1 if max_token_length is None else max_token_length // WINDOW_TOKENS
        return windows, min(self._tokenizer(encoder).model_max_length, positions) - 2

    def _weighed(
        self, states_BLD: Tensor, captions: Sequence[str], encoder: int, max_token_length: int | None
    ) -> Tensor:
        """States of whole captions times the weights in them (weighted_captions)."""
        windows, inner = self._windows(encoder, max_token_length)
        _, weights = weighted_rows(self._tokenizer(encoder), captions, windows * inner + 2)
        return apply_weights(states_BLD, weights)

    def token_count(self, text: str) -> int:
        """Number of tokens of a text, without start and end tokens. Encoders read at most 75 at once."""
        return len(self.tokenizers[0](text, add_special_tokens=False)["input_ids"])

    @property
    def caption_tokens(self) -> int:
        """How many tokens of a caption are used, without start and end tokens (75 for CLIP)."""
        positions = self.text_encoders[0].config.max_position_embeddings
        return int(min(self.tokenizers[0].model_max_length, positions)) - 2

    def _tokenizer(self, encoder: int) -> Any:
        """The tokenizer for an encoder. Published SDXL folders declare '!' as the padding of the second tokenizer,
        which would turn the word "!" into padding. If both vocabularies are equal, the first tokenizer is used."""
        return self.tokenizers[0] if self._one_vocabulary else self.tokenizers[encoder]

    @cached_property
    def _one_vocabulary(self) -> bool:
        first = self.tokenizers[0].get_vocab()
        return all(tokenizer.get_vocab() == first for tokenizer in self.tokenizers[1:])

    @abstractmethod
    def encode_text(
        self,
        captions: Sequence[str],
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        weighted: bool = False,
    ) -> TextStates:
        """Captions → states on the text encoders' device.  Differentiable; wrap in ``torch.no_grad`` for a cache.

        ``max_token_length``: 150 or 225 use longer captions, L = 152 or 227; None and 75 use 75 tokens, L = 77.
        ``weighted``: ``(word:1.2)`` and ``[word]`` weigh the states of their tokens (``trainer.bases.weighted``).
        """

    @contextmanager
    def _reading(self, captions: Sequence[str], max_token_length: int | None) -> Iterator[None]:
        """The text encoders where they compute, while some captions are encoded."""
        rows = len(captions) * max(1, (max_token_length or WINDOW_TOKENS) // WINDOW_TOKENS)
        with self.card.phase("encode text", *self.text_encoders, work=lambda: self._text_bytes(rows)):
            self.card.require(*self.text_encoders)
            yield

    def _text_bytes(self, rows: int) -> int:
        return sum(
            needs.text_bytes(encoder.config.to_dict(), rows, encoder.dtype.itemsize)
            for encoder in self.text_encoders
        )

    def encode_captions(self, captions: Sequence[str], config: TrainConfig) -> TextStates:
        """Captions of a training as its settings read them."""
        return self.encode_text(captions, config.clip_skip, config.max_token_length, config.weighted_captions)

    # Images

    @torch.no_grad()
    def encode_images(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Pixels in [-1, 1] → one unscaled VAE sample per image (B, C, h, w), fp32. One CPU generator per image.

        On a card, as many images at once as fit, and a large image in tiles where a whole one does not fit.
        """
        height_px, width_px = pixels_BCHW.shape[2:]
        each = needs.encode_bytes(self.vae.config, width_px, height_px, self.vae.dtype.itemsize)
        space = self.card.space(self.vae)
        at_once = len(pixels_BCHW) if space is None else max(1, min(len(pixels_BCHW), space // max(1, each)))
        with (
            self.card.phase("encode images", self.vae, work=at_once * each),
            self._in_tiles(each, space, (width_px, height_px), "encodes"),
        ):
            self.card.require(self.vae)
            self.encoded_in_tiles = bool(getattr(self.vae, "use_tiling", False))
            rows = [self._sample_of_images(part) for part in pixels_BCHW.split(at_once)]
        mean, std = (torch.cat(parts) for parts in zip(*rows, strict=True))
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        return mean + std * noise.to(mean.device)

    def _sample_of_images(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, fp32."""
        moments = self.vae.encode(pixels_BCHW.to(self.vae.device, self.vae.dtype)).latent_dist
        return moments.mean.float(), moments.std.float()

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> tuple[np.ndarray, list[bool]]:
        """Scaled latents → uint8 images (B, H, W, 3), and whether each image is finite.

        A VAE that overflows in fp16 decodes these images again in fp32, and from then on all others, as A1111 does
        ("Automatically revert VAE to 32-bit floats"); ``vae_overflows`` remembers it. In fp32 and bf16 nothing is
        repeated. On a card, large images are decoded one at a time, and in tiles where a whole one does not fit.
        """
        kind = torch.float32 if self.vae_overflows else self.vae.dtype
        with self.card.phase("decode", self.vae, work=self._decode_bytes(latents_BCHW, kind)):
            self.card.require(self.vae)
            return self._decoded(latents_BCHW)

    def _decoded(self, latents_BCHW: Tensor) -> tuple[np.ndarray, list[bool]]:
        unscaled = latents_BCHW.float() / self.latent_scale
        if self.vae.dtype != torch.float16:
            pixels = self._decode(unscaled)
        elif self.vae_overflows:
            pixels = self._decode_singly(unscaled)
        else:
            pixels = self._decode(unscaled)
            if bool((~_finite_rows(pixels) & _finite_rows(unscaled).to(pixels.device)).any()):
                again = self._decode_singly(unscaled)
                if _finite_rows(again).sum() > _finite_rows(pixels).sum():
                    pixels = again
                    self._remember_overflow()
        shown = (pixels.nan_to_num(0.0) / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return shown.permute(0, 2, 3, 1).cpu().numpy(), _finite_rows(pixels).tolist()

    def _decode(self, unscaled_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), fp32."""
        size = self._pixel_size(unscaled_BCHW)
        at_once = self._decoded_at_once(unscaled_BCHW)
        each = needs.decode_bytes(self.vae.config, *size, self.vae.dtype.itemsize)
        with self._in_tiles(each, self.card.space(self.vae), size, "decodes"):
            parts = [self._decode_part(part) for part in unscaled_BCHW.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_part(self, unscaled_BCHW: Tensor) -> Tensor:
        given = unscaled_BCHW.to(self.vae.device, self.vae.dtype)
        return self.vae.decode(given, return_dict=False)[0].float()

    def _pixel_size(self, latents_BCHW: Tensor) -> tuple[int, int]:
        """Width and height of the images of some latents, in px."""
        height, width = latents_BCHW.shape[2:]
        return width * self.latent_factor_px, height * self.latent_factor_px

    def _decoded_at_once(self, latents_BCHW: Tensor) -> int:
        """All of them on a CPU. On a card, one large image fills it: more at once only take memory."""
        count = max(1, len(latents_BCHW))
        return needs.decoded_at_once(count, *self._pixel_size(latents_BCHW)) if self.card.moves else count

    def _decode_bytes(self, latents_BCHW: Tensor, kind: torch.dtype) -> int:
        size, at_once = self._pixel_size(latents_BCHW), self._decoded_at_once(latents_BCHW)
        return at_once * needs.decode_bytes(self.vae.config, *size, kind.itemsize)

    @contextmanager
    def _in_tiles(
        self, whole_bytes: int, space: int | None, size_px: tuple[int, int], does: str
    ) -> Iterator[None]:
        """The VAE in tiles while a whole image needs more than there is space for. Seams may differ slightly."""
        side = None if space is None else needs.tile_px(whole_bytes, *size_px, space)
        if space is None or side is None:
            yield
            return
        self.say_once(
            f"the VAE {does} {size_px[0]}×{size_px[1]} px in tiles of {side} px: a whole image needs "
            f"{whole_bytes / 1e9:.1f} GB and {space / 1e9:.1f} GB can be free; seams may differ slightly"
        )
        vae = self.vae
        before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
        vae.use_tiling = True
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // self.latent_factor_px
        try:
            yield
        finally:
            vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before

    def _decode_singly(self, unscaled_BCHW: Tensor) -> Tensor:
        """In fp32 and one image at a time: a batch that fits into memory in fp16 may not fit in fp32."""
        with self.vae_as(torch.float32):
            return torch.cat([self._decode(row_1CHW) for row_1CHW in unscaled_BCHW.split(1)])

    def _remember_overflow(self) -> None:
        self.vae_overflows = True
        for listener in self.on_overflow:
            listener()
        self.say_once(
            f"the VAE of {self.name} overflows in fp16: its images are decoded in fp32 from now on (training is "
            "not affected)"
        )

    def say_once(self, text: str) -> None:
        """Tell the user something about this base, once per process."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    @contextmanager
    def vae_as(self, dtype: torch.dtype) -> Iterator[None]:
        """The VAE in another dtype for a while.  fp16 → fp32 → fp16 loses nothing."""
        before = self.vae.dtype
        if before == dtype:
            yield
            return
        nn.Module.to(self.vae, dtype)  # diffusers' own ``to`` warns of every cast
        try:
            yield
        finally:
            nn.Module.to(self.vae, before)

    # Noise

    @abstractmethod
    def predict(
        self, noisy_BCHW: Tensor, timesteps_B: Tensor, states: TextStates, sizes: Sequence[Sizes]
    ) -> Tensor:
        """The U-Net's prediction (B, C, h, w) in fp32.  ``sizes`` (one per row) are used by SDXL only."""

    # Names of LoRA modules in kohya's files

    @abstractmethod
    def unet_name(self, path: str) -> str:
        """The path of a U-Net module in sd-scripts' own U-Net, on which presets of LyCORIS are written. Raises KeyError
        for a module that it does not have."""

    def unet_key(self, path: str) -> str:
        """kohya's key prefix of a U-Net module, e.g. ``lora_unet_down_blocks_0_…``."""
        return "lora_unet_" + self.unet_name(path).replace(".", "_")

    def text_keys(self) -> dict[str, str]:
        """component → kohya's key prefix of its text encoder."""
        return dict(zip(self.facts.text_encoders, self.facts.text_prefixes, strict=False))

    def key_of(self, component: str, path: str) -> str:
        """kohya's key of a module, without the ending of a tensor."""
        return self.unet_key(path) if component == "unet" else text_key(self.text_keys()[component], path)

    def lora_names(self) -> dict[str, dict[str, str]]:
        """component → module path → kohya key prefix of the modules that sd-scripts' ``networks.lora`` trains.

        U-Net: linear layers and 1×1 convolutions inside Transformer2DModel (SD1.5 192, SDXL 722).  Text
        encoders: linear layers inside attention and MLP (72; SDXL 72 + 192).
        """
        return self._names[0]

    def conv_names(self) -> dict[str, dict[str, str]]:
        """The same for the modules that ``conv_dim`` adds: layers of resnets and samplers (SD1.5 86, SDXL 66)."""
        return self._names[1]

    @cached_property
    def _names(self) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
        linear = {"unet": {p: self.unet_key(p) for p in inner_layers(self.unet, ("Transformer2DModel",))}}
        conv_owners = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
        conv = {"unet": {p: self.unet_key(p) for p in inner_layers(self.unet, conv_owners)}}
        for component, prefix, encoder in zip(
            self.facts.text_encoders, self.facts.text_prefixes, self.text_encoders, strict=False
        ):
            paths = inner_layers(encoder, ("CLIPAttention", "CLIPMLP"))
            linear[component] = {p: text_key(prefix, p) for p in paths}
        return linear, conv


def _finite_rows(values_BCHW: Tensor) -> Tensor:
    """(B) whether every value of a row is finite."""
    return values_BCHW.flatten(1).isfinite().all(1)


def text_key(prefix: str, path: str) -> str:
    """kohya's key prefix of a text encoder module. It contains ``text_model_`` even if the installed
    transformers does not wrap the encoder in ``text_model`` (removed in 5.6), because ComfyUI and A1111
    accept no other name."""
    return f"{prefix}_text_model_{path.removeprefix('text_model.').replace('.', '_')}"


def inner_layers(model: nn.Module, owners: tuple[str, ...]) -> list[str]:
    """Paths of the linear and convolution layers inside modules of the given class names, in module order."""
    paths: dict[str, None] = {}
    for owner_path, owner in model.named_modules():
        if type(owner).__name__ not in owners:
            continue
        for path, layer in owner.named_modules(prefix=owner_path):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                paths[path] = None
    return list(paths)


def compute_type(mixed_precision: str, device: torch.device | str) -> torch.dtype:
    """The dtype of computation. auto: bf16 on GPUs that support it, fp16 on older ones, fp32 on CPU."""
    named = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if mixed_precision != "auto":
        return named[mixed_precision]
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """ᾱ_t for every training timestep, fp32 on CPU. Both families use scaled-linear β from 0.00085 to 0.012.

    The schedule of a base with zero terminal SNR is rescaled; the last ᾱ is 2⁻²⁴ instead of 0, as in
    diffusers, because samplers divide by it.
    """
    alphas_T = plain_alphas_cumprod(scheduler_config)
    if scheduler_config.get("rescale_betas_zero_snr"):
        alphas_T = zero_terminal_snr(alphas_T)
        alphas_T[-1] = 2.0**-24
    return alphas_T


def plain_alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """The same, without rescaling."""
    steps = scheduler_config.get("num_train_timesteps", 1000)
    start, end = scheduler_config.get("beta_start", 0.00085), scheduler_config.get("beta_end", 0.012)
    schedule = scheduler_config.get("beta_schedule", "scaled_linear")
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
        raise _bad_schedule("num_train_timesteps", steps)
    for key, value in (("beta_start", start), ("beta_end", end)):
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise _bad_schedule(key, value)
    if scheduler_config.get("trained_betas") is not None:
        raise _bad_schedule("trained_betas", scheduler_config["trained_betas"])
    if schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif schedule != "linear":
        raise _bad_schedule("beta_schedule", schedule)
    else:
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    return torch.cumprod(1.0 - betas, dim=0)


def _latent_scale(value: Any) -> float:
    """Latents are multiplied by this before noise is added (0.18215 for SD1.5, 0.13025 for SDXL)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelFileError(
            f"vae/config.json: scaling_factor = {str(value)[:80]} is not a valid latent scale",
            "the configuration is damaged; download the model again",
        )
    return float(value)


def _bad_schedule(key: str, value: Any) -> ModelFileError:
    return ModelFileError(
        f"scheduler_config.json: {key} = {str(value)[:80]} is not a supported noise schedule",
        "use a base with beta_start, beta_end and a linear or scaled_linear schedule",
    )


def last_state(encoder: Any, ids_BL: Tensor, clip_skip: int | None) -> Tensor:
    """SD1.5's text states (B, L, D): the last layer, or layer ``clip_skip`` counted from the end,
    after the final norm."""
    if clip_skip is None or clip_skip == 1:
        return encoder(ids_BL).last_hidden_state
    states = encoder(ids_BL, output_hidden_states=True).hidden_states
    return inner_encoder(encoder).final_layer_norm(states[-clip_skip])


def inner_encoder(encoder: Any) -> Any:
    """The network with ``final_layer_norm``: transformers wraps only some encoders in ``text_model``."""
    return getattr(encoder, "text_model", encoder)


def join_windows(states_BWLD: Tensor) -> Tensor:
    """States of W windows joined to one long text (B, 75·W + 2, D): the first start token, the inner tokens
    of every window, and the end token of the last window (sd-scripts library/strategy_sd.py)."""
    if states_BWLD.shape[1] == 1:
        return states_BWLD[:, 0]
    middle_BLD = states_BWLD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BWLD[:, 0, :1], middle_BLD, states_BWLD[:, -1, -1:]], dim=1)


def first_position(ids_BL: Tensor, token: int) -> Tensor:
    """Index (B) of the first occurrence of a token in each row."""
    return (ids_BL == token).int().argmax(dim=1)
