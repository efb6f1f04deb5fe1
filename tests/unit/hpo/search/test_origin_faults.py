"""The faults of the pipeline this project replaces: one test each, which fails if the fault comes back.

That only the final epoch was scored is tested with the choice of a checkpoint
(tests/unit/evaluation/choice/test_checkpoints.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from evaluation.encoders.embed import default_scorer, load_scorer
from evaluation.gauges.preference import check_preference
from evaluation.images.sampling import initial_noise, sample
from evaluation.images.settings import SampleConfig
from evaluation.prompts.kinds import SEARCH_SEEDS
from evaluation.prompts.prompts import Prompt, PromptSet, generate, make_prompt
from evaluation.score.score import Score, composite, evaluate_adapter
from hpo.search.sampled import SearchLimits, suggest
from hpo.search.workbench import Workbench
from hpo.study.config import SHIPPED, StudyConfig, build_study, read_study
from hpo.study.result import FAILED
from hpo.study.scoring import worded
from hpo.study.space.derived import DERIVED
from hpo.study.storage import open_study
from tests.tiny import tiny_base
from tests.tiny_search import STUDY, Recorder, draw_images, make_search, tiny_bench
from trainer.adapters.adapter import inject
from trainer.adapters.metadata import CONFIG_KEY
from trainer.config import TrainConfig
from trainer.data import Dataset, Item
from trainer.errors import InvalidImages, ModelFileError, ToolError
from trainer.files import read_records
from trainer.loop import optim
from trainer.tensorfile import read_header

PROMPTS = PromptSet((Prompt("zkw cat", "cat", "altered"), Prompt("a zkw dog", "a dog", "altered")), (0, 1))
CONFIG = SampleConfig(width_px=64, height_px=64, steps=1, batch_size=2, cfg=1.0)


def evaluate(bench: Workbench, folder: Path) -> Score:
    """What a trial does once it is trained."""
    return evaluate_adapter(bench.evaluator, folder)


def listen(what: Any, method: str) -> list[str]:
    """The texts that a method is given from now on."""
    heard: list[str] = []
    original = getattr(what, method)

    def listening(texts: Any, *rest: Any, **options: Any) -> Any:
        heard.extend(texts)
        return original(texts, *rest, **options)

    vars(what)[method] = listening
    return heard


def test_the_untrained_base_cannot_win_and_no_term_rewards_being_far_from_a_constant() -> None:
    """The objective was 0.40·style + 0.30·|LPIPS − 0.40| + 0.30·max(0, 0.35 − CLIP)."""
    follows, alike = np.linspace(0, 1, 11), np.linspace(0, 1, 11)
    assert composite(np.array([1.0]), np.array([0.0]))[0] == 0
    for t in follows:
        assert (np.diff(composite(np.full(11, t), alike)) >= 0).all()
    for i in alike:
        assert (np.diff(composite(follows, np.full(11, i))) >= 0).all()


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_a_score_is_of_more_than_eight_images_of_different_prompts(file: Path) -> None:
    captions = [f"zkw girl {n}" for n in range(20)]
    items = tuple(Item(Path(f"{n}.png"), caption, 1, 64, 64, str(n)) for n, caption in enumerate(captions))
    study = worded(read_study(file), Dataset(Path("d"), items))
    made = generate(
        captions, trigger="zkw", class_word="girl", words=study.prompts.words,
        counts=study.prompts.counts or study.preset.counts, seeds=study.prompts.seeds or SEARCH_SEEDS,
        count_tokens=lambda text: len(text.split()),
    )  # fmt: skip
    assert len(made.prompts) == 16 and made.image_count >= 32


def test_pictures_are_scored_by_another_model_than_their_own_text_encoder() -> None:
    """OpenAI's ViT-B/32 scored what OpenAI's text encoder had asked for."""
    for base in ("sd15", "sdxl", "/models/base.safetensors"):
        assert default_scorer(base).split(":")[1].startswith("laion")


def test_the_scored_text_is_derived_from_the_rendered_one(tmp_path: Path) -> None:
    """The optimiser scored images against eight strings of its own, not against what was rendered."""
    prompt = make_prompt("{trigger} {class} on a beach", "altered", "zkw", "girl")
    assert (prompt.text, prompt.scored_text) == ("zkw girl on a beach", "girl on a beach")
    other = PromptSet((Prompt(prompt.text, "something else", "altered"), PROMPTS.prompts[0]), (0,))
    same = PromptSet((prompt, PROMPTS.prompts[0]), (0,))
    assert other.hash != same.hash, "a study's scored texts cannot be exchanged unnoticed"
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"))
    bench.measure_anchors(lambda text: None)
    rendered, scored = listen(bench.base, "encode_text"), listen(bench.evaluator.scorer, "text_features")
    bench.base.unet.conv_out.weight.data.mul_(1.5)
    evaluate(bench, tmp_path / "trial")
    wanted = [p.text for p in bench.prompts.prompts]
    assert [text for text in dict.fromkeys(rendered) if text] == wanted
    assert scored == [text.replace("zkw figure", "figure") for text in wanted]


def test_a_missing_scorer_is_an_error_never_a_zero(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        load_scorer(f"ViT-B-32:{tmp_path / 'absent.safetensors'}")
    for spec in ("imagereward", f"hpsv2.1:{tmp_path / 'absent.pt'}", f"pickscore:{tmp_path / 'absent'}"):
        with pytest.raises(ToolError, match=r"is requested, but"):
            check_preference(spec)


def test_a_lora_that_did_not_load_never_gets_the_bases_score(tmp_path: Path) -> None:
    """A failed load printed a warning and went on with the base."""
    data = draw_images(tmp_path / "data")
    bench = tiny_bench(tmp_path / "study", data)
    bench.measure_anchors(lambda text: None)
    adapter = inject(bench.base, bench.config(bench.study.baseline, 0))  # in place, and without effect
    with pytest.raises(ModelFileError, match="the LoRA has no effect"):
        evaluate(bench, tmp_path / "trial")
    adapter.remove()


def suggested(seed: int, study: StudyConfig) -> dict[str, Any]:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    proposed = suggest(trial, study)
    assert trial.params == proposed
    return proposed


def check_is_what_was_suggested(config: Any, proposed: dict[str, Any]) -> None:
    """Every setting that a proposal names, worked out here rather than by the space itself."""
    as_they_are = set(proposed) - {*DERIVED, "lr_scheduler", "min_snr_gamma"}
    assert {name: getattr(config, name) for name in as_they_are} == {n: proposed[n] for n in as_they_are}
    assert config.network_dim == 2 ** proposed["network_dim_log2"]
    assert config.network_alpha == proposed["network_alpha_ratio"] * config.network_dim
    if "text_encoder_lr_ratio" in proposed:
        assert config.text_encoder_lr == proposed["text_encoder_lr_ratio"] * proposed["learning_rate"]
    if "images_seen" in proposed:
        batch = config.train_batch_size * config.gradient_accumulation_steps
        assert config.max_train_steps == max(1, int(proposed["images_seen"] / batch + 0.5))
        assert config.max_train_epochs is None
    if "lr_scheduler" in proposed:
        scheduler = config.lr_scheduler
        if scheduler == "cosine_with_restarts":
            scheduler = f"{scheduler}_{config.lr_scheduler_num_cycles}"
        assert scheduler == proposed["lr_scheduler"]
        assert config.lr_warmup_steps == (0 if scheduler == "constant" else proposed["warmup_ratio"])
        assert config.min_snr_gamma == (proposed["min_snr_gamma"] or None)


@pytest.mark.parametrize("name", ["sd15-character", "sd15-style"])
def test_what_was_suggested_is_what_is_configured(name: str) -> None:
    """The optimizer became AdamW and the accumulation 3 or more, where alpha was at least 0.75 of the rank."""
    study = read_study(SHIPPED / f"{name}.toml")
    proposals = [suggested(seed, study) for seed in range(40)]
    met = {(p["network_alpha_ratio"] >= 0.75, p["optimizer_type"]) for p in proposals}
    assert met == {(high, name) for high in (True, False) for name in ("AdamW", "AdamW8bit")}
    assert {p.get("gradient_accumulation_steps", 1) for p in proposals} >= {1}
    for proposed in proposals:
        check_is_what_was_suggested(study.config(proposed), proposed)


def test_what_was_suggested_is_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the study's database to the settings in the LoRA's file and the optimizer steps that were done."""
    searched = {"optimizer_type": {"choices": ["AdamW", "Adafactor"]},
                "gradient_accumulation_steps": {"low": 1, "high": 3},
                "network_alpha_ratio": {"low": 0.75, "high": 2.0}}  # fmt: skip
    usual = {"optimizer_type": "Adafactor", "gradient_accumulation_steps": 1}
    train = {name: value for name, value in STUDY["train"].items() if name not in usual}
    parts = {"space": STUDY["space"] | searched, "baseline": STUDY["baseline"] | usual, "train": train}
    study = build_study("tiny", STUDY | parts)
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"), study)
    made: list[str] = []
    make = optim.make

    def noting(groups: list[dict[str, Any]], config: TrainConfig) -> Any:
        made.append(config.optimizer_type)
        return make(groups, config)

    monkeypatch.setattr(optim, "make", noting)
    make_search(bench, SearchLimits(4), Recorder()).run()
    found = open_study(bench.folder).get_trials(deepcopy=False)
    assert len({(t.params["optimizer_type"], t.params["gradient_accumulation_steps"]) for t in found}) >= 3
    assert made == [t.params["optimizer_type"] for t in found]
    for trial in found:
        folder = bench.folder.trial(trial.number)
        ran = TrainConfig(**json.loads(read_header(folder.lora).metadata[CONFIG_KEY]))
        check_is_what_was_suggested(ran, trial.params)
        images = sum(item.repeats for item in bench.data.items)
        batches = math.ceil(images / ran.train_batch_size)
        steps = math.ceil(batches / trial.params["gradient_accumulation_steps"])
        rows = [row for row in read_records(folder.steps) if row["event"] == "step"]
        assert len(rows) == steps * trial.params["max_train_epochs"]


def test_a_failure_is_a_failure_and_nothing_is_pruned(tmp_path: Path) -> None:
    """Failures were raised as TrialPruned, and a scorer's missing package was a score of 0."""
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"))
    search = make_search(bench, SearchLimits(1), Recorder())

    def broken(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'lpips'")

    vars(bench.evaluator.scorer)["image_features"] = broken
    with pytest.raises(ToolError, match="three trials in a row failed in the same way"):
        search.run()
    found = open_study(bench.folder).get_trials(deepcopy=False)
    assert {t.state.name for t in found} == {"FAIL"} and found[0].user_attrs["outcome"] == FAILED
    assert [t.values for t in found] == [None] * 3


def test_another_prompt_shifts_no_other_image() -> None:
    """One random generator served all prompts in a row."""
    base = tiny_base("sd15")
    more = PromptSet((Prompt("first", "first", "style"), *PROMPTS.prompts), (0, 1))
    few, many = (initial_noise(base, list(prompts.jobs), CONFIG) for prompts in (PROMPTS, more))
    assert torch.equal(few, many[2:])
    images = {(i.prompt_id, i.seed): i.pixels_HW3 for i in sample(base, more, CONFIG)}
    for image in sample(base, PROMPTS, CONFIG):
        assert (image.pixels_HW3 == images[image.prompt_id, image.seed]).all()


def test_black_images_are_no_score(tmp_path: Path) -> None:
    """Its failed trial drew black images and was scored like any other."""
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"))
    bench.measure_anchors(lambda text: None)
    bench.base.vae.decoder.conv_out.weight.data.zero_()
    bench.base.vae.decoder.conv_out.bias.data.fill_(-5)
    with pytest.raises(InvalidImages):
        evaluate(bench, tmp_path / "trial")
