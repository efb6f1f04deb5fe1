"""A trial's own promises: remedies change no result and are remembered; a LoRA too weak to be
seen is its settings'."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.exceptions import StorageInternalError
from safetensors.torch import load_file

from evaluation.images import images
from evaluation.images.images import Unchanged
from hpo.search import trial as trials
from hpo.search.trial import run_trial
from hpo.search.workbench import Workbench
from hpo.study.result import write_params
from tests.outofmemory import FORMS, LOST, FailingAt
from tests.tiny_search import Recorder, draw_images, tiny_bench, tiny_study
from trainer.adapters import adapter as adapters
from trainer.config import TrainConfig
from trainer.errors import DeviceLost, Interrupted, MachineError, ModelFileError
from trainer.files import append_line, read_records
from trainer.loop import loop


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    torch.set_num_threads(1)
    study = tiny_study({"train": {"gradient_checkpointing": False}})
    found = tiny_bench(tmp_path / "study", draw_images(tmp_path / "images"), study)
    found.folder.trial(0).root.mkdir(parents=True)
    return found


def settings(bench: Workbench, **values: Any) -> TrainConfig:
    return bench.config(bench.study.baseline, 0).with_values(values)


class SmallCard:
    """Refuses to train more than some images at once, or even one; ``plain``: without checkpointing. ``tried`` counts
    the images of each refused attempt."""

    def __init__(
        self,
        bench: Workbench,
        monkeypatch: pytest.MonkeyPatch,
        fits: int = 1,
        form: str = "torch",
        *,
        plain: bool = False,
    ) -> None:
        unet, forward = bench.base.unet, bench.base.unet.forward
        self.tried: list[int] = []

        def limited(sample: Any, *args: Any, **kwargs: Any) -> Any:
            too_much = len(sample) > fits or (plain and not unet.is_gradient_checkpointing)
            if too_much and torch.is_grad_enabled():
                self.tried.append(len(sample))
                raise FORMS[form]()
            return forward(sample, *args, **kwargs)

        monkeypatch.setattr(unet, "forward", limited)


def lora_of(bench: Workbench, number: int, config: TrainConfig) -> tuple[str, dict[str, torch.Tensor]]:
    """(the remedy that a trial needed, the weights in its LoRA)."""
    folder = bench.folder.trial(number)
    folder.root.mkdir(parents=True, exist_ok=True)
    result = run_trial(bench, folder, config, Recorder())
    assert result.state == "complete"
    return result.remedy, load_file(folder.lora)


@pytest.mark.parametrize(
    "dropout", [{}, {"network_dropout": 0.3}, {"rank_dropout": 0.3, "module_dropout": 0.1}]
)
def test_image_by_image_the_same_lora_is_trained(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, dropout: dict[str, float]
) -> None:
    bench.measure_anchors(lambda text: None)
    config = settings(bench, gradient_accumulation_steps=2, save_precision="float", **dropout)
    remedy, whole = lora_of(bench, 0, config)
    assert remedy == ""
    SmallCard(bench, monkeypatch)
    recomputing = config.with_values({"gradient_checkpointing": True})
    for number, settled in ((1, config), (2, recomputing)):
        remedy, split = lora_of(bench, number, settled)
        assert remedy == "single images"
        assert split.keys() == whole.keys()
        for key, weight in whole.items():
            torch.testing.assert_close(split[key], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["accelerator", "cudnn at first use", "cpu"])
def test_every_form_of_out_of_memory_splits_the_batch_and_then_recomputes(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    card = SmallCard(bench, monkeypatch, 1, form, plain=True)
    adapter, remedy = trained(bench, 0, settings(bench, max_train_steps=1))
    adapter.remove()
    assert remedy == "single images, gradient_checkpointing of 3 blocks"
    assert card.tried == [4, 2, 1]


def trained(bench: Workbench, number: int, config: TrainConfig) -> tuple[Any, str]:
    """The training of a trial without its images: the adapter, and the remedy that was needed."""
    folder = bench.folder.trial(number)
    folder.root.mkdir(parents=True, exist_ok=True)
    return trials._trained(bench, folder, config, Recorder())


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_nothing_of_a_failed_attempt_is_left_when_the_next_begins(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Memory runs out once, in the middle of a step: its tensors are gone before the retry, which trains as if
    nothing had happened.  On a CPU autograd can keep tensors of a failed backward pass (it did at the third
    convolution, not at this one), probably in the queue of this thread; a GPU has threads of its own. Not seen on a
    card yet."""
    config = settings(bench, max_train_steps=1, save_precision="float")
    whole, remedy = trained(bench, 0, config)
    expected = whole.state()
    whole.remove()
    assert remedy == ""
    operation = {"forward": "convolution", "backward": "convolution_backward", "optimizer": "_fused_adamw"}[
        place
    ]
    made: list[weakref.ref[torch.Tensor]] = []
    counts = itertools.count()

    def in_the_middle(number: int, name: str, result: Any) -> bool:
        if isinstance(result, torch.Tensor) and "_to_copy" not in name and "detach" not in name:
            made.append(weakref.ref(result))
        return operation in name and next(counts) == (0 if place == "optimizer" else 3)

    left: list[int] = []
    train = loop.train

    def again(*args: Any, **kwargs: Any) -> Any:
        left.append(sum(tensor() is not None for tensor in made))
        return train(*args, **kwargs)

    monkeypatch.setattr(loop, "train", again)
    bench.prepared(config)  # what is cached stays, of course
    with FailingAt(FORMS["torch"], in_the_middle):
        adapter, remedy = trained(bench, 1, config)
    found = adapter.state()
    adapter.remove()
    assert remedy == "2 images at once"
    assert len(left) == 2 and len(made) > 100
    assert left[1] == left[0], f"{left[1] - left[0]} tensors of the failed attempt are still there"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_a_lost_context_ends_the_process_and_the_next_one_goes_on_with_the_trial(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = bench.folder.trial(0), settings(bench)
    bench.measure_anchors(lambda text: None)
    forward, calls = bench.base.unet.forward, itertools.count()

    def lost(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and next(calls) == 1:
            raise LOST["illegal access"]()
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bench.base.unet, "forward", lost)
        with pytest.raises(DeviceLost, match="an illegal memory access was encountered"):
            run_trial(bench, folder, config, Recorder())
    assert not folder.result.exists()  # it is neither failed nor infeasible
    assert run_trial(bench, folder, config, Recorder()).state == "complete"


def test_a_later_trial_that_needs_as_much_begins_with_the_remedy(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(bench, max_train_steps=1)
    card = SmallCard(bench, monkeypatch, 2)
    for number, (rank, tried) in enumerate([(2, [4]), (4, []), (1, [4])]):  # a smaller one is tried as it is
        card.tried.clear()
        adapter, remedy = trained(
            bench, number, config.with_values({"network_dim": rank, "network_alpha": 1})
        )
        adapter.remove()
        assert (remedy, card.tried) == ("2 images at once", tried)
    rows = [row for row in read_records(bench.folder.trial(1).starts) if row["event"] == "remedy"]
    assert [(row["remedies"], row["why"]) for row in rows] == [
        (["batch 2"], "settings that need no more ran out of memory before")
    ]


def test_encoding_that_runs_out_of_memory_encodes_fewer_images_and_blames_no_trial(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = bench.base.encode_images, []

    def limited(pixels: Any, *args: Any) -> Any:
        seen.append(len(pixels))
        if len(pixels) > fits:
            raise FORMS["cudnn"]()
        return encode(pixels, *args)

    monkeypatch.setattr(bench.base, "encode_images", limited)
    fits = 0
    with pytest.raises(MachineError, match="encoding images at vae_batch_size 1"):
        bench.prepared(settings(bench, vae_batch_size=4))
    fits = 2
    seen.clear()
    assert len(bench.prepared(settings(bench, vae_batch_size=4)).latents) == 4
    assert set(seen) == {1}  # as before: what ran out once is not tried again


def test_captions_that_run_out_of_memory_do_not_lower_the_number_of_images(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise FORMS["cublas"]()

    monkeypatch.setattr(bench.base, "encode_text", full)
    with pytest.raises(MachineError, match="encodes captions"):
        bench.prepared(settings(bench, vae_batch_size=4, network_train_unet_only=True))
    assert bench._vae_batch is None


def test_the_remedy_of_an_infeasible_trial_is_kept(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallCard(bench, monkeypatch, fits=0)
    result = run_trial(bench, bench.folder.trial(0), settings(bench), Recorder())
    assert (result.state, result.reason, result.remedy) == (
        "infeasible", "out_of_memory", "single images, gradient_checkpointing",
    )  # fmt: skip


def test_an_interrupted_trial_goes_on_with_the_remedy_that_it_needed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.measure_anchors(lambda text: None)
    SmallCard(bench, monkeypatch)
    view, folder = Recorder(), bench.folder.trial(0)
    view.stop = True  # after the first step that works
    with pytest.raises(Interrupted):
        run_trial(bench, folder, settings(bench), view)
    assert list(folder.checkpoints.glob("step-*"))
    before = len([row for row in read_records(folder.starts) if row["event"] == "remedy"])
    view.stop = False
    result = run_trial(bench, folder, settings(bench), view)
    assert (result.state, result.remedy) == ("complete", "single images")
    after = [row for row in read_records(folder.starts) if row["event"] == "remedy"]
    assert len(after) == before == 2  # it did not run out of memory again
    steps = [row["step"] for row in read_records(folder.steps) if row["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_checkpoint_of_whole_batches_goes_on_image_by_image(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the remedies as earlier versions named them."""
    bench.measure_anchors(lambda text: None)
    view, folder = Recorder(), bench.folder.trial(0)
    view.stop = True
    with pytest.raises(Interrupted):
        run_trial(bench, folder, settings(bench), view)
    remedies = ["gradient_checkpointing", "single images"]
    append_line(folder.starts, json.dumps({"event": "remedy", "remedies": remedies}))
    SmallCard(bench, monkeypatch)
    view.stop = False
    result = run_trial(bench, folder, settings(bench), view)
    assert (result.state, result.remedy) == ("complete", "single images, gradient_checkpointing")
    steps = [row["step"] for row in read_records(folder.steps) if row["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1


@pytest.fixture
def unchanged(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    bench.measure_anchors(lambda text: None)
    monkeypatch.setattr(images, "SAME_WITHIN", 255)
    yield bench


def test_a_lora_in_place_that_changes_no_pixel_is_its_settings_fault(unchanged: Workbench) -> None:
    result = run_trial(unchanged, unchanged.folder.trial(0), settings(unchanged), Recorder())
    assert (result.state, result.reason, result.value) == ("infeasible", "no_effect", -1)


def test_a_lora_that_is_switched_off_is_the_tools_fault(
    unchanged: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_to = adapters.Adapter.round_to

    def switched_off(self: Any, precision: str) -> None:
        round_to(self, precision)
        layer = self.layers[0].target
        module = self.base.components()[layer.component].get_submodule(layer.path)
        module._disable_adapters = True

    monkeypatch.setattr(adapters.Adapter, "round_to", switched_off)
    result = run_trial(unchanged, unchanged.folder.trial(0), settings(unchanged), Recorder())
    assert (result.state, result.reason) == ("failed", Unchanged.__name__)


def test_a_trial_folder_that_cannot_be_made_is_a_machine_error(bench: Workbench) -> None:
    folder = bench.folder.trial(1)
    folder.root.write_text("a file in the way")
    with pytest.raises(MachineError, match="cannot write"):
        write_params(folder, {}, (), settings(bench))


def test_the_compute_type_is_a_fact_of_the_study(bench: Workbench) -> None:
    assert bench.facts()["compute type"] == "torch.float32"


def test_a_lost_connection_to_the_database_is_no_result_and_the_trial_goes_on(bench: Workbench) -> None:
    """The worker connects again and resumes; a failed trial would have been written to result.json."""
    bench.measure_anchors(lambda text: None)
    folder, calls = bench.folder.trial(0), itertools.count()

    def check(*, certain: bool = False) -> None:
        if next(calls) == 2:  # in the training
            raise StorageInternalError("the claims of the study cannot be read or written")

    with pytest.raises(StorageInternalError):
        run_trial(bench, folder, settings(bench), Recorder(), check)
    assert not folder.result.exists() and not bench.base.unet.training
    assert "failed" not in (folder.log.read_text() if folder.log.is_file() else "")
    assert run_trial(bench, folder, settings(bench), Recorder(), check).state == "complete"


def test_a_lora_of_a_trial_that_was_taken_over_may_differ_in_the_last_digits(bench: Workbench) -> None:
    """Its settings were derived anew from another space's parameters (``hpo.search.fork``)."""
    folder, config = bench.folder.trial(0), settings(bench, learning_rate=1e-3)
    saved = config.as_dict()
    assert trials._saved_remedy(folder, config, {**saved, "learning_rate": 1e-3 * (1 + 4e-16)}) == ""
    for other in (1.001e-3, None, "1e-3"):
        with pytest.raises(ModelFileError, match="different learning_rate"):
            trials._saved_remedy(folder, config, {**saved, "learning_rate": other})
