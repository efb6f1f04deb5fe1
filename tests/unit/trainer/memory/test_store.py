"""Traces on disk: the same figures as fresh ones, never a stale one, and never a reason to fail."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainConfig
from trainer.memory import footprint, shipped, stacks, store
from trainer.memory.footprint import BaseFacts, Footprint, base_facts
from trainer.memory.recorder import _PURE, Recorder
from trainer.memory.traces import as_table, from_table

FORMS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "checkpoint_blocks": 2},
    {"train_batch_size": 3, "gradient_accumulation_steps": 2, "network_train_unet_only": True},
    {"full_bf16": True, "fp8_base": True, "gradient_checkpointing": True},
    {"network_type": "LoCon", "conv_dim": 4, "network_dropout": 0.1},
    {"network_type": "DoRA", "max_token_length": 150},
    {"network_type": "LoKr", "mixed_precision": "no"},
    {"network_type": "LoHa", "network_train_unet_only": True},
]


def settings(base: str = "mini-sd15", **values: Any) -> TrainConfig:
    usual = {"pretrained_model_name_or_path": base, "resolution": 64, "min_bucket_reso": 64}
    return TrainConfig().with_values(usual | values)


def forget() -> None:
    for remembered in (footprint.predict, footprint._trace, footprint._networks):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is remembered from one test to the next in this process."""
    forget()
    yield
    forget()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Footprint]:
    """What a first question about the usual settings left on disk, and its answer."""
    place = tmp_path_factory.mktemp("traced")
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(store.FOLDER, str(place))
        return place, footprint.predict(settings(), base_facts("mini-sd15"))


@pytest.fixture
def fresh(traced: tuple[Path, Footprint], folder: Path) -> Footprint:
    """The answer; what is on disk is there, in this test's own folder, and nothing is remembered."""
    shutil.copytree(traced[0], folder.parent)
    forget()
    return traced[1]


def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise AssertionError("traced again")

    monkeypatch.setattr(footprint, "_loaded_networks", refuse)


@pytest.mark.parametrize("base", ["mini-sd15", "mini-sdxl"])
def test_a_stored_trace_gives_the_figures_of_a_fresh_one(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = base_facts(base)
    fresh = [footprint.predict(settings(base, **form), facts) for form in FORMS]
    assert len(list(folder.glob("*.json.gz"))) == len(FORMS) + 1  # and the shapes of the base's tensors
    forget()
    no_tracing(monkeypatch)
    assert [footprint.predict(settings(base, **form), facts) for form in FORMS] == fresh


def test_results_remembered_while_tracing_are_what_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortcut of the recorder: the whole trace is the same without it."""
    facts = base_facts("mini-sdxl")
    networks = footprint._loaded_networks()

    def traces() -> list[Any]:
        forms = [footprint._traced_settings(settings("mini-sdxl", **form)) for form in FORMS]
        return [networks.traced(facts, form, (128, 64), footprint.compute_type(form)) for form in forms]

    short = traces()
    monkeypatch.setattr(
        Recorder, "_remembered", lambda self, function, args, kwargs: function(*args, **kwargs)
    )
    assert traces() == short and len(_PURE) == 6


def test_what_differs_only_in_rank_or_optimizer_is_not_traced_again(
    fresh: Footprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = base_facts("mini-sd15")
    no_tracing(monkeypatch)
    for values in (
        {"network_dim": 4, "network_alpha": 2},
        {"optimizer_type": "AdamW8bit"},
        {"learning_rate": 1e-5},
    ):
        footprint.predict(settings(**values), facts)
    with pytest.raises(AssertionError, match="traced again"):
        footprint.predict(settings(train_batch_size=2), facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda monkeypatch: monkeypatch.setattr(store, "versions", lambda: {"torch": "0.1"}),
        lambda monkeypatch: monkeypatch.setattr(store, "_code", lambda: "other"),
        lambda monkeypatch: monkeypatch.setattr(store, "FORMAT", 0),
    ],
    ids=["library", "our code", "format"],
)
def test_a_stale_trace_is_never_used(fresh: Footprint, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    change(monkeypatch)
    no_tracing(monkeypatch)
    with pytest.raises(AssertionError, match="traced again"):
        footprint.predict(settings(), base_facts("mini-sd15"))


def test_another_base_of_the_family_is_another_question_and_another_name_is_not(
    fresh: Footprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = base_facts("mini-sd15")
    no_tracing(monkeypatch)
    assert footprint.predict(settings(), BaseFacts("renamed", facts.family, facts.configs)) == fresh
    unet = {**facts.config("unet"), "norm_num_groups": 4}
    configs = tuple({**dict(facts.configs), "unet": json.dumps(unet)}.items())
    with pytest.raises(AssertionError, match="traced again"):
        footprint.predict(settings(), BaseFacts(facts.name, facts.family, configs))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_answer(content: bytes, change: Any) -> bytes:
    body = json.loads(gzip.decompress(content))
    change(body)
    return gzip.compress(json.dumps(body).encode())


DAMAGE = {
    "empty": lambda content: b"",
    "cut": cut,
    "a flipped byte": lambda content: content[:200] + bytes([content[200] ^ 255]) + content[201:],
    "not gzip": lambda content: b"{}",
    "not JSON": lambda content: gzip.compress(b"\xff{"),
    "a list": lambda content: gzip.compress(b"[]"),
    "deep": lambda content: gzip.compress(b"[" * 100_000),
    "no answer": lambda content: with_answer(content, lambda body: body.pop("answer")),
    "null": lambda content: with_answer(content, lambda body: body.update(answer=None)),
    "another question": lambda content: with_answer(content, lambda body: body.update(question={})),
    "no events": lambda content: with_answer(content, lambda body: body["answer"].update(events=[])),
    "an unknown block": lambda content: with_answer(
        content, lambda body: body["answer"].update(events=[10**9])
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGE.values()), ids=list(DAMAGE))
def test_a_damaged_file_is_replaced_without_a_word(
    fresh: Footprint, folder: Path, damage: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = base_facts("mini-sd15")
    sound = {path: path.read_bytes() for path in folder.iterdir()}
    trace = max(sound, key=lambda path: len(sound[path]))
    trace.write_bytes(damage(sound[trace]))
    assert footprint.predict(settings(), facts) == fresh
    assert {path: path.read_bytes() for path in folder.iterdir()} == sound
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere", "forbidden", "no home"])
def test_a_folder_that_cannot_be_used_is_ignored(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    monkeypatch.setenv(store.FOLDER, str(place))
    if kind == "a file":
        place.write_text("")
    elif kind == "a link to nowhere":
        place.symlink_to("/proc/nowhere/at/all")
    elif kind == "forbidden":
        monkeypatch.setenv(store.FOLDER, "/proc/lora-hpo")
    else:
        monkeypatch.delenv(store.FOLDER)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        assert store.cache_folder() is None
    assert footprint.predict(settings(), base_facts("mini-sd15")).peak_bytes > 0


def test_the_folder_follows_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(store.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "lora-hpo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored, as its specification says
    assert store.cache_folder() == Path.home() / ".cache" / "lora-hpo"


def test_the_folder_does_not_grow_without_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_FILES", 3)
    for number in range(6):
        assert store.stored({"n": number}, int, lambda number=number: (number, number)) == number
        os.utime(folder / sorted(folder.iterdir())[0].name)
    assert len(list(folder.iterdir())) == 3


def test_a_trace_is_the_same_after_a_way_through_json() -> None:
    networks = footprint._loaded_networks()
    found = networks.traced(
        base_facts("mini-sd15"), footprint._traced_settings(settings()), (64, 64), "bfloat16"
    )
    assert from_table(json.loads(json.dumps(as_table(found)))) == found


def test_a_plan_from_stored_traces_loads_no_torch(folder: Path) -> None:
    facts = base_facts("mini-sd15")
    stacks.choose(settings(), facts, 16 * 10**9)
    code = (
        "import sys\n"
        "from hpo.cli.main import main\n"
        "sys.argv = ['hpo', 'plan', '--base', 'mini-sd15', '--json']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert second.stdout == first.stdout and second.stderr.strip() == "False"
    body = json.loads(second.stdout)
    assert body["tried"][0] == {"settings": {}, "peak_bytes": body["given"]["peak_bytes"], "fits": True}


# Traces in the package


def usual(**values: Any) -> TrainConfig:
    return TrainConfig().with_values({"pretrained_model_name_or_path": "sdxl", "resolution": 1024} | values)


@pytest.mark.parametrize(
    "config",
    [
        usual(),
        usual(gradient_checkpointing=True, checkpoint_blocks=4),
        usual(train_batch_size=1, network_train_unet_only=True, gradient_checkpointing=True, fp8_base=True),
        usual(pretrained_model_name_or_path="sd15", resolution=512, train_batch_size=2),
    ],
    ids=["sdxl", "sdxl, 4 blocks", "sdxl, fp8", "sd15"],
)
def test_a_trace_in_the_package_equals_a_fresh_one(config: TrainConfig) -> None:
    """If it does not: traces changed, or a library of constraints.txt did. ``python -m trainer.memory.makeshipped``"""
    facts, bucket = base_facts(config.pretrained_model_name_or_path), (config.resolution, config.resolution)
    step = shipped.read(footprint.step_question(facts, config, bucket), store.versions())
    assert step == json.loads(json.dumps(footprint.fresh_step(facts, config, bucket)))
    tensors = shipped.read(footprint.tensors_question(facts), store.versions())
    assert tensors == json.loads(json.dumps(footprint.fresh_tensors(facts)))


@pytest.mark.parametrize("vram_gb", [12, 16, 24])
@pytest.mark.parametrize("unet_only", [False, True])
def test_the_first_plan_of_usual_settings_traces_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, vram_gb: int, unet_only: bool
) -> None:
    no_tracing(monkeypatch)
    config = usual(network_dim=24, optimizer_type="Prodigy", network_train_unet_only=unet_only)
    assert stacks.choose(config, base_facts("sdxl"), vram_gb * 10**9).footprint.peak_bytes < vram_gb * 10**9
    assert not folder.exists()


def test_a_damaged_package_file_is_no_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damaged = tmp_path / "shipped.xz"
    damaged.write_bytes(b"not packed")
    monkeypatch.setattr(shipped, "FILE", damaged)
    shipped._lines.cache_clear()
    try:
        question = {"what": "tensors", "settings": {}}
        assert store.stored(question, str, lambda: ("fresh", "fresh")) == "fresh"
    finally:
        shipped._lines.cache_clear()
