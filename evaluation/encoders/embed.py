"""Scorers: images and texts → unit vectors, from model files that are checked while loading.

Owns finding the files of a scorer (short name, open_clip tag, file, folder; offline first), the checks that a
file holds the claimed model, and the two encoders: open_clip (text and image) and DINOv2 (image, for
likeness). Does not own the score; see ``evaluation.score.score``.

A scorer that cannot be loaded is an error, never a score of 0. The checks cover known traps: missing weights,
truncated files, the Hugging Face layout (mlfoundations/open_clip issue 983), a missing QuickGELU (open_clip does not
warn if the weights come from a file; issues 771 and 915), and truncated texts (Lightning-AI/torchmetrics issue 2883).

Shapes: N images or texts, D vector width; vectors are fp32 on CPU and have length 1.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from transformers import Dinov2Model

from evaluation.encoders.exact import exact_fp32
from evaluation.encoders.scorerfile import (
    check_quick_gelu,
    check_safetensors,
    facts_of_tag,
    file_of_tag,
    model_folder,
    read_json,
    tag_in_name,
    tag_of_sha,
    tags_shown,
)
from trainer.bases import KNOWN_BASES, MINIATURE_LIKENESS, MINIATURE_SCORER, MINIATURE_WEIGHTS
from trainer.card import Card, card_of
from trainer.errors import ConfigError, MissingModel, ModelFileError
from trainer.files import sha256_file
from trainer.oom import Fitting, is_out_of_memory, memory_named

# For real bases: small enough for a CPU (0.17 s per image on 2 cores), and not trained on OpenAI's data. The text
# encoder of SD1.5 and the first one of SDXL are OpenAI's CLIP ViT-L/14: scoring with it would share the text tower
# with the generator. LyCORIS (arXiv 2309.14859, D.4) scores with an independent CLIP too.
DEFAULT_WEIGHTS = {"ViT-B-32": "laion2b_s34b_b79k"}
DEFAULT_SCORER = "ViT-B-32:laion2b_s34b_b79k"
# Likeness on real bases: CLIP ViT-B/32 ignores what tells one member of a class from another, and DINO is the measure
# that DreamBooth (arXiv 2208.12242, 4.1) prefers for a subject. The revision is fixed, so that scores stay comparable.
DEFAULT_LIKENESS = "facebook/dinov2-small"
REVISIONS = {DEFAULT_LIKENESS: "ed25f3a31f01632728cabb09d1542f84ab7b0056"}
FEATURE_BATCH = 32
STATES_AT_ONCE = (
    14  # tensors of a transformer's width inside a block: q, k, v, the MLP's eight, and those around them
)
UNKNOWN_STATES = (257, 1280)  # tokens and width of ViT-H-14, the largest scorer in use
CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
LIKENESS_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
INIT_LOGIT_SCALE = math.log(
    1 / 0.07
)  # open_clip's initial value: weights that still have it were never trained
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


class ImageEncoder(Protocol):
    """Images → vectors. ``name`` is for display, ``sha`` (sha256 of the weights) for comparisons."""

    name: str
    sha: str

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, 3) images of any size → (N, D)."""
        ...


class Scorer(ImageEncoder, Protocol):
    """Images and texts → vectors in one space."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts → (N, D). Raises ConfigError for a text that would be truncated."""
        ...


def default_scorer(base: str) -> str:
    """The default scorer of a base (named as for ``load_base``); the same on every device."""
    return (base in KNOWN_BASES and KNOWN_BASES[base].scorer) or DEFAULT_SCORER


def default_likeness(base: str, scorer: str) -> str:
    """The default likeness encoder of a base: DINOv2 for real bases, which is a download like the base. A base that is
    scored by the miniature's scorer, which is part of this package, needs no download for its likeness either."""
    known = base in KNOWN_BASES and KNOWN_BASES[base].likeness
    return known or ("clip" if Path(scorer).name == MINIATURE_SCORER else DEFAULT_LIKENESS)


def _hub_folder(spec: str) -> Path:
    """The files of a likeness encoder that is named as on the hub, cached or downloaded.

    Raises ModelFileError, for the default with the other way to judge likeness.
    """
    try:
        return model_folder(spec, LIKENESS_FILES, REVISIONS.get(spec))
    except ModelFileError as error:
        if spec != DEFAULT_LIKENESS:
            raise
        other = (
            'or judge likeness with the scorer, which sees less of what is special: likeness = "clip" in [study] '
            "of the study file; for hpo search: --set study.likeness=clip"
        )
        raise ModelFileError(f"{error.message} (it judges likeness)", f"{error.hint}; {other}") from None


class OnCard:
    """The network of an encoder, on its device while it computes (``trainer.card``), in exact fp32."""

    def __init__(self, network: Any, name: str, device: str | torch.device) -> None:
        self._model = network.eval().requires_grad_(False)
        self._device = torch.device(device)
        self.live_on(card_of(device), name)

    def live_on(self, card: Card, name: str) -> None:
        """Let a card say where the network is. It comes when it is first needed."""
        self._card = card
        card.add(self._model, name)

    @contextlib.contextmanager
    def _scoring(self, tokens: int, width: int) -> Iterator[None]:
        """The network where it computes. ``tokens`` and ``width`` of the states of one image or text."""
        work = FEATURE_BATCH * tokens * width * 4 * STATES_AT_ONCE
        with self._card.phase("score", self._model, work=work), exact_fp32(self._device), torch.no_grad():
            self._card.require(self._model)
            yield


class OpenClipScorer(OnCard):
    """An open_clip model in fp32.  ``assumed`` names the properties that had to be assumed; it is shown once."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        sha: str,
        device: str | torch.device = "cpu",
        assumed: str = "",
    ) -> None:
        self.name = name
        self.sha = sha
        self.assumed = assumed
        super().__init__(model, f"scorer {name}", device)
        self._tokenizer = tokenizer
        self._preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        with self._scoring(*self._image_states()):
            return _in_batches(images, self._image_batch)

    def _image_states(self) -> tuple[int, int]:
        """Tokens and width of an image inside the tower, or as good a guess for a tower that is no transformer."""
        tower = self._model.visual
        positions = getattr(tower, "positional_embedding", None)
        return tuple(positions.shape) if positions is not None and positions.dim() == 2 else UNKNOWN_STATES

    def _image_batch(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = torch.stack([self._preprocess(Image.fromarray(image)) for image in images])
        return self._model.encode_image(pixels.to(self._device), normalize=True)

    def patch_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """(N, L, C): the last patch tokens of the image tower, before pooling."""
        with self._scoring(*self._image_states()):
            return _in_batches(images, self._patch_batch)

    def _patch_batch(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = torch.stack([self._preprocess(Image.fromarray(image)) for image in images])
        found = self._model.visual.forward_intermediates(
            pixels.to(self._device), indices=1, intermediates_only=True, output_fmt="NCHW"
        )
        return found["image_intermediates"][-1].flatten(2).transpose(1, 2)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        for text in texts:
            tokens, limit = self._token_count(text), self._tokenizer.context_length
            if tokens > limit:
                raise ConfigError(
                    f"the scorer {self.name} would truncate the text {text[:40]!r}… ({tokens} of {limit} tokens)",
                    "shorten the prompt",
                )
        with self._scoring(self._tokenizer.context_length, UNKNOWN_STATES[1]):
            return _in_batches(texts, lambda part: self._model.encode_text(self._ids(part), normalize=True))

    def _ids(self, texts: Sequence[str]) -> Tensor:
        return self._tokenizer(list(texts)).to(self._device)

    def _token_count(self, text: str) -> int:
        """Number of tokens with start and end tokens, before truncation."""
        if hasattr(self._tokenizer, "tokenizer"):  # open_clip's wrapper around a Hugging Face tokenizer
            return len(self._tokenizer.tokenizer(self._tokenizer.clean_fn(text)).input_ids)
        return len(self._tokenizer.encode(text)) + 2


class Dinov2Encoder(OnCard):
    """A transformers Dinov2Model: the class token, in fp32."""

    def __init__(
        self, model: Any, preprocess: dict[str, Any], name: str, sha: str, device: str | torch.device = "cpu"
    ) -> None:
        self.name = name
        self.sha = sha
        super().__init__(model, f"likeness encoder {name}", device)
        self._resize_px, self._crop_px = preprocess["resize_px"], preprocess["crop_px"]
        self._mean, self._std = np.float32(preprocess["mean"]), np.float32(preprocess["std"])

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        with self._scoring(*self._image_states()):
            return _in_batches(images, self._batch)

    def patch_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """(N, L, C): the last patch tokens."""
        with self._scoring(*self._image_states()):
            return _in_batches(images, lambda part: self._states(part)[:, 1:])

    def _image_states(self) -> tuple[int, int]:
        config = self._model.config
        return (self._crop_px // int(config.patch_size)) ** 2 + 1, int(config.hidden_size)

    def _batch(self, images: Sequence[np.ndarray]) -> Tensor:
        return torch.nn.functional.normalize(self._states(images)[:, 0], dim=-1)

    def _states(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = np.stack([self._pixels(image) for image in images])
        return self._model(torch.from_numpy(pixels).to(self._device)).last_hidden_state

    def _pixels(self, image_HW3: np.ndarray) -> np.ndarray:
        """Shortest side to ``resize_px`` (bicubic), centre crop, normalised: (3, crop, crop)."""
        height, width = image_HW3.shape[:2]
        size = (self._resize_px * width // min(height, width), self._resize_px * height // min(height, width))
        resized = Image.fromarray(image_HW3).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self._crop_px) // 2, (size[1] - self._crop_px) // 2
        cropped = np.asarray(
            resized.crop((left, top, left + self._crop_px, top + self._crop_px)), dtype=np.float32
        )
        return ((cropped / 255 - self._mean) / self._std).transpose(2, 0, 1)


def _in_batches(values: Sequence[Any], encode: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    """Vectors of all values, ``FEATURE_BATCH`` at a time, fewer where memory runs out. Raises ModelFileError if any is
    not finite, and OutOfMemory."""
    with memory_named("out of memory while scoring a single image or text"):
        parts = list(Fitting(FEATURE_BATCH).each(values, lambda part: encode(part).float().cpu()))
    vectors_ND = torch.cat(parts)
    if not vectors_ND.isfinite().all():
        raise ModelFileError(
            "a scorer returned numbers that are not finite", "its weights are damaged; download them again"
        )
    return vectors_ND


# Finding and loading


def load_scorer(spec: str, device: str | torch.device = "cpu") -> OpenClipScorer:
    """A scorer from ``mini-clip``, a folder (open_clip_config.json + weights), or MODEL[:WEIGHTS].

    WEIGHTS is an open_clip tag or a file.  The text is split at ':' only if the left part is a model name, so
    paths may contain a colon.
    """
    check_scorer(spec)
    if spec == MINIATURE_SCORER:
        return _load_folder(MINIATURE_WEIGHTS / MINIATURE_SCORER, spec, device)
    model, _, weights = spec.partition(":")
    if model in open_clip.list_models():
        return _load_named(model, weights or _default_weights(model), device)
    folder = Path(spec).expanduser()
    return _load_folder(folder, folder.name, device)


def check_scorer(spec: str) -> None:
    """Check a scorer's spec before anything is downloaded or loaded. Raises ModelFileError."""
    model, _, weights = spec.partition(":")
    folder = Path(spec).expanduser()
    if spec == MINIATURE_SCORER:
        return
    if model in open_clip.list_models():
        _tag_or_file(model, weights or _default_weights(model))
        return
    if folder.is_dir():
        _folder_weights(folder)
        return
    if folder.is_file():
        raise ModelFileError(
            f"{spec}: the model of these weights is not given",
            f"write MODEL:FILE, for example ViT-B-32:{spec}",
        )
    raise MissingModel(
        f"no scorer {spec!r}: neither an open_clip model nor a folder",
        "write MODEL[:TAG or FILE], for example ViT-B-32:/models/clip.safetensors",
    )


def load_likeness(spec: str, scorer: Scorer, device: str | torch.device = "cpu") -> ImageEncoder:
    """The likeness encoder: ``clip`` (the image tower of the scorer), ``mini-likeness``, or a Dinov2Model (a
    folder, or a hub name such as facebook/dinov2-small)."""
    if spec == "clip":
        return scorer
    check_likeness(spec)
    folder = _likeness_folder(spec)
    if not folder.is_dir():
        folder = _hub_folder(spec)
        check_likeness(str(folder))
    weights, config = folder / "model.safetensors", read_json(folder / "config.json")
    model, report = Dinov2Model.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    # the mask token is used in pre-training only; it may be absent
    missing = sorted(k for k in report["missing_keys"] if "mask_token" not in k) + sorted(
        str(m) for m in report.get("mismatched_keys", ())
    )
    if missing:
        raise ModelFileError(
            f"{weights} lacks {len(missing)} of the model's weights: {missing[:5]}", "download it again"
        )
    name = spec if _is_hub_name(spec) or spec == MINIATURE_LIKENESS else folder.name
    return Dinov2Encoder(
        model, _dinov2_preprocess(folder, int(config["image_size"])), name, sha256_file(weights), device
    )


def is_likeness(spec: str) -> bool:
    """Whether a spec names a DINOv2 encoder instead of a scorer."""
    folder = _likeness_folder(spec)
    return ((folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()) or (
        _is_hub_name(spec)
    )


def open_clip_tokenizer(context_length: int) -> Any:
    """CLIP's tokenizer, with open_clip's vocabulary."""
    return open_clip.SimpleTokenizer(context_length=context_length)


def check_likeness(spec: str) -> None:
    """Check the spec of a likeness encoder before it is loaded. Raises ModelFileError."""
    if spec == "clip":
        return
    folder = _likeness_folder(spec)
    if not folder.is_dir():
        if _is_hub_name(spec):
            return
        raise ModelFileError(
            f"no likeness encoder {spec!r}",
            "give clip, the folder of a transformers Dinov2Model, or a hub name such as facebook/dinov2-small",
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") != "dinov2":
        raise ModelFileError(
            f"{folder} holds {config.get('model_type')!r}, not a dinov2 model",
            "give the folder of a Dinov2Model",
        )
    check_safetensors(folder / "model.safetensors")


def _is_hub_name(spec: str) -> bool:
    """Whether a spec has the form org/name and no such path exists in the current folder."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec)) and not Path(spec).exists()


def _likeness_folder(spec: str) -> Path:
    return MINIATURE_WEIGHTS / MINIATURE_LIKENESS if spec == MINIATURE_LIKENESS else Path(spec).expanduser()


def _dinov2_preprocess(folder: Path, image_px: int) -> dict[str, Any]:
    """From preprocessor_config.json in the folder; if missing, ImageNet's mean and std and the model's image size."""
    path = folder / "preprocessor_config.json"
    given = read_json(path) if path.is_file() else {}
    resize, crop = given.get("size", {}), given.get("crop_size", {})
    return {
        "resize_px": int(resize.get("shortest_edge", resize.get("height", image_px))),
        "crop_px": int(crop.get("height", image_px)),
        "mean": given.get("image_mean", [0.485, 0.456, 0.406]),
        "std": given.get("image_std", [0.229, 0.224, 0.225]),
    }


def _default_weights(model: str) -> str:
    if model in DEFAULT_WEIGHTS:
        return DEFAULT_WEIGHTS[model]
    raise ModelFileError(
        f"the weights of {model} are not given",
        f"write {model}:FILE or {model}:TAG (tags: {tags_shown(model)})",
    )


def _tag_or_file(model: str, weights: str) -> tuple[str | None, Path | None]:
    """The tag of the weights, if known, and their file, unless the tag decides it."""
    path = Path(weights).expanduser()
    by_tag = bool(get_pretrained_cfg(model, weights))
    if not by_tag and not path.is_file():
        hint = f"its tags: {tags_shown(model)}"
        raise ModelFileError(f"{weights} is neither a file nor a tag of {model}", hint)
    tag = weights if by_tag else tag_in_name(model, path) or tag_of_sha(model, sha256_file(path))
    check_quick_gelu(model, tag, weights)
    return tag, None if by_tag else path


def _load_named(model: str, weights: str, device: str | torch.device) -> OpenClipScorer:
    tag, path = _tag_or_file(model, weights)
    path = path or file_of_tag(model, weights)
    facts = facts_of_tag(model, tag) if tag else {}
    preprocess = {key: facts[key] for key in PREPROCESS_KEYS if key in facts}
    network = _create(model, path, preprocess)
    assumed = "" if tag else f"{path.name}: mean, std and activation are assumed; {_after_a_tag(model)}"
    return OpenClipScorer(
        network, _tokenizer(model), f"{model}:{tag or path.name}", sha256_file(path), device, assumed
    )


def _after_a_tag(model: str) -> str:
    tags = tags_shown(model)
    return (
        f"name the file after its tag ({tags})" if tags != "none" else "open_clip has no tag for this model"
    )


def _folder_weights(folder: Path) -> Path:
    """The weights file of an open_clip folder."""
    if not (folder / "open_clip_config.json").is_file():
        hint = "give a folder with open_clip_config.json and open_clip_model.safetensors"
        if (folder / "config.json").is_file():
            hint = "it is in the transformers layout; " + hint
        raise ModelFileError(f"{folder} is not an open_clip folder", hint)
    weights = folder / "open_clip_model.safetensors"  # open_clip prefers this one
    if not weights.is_file():
        raise ModelFileError(f"{folder} has no weights", "add open_clip_model.safetensors")
    return weights


def _load_folder(folder: Path, name: str, device: str | torch.device) -> OpenClipScorer:
    weights = _folder_weights(folder)
    source, config = f"local-dir:{folder}", folder / "open_clip_config.json"
    told = {"mean", "std"} <= read_json(config).get("preprocess_cfg", {}).keys()
    assumed = "" if told else f"{config}: mean and std are assumed; give them as preprocess_cfg"
    return OpenClipScorer(
        _create(source, weights, {}), _tokenizer(source), name, sha256_file(weights), device, assumed
    )


def _create(model: str, weights: Path, preprocess: dict[str, Any]) -> Any:
    """The network with loaded weights. Raises ModelFileError. ``model`` is a name or local-dir:FOLDER."""
    if weights.suffix == ".safetensors":
        check_safetensors(weights)
    by_file = {} if model.startswith("local-dir:") else {"pretrained": str(weights)}
    try:
        network = open_clip.create_model(
            model, require_pretrained=True, weights_only=True, force_preprocess_cfg=preprocess, **by_file
        )
    except Exception as error:  # open_clip raises many types of errors
        if is_out_of_memory(error):
            raise
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelFileError(
            f"{weights} cannot be loaded as {model}: {why}",
            "give the open_clip file of this model, as .safetensors",
        ) from error
    scale = float(network.logit_scale.detach().float())
    if abs(scale - INIT_LOGIT_SCALE) < 1e-5:
        raise ModelFileError(f"{weights} holds a model that was never trained", "give trained weights")
    return network


def _tokenizer(model: str) -> Any:
    try:
        return open_clip.get_tokenizer(model)
    except Exception as error:  # the hub is unreachable, or files are missing
        raise ModelFileError(
            f"the tokenizer of {model} cannot be loaded: {error}", "choose another model"
        ) from error
