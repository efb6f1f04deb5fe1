"""Preference models: metrics of what people tend to like. They are computed only on request.

Owns three models behind one small interface: HPSv2.1 (arXiv 2306.09341), PickScore (arXiv 2305.01569) and
ImageReward (arXiv 2304.05977).  A requested model that is missing is an error, never a 0. These models follow
the taste of their raters and do not measure a subject (LyCORIS, arXiv 2309.14859, found them unsuitable for
choosing settings), so none of them is part of the score.

    hpsv2.1[:FILE]      cosine of an open_clip ViT-H-14 in the published file HPS_v2.1_compressed.pt
    pickscore[:FOLDER]  cosine of a transformers CLIPModel, yuvalkirstain/PickScore_v1; the published score is
                        this times exp(logit_scale), which is kept as ``scale`` and applied only in output
    imagereward         the package image-reward, which downloads its own weights

Text: the scored text, with the class word instead of the trigger.  Shapes: N images, P prompts, D vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from evaluation.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    FEATURE_BATCH,
    UNKNOWN_STATES,
    OnCard,
    Vectors,
    check_safetensors,
    load_scorer,
    model_folder,
    open_clip_tokenizer,
    read_json,
)
from evaluation.gauges.gauge import Gauge, TextGauge
from evaluation.images import SampledImage
from evaluation.prompts import PromptSet
from trainer.card import card_of
from trainer.errors import MachineError, MissingModel, ModelFileError
from trainer.files import sha256_file
from trainer.oom import Fitting, memory_named

HPS_MODEL, HPS_REPOSITORY, HPS_FILE = "ViT-H-14", "xswu/HPSv2", "HPS_v2.1_compressed.pt"
PICK_REPOSITORY = "yuvalkirstain/PickScore_v1"
PICK_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def load_preference(spec: str, device: str | torch.device = "cpu") -> Gauge:
    """The gauge of ``NAME`` or ``NAME:PATH``. Raises an error that names what is missing."""
    check_preference(spec)
    name, _, place = spec.partition(":")
    return LOADERS[name](place, device)


def is_preference(spec: str) -> bool:
    return spec.partition(":")[0] in LOADERS


def check_preference(spec: str) -> None:
    """Raise an error for a missing package or path before anything is loaded."""
    name, _, place = spec.partition(":")
    if name == "imagereward" and find_spec("ImageReward") is None:
        raise MachineError(
            "imagereward is requested, but its package is not installed",
            "run `pip install image-reward`, or remove it from [study] also",
        )
    if place and not Path(place).expanduser().exists():
        raise MissingModel(
            f"{name} is requested, but {place} does not exist", f"write {name}:PATH, or {name}"
        )


def _hps(place: str, device: str | torch.device) -> Gauge:
    path = Path(place).expanduser() if place else None
    if path is None:
        cached = try_to_load_from_cache(HPS_REPOSITORY, HPS_FILE)
        if not isinstance(cached, str):
            raise ModelFileError(
                f"hpsv2.1 is requested, but {HPS_FILE} is not on this machine",
                f"download it from {HPS_REPOSITORY} and write hpsv2.1:/path/to/{HPS_FILE}",
            )
        path = Path(cached)
    gauge = TextGauge(load_scorer(f"{HPS_MODEL}:{path}", device))
    gauge.measure, gauge.model = "hpsv2.1", path.name
    return gauge


def _pickscore(place: str, device: str | torch.device) -> Gauge:
    folder = Path(place).expanduser() if place else model_folder(PICK_REPOSITORY, PICK_FILES)
    gauge = TextGauge(HfClip(folder, device))
    gauge.measure = "pickscore"
    return gauge


class HfClip(OnCard):
    """A transformers CLIPModel in fp32, as a scorer. It uses open_clip's tokenizer, which gives the same tokens."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        weights, config = folder / "model.safetensors", read_json(folder / "config.json")
        if config.get("model_type") != "clip":
            raise ModelFileError(
                f"{folder} holds {config.get('model_type')!r}, not a clip model",
                "give the folder of a CLIPModel",
            )
        check_safetensors(weights, transformers=True)
        model, report = CLIPModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, local_files_only=True
        )
        missing = sorted(k for k in report["missing_keys"] if not k.endswith("position_ids"))
        if missing:
            raise ModelFileError(
                f"{weights} lacks {len(missing)} weights: {missing[:5]}", "download it again"
            )
        self.name, self.sha = folder.name, sha256_file(weights)
        self.scale = float(model.logit_scale.exp())
        super().__init__(model, f"scorer {self.name}", device)
        self._side_px = int(model.config.vision_config.image_size)
        self._tokenizer = open_clip_tokenizer(int(model.config.text_config.max_position_embeddings))

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        with self._scoring(*UNKNOWN_STATES):
            return self._in_batches([self._pixels(image) for image in images], self._image_batch)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        with self._scoring(*UNKNOWN_STATES):
            return self._in_batches(list(self._tokenizer(list(texts))), self._text_batch)

    def _image_batch(self, pixels_B3HW: Tensor) -> Tensor:
        return self._model.visual_projection(self._model.vision_model(pixels_B3HW).pooler_output)

    def _text_batch(self, ids_BL: Tensor) -> Tensor:
        return self._model.text_projection(self._model.text_model(ids_BL).pooler_output)

    def _in_batches(self, rows: Sequence[Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
        def encoded(part: Sequence[Tensor]) -> Tensor:
            return encode(torch.stack(list(part)).to(self._device)).float().cpu()

        with memory_named(f"out of memory while {self.name} measures a single image or text"):
            vectors = torch.cat(list(Fitting(FEATURE_BATCH).each(rows, encoded)))
        if not vectors.isfinite().all():
            raise ModelFileError(
                f"{self.name} returned numbers that are not finite", "download its weights again"
            )
        return torch.nn.functional.normalize(vectors, dim=-1)

    def _pixels(self, image_HW3: np.ndarray) -> Tensor:
        """Shortest side resized to the model's size (bicubic), centre crop, CLIP's mean and std: (3, side, side)."""
        height, width = image_HW3.shape[:2]
        side, short = self._side_px, min(height, width)
        size = (side * width // short, side * height // short)
        resized = Image.fromarray(image_HW3).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        cropped = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
        return torch.from_numpy(((cropped - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1))


class ImageRewardGauge:
    """ImageReward-v1.0 through its own package: about 0 ± 1 on the prompts of its authors."""

    measure, model = "imagereward", "ImageReward-v1.0"

    def __init__(self, _: str, device: str | torch.device) -> None:
        import ImageReward  # type: ignore[import-not-found]

        self._network: Any = ImageReward.load(self.model, device=str(device))
        self._card = card_of(device)
        self._card.add(self._network, self.model)
        state = self._network.state_dict()
        total = sum(float(value.double().sum()) for value in state.values() if value.is_floating_point())
        self.sha = f"sum of weights {total:.6e}"  # the package does not expose the path of its file

    def values(self, vectors: Vectors, images: Sequence[SampledImage], prompts: PromptSet) -> np.ndarray:
        text = {p.id: p.scored_text for p in prompts.prompts}
        pairs = zip(images, vectors.pixels, strict=True)
        with (
            memory_named(f"out of memory while {self.model} measures an image"),
            self._card.phase("score", self._network),
            torch.no_grad(),
        ):
            return np.array(
                [
                    float(self._network.score(text[i.prompt_id], Image.fromarray(pixels)))
                    for i, pixels in pairs
                ]
            )


LOADERS: dict[str, Callable[[str, str | torch.device], Gauge]] = {
    "hpsv2.1": _hps,
    "pickscore": _pickscore,
    "imagereward": ImageRewardGauge,
}
