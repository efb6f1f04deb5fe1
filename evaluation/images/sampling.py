"""Prompts × seeds → images, reproducibly: the sampler behind every score.

Owns the noise of each image, the classifier-free-guidance loop over a base (with or without an adapter) and
the resumable folder of PNGs. Does not own the checks of images; see ``evaluation.images.images``.

Common random numbers: one CPU generator per image, seeded by (prompt id, seed), so an image depends only on its
prompt, its seed and the weights. Only ODE samplers are used: an ancestral sampler would draw more noise at every
step. Empty negative prompts are encoded as text, as kohya, ComfyUI and A1111 do; diffusers' SDXL pipeline uses zeros.

Shapes: B images of a chunk, C latent channels, h w latent sides, H W pixels, 3 colours.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from evaluation.images.images import SampledImage, png_bytes
from evaluation.images.settings import SAMPLERS, SampleConfig
from evaluation.prompts import Prompt, PromptSet
from trainer.adapters import computing
from trainer.bases import Base, Sizes, TextStates, needs
from trainer.card import nbytes
from trainer.errors import ConfigError
from trainer.files import machine_error, write_atomic
from trainer.oom import Fitting, memory_named

INDEX_NAME = "samples.json"
CPU_CELLS, CPU_BATCH = 8 * 64 * 64, 32  # at most per chunk on a CPU: latent cells (8 images of 512²), images

OnImages = Callable[[int, int], None]  # (images done, total)


def default_config(base: Base, **changes: Any) -> SampleConfig:
    """The native size of the base and a chunk size that fits; ``changes`` override single values."""
    side_px = base.native_resolution_px
    width_px, height_px = changes.get("width_px") or side_px, changes.get("height_px") or side_px
    cells = (width_px // base.latent_factor_px) * (height_px // base.latent_factor_px)
    return SampleConfig(
        **{"batch_size": chunk_size(base, cells), **changes, "width_px": width_px, "height_px": height_px}
    )


def chunk_size(base: Base, cells: int) -> int:
    """Images per chunk, for images of ``cells`` latent cells."""
    total = base.card.total_bytes()
    if total is None:
        return max(1, min(CPU_BATCH, CPU_CELLS // cells))
    element = base.compute_dtype.itemsize
    return needs.drawn_at_once(base.unet.config, cells, nbytes(base.unet), element, total)


def generator(prompt_id: str, seed: int) -> torch.Generator:
    """The CPU generator of one image: 63 bits of sha256(prompt id, seed)."""
    digest = hashlib.sha256(f"{prompt_id}:{seed}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample(
    base: Base,
    prompts: PromptSet,
    config: SampleConfig,
    folder: Path | None = None,
    *,
    identity: str = "",
    as_class: bool = False,
    only_first_chunk: bool = False,
    on_image: OnImages | None = None,
) -> list[SampledImage]:
    """One image per prompt and seed, prompt by prompt, from the base in its current state (adapter included).

    ``folder`` stores them as PNG. With an ``identity`` (of the weights: base and adapter), whole chunks that
    are stored under the same identity are reused. ``as_class`` renders the scored text, which has the class
    word instead of the trigger, with the noise of the same prompts: the anchor of the untrained base.

    Where memory runs out, half as many images are drawn at once, down to one: an image differs by rounding only. The
    base remembers how many fitted, for later calls. Raises OutOfMemory if a single image does not fit.
    """
    jobs = list(prompts.jobs)
    if only_first_chunk:
        jobs = jobs[: config.batch_size]
    chunks = [jobs[i : i + config.batch_size] for i in range(0, len(jobs), config.batch_size)]
    store = _Store(folder, _key(identity, prompts, config, as_class)) if folder else None
    stored = [store.read(chunk) if store and identity else None for chunk in chunks]
    missing = [chunk for chunk, found in zip(chunks, stored, strict=True) if found is None]
    images: list[SampledImage] = []
    kind = (config.height_px, config.width_px, config.cfg > 1)
    fitting = Fitting(min(config.batch_size, base.drawn_at_once.get(kind, config.batch_size)))
    size = f"{config.width_px}×{config.height_px} px"

    def draw(part: Sequence[tuple[Prompt, int]]) -> list[SampledImage]:
        return _draw(base, part, config, encoded, as_class)

    with base.card.phase("sample"), _Writer(store, beside=base.card.moves) as writer:
        with memory_named(f"out of memory while encoding the texts of images of {size}"):
            encoded = _encoded(base, missing, config, as_class)
        for chunk, found in zip(chunks, stored, strict=True):
            if found is None:
                with memory_named(f"out of memory while sampling an image of {size}"):
                    found = [image for part in fitting.each(chunk, draw) for image in part]
                if fitting.size < config.batch_size:
                    base.drawn_at_once[kind] = fitting.size
                    base.say_once(f"out of memory while sampling: {fitting.size} images are drawn at once")
                writer.write(found)
            images += found
            if on_image:
                on_image(len(images), len(jobs))
    return images


def _text(prompt: Prompt, as_class: bool) -> str:
    return prompt.class_text if as_class else prompt.text


def _encoded(
    base: Base, chunks: Sequence[Sequence[tuple[Prompt, int]]], config: SampleConfig, as_class: bool
) -> dict[str, TextStates]:
    """The states of all texts of some chunks, before anything is drawn: the text encoders are then not needed again.
    Each text is encoded once per call and on its own, so its states do not depend on the others."""
    texts = [_text(prompt, as_class) for chunk in chunks for prompt, _ in chunk]
    if chunks and config.cfg > 1:
        texts.append(config.negative)
    return {text: _encode(base, text, config) for text in dict.fromkeys(texts)}


def _draw(
    base: Base,
    chunk: Sequence[tuple[Prompt, int]],
    config: SampleConfig,
    encoded: dict[str, TextStates],
    as_class: bool,
) -> list[SampledImage]:
    """The images of a chunk, from the states of its texts."""
    states = TextStates.join([encoded[_text(prompt, as_class)] for prompt, _ in chunk])
    negative = encoded[config.negative] if config.cfg > 1 else None
    latents_BChw = denoise(base, initial_noise(base, chunk, config), states, negative, config)
    pixels_BHW3, finite = base.decode_latents(latents_BChw)
    rows = zip(chunk, pixels_BHW3, finite, strict=True)
    return [SampledImage(prompt.id, seed, pixels, bool(ok)) for (prompt, seed), pixels, ok in rows]


@torch.no_grad()
def _encode(base: Base, text: str, config: SampleConfig) -> TextStates:
    with computing(base, *base.text_encoders):
        return base.encode_text([text], clip_skip=config.clip_skip)


def initial_noise(base: Base, chunk: Sequence[tuple[Prompt, int]], config: SampleConfig) -> Tensor:
    """(B, C, h, w) fp32 on CPU: drawn per image, independent of the other images in the chunk."""
    factor = base.latent_factor_px
    if config.width_px % factor or config.height_px % factor:
        raise ConfigError(
            f"image size {config.width_px}×{config.height_px} px cannot be sampled",
            f"give multiples of {factor}",
        )
    shape = (int(base.unet.config.in_channels), config.height_px // factor, config.width_px // factor)
    return torch.stack([torch.randn(shape, generator=generator(prompt.id, seed)) for prompt, seed in chunk])


def make_scheduler(base: Base, config: SampleConfig) -> DPMSolverMultistepScheduler:
    """A new solver with the noise schedule of the base and its timesteps set."""
    alphas = base.alphas_cumprod.double().cpu()
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=len(alphas),
        trained_betas=betas.numpy(),
        prediction_type=base.prediction_type,
        **SAMPLERS[config.sampler],
    )
    scheduler.set_timesteps(config.steps)
    return scheduler


@torch.no_grad()
def denoise(
    base: Base, noise_BChw: Tensor, states: TextStates, negative: TextStates | None, config: SampleConfig
) -> Tensor:
    """Scaled latents (B, C, h, w) in fp32 from noise; both guidance branches in one U-Net call.

    Nothing waits for a GPU inside: the solver's numbers stay on the CPU, the timesteps are copied once.
    """
    rows = len(noise_BChw) * (1 if negative is None else 2)
    cells = noise_BChw.shape[-2] * noise_BChw.shape[-1]
    work = needs.denoise_bytes(base.unet.config, cells, rows, base.compute_dtype.itemsize)
    with base.card.phase("denoise", base.unet, work=work), computing(base, base.unet):
        base.card.require(base.unet)
        return _denoised(base, noise_BChw, states, negative, config)


def _denoised(
    base: Base, noise_BChw: Tensor, states: TextStates, negative: TextStates | None, config: SampleConfig
) -> Tensor:
    count = len(noise_BChw)
    scheduler = make_scheduler(base, config)
    steps_T = scheduler.timesteps.to(base.device)
    latents_BChw = noise_BChw.to(base.device) * scheduler.init_noise_sigma
    guided = negative is not None
    if negative is not None:
        states = TextStates.join([negative.rows([0] * count), states])
    side = (config.height_px, config.width_px)
    sizes = [Sizes(side, (0, 0), side)] * (2 * count if guided else count)
    for step, step_there in zip(scheduler.timesteps, steps_T, strict=True):
        doubled = torch.cat([latents_BChw] * 2) if guided else latents_BChw
        predicted = base.predict(doubled, step_there.expand(len(doubled)), states, sizes).float()
        if guided:
            without, with_text = predicted.chunk(2)
            predicted = without + config.cfg * (with_text - without)
        latents_BChw = scheduler.step(predicted, step, latents_BChw, return_dict=False)[0]
    return latents_BChw


def _key(identity: str, prompts: PromptSet, config: SampleConfig, as_class: bool) -> str:
    """What must match before a stored chunk is reused. The batch size decides which images share a chunk."""
    parts = [identity, prompts.hash, [(prompt.id, seed) for prompt, seed in prompts.jobs], config.hash]
    return hashlib.sha256(json.dumps([*parts, config.batch_size, as_class]).encode()).hexdigest()


class _Store:
    """A folder of PNGs with an index: the sha256 and the finite flag of each finished image."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self.rows: dict[str, dict[str, Any]] = {}
        index = _read_index(folder)
        if index.get("key") == key:
            self.rows = index["images"]
            return
        try:  # remove images of other weights or prompts
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.png"):
                if re.fullmatch(r"[0-9a-f]{16}_\d+\.png", path.name):
                    path.unlink()
        except OSError as error:
            raise machine_error(error, folder) from error

    def read(self, chunk: Sequence[tuple[Prompt, int]]) -> list[SampledImage] | None:
        """The images of the chunk, or None if any of them cannot be used."""
        images = []
        for prompt, seed in chunk:
            name = file_name(prompt.id, seed)
            image = _read_image(self.folder / name, prompt, seed, self.rows.get(name))
            if image is None:
                return None
            images.append(image)
        return images

    def write(self, images: Sequence[SampledImage]) -> None:
        for image in images:
            name = file_name(image.prompt_id, image.seed)
            content = png_bytes(image.pixels_HW3)
            write_atomic(self.folder / name, content)
            self.rows[name] = {"sha256": hashlib.sha256(content).hexdigest(), "finite": image.finite}
        write_atomic(self.folder / INDEX_NAME, json.dumps({"key": self.key, "images": self.rows}, indent=1))


class _Writer:
    """Stores chunks in their order. ``beside``: in a thread, while the next chunk is drawn. At most one chunk waits.
    An error surfaces with the next chunk or at the end. What was handed over is stored before the block is left."""

    def __init__(self, store: _Store | None, *, beside: bool) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "images") if store and beside else None
        self._last: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def write(self, images: list[SampledImage]) -> None:
        if self._store is None:
            return
        if self._thread is None:
            self._store.write(images)
            return
        self._wait()
        self._last = self._thread.submit(self._store.write, images)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return
        self._thread.shutdown(wait=True)
        if error is None:
            self._wait()


def read_images(folder: Path, prompts: PromptSet) -> list[SampledImage]:
    """The images of these prompts that ``sample`` stored in a folder, whatever the chunks; some may be missing."""
    rows = _read_index(folder).get("images", {})
    found = []
    for prompt, seed in prompts.jobs:
        name = file_name(prompt.id, seed)
        image = _read_image(folder / name, prompt, seed, rows.get(name))
        if image is not None:
            found.append(image)
    return found


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) and isinstance(index.get("images"), dict) else {}


def _read_image(path: Path, prompt: Prompt, seed: int, row: dict[str, Any] | None) -> SampledImage | None:
    """A stored image, or None if it is missing, changed or not finite.

    An image that is not finite is drawn again: earlier versions stored grey images of an overflowing VAE.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if row is None or hashlib.sha256(content).hexdigest() != row["sha256"] or not row["finite"]:
        return None
    return SampledImage(prompt.id, seed, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def file_name(prompt_id: str, seed: int) -> str:
    """Name of an image in a samples folder."""
    return f"{prompt_id}_{seed}.png"
