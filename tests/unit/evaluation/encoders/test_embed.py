"""Tests of evaluation.encoders.embed and evaluation.encoders.scorerfile with tiny open_clip and
DINOv2 models; no network."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants as hub_constants
from open_clip import factory, pretrained
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from evaluation.encoders import embed, scorerfile
from evaluation.encoders.answers import self_test
from evaluation.encoders.embed import (
    DEFAULT_LIKENESS,
    DEFAULT_SCORER,
    REVISIONS,
    default_likeness,
    default_scorer,
    load_likeness,
    load_scorer,
)
from trainer.errors import ConfigError, ModelFileError

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TAGS = {
    "plain_web": {"hf_hub": "someone/tiny-clip/", "mean": MEAN, "std": STD, "resize_mode": "squash"},
    "openai": {"hf_hub": "someone/tiny-openai/", "quick_gelu": True},
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = open_clip.CLIP(**CONFIG).state_dict()
    state["logit_scale"] = torch.tensor(4.6)
    return {k: v.clone().contiguous() for k, v in state.items()}


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """An open_clip folder, like that of the miniature."""
    target = tmp_path / "clip"
    target.mkdir()
    (target / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": MEAN, "std": STD}})
    )
    save_file(weights, target / "open_clip_model.safetensors")
    return target


@pytest.fixture
def named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register the models tiny-clip and tiny-clip-quickgelu with some tags in open_clip. Returns the weights file."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-clip", CONFIG)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-clip-quickgelu", {**CONFIG, "quick_gelu": True})
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", TAGS)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip-quickgelu", {"openai": TAGS["openai"]})
    return folder / "open_clip_model.safetensors"


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + n, 48, 3), dtype=np.uint8) for n in range(count)]


def test_a_folder_loads_with_its_own_mean_and_std_and_the_files_sha(folder: Path) -> None:
    scorer = load_scorer(str(folder))
    content = (folder / "open_clip_model.safetensors").read_bytes()
    assert scorer.sha == hashlib.sha256(content).hexdigest() and scorer.name == "clip"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert model.visual.preprocess_cfg["mean"] == list(MEAN)
    image = pictures(1)[0]
    theirs = model.eval().encode_image(preprocess(embed.Image.fromarray(image))[None], normalize=True)
    torch.testing.assert_close(scorer.image_features([image]), theirs.detach(), rtol=1e-5, atol=1e-6)
    text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(["a red cat"]), normalize=True)
    torch.testing.assert_close(scorer.text_features(["a red cat"]), text.detach(), rtol=1e-5, atol=1e-6)


def test_vectors_have_length_one_repeat_bitwise_and_do_not_depend_on_the_batch(folder: Path) -> None:
    scorer = load_scorer(str(folder))
    images = pictures(40)
    together = scorer.image_features(images)
    assert together.shape == (40, 8) and together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(40))
    assert together.equal(scorer.image_features(images))
    alone = torch.cat([scorer.image_features([image]) for image in images])
    assert (together - alone).abs().max() < 1e-4


def test_a_text_that_would_be_cut_is_refused(folder: Path) -> None:
    scorer = load_scorer(str(folder))
    assert scorer.text_features(["cat " * 14]).shape == (1, 8)
    with pytest.raises(ConfigError, match="17 of 16 tokens"):
        scorer.text_features(["a cat", "cat " * 15])


def test_a_file_loads_under_a_models_name_also_with_a_colon_in_its_path(named: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a:b.safetensors"
    odd.write_bytes(named.read_bytes())
    one, two = load_scorer(f"tiny-clip:{named}"), load_scorer(f"tiny-clip:{odd}")
    assert one.name == "tiny-clip:open_clip_model.safetensors" and one.sha == two.sha
    folder = tmp_path / "tiny:x"
    (tmp_path / "clip").rename(folder)
    assert load_scorer(str(folder)).sha == one.sha, "split only after a model's name"


def test_a_file_named_after_a_tag_takes_the_tags_mean_std_and_resizing(named: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny-plain-web.safetensors"
    file.write_bytes(named.read_bytes())
    scorer = load_scorer(f"tiny-clip:{file}")
    assert scorer.name == "tiny-clip:plain_web"
    facts = scorer._model.visual.preprocess_cfg
    assert tuple(facts["mean"]) == MEAN and tuple(facts["std"]) == STD and facts["resize_mode"] == "squash"


def test_what_a_file_does_not_tell_is_said_once(named: Path, tmp_path: Path) -> None:
    """A file without a known tag or sha256 gets OpenAI's mean and std, and the activation of the model."""
    said: list[str] = []
    nameless = load_scorer(f"tiny-clip:{named}")
    with pytest.raises(ModelFileError, match="cannot tell a red circle"):  # random weights
        self_test(nameless, said.append)
    (line,) = said
    assert line.startswith(
        "warning: open_clip_model.safetensors: mean, std and activation are assumed; name the file"
    )
    assert "plain_web" in line
    file = tmp_path / "tiny-plain-web.safetensors"
    file.write_bytes(named.read_bytes())
    config = named.parent / "open_clip_config.json"
    told, content = [f"tiny-clip:{file}", str(named.parent)], json.loads(config.read_text())
    for spec in told:
        assert load_scorer(spec).assumed == ""
    del content["preprocess_cfg"]["std"]
    config.write_text(json.dumps(content))
    assert "mean and std are assumed" in load_scorer(str(named.parent)).assumed
    self_test(load_scorer("mini-clip"), said.append)
    assert len(said) == 1


def test_weights_that_are_absent_are_an_error_not_a_random_scorer(folder: Path, named: Path) -> None:
    named.unlink()
    with pytest.raises(ModelFileError, match="has no weights"):
        load_scorer(str(folder))
    with pytest.raises(ModelFileError, match=r"neither a file nor a tag.*plain_web, openai"):
        load_scorer(f"tiny-clip:{named}")


def test_weights_that_were_never_trained_are_refused(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    fresh = {**weights, "logit_scale": torch.tensor(embed.INIT_LOGIT_SCALE)}
    save_file(fresh, folder / "open_clip_model.safetensors")
    with pytest.raises(ModelFileError, match="never trained"):
        load_scorer(str(folder))


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_a_file_that_was_cut_off_is_refused(folder: Path, kept: int) -> None:
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load_scorer(str(folder))


def test_a_file_in_transformers_layout_is_recognised(named: Path, tmp_path: Path) -> None:
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="the transformers layout"):
        load_scorer(f"tiny-clip:{tmp_path / 'model.safetensors'}")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelFileError, match="the transformers layout"):
        load_scorer(str(tmp_path))


def test_a_file_of_another_model_is_refused(
    named: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "other.safetensors"
    save_file({k: v for k, v in weights.items() if k != "visual.proj"}, file)
    with pytest.raises(ModelFileError, match=r"cannot be loaded as tiny-clip: .*visual\.proj"):
        load_scorer(f"tiny-clip:{file}")
    (tmp_path / "pickle.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load_scorer(f"tiny-clip:{tmp_path / 'pickle.pt'}")


def test_quick_gelu_weights_in_a_model_without_it_are_refused_by_tag_and_by_file_name(
    named: Path, tmp_path: Path
) -> None:
    file = tmp_path / "openai" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(named.read_bytes())
    for spec in ("openai", str(file)):
        with pytest.raises(ModelFileError, match="belong to tiny-clip-quickgelu"):
            load_scorer(f"tiny-clip:{spec}")
    assert load_scorer(f"tiny-clip-quickgelu:{file}").name == "tiny-clip-quickgelu:openai"
    plain = tmp_path / "plain_web.safetensors"
    plain.write_bytes(named.read_bytes())
    with pytest.raises(ModelFileError, match="belong to tiny-clip, not to tiny-clip-quickgelu"):
        load_scorer(f"tiny-clip-quickgelu:{plain}")


def test_quick_gelu_of_the_real_models_is_known() -> None:
    with pytest.raises(ModelFileError, match="belong to ViT-B-32-quickgelu"):
        load_scorer("ViT-B-32:openai")
    model, tag = DEFAULT_SCORER.split(":")
    scorerfile.check_quick_gelu(model, tag, "")
    scorerfile.check_quick_gelu("ViT-L-14-quickgelu", "openai", "")


def test_a_tag_without_network_fails_fast_with_a_hint(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    for proxy in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    start = time.monotonic()
    with pytest.raises(ModelFileError, match="tiny-clip:plain_web is not on this machine") as caught:
        load_scorer("tiny-clip:plain_web")
    assert time.monotonic() - start < 5
    assert (
        "--clip tiny-clip:/path/to/weights.safetensors" in caught.value.hint
        and "HF_ENDPOINT" in caught.value.hint
    )


def test_a_tag_in_the_hubs_cache_loads_without_network(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def cached(repository: str, name: str) -> str | None:
        asked.append(f"{repository}/{name}")
        return str(named) if name.endswith(".safetensors") else None

    monkeypatch.setattr(scorerfile, "try_to_load_from_cache", cached)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scorer = load_scorer("tiny-clip:plain_web")
    assert asked == ["someone/tiny-clip/open_clip_model.safetensors"] and scorer.name == "tiny-clip:plain_web"


def test_an_unclear_scorer_says_what_to_write(named: Path) -> None:
    for spec, says in (
        ("tiny-clip", "the weights of tiny-clip are not given.*tags: plain_web"),
        (str(named), "the model of these weights is not given.*MODEL:FILE"),
        ("ViT-Z-99:openai", "no scorer 'ViT-Z-99:openai'"),
    ):
        with pytest.raises(ModelFileError, match=says):
            load_scorer(spec)


def test_every_base_has_one_default_scorer() -> None:
    assert default_scorer("mini-sdxl") == "mini-clip"
    assert default_scorer("mini-mine") == default_scorer("/models/mini-sd15") == DEFAULT_SCORER
    assert default_scorer("sd15") == DEFAULT_SCORER
    model, tag = DEFAULT_SCORER.split(":")
    facts = pretrained.get_pretrained_cfg(model, tag)
    assert facts and not facts.get("quick_gelu"), "independent of OpenAI's weights"


# Likeness


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def test_likeness_takes_the_class_token_of_a_dinov2_folder(dinov2: Path, folder: Path) -> None:
    processor = BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.4] * 3,
        image_std=[0.3] * 3,
        resample=3,
    )
    processor.save_pretrained(dinov2)
    encoder = load_likeness(str(dinov2), load_scorer(str(folder)))
    images = pictures(3)
    pixels = torch.cat([processor(image, return_tensors="pt").pixel_values.float() for image in images])
    theirs = Dinov2Model.from_pretrained(dinov2).eval()(pixels).pooler_output
    theirs = torch.nn.functional.normalize(theirs, dim=1).detach()
    torch.testing.assert_close(encoder.image_features(images), theirs, rtol=1e-4, atol=1e-5)
    assert (
        encoder.name == "dino"
        and encoder.sha == hashlib.sha256((dinov2 / "model.safetensors").read_bytes()).hexdigest()
    )


def test_clip_as_likeness_is_the_scorers_own_image_tower(folder: Path) -> None:
    scorer = load_scorer(str(folder))
    assert load_likeness("clip", scorer) is scorer


def test_a_likeness_encoder_that_is_not_whole_is_an_error(dinov2: Path, folder: Path) -> None:
    scorer = load_scorer(str(folder))
    file = dinov2 / "model.safetensors"
    state = load_file(file)
    save_file(
        {k: v for k, v in state.items() if "attention.output" not in k}, file, metadata={"format": "pt"}
    )
    with pytest.raises(ModelFileError, match="lacks 2 of the model's weights"):
        load_likeness(str(dinov2), scorer)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load_likeness(str(dinov2), scorer)
    file.unlink()
    with pytest.raises(ModelFileError, match="does not exist"):
        load_likeness(str(dinov2), scorer)
    (dinov2 / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelFileError, match="not a dinov2"):
        load_likeness(str(dinov2), scorer)
    with pytest.raises(ModelFileError, match="no likeness encoder"):
        load_likeness("/nowhere", scorer)


def test_vectors_that_are_not_finite_are_an_error_never_a_score(folder: Path) -> None:
    scorer = load_scorer(str(folder))
    scorer._model.visual.proj.data.fill_(float("nan"))
    with pytest.raises(ModelFileError, match="not finite"):
        scorer.image_features(pictures(1))


# Known answers


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model_cfg", {"quick_gelu": True}),
        ("preprocess_cfg", {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
        ("preprocess_cfg", {"interpolation": "bilinear"}),
    ],
)
def test_another_activation_mean_or_resizing_than_the_weights_were_trained_with_is_caught(
    part: str, change: dict[str, object], tmp_path: Path
) -> None:
    target = tmp_path / "renamed"
    shutil.copytree(embed.MINIATURE_WEIGHTS / "mini-clip", target)
    self_test(load_scorer(str(target)))
    config = json.loads((target / "open_clip_config.json").read_text())
    config[part].update(change)
    (target / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="fails its known-answer test"):
        self_test(load_scorer(str(target)))


def test_a_random_network_that_looks_trained_is_caught_by_the_drawings(folder: Path) -> None:

    with pytest.raises(ModelFileError, match="cannot tell a red circle from a blue square"):
        self_test(load_scorer(str(folder)))


def test_openais_own_files_are_known_by_their_sha256_whatever_they_are_called() -> None:
    sha = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
    assert scorerfile.tag_of_sha("ViT-L-14", sha) == "openai"
    assert scorerfile.tag_of_sha("ViT-L-14", "0" * 64) is None


def test_a_hub_name_of_a_likeness_encoder_is_taken_from_the_cache(
    dinov2: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def cached(repository: str, name: str, revision: str | None = None) -> str:
        asked.append(revision)
        return str(dinov2 / name)

    monkeypatch.setattr(scorerfile, "try_to_load_from_cache", cached)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_likeness("facebook/dinov2-small", load_scorer(str(folder))).name == "facebook/dinov2-small"
    assert set(asked) == {REVISIONS[DEFAULT_LIKENESS]}, "scores stay comparable when the hub's file changes"
    monkeypatch.setattr(scorerfile, "try_to_load_from_cache", lambda repo, name, revision: None)
    with pytest.raises(
        ModelFileError, match=r"dinov2-small is not on this machine.*it judges likeness"
    ) as found:
        load_likeness(DEFAULT_LIKENESS, load_scorer(str(folder)))
    assert "--set study.likeness=clip" in found.value.hint
    with pytest.raises(ModelFileError) as found:
        load_likeness("someone/own-dino", load_scorer(str(folder)))
    assert "study.likeness" not in found.value.hint, "chosen by the user"


def test_real_bases_are_judged_by_dino_and_the_miniatures_by_their_own() -> None:
    assert (
        default_likeness("sd15", DEFAULT_SCORER)
        == default_likeness("x.safetensors", "ViT-B-32:f")
        == DEFAULT_LIKENESS
    )
    assert default_likeness("mini-sd15", "mini-clip") == "mini-likeness"
    assert default_likeness("some/folder", "mini-clip") == "clip", (
        "nothing is downloaded for the miniature's scorer"
    )
