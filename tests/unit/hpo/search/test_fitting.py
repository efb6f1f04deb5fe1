"""What is planned before the first trial of a search: said, applied from the start, refused where nothing fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpo.search import fitting, remedies
from hpo.search import trial as trials
from hpo.search.workbench import Workbench
from hpo.study.config import StudyConfig, build_study
from tests.pretendcard import GB, pretend_card
from tests.tiny import save_folder, tiny_base
from tests.tiny_search import STUDY, Recorder, draw_images, tiny_bench, tiny_study
from trainer.errors import ConfigError, OutOfMemory
from trainer.files import read_records
from trainer.loop import loop
from trainer.memory import base_facts, predict


def study_of(high: int = 4) -> StudyConfig:
    space = {"train_batch_size": {"low": 1, "high": high}}
    train = {"gradient_checkpointing": False, "mixed_precision": "no"}
    return tiny_study({"train": train, "space": space, "baseline": {"train_batch_size": high}})


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    torch.set_num_threads(1)
    found = tiny_bench(tmp_path / "study", draw_images(tmp_path / "images"), study_of())
    save_folder(tiny_base("sd15"), tmp_path / "base")
    found.base_spec = str(tmp_path / "base")
    found.folder.root.mkdir(exist_ok=True)
    return found


def card_of(bench: Workbench, monkeypatch: pytest.MonkeyPatch, usable: int) -> Recorder:
    """The search begins on a GPU with so many bytes; what it says."""
    monkeypatch.setattr(remedies, "usable_bytes", lambda base: (usable, 0))
    vars(bench).pop("remedies", None)  # as in a new process
    view = Recorder()
    fitting.say_fit(bench, view.say, fresh=True)
    return view


def test_networks_that_leave_the_card_do_not_count(bench: Workbench) -> None:
    with pretend_card(16 * GB):
        bench.base.to("cuda")
        scorer = torch.nn.Linear(1000, 1000)
        bench.base.card.add(scorer.to("cuda"), "scorer")
        resident = torch.cuda.memory_allocated()
        assert resident >= bench.base.card.resident_bytes() > 4_000_000
        kept = torch.zeros(10_000_000, dtype=torch.uint8, device="cuda")
        found = remedies.usable_bytes(bench.base)
        assert found is not None
        _, others = found
        assert len(kept) <= others < len(kept) + 1_000_000  # and the rounding of every tensor
        bench.base.to("cpu")
    facts, config = base_facts(bench.base_spec), bench.config(bench.study.baseline, 0)
    needed = remedies.Card(16 * GB, others, facts).needed_bytes(config)
    assert needed == predict(config, facts).peak_bytes + others


def test_nothing_is_said_on_a_cpu_or_where_everything_fits(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = Recorder()
    fitting.say_fit(bench, view.say, fresh=True)
    assert view.lines == []
    (line,) = card_of(bench, monkeypatch, 10**12).lines
    assert line.startswith("planning memory for 1000.0 GB")


def test_the_corner_that_needs_a_remedy_is_named_and_its_trial_begins_with_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the peaks of a base of this size hardly differ: 1 GB for every image instead
    monkeypatch.setattr(
        remedies.Card, "needed_bytes", lambda self, config: config.images_at_once * 10**9 + config.network_dim
    )
    view = card_of(bench, monkeypatch, 2_500_000_000)
    (line,) = view.lines[1:]
    assert "train_batch_size 4" in line and "computed with 2 images at once" in line
    seen = []
    train = loop.train

    def watched(config: object, *rest: object) -> object:
        seen.append(config)
        return train(config, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train", watched)
    for number, (batch, micro, remedy) in enumerate([(4, 2, "2 images at once"), (1, None, "")]):
        folder = bench.folder.trial(number)
        folder.root.mkdir()
        values = {"train_batch_size": batch, "max_train_steps": 1}
        config = bench.config(bench.study.baseline, number).with_values(values)
        adapter, said = trials._trained(bench, folder, config, Recorder())
        adapter.remove()
        assert said == remedy and seen[-1].micro_batch_size == micro  # type: ignore[attr-defined]
    assert len(seen) == 2  # neither ran out of memory first
    (row,) = read_records(bench.folder.trial(0).starts)
    assert row["event"] == "remedy" and row["remedies"] == ["batch 2"] and "GB are predicted" in row["why"]


def test_a_space_that_cannot_fit_is_refused_with_the_settings_to_change(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B5 · weight 1 · The settings of a search cannot fit into the GPU's memory → It is said before the first
    trial, with the settings to change.
    """
    with pytest.raises(ConfigError, match=r"no trial of this space fits into 0\.4 GB") as caught:
        card_of(bench, monkeypatch, 400_000_000)  # CUDA itself needs more
    assert "GPU with more memory" in caught.value.hint
    view = Recorder()
    fitting.say_fit(bench, view.say, fresh=False)  # a study that was begun goes on
    assert any(line.startswith("warning: ") for line in view.lines)


def test_a_corner_that_does_not_fit_is_said_with_the_range_that_does(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = remedies.Card(10**12, 0, base_facts(bench.base_spec))

    def by_rank(self: remedies.Card, config: object) -> int:
        return config.network_dim * 10**9 // (1 + config.gradient_checkpointing)  # type: ignore[attr-defined]

    monkeypatch.setattr(remedies.Card, "needed_bytes", by_rank)
    card = remedies.Card(int(1.5e9), 0, card.facts)  # rank 4 needs 2 GB even with checkpointing
    fit = fitting.plan(bench.study, card, lambda text: None)
    found = [line for line in fitting.lines(bench.study, fit) if line.startswith("warning: network_dim 4")]
    assert found and "--set 'network_dim_log2={low=0, high=1}'" in found[0]
    fitting.require_room(bench.study, fit)


def test_planning_ends_in_time(bench: Workbench) -> None:
    clock = iter(range(0, 10_000, 40))
    card = remedies.Card(10**12, 0, base_facts(bench.base_spec))
    fit = fitting.plan(bench.study, card, lambda text: None, now=lambda: next(clock))
    assert len(fit.corners) == 2 and fit.left == 2
    assert "2 more corners" in fitting.lines(bench.study, fit)[-1]


def test_the_smallest_corner_is_planned_before_time_is_up(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remedies.Card, "needed_bytes", lambda self, config: config.images_at_once * 10**9)
    clock = iter(range(0, 100_000, 1000))
    space = {"train_batch_size": [4, 1, 2]}
    study = tiny_study({"space": space, "baseline": {"train_batch_size": 4}})
    card = remedies.Card(int(1.2e9), 0, base_facts(bench.base_spec))
    fit = fitting.plan(study, card, lambda text: None, now=lambda: next(clock))
    (smallest,) = fit.corners
    assert smallest.config.train_batch_size == 1 and fit.left == 5
    fitting.require_room(study, fit)  # the study is not refused


def test_of_many_corners_the_largest_are_planned_and_the_others_counted(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remedies.Card, "needed_bytes", lambda self, config: config.network_dim)
    space = {
        "train_batch_size": list(range(8, 0, -1)),  # in any order
        "network_dim_log2": {"low": 0, "high": 2},
        "gradient_checkpointing": [True, False],
        "text_encoder_lr": [1e-4, 0.0],
    }
    study = tiny_study({"space": space, "baseline": {"train_batch_size": 2, "text_encoder_lr": 0.0}})
    fit = fitting.plan(study, remedies.Card(10**12, 0, base_facts(bench.base_spec)), lambda text: None)
    assert len(fit.corners) == fitting.MOST_CORNERS and fit.left == 8 * 2 * 2 * 2 - 32
    edges = [
        (c.config.train_batch_size, c.config.network_dim, c.values["text_encoder_lr"]) for c in fit.corners
    ]
    assert (8, 4, 1e-4) in edges and (1, 1, 0.0) in edges


def test_the_largest_rank_that_fits_is_found_in_a_few_plans_and_in_time(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def by_rank(self: remedies.Card, config: object) -> int:
        asked.append(config.network_dim)  # type: ignore[attr-defined]
        return config.network_dim * 10**9  # type: ignore[attr-defined]

    monkeypatch.setattr(remedies.Card, "needed_bytes", by_rank)
    domain = {"low": 4, "high": 128, "step": 4}
    train = STUDY["train"] | {"gradient_checkpointing": True}
    study = build_study(
        "tiny", STUDY | {"train": train, "space": {"network_dim": domain}, "baseline": {"network_dim": 8}}
    )
    card = remedies.Card(31 * 10**9, 0, base_facts(bench.base_spec))  # rank 30 would fit, 28 is a step
    fit = fitting.plan(study, card, lambda text: None)
    asked.clear()
    (line,) = fitting.lines(study, fit)
    assert "--set 'network_dim={low=4, high=28, step=4}'" in line and len(set(asked)) < 8
    clock = iter(range(0, 100_000, 1000))
    assert "to leave them out" not in fitting.lines(study, fit, now=lambda: next(clock))[0]


@pytest.mark.parametrize("error", [OutOfMemory("full"), ZeroDivisionError("a bug")])
def test_a_failed_estimate_does_not_end_the_study(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from hpo.search import cost

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop, "train", fail)
    assert cost.probed_pace(bench, bench.config(bench.study.baseline, 0)) is None
    assert "peft_config" not in vars(bench.base.unet)


@pytest.mark.parametrize(
    ("former", "now"),
    [
        (["gradient_checkpointing"], "gradient_checkpointing"),
        (["gradient_checkpointing", "single images"], "single images, gradient_checkpointing"),
        (["batch 2", "batch 1", "checkpointing 3"], "single images, gradient_checkpointing of 3 blocks"),
        (["batch 2", "of a later version"], "2 images at once"),
    ],
)
def test_remedies_of_every_version_are_understood(bench: Workbench, former: list[str], now: str) -> None:
    config = bench.config(bench.study.baseline, 0)
    assert remedies.remedy_words(config, former) == now
    assert remedies.with_remedies(config, former).effective_batch_size == config.effective_batch_size
