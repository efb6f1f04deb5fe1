"""hpo evaluate and hpo compare on tiny trained runs: real files as input; a marked file and results as output."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from evaluation.images import sampling
from hpo.cli.main import main
from tests.faults.zygote import attempt
from tests.tiny_run import JUDGING, MINI_CLIP, THREE_CHECKPOINTS, loud_base
from tests.tiny_search import draw_images
from trainer.files import sha256_file
from trainer.tensorfile import load_tensors, read_header

STUDY = f"""
[study]
also = ["{MINI_CLIP}"]
{JUDGING}"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a dataset, two bases, and a run on each: out15 and outxl."""
    place = tmp_path_factory.mktemp("trained")
    here = Path.cwd()
    os.chdir(place)
    draw_images(place / "images" / "1_zkw figure", count=4)
    draw_images(place / "images" / "held_out", count=3, seed=2)
    (place / "sd15-character.toml").write_text(STUDY)
    (place / "settings.toml").write_text(THREE_CHECKPOINTS)
    for family in ("sd15", "sdxl"):
        base = loud_base(place / f"tiny-{family}", family)
        words = ("settings.toml", "--base", base.name, "--data", "images", "--device", "cpu")
        result = run("train", *words, "--output", f"out{family[2:]}")
        assert result.exit_code == 0, result.output
    yield place
    os.chdir(here)


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the runs as the current folder."""
    import shutil

    shutil.copytree(trained, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "here"


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def evaluate(*words: str) -> Result:
    return run("evaluate", *words, "--clip", str(MINI_CLIP), "--device", "cpu")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("samples/*.png"))}


def test_every_checkpoint_is_scored_and_the_chosen_one_is_marked(place: Path) -> None:
    before = {p.name: sha256_file(p) for p in (place / "out15").glob("*.safetensors")}
    result = evaluate("out15")
    assert result.exit_code == 0, result.output
    folder = place / "out15" / "zkw.run" / "evaluation"
    found = read(folder / "evaluation.json")
    rows = found["search"]["checkpoints"]
    assert [row["checkpoint"] for row in rows] == ["zkw-000001", "zkw-000002", "zkw"]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and [row["step"] for row in rows] == [2, 4, 6]
    assert [row["n_images"] for row in rows if not row["reason"]] == [4] * sum(not r["reason"] for r in rows)
    assert found["confirmation"]["prompts"] != found["search"]["prompts"]
    assert found["chosen"] in {row["checkpoint"] for row in rows}
    assert Image.open(folder / "curve.png").size == (900, 520)
    # the mark is a copy that names its source; nothing else in the folder has changed
    mark, source = place / "out15" / "best.safetensors", place / "out15" / f"{found['chosen']}.safetensors"
    metadata = read_header(mark).metadata
    assert metadata["lora_hpo_best_of"] == source.name
    assert metadata["lora_hpo_best_of_sha256"] == before[source.name] == found["chosen_file_sha256"]
    ours, theirs = load_tensors(mark), load_tensors(source)
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
    assert {p.name: sha256_file(p) for p in source.parent.glob("zkw*.safetensors")} == before
    assert "next:" not in result.output, "these settings come from no study"
    table = [
        line
        for line in result.output.splitlines()
        if line.startswith(("checkpoint ", "untrained ", "epoch "))
    ]
    assert len(table) >= 4 and all(len(line.rstrip()) <= 80 and "…" not in line for line in table)
    for words in ("untrained", "best", "chosen", found["verdict"]["word"], "4 prompts × 1 seed"):
        assert words in result.output
    figures = [f["measure"] for row in rows for f in row["beside"]]
    assert {"clip_t", "clip_i"} <= set(figures), "[study] also names another model"
    assert "extra metrics, raw" in result.output and "mini-clip" in result.output
    # a second call generates no images, gives the same result, and does not count best.safetensors as a checkpoint
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png") if p.name != "curve.png"}
    again = evaluate("out15/zkw")
    assert again.exit_code == 0 and read(folder / "evaluation.json") == found
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.png") if p.name != "curve.png"} == files


def evaluate_killed_at(chunk: int) -> None:
    """The command in a process that kills itself after the given number of chunks of images."""
    original, drawn = sampling._draw, [0]

    def killing(*args: Any, **options: Any) -> Any:
        images = original(*args, **options)
        drawn[0] += 1
        if drawn[0] == chunk:
            os.kill(os.getpid(), signal.SIGKILL)
        return images

    sampling._draw = killing
    evaluate("out15")


def test_a_killed_evaluation_goes_on_and_draws_no_finished_checkpoint_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place / "out15" / "zkw.run" / "evaluation"
    # chunks: the base with the trigger, the base as class, the first checkpoint, the second …
    assert attempt(evaluate_killed_at, 4) == -signal.SIGKILL
    kept = pictures(folder)
    assert any(name.startswith("zkw-000001") for name in kept)
    assert not any(name.startswith("zkw-000002") for name in kept)
    seen: list[bool] = []
    original = sampling._draw
    monkeypatch.setattr(sampling, "_draw", lambda *a, **o: (seen.append(True), original(*a, **o))[1])
    resumed = evaluate("out15")
    assert resumed.exit_code == 0, resumed.output
    after = pictures(folder)
    assert {name: after[name] for name in kept} == kept
    first = len(seen)
    seen.clear()
    (folder / "evaluation.json").unlink()
    import shutil

    shutil.rmtree(folder)
    whole = evaluate("out15")
    assert whole.exit_code == 0 and first == len(seen) - 3, "three chunks were there already"
    assert pictures(folder) == after


def test_a_damaged_checkpoint_has_a_place_on_the_curve_and_is_never_chosen(place: Path) -> None:
    damaged = place / "out15" / "zkw-000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-400])
    result = evaluate("out15")
    assert result.exit_code == 0, result.output
    rows = read(place / "out15/zkw.run/evaluation/evaluation.json")["search"]["checkpoints"]
    assert rows[1]["value"] is None and "incomplete" in rows[1]["reason"]


def test_files_of_another_program_are_scored_once_base_and_images_are_named(place: Path) -> None:
    foreign_lora(place)
    assert "--base" in refused(2, "does not contain its base model", "foreign").stderr
    assert (
        "--data"
        in refused(3, "the training images of zkw are unknown", "foreign", "--base", "tiny-sd15").stderr
    )
    result = evaluate("foreign", "--base", "tiny-sd15", "--data", "images")
    assert result.exit_code == 0, result.output
    assert (place / "foreign" / "best.safetensors").is_file()


def refused(code: int, message: str, *words: str) -> Result:
    result = evaluate(*words)
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[0].startswith("error: ") and message in lines[0] and lines[1].startswith("hint: "), lines
    return result


def test_what_cannot_be_evaluated_is_two_lines_and_leaves_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    refused(2, "no run found at nowhere", "nowhere")
    refused(2, "contains no LoRA file", "images")
    refused(4, "is a LoRA for SD1.5", "out15", "--base", "tiny-sdxl")
    refused(
        2, "no class word", "out15", "--data", str(plain_images(place)), "--references", "images/held_out"
    )
    assert [p for p in sorted(place.rglob("*")) if p not in before and "plain" not in str(p)] == []


def plain_images(place: Path) -> Path:
    return draw_images(place / "plain", count=4)


def test_two_runs_in_one_folder_have_to_be_named(place: Path) -> None:
    (place / "out15" / "other.safetensors").write_bytes((place / "out15" / "zkw.safetensors").read_bytes())
    assert "choose one, for example out15/other" in refused(2, "of 2 runs: other, zkw", "out15").stderr


def test_likeness_is_not_claimed_where_every_image_was_trained_on(place: Path) -> None:
    import shutil

    shutil.rmtree(place / "images" / "held_out")
    assert "--references" in refused(3, "was trained on all 4 images", "out15").stderr
    refused(3, "is also a training image", "out15", "--references", "images/1_zkw figure")
    draw_images(place / "others", count=2, seed=5)
    assert evaluate("out15", "--references", "others").exit_code == 0


def test_a_file_of_the_users_called_best_is_not_replaced(place: Path) -> None:
    own = place / "out15" / "best.safetensors"
    own.write_bytes((place / "out15" / "zkw.safetensors").read_bytes())
    content = own.read_bytes()
    refused(2, "was not written by hpo evaluate", "out15/zkw")
    assert own.read_bytes() == content


def test_two_bases_are_compared_on_the_same_prompts(place: Path) -> None:
    words = ("--clip", str(MINI_CLIP), "--device", "cpu")
    result = run("compare", "out15/zkw-000002.safetensors", "outxl", *words)
    assert result.exit_code == 0, result.output
    (folder,) = (place / "outxl" / "zkw.run" / "evaluation" / "compare").iterdir()
    found = read(folder / "compare.json")
    assert found["a"]["file"] == "zkw-000002.safetensors" and found["b"]["file"] == "zkw.safetensors"
    for name in ("prompt following", "likeness"):
        rows = {row: values[name]["mean"] for row, values in found["cosines"].items()}
        total = rows["base effect"] + rows["adapter effect"]
        assert rows["LoRA B − LoRA A"] == pytest.approx(total)
    assert any(name.startswith("clip_t ") for name in found["beside_b_minus_a"])
    assert all("per_image" not in figure for figure in found["a"]["score"]["beside"])
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    assert sheet.shape[1] == 4 * 192 + 3 * 8 + 2 * 12 and sheet.std() > 5
    for shown in ("base effect", "adapter effect", "64×64 px", "B − A", "extra metrics, raw"):
        assert shown in result.output
    tables = [line for line in result.output.splitlines() if "…" in line and "predict" not in line]
    assert len(tables) >= 8 and max(len(line.rstrip()) for line in tables) <= 80
    assert "Adapter effect: how much more LoRA B adds" in result.output
    assert "LoRA B to use: outxl/zkw.safetensors" in result.output
    assert run("compare", "out15", "nowhere", *words).exit_code == 2


def test_a_trial_is_judged_by_its_studys_prompts_references_and_sampling(place: Path) -> None:
    import shutil

    from evaluation.prompts.prompts import PromptSet, make_prompt, save_prompts

    study, trial = place / "runs" / "s", place / "runs" / "s" / "trial_0003"
    trial.mkdir(parents=True)
    shutil.copy(place / "out15" / "zkw.safetensors", trial / "lora_trial_3.safetensors")
    (trial / "params.json").write_text(json.dumps({"train": read(place / "out15/zkw.run/config.json")}))
    shutil.rmtree(place / "images" / "held_out")
    apart = place / "images" / "1_zkw figure" / "0.png"  # set apart by the study, in the training folder
    other = place / "images" / "1_zkw figure" / "1.png"
    sampling = {"width_px": 64, "height_px": 64, "steps": 2, "cfg": 1.0, "batch_size": 2, "later": 1}
    facts = {"data": "images", "references": [str(apart), str(other)], "sampling": sampling}
    (study / "study.json").write_text(json.dumps(facts))
    texts = ("{trigger} {class} a", "{trigger} {class} b")
    prompts = PromptSet(
        tuple(make_prompt(t, "altered", "zkw", "figure") for t in texts), (7,), "zkw", "figure"
    )
    save_prompts(prompts, study / "prompts.toml")
    result = evaluate("runs/s/trial_0003")
    assert result.exit_code == 0, result.output
    found = read(trial / "evaluation" / "evaluation.json")
    assert found["search"]["prompts"] == prompts.hash and found["sampling"]["cfg"] == 1.0
    assert found["references"] == [str(apart), str(other)]
    assert found["verdict"]["word"] == "no better than the untrained base" and "no better" in found["warning"]
    assert not (trial / "best.safetensors").exists(), "a trial has one LoRA: nothing to mark"


# Which definition a run is scored with


def judge(path: str, *, study: str | None = None, like: Any = None, **words: Any) -> tuple[Any, str]:
    """The judge of a run, and the printed lines."""
    from hpo.judge import judge as judges
    from hpo.judge.runfiles import find_run
    from hpo.study.config import Inputs

    inputs = Inputs(**{"base": "", "clip": str(MINI_CLIP), "device": "cpu", **words})
    said: list[str] = []
    return judges.load(find_run(Path(path)), inputs, said.append, named=study, like=like), "\n".join(said)


HARMONIC = (
    STUDY
    + """
[score]
mean = "harmonic"
"""
)


def test_regularisation_images_make_no_prompts_and_are_no_training_images_of_the_subject(place: Path) -> None:
    plain, _ = judge("out15")
    settings = read(place / "out15/zkw.run/config.json")
    for number in range(8):
        draw_images(place / "class" / f"1_figure{number}", count=1, seed=50 + number)
        (place / "class" / f"1_figure{number}" / "0.txt").write_text(f"figure of class {number}")
    (place / "out15/zkw.run/config.json").write_text(json.dumps({**settings, "reg_data_dir": "class"}))
    with_class, _ = judge("out15")
    assert sum(item.is_reg for item in with_class.data.items) > 0
    assert (
        with_class.evaluator.prompts == plain.evaluator.prompts
        and with_class.confirmation == plain.confirmation
    )
    assert with_class.safeguards.copies.features_TD.equal(plain.safeguards.copies.features_TD)
    assert with_class.watch == plain.watch


def test_limits_that_changed_judge_what_is_drawn_already(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from evaluation.score.limits import SafeguardLimits

    first, _ = judge("out15")
    lora, folder = place / "out15" / "zkw.safetensors", place / "scored"
    first.measure_anchors(place / "evaluation")
    before, by = first.score(lora, folder), first.evaluator
    assert not before.safety.broken
    monkeypatch.setattr(sampling, "_draw", None)  # generating an image fails from here on

    def limited(limits: SafeguardLimits) -> Any:
        return replace(first, evaluator=replace(by, safeguards=replace(first.safeguards, limits=limits)))

    for changed, broken in (
        (limited(SafeguardLimits(copy_rate=-1.0, diversity=0.0, shown=None)), ("copied",)),
        (limited(SafeguardLimits(copy_rate=1.0, diversity=0.0, shown=0.1)), ("shows_nothing",)),
        (replace(first, data=replace(first.data, items=first.data.items[:1])), ()),
        (replace(first, evaluator=replace(by, gauges=())), ()),
    ):
        again = changed.score(lora, folder)
        assert again.value == before.value and again.safety.broken == broken
        assert len(again.beside) == len(changed.evaluator.gauges)
        assert read(folder / "lora.json")["watch"] == changed.watch != first.watch
    metrics = folder / "metrics.json"
    written = metrics.stat().st_mtime_ns
    assert changed.score(lora, folder) == again
    assert metrics.stat().st_mtime_ns == written, "nothing has changed: read, not measured"


def test_what_had_to_be_assumed_of_another_model_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a search: both use the same function."""
    from evaluation.gauges import others

    monkeypatch.setattr(others, "self_test", lambda other, say: say(f"warning: {other.name}: assumed"))
    _, said = judge("out15")
    assert f"warning: {MINI_CLIP.name}: assumed" in said


def test_a_study_can_be_named_to_judge_by(place: Path) -> None:
    (place / "own.toml").write_text(HARMONIC)
    found, said = judge("out15", study="own.toml")
    assert found.evaluator.formula.mean == "harmonic" and "scored with the definition of own.toml" in said
    assert found.evaluator.sampling.steps == 2, "its own [sampling]"
    style, said = judge("out15", study="sd15-style")
    assert style.evaluator.formula.mean == "geometric" and "scored with the definition of sd15-style" in said
    assert (
        style.evaluator.sampling.steps == 25
        and style.evaluator.likeness.name != found.evaluator.likeness.name
    )
    assert len(style.confirmation.prompts) == 24
    (place / "greedy.toml").write_text(
        STUDY.replace(
            "counts = { train-like = 1, altered = 3 }\nseeds = [1000]",
            "counts = { altered = 60 }\nseeds = [1000]",
        )
    )
    _, said = judge("out15", study="greedy.toml")
    assert "confirmation prompts: 37 of 60 planned prompts" in said
    result = evaluate("out15", "--definition", "nothing")
    assert result.exit_code == 2 and "no study file nothing" in result.stderr


def carried_over(place: Path, output: Path, comment: str = "study s, trial 3, transferred (rules 2)") -> None:
    """A finished search, and a run in ``output`` with the settings transferred from it."""
    import shutil
    import tomllib

    study = place / "runs" / "s"
    study.mkdir(parents=True)
    facts = {"data": "images", "references": [], "sampling": {}, "inputs": {"base": "x"}}
    sections = tomllib.loads(HARMONIC)
    del sections["limits"]["shown"]  # there was no such limit when it was begun
    (study / "study.json").write_text(json.dumps({**facts, "sections": sections}))
    shutil.copytree(place / "out15", output)
    settings = read(output / "zkw.run" / "config.json")
    settings["training_comment"] = comment
    (output / "zkw.run" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("comment", ["study s, trial 3, transferred (rules 2)", "s trial 3, mapping 1"])
@pytest.mark.parametrize("output", ["runs/s/transfer/output-sdxl", "elsewhere"])
def test_a_run_with_settings_of_a_study_is_judged_as_the_study_says(
    place: Path, output: str, comment: str
) -> None:
    carried_over(place, place / output, comment)
    found, said = judge(output)
    assert found.evaluator.formula.mean == "harmonic"
    assert "scored with the definition of study s, because the settings were transferred from it" in said
    assert found.safeguards.limits.prior == 100 and len(found.evaluator.prompts.prompts) == 4
    assert found.safeguards.limits.shown is None, "so it stays off"
    named, said = judge("out15", study="runs/s")
    assert named.evaluator.formula.mean == "harmonic" and "scored with the definition of study s" in said


def test_what_follows_an_evaluation_is_the_comparison_with_the_trial_that_was_transferred(
    place: Path,
) -> None:
    import shlex
    import shutil

    from hpo.judge.evaluate import following
    from hpo.judge.runfiles import find_run
    from hpo.study.config import Inputs

    carried_over(place, place / "runs/s/transfer/output-sdxl")
    output = Path("runs/s/transfer/output-sdxl")
    assert following(find_run(output), output, Inputs(base=""), None) == "", "the LoRA of the trial is gone"
    trial = place / "runs" / "s" / "trial_0003"
    trial.mkdir()
    shutil.copy(place / "out15" / "zkw.safetensors", trial / "lora_trial_3.safetensors")
    given = Inputs(base="my base", clip="a", data=Path("b c"), device="cpu")
    words = shlex.split(following(find_run(output), output, given, None))
    assert words == ["hpo", "compare", "runs/s/trial_0003", str(output), "--clip", "a", "--base-b", "my base",
                     "--data-b", "b c", "--device", "cpu"]  # fmt: skip
    assert following(find_run(Path("out15")), Path("out15"), given, None) == ""


def test_one_checkpoint_is_no_curve(place: Path) -> None:
    for name in ("zkw-000001", "zkw-000002"):
        (place / "out15" / f"{name}.safetensors").unlink()
    result = evaluate("out15")
    assert result.exit_code == 0, result.output
    assert not (place / "out15" / "zkw.run" / "evaluation" / "curve.png").exists()
    assert "curve.png" not in result.output


def test_the_time_left_counts_only_images_that_this_call_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpo.judge import view as views

    clock = [100.0]
    monkeypatch.setattr(views.time, "monotonic", lambda: clock[0])
    pace = views.Pace(planned=30)
    pace.begin()
    assert pace.words(10) == ""
    pace.drawn(8)  # found on the disk: no time has passed
    assert pace.words(2) == ""
    clock[0] += 4.0
    pace.drawn(10)  # two images in four seconds, and twenty are left in the parts that follow
    assert pace.words(0) == "less than a minute left"
    pace.end(10)
    pace.begin()
    assert pace.words(30) == "about 1:00 left"
    pace.end(20)
    assert pace.words(0) == "a few seconds left", "the last image is drawn, but not scored"


def test_a_checkpoint_is_called_by_its_place_in_the_training() -> None:
    from hpo.judge.runfiles import label

    names = ("a-000012", "a-step00000100", "a", "best")
    assert [label(name) for name in names] == ["epoch 12", "step 100", "final", "final"]


def test_a_second_run_with_another_trigger_is_warned_of(place: Path) -> None:
    import shutil

    first, _ = judge("out15")
    _, said = judge("outxl", like=first)
    assert "trained with" not in said
    shutil.copytree(place / "images" / "1_zkw figure", place / "other" / "1_abc figure")
    _, said = judge("outxl", like=first, data=Path("other"))
    assert "zkw was trained with the trigger abc, but the prompts use zkw (from zkw)" in said
    assert "class word" not in said


def test_a_second_run_of_another_program_takes_options_of_its_own(place: Path) -> None:
    from trainer.tensorfile import to_bytes

    file = place / "outxl" / "zkw.safetensors"
    metadata = {k: v for k, v in read_header(file).metadata.items() if k.startswith("ss_")}
    (place / "foreign.safetensors").write_bytes(to_bytes(load_tensors(file), metadata))
    words = ("compare", "out15", "foreign.safetensors", "--clip", str(MINI_CLIP), "--device", "cpu")
    result = run(*words)
    assert result.exit_code == 2 and "set it with --base-b, for example" in result.stderr
    result = run(*words, "--base-b", "tiny-sdxl")
    assert result.exit_code == 3 and "--data-b" in result.stderr
    result = run(*words, "--base-b", "tiny-sdxl", "--data-b", "images")
    assert result.exit_code == 0 and "B: foreign.safetensors on tiny-sdxl" in result.output


SUBSET = """
[[datasets]]
[[datasets.subsets]]
image_dir = "{folder}"
num_repeats = 2
{more}
"""


def with_data(place: Path, name: str, **values: str) -> str:
    """A copy of the run whose settings name other images."""
    import shutil

    shutil.copytree(place / "out15", place / name)
    path = place / name / "zkw.run" / "config.json"
    path.write_text(json.dumps({**read(path), "train_data_dir": "", **values}))
    return name


def judged(path: str, **words: Any) -> tuple[list[str], str | None, str | None]:
    """What a run is judged with, without loading a model: the folders of the references, trigger, class word."""
    from hpo.judge import standard as standards
    from hpo.judge.runfiles import find_run
    from hpo.study.config import Inputs

    run, inputs = find_run(Path(path)), Inputs(**{"base": "", **words})
    config = standards.settings(run, inputs)
    data = standards.training_data(run, config, inputs)
    paths = standards.references(run, inputs, data, standards.standard(run, config, None, data))
    standards.check_unseen(run, paths, data)
    assert len(paths) == 3
    return sorted({str(path.parent) for path in paths}), data.trigger, data.class_word


def test_references_and_words_are_found_from_any_form_of_the_training_images(place: Path) -> None:
    """The kohya folder, one folder in it, dataset files that name it, and another program's LoRA."""
    expected = (["images/held_out"], "zkw", "figure")
    folder = "images/1_zkw figure"
    described = {"whole": folder, "named": folder, "absolute": str(place / folder)}
    runs = [
        with_data(place, "parent", train_data_dir="images"),
        with_data(place, "one", train_data_dir=folder),
    ]
    for name, image_dir in described.items():
        more = 'class_tokens = "zkw"' if name == "named" else ""
        (place / f"{name}.toml").write_text(SUBSET.format(folder=image_dir, more=more))
        runs.append(with_data(place, name, dataset_config=f"{name}.toml"))
    for run_name in runs:
        places, *words = judged(run_name)
        assert words == ["zkw", "figure"], run_name
        assert [Path(found).resolve() for found in places] == [place / "images" / "held_out"], run_name
    foreign_lora(place)
    for data in ("images", folder):
        assert judged("foreign", base="tiny-sd15", data=Path(data)) == expected, data
    shown = {"data": plain_images(place), "references": Path("images/held_out")}
    assert judged("foreign", base="tiny-sd15", **shown) == expected, "the LoRA's metadata name its folders"


def foreign_lora(place: Path) -> None:
    from trainer.tensorfile import to_bytes

    (place / "foreign").mkdir()
    for path in (place / "out15").glob("zkw*.safetensors"):
        metadata = {k: v for k, v in read_header(path).metadata.items() if k.startswith("ss_")}
        (place / "foreign" / path.name).write_bytes(to_bytes(load_tensors(path), metadata))


def test_what_the_files_of_another_tool_lack_is_said_once(place: Path) -> None:
    from trainer.tensorfile import to_bytes

    foreign_lora(place)
    paths = sorted((place / "foreign").glob("*.safetensors"))
    for path in paths:
        weights = {name: tensor for name, tensor in load_tensors(path).items() if not name.endswith(".alpha")}
        path.write_bytes(to_bytes(weights, read_header(path).metadata))
    found, _ = judge("foreign", base="tiny-sd15", data=Path("images"))
    said: list[str] = []
    found.say = said.append
    for path in paths:
        found.check(path)
    assert len(paths) > 1 and len(said) == 1
    assert said[0].startswith(f"warning: {paths[0].name}: no module has an alpha: readers take the rank")


def test_a_run_of_a_dataset_file_with_plain_folders_is_trained_and_judged(place: Path) -> None:
    """held_out/ lies next to the folder, the words are in the file."""
    import shutil

    shutil.copytree(place / "images" / "1_zkw figure", place / "set" / "pictures")
    shutil.copytree(place / "images" / "held_out", place / "set" / "held_out")
    (place / "set.toml").write_text(SUBSET.format(folder="set/pictures", more='class_tokens = "zkw figure"'))
    words = ("settings.toml", "--dataset", "set.toml", "--base", "tiny-sd15", "--device", "cpu")
    result = run("train", *words, "--output", "outset")
    assert result.exit_code == 0, result.output
    assert judged("outset") == (["set/held_out"], "zkw", "figure")


def test_a_folder_that_says_no_class_word_is_an_error_that_names_the_flag(place: Path) -> None:
    name = with_data(place, "plainrun", train_data_dir=str(plain_images(place)))
    result = refused(2, "no class word", name, "--references", "images/held_out")
    assert "--class" in result.stderr
    own = {"references": Path("images/held_out"), "class_word": "figure", "trigger": "zkw"}
    assert judged(name, **own) == (["images/held_out"], "zkw", "figure")


def test_a_run_that_belongs_to_no_study_is_judged_as_what_its_folder_says(place: Path) -> None:
    import shutil

    shutil.copytree(place / "images", place / "art")
    (place / "art" / "1_zkw figure").rename(place / "art" / "1_zkw style")
    found, said = judge(with_data(place, "stylish", train_data_dir="art"))
    assert found.evaluator.likeness.name.startswith("style of") and "judged as a style" in said
    assert "references: 3 images in art/held_out" in said
    assert any(prompt.text.endswith(", zkw style") for prompt in found.evaluator.prompts.prompts)
    named, said = judge("stylish", study="sd15-character.toml")
    assert not named.evaluator.likeness.name.startswith("style of") and "judged as a style" not in said


def test_a_run_with_base_weights_is_judged_on_the_base_that_it_was_trained_on(place: Path) -> None:
    (place / "first.safetensors").write_bytes((place / "out15" / "zkw.safetensors").read_bytes())
    words = (
        "settings.toml",
        "--base",
        "tiny-sd15",
        "--data",
        "images",
        "--device",
        "cpu",
        "--output",
        "second",
    )
    result = run(
        "train", *words, "--set", "base_weights=first.safetensors", "--set", "save_every_n_epochs=none"
    )
    assert result.exit_code == 0, result.output
    result = evaluate("second")
    assert result.exit_code == 0 and "merged first.safetensors into the base" in result.output, result.output
    assert "different base" not in result.output
    (place / "first.safetensors").unlink()
    result = evaluate("second")
    assert result.exit_code == 0 and "without base_weights of the run: " in result.output, result.output
    assert "trained on a different base" in result.output
