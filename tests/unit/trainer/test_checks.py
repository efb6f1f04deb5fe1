"""One validation for all input: value, rule and hint are the same for every reader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evaluation.images.settings import SampleConfig
from evaluation.score.formula import Formula
from evaluation.score.limits import SafeguardLimits
from hpo.study.config import build_study
from hpo.study.sections import SamplingSection
from hpo.transfer.profile import read_profile
from tests.tiny_search import STUDY
from trainer.checks import Rule, check, check_known, read, same, setting
from trainer.config import TrainConfig
from trainer.data.subsets import read_dataset_file
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Section:
    steps: int = setting(20, low=1, high=1000, unit="steps")
    rate: float = setting(1.0, "how fast", low=0, low_is_excluded=True)
    side: int | None = setting(None, low=8, high=64, multiple_of=8)
    word: str = setting("one", choices=("one", "two"))
    is_on: bool = setting(False)
    seeds: tuple[int, ...] = setting((), low=0, least=1, example="[0, 1]")
    pair: tuple[str, ...] = setting(("a",), choices=(("a",), ("a", "b")), example='["a", "b"]')
    counts: Mapping[str, int] = setting({}, choices=("one", "two"), low=0, example="{ one = 1 }")
    own: str = "the caller's"


def test_what_is_right_is_taken_as_its_type() -> None:
    body = {"steps": 3.0, "rate": 2, "side": 16, "word": "two", "seeds": [0, 2.0], "counts": {"two": 1.0}}
    found = read(Section, body, "x", own="mine")
    assert found == Section(3, 2, 16, "two", False, (0, 2), ("a",), {"two": 1}, "mine")
    assert type(found.steps) is int and type(found.seeds[1]) is int
    assert type(found.rate) is int, "a number must stay as written: studies store values as texts"
    assert read(Section, {"steps": None, "side": None}, "x") == Section()
    assert Section().counts is not Section().counts


@pytest.mark.parametrize(
    ("body", "message", "hint"),
    [
        ({"stepps": 3}, "unknown key stepps in [x]", "did you mean steps?"),
        ({"qqq": 3}, "unknown key qqq in [x]", "known: steps, rate, "),
        ({"own": "y"}, "unknown key own in [x]", "known: "),
        ({"\x1b[31m": 3}, "unknown key [31m in [x]", "known: "),
        ([], "[x] is not a section", "write [x] on a line of its own"),
        (
            {"steps": "3"},
            'steps = "3" in [x] is a text, not a whole number',
            "write it without quotes: steps = 3",
        ),
        ({"steps": " 3.0"}, 'steps = " 3.0" in [x] is a text', "write it without quotes: steps = 3"),
        ({"steps": "2.5"}, "steps = '2.5' in [x] is not a number", "from 1 to 1000 steps"),
        ({"steps": ""}, "steps = '' in [x] is not a number", "from 1 to 1000 steps"),
        (
            {"rate": "1e-4"},
            'rate = "1e-4" in [x] is a text, not a number',
            "write it without quotes: rate = 1e-4",
        ),
        ({"rate": ".5"}, 'rate = ".5" in [x] is a text, not a number', "write it without quotes: rate = 0.5"),
        ({"rate": "nan"}, "rate = 'nan' in [x] is not a number", "how fast"),
        (
            {"is_on": "True"},
            'is_on = "True" in [x] is a text, not true or false',
            "write it without quotes and in lower case: is_on = true",
        ),
        ({"is_on": "false"}, 'is_on = "false" in [x] is a text', "write it without quotes: is_on = false"),
        ({"is_on": "yes"}, "is_on = 'yes' in [x] is not true or false", "write true or false"),
        ({"steps": True}, "steps = True in [x] is not a number", "from 1 to 1000 steps"),
        ({"steps": 2.5}, "steps = 2.5 in [x] is not a whole number", "from 1 to 1000 steps"),
        ({"steps": 0}, "steps = 0 in [x] is outside its limits", "from 1 to 1000 steps"),
        ({"steps": 10**400}, "in [x] is not a number", "from 1 to 1000 steps"),
        ({"rate": 0}, "rate = 0 in [x] is outside its limits", "above 0"),
        ({"rate": float("nan")}, "rate = nan in [x] is not a number", "how fast"),
        ({"side": 12}, "side = 12 in [x] is not a multiple of 8", "from 8 to 64"),
        ({"word": "tow"}, "word = tow in [x] is not known", "did you mean two?"),
        ({"word": "xxx"}, "word = xxx in [x] is not known", "choose one of one, two"),
        ({"word": 1}, "word = 1 in [x] is not a text", 'write "…"'),
        ({"is_on": 1}, "is_on = 1 in [x] is not true or false", "write true or false"),
        ({"seeds": []}, "seeds = [] in [x] is not a list of different whole numbers", "for example [0, 1]"),
        ({"seeds": [1, 1.0]}, "seeds = [1, 1.0] in [x] is not a list of different whole numbers", "[0, 1]"),
        ({"seeds": [-1]}, "seeds = [-1] in [x] is not a list of different whole numbers", "[0, 1]"),
        ({"seeds": 1}, "seeds = 1 in [x] is not a list of different whole numbers", "[0, 1]"),
        ({"pair": ["b"]}, "pair = ['b'] in [x] is not known", 'for example ["a", "b"]'),
        ({"counts": {"on": 1}}, "counts = {'on': 1} in [x] has an unknown on", "did you mean one?"),
        (
            {"counts": {"one": -1}},
            "counts = {'one': -1} in [x] is not a table of whole numbers",
            "{ one = 1 }",
        ),
        ({"counts": [1]}, "counts = [1] in [x] is not a table of whole numbers", "{ one = 1 }"),
    ],
)
def test_what_is_wrong_is_told_with_value_rule_and_remedy(body: Any, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(Section, body, "x")
    assert message in caught.value.message and hint in caught.value.hint


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(ConfigError) as caught:
        read(Section, {"seeds": ["x" * 500]}, "x")
    assert len(caught.value.message) < 200


def test_a_value_that_must_be_there_says_what_it_is() -> None:
    assert check("a", None, int | None) is None
    with pytest.raises(ConfigError, match="a must have a value") as caught:
        check("a", None, int, Rule("the rank"))
    assert caught.value.hint == "it is the rank"
    with pytest.raises(ConfigError, match="unknown thing b in here"):
        check_known("b", ("aaa",), "thing", "here")


def test_a_default_is_stated_once() -> None:
    sampling, owner = SamplingSection(), SampleConfig(8, 8)
    names = ("steps", "cfg", "sampler", "negative")
    assert [getattr(sampling, name) for name in names] == [getattr(owner, name) for name in names]
    assert (sampling.width_px, sampling.height_px, sampling.batch_size) == (None, None, None)
    study = build_study("t", {**STUDY, "sampling": {}, "study": {}})
    assert (study.score, study.limits) == (Formula(below_zero=study.score.below_zero), SafeguardLimits())
    assert study.study.seed == TrainConfig().seed
    assert same(SampleConfig, "steps").metadata["rule"].high == 1000


def in_study(folder: Path, section: str, line: str) -> None:
    name, value = line.split(" = ")
    build_study("t", {**STUDY, section: {name: int(value)}})


def in_profile(folder: Path, section: str, line: str) -> None:
    file = folder / "mine.toml"
    file.write_text(f'family = "sdxl"\n[{section}]\n{line}\n')
    read_profile(str(file))


def in_dataset(folder: Path, section: str, line: str) -> None:
    file = folder / "data.toml"
    file.write_text(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\n{line}\n')
    read_dataset_file(file)


def in_settings(folder: Path, section: str, line: str) -> None:
    name, value = line.split(" = ")
    TrainConfig().with_values({name: int(value)})


@pytest.mark.parametrize(
    ("reader", "section", "line", "hint"),
    [
        (in_study, "sampling", "steps = 0", "from 1 to 1000"),
        (in_study, "limits", "copy_rate = 2", "from 0 to 1"),
        (in_study, "score", "likeness = 0", "from 0.01 to 100"),
        (in_profile, "batch", "train_batch_size = 2000", "from 0 to 1024"),
        (in_dataset, "", "num_repeats = -1", "from 0 to "),
        (in_settings, "", "network_dim = 0", "from 1 to 1000000"),
    ],
)
def test_every_file_says_it_alike(
    tmp_path: Path, reader: Callable[[Path, str, str], None], section: str, line: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        reader(tmp_path, section, line)
    assert line in caught.value.message and "is outside its limits" in caught.value.message
    assert caught.value.hint.startswith(hint)


def test_a_study_is_read_without_torch_and_without_optuna() -> None:
    code = "import sys, hpo.study.config; print([m for m in ('torch', 'optuna', 'diffusers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
