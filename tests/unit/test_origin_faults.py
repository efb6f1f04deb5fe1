"""The faults of the pipeline this project replaces: one test each, which fails if the fault comes back.

That only the final epoch was scored is tested with the choice of a checkpoint (tests/unit/test_checkpoints.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.embed import load_scorer
from evaluation.preference import check_preference
from evaluation.prompts import Prompt, PromptSet, generate, make_prompt
from evaluation.sampling import SampleConfig, initial_noise, sample
from evaluation.score import composite, evaluate_adapter
from hpo.claim import suggest
from hpo.folder import open_study
from hpo.result import FAILED
from hpo.search import Limits
from tests.tiny import tiny_base
from tests.tiny_search import Recorder, draw_images, make_search, tiny_bench, tiny_study
from trainer.adapter import inject
from trainer.errors import InvalidImages, ModelFileError, ToolError

PROMPTS = PromptSet((Prompt("zkw cat", "cat", "altered"), Prompt("a zkw dog", "a dog", "altered")), (0, 1))
CONFIG = SampleConfig(width_px=64, height_px=64, steps=1, batch_size=2, cfg=1.0)


def test_the_untrained_base_cannot_win_and_no_term_rewards_being_far_from_a_constant() -> None:
    """The objective was 0.40·style + 0.30·|LPIPS − 0.40| + 0.30·max(0, 0.35 − CLIP)."""
    follows, alike = np.linspace(0, 1, 11), np.linspace(0, 1, 11)
    assert composite(np.array([1.0]), np.array([0.0]))[0] == 0
    for t in follows:
        assert (np.diff(composite(np.full(11, t), alike)) >= 0).all()
    for i in alike:
        assert (np.diff(composite(follows, np.full(11, i))) >= 0).all()


def test_a_score_is_of_more_than_eight_images_of_different_prompts() -> None:
    made = generate(
        ["zkw girl"], trigger="zkw", class_word="girl", count_tokens=lambda text: len(text.split())
    )
    assert len(made.prompts) == 16 and made.image_count >= 32


def test_the_scored_text_is_derived_from_the_rendered_one() -> None:
    """The optimiser scored images against eight strings of its own, not against what was rendered."""
    prompt = make_prompt("{trigger} {class} on a beach", "altered", "zkw", "girl")
    assert (prompt.text, prompt.scored_text) == ("zkw girl on a beach", "girl on a beach")
    other = PromptSet((Prompt(prompt.text, "something else", "altered"), PROMPTS.prompts[0]), (0,))
    same = PromptSet((prompt, PROMPTS.prompts[0]), (0,))
    assert other.hash != same.hash, "a study's scored texts cannot be exchanged unnoticed"


def test_a_missing_scorer_is_an_error_never_a_zero(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        load_scorer(f"ViT-B-32:{tmp_path / 'absent.safetensors'}")
    for spec in ("imagereward", f"hpsv2.1:{tmp_path / 'absent.pt'}", f"pickscore:{tmp_path / 'absent'}"):
        with pytest.raises(ToolError, match=r"asked for"):
            check_preference(spec)


def test_a_lora_that_did_not_load_never_gets_the_bases_score(tmp_path: Path) -> None:
    """A failed load printed a warning and went on with the base."""
    data = draw_images(tmp_path / "data")
    bench = tiny_bench(tmp_path / "study", data)
    bench.measure_anchors(lambda text: None)
    adapter = inject(bench.base, bench.config(bench.study.baseline, 0))  # in place, and without effect
    with pytest.raises(ModelFileError, match="the LoRA changes nothing"):
        evaluate_adapter(
            bench.base, bench.prompts, bench.sampling, bench.references, bench.scorer, bench.likeness,
            bench.anchors, tmp_path / "trial", **bench.scoring,
        )  # fmt: skip
    adapter.remove()


def test_what_was_suggested_is_what_ran() -> None:
    """The optimizer and the accumulation were overwritten after they had been suggested."""
    import optuna

    study = tiny_study()
    for seed in range(5):
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
        proposed = suggest(trial, study)
        config = study.config(proposed)
        assert trial.params == proposed
        assert config.learning_rate == proposed["learning_rate"]
        assert config.network_dim == 2 ** proposed["network_dim_log2"]
        assert config.max_train_epochs == proposed["max_train_epochs"]


def test_a_failure_is_a_failure_and_nothing_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures were raised as TrialPruned: the sampler took them for weak settings."""
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"))
    search = make_search(bench, Limits(1), Recorder())

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the scorer broke")

    monkeypatch.setattr("evaluation.score.evaluate_adapter", broken)
    with pytest.raises(ToolError, match="three trials in a row failed alike"):
        search.run()
    found = open_study(bench.folder).get_trials(deepcopy=False)
    assert {t.state.name for t in found} == {"FAIL"} and found[0].user_attrs["outcome"] == FAILED


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
        evaluate_adapter(
            bench.base, bench.prompts, bench.sampling, bench.references, bench.scorer, bench.likeness,
            bench.anchors, tmp_path / "trial", **bench.scoring,
        )  # fmt: skip
