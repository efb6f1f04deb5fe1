"""sample_prompts in every form that sd-scripts reads, and what is said of what it cannot draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.train.promptfile import SamplePrompt, SamplePrompts, sample_prompts
from trainer.config import TrainConfig
from trainer.settings import check_value

CAT = SamplePrompt("a cat", "bad", 64, 512, 7, 30, 7.5)


def read(text: str, **settings: object) -> SamplePrompts:
    return sample_prompts(TrainConfig(sample_prompts=text, **settings))  # type: ignore[arg-type]


def lines_of(tmp_path: Path, content: bytes, name: str = "p.txt") -> SamplePrompts:
    (tmp_path / name).write_bytes(content)
    return read(str(tmp_path / name))


FORMS = {
    "p.txt": b"a cat --w 64 --d 7 --n bad\n",
    "marked.txt": b"\xef\xbb\xbf# a remark\r\n\r\na cat --W 64 --d 7 --n bad\r\n",
    "p.toml": b'[prompt]\nwidth = 64\nnegative_prompt = "bad"\n[[prompt.subset]]\nprompt = "a cat"\nseed = 7\n',
    "p.json": b'[{"prompt": "a cat", "width": 64, "seed": 7, "negative_prompt": "bad", "enum": 3}]',
    "lines.json": b'["a cat --w 64 --d 7 --n bad"]',
}


@pytest.mark.parametrize("name", FORMS)
def test_sample_prompts_are_read_in_all_of_kohyas_forms(tmp_path: Path, name: str) -> None:
    assert lines_of(tmp_path, FORMS[name], name).prompts == (CAT,)


def test_prompts_can_stand_in_the_settings_themselves() -> None:
    line = "a cat --w 64 --d 7 --n bad"
    for value in (line, f"\n{line}\n# remark\n", [line], [{"prompt": "a cat", "width": 64, "seed": 7,
                                                             "negative_prompt": "bad"}]):  # fmt: skip
        assert read(check_value("sample_prompts", value)).prompts == (CAT,)
    assert len(read(check_value("sample_prompts", ["a cat", "a dog\n--w 64"])).prompts) == 2
    assert len(read("[masterpiece] a cat in the rain").prompts) == 1


def test_every_finding_of_a_file_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    content = (
        b"zed man --ss euler_a --w 64\nzed man--w 64\nzed man --w 513 --h 1\n --w 64 --h 64\n"
        b"zed --qq 3 --w x\nzed --w 9000 --d 99999999999999999999 --l 500\nzed --s 5000\n"
    )
    found = lines_of(tmp_path, content)
    told = [line.removeprefix(f"{tmp_path}/p.txt, ") for line in found.findings]
    assert told == [
        "line 2 '--w 64' has no space before it: drawn as text, as in sd-scripts",
        "line 3 width 513 becomes 512: a multiple of 8, at least 64",
        "line 3 height 1 becomes 64: a multiple of 8, at least 64",
        "line 4 has flags without a prompt: left out; write them at the end of the prompt's line",
        "line 5 --w x: width is not a number: ignored",
        "line 6 is left out: width 9000 is outside 8 to 8192, seed 99999999999999999999 is outside 0 to "
        "9223372036854775807, scale 500 is outside 1 to 100",
        "line 7 sample_steps 5000 becomes 1000 (1 to 1000)",
        "line 1: --ss is ignored: samples are drawn with DPM-Solver++ (2M)",
        "line 5: --qq is unknown and ignored, as by sd-scripts (known: --w --h --d --s --l --n)",
    ]
    assert [(prompt.prompt, prompt.width, prompt.height) for prompt in found.prompts] == [
        ("zed man", 64, 512),
        ("zed man--w 64", 512, 512),
        ("zed man", 512, 64),
        ("zed", 512, 512),
        ("zed", 512, 512),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"# only a remark\n", "has no prompts"),
        ("p.txt", b"\xff\xfea\x00", "not a text in UTF-8"),
        ("p.toml", b"prompt = 3\n", "no table [prompt]"),
        ("p.toml", b"prompt = ", "not a .toml file"),
        ("p.json", b'{"prompt": "x"}', "not a list of prompts"),
        ("p.json", b'[{"prompt": 3}, 4]', "prompt = 3 is not a text"),
        ("p.json", b'[{"prompt": "x", "width": "64"}]', "width = 64 is not a whole number"),
    ],
)
def test_a_broken_file_is_a_warning(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    found = lines_of(tmp_path, content, name)
    assert found.prompts == () and said in found.findings[0]


def test_a_file_that_is_not_here_and_no_file_at_all_are_warnings() -> None:
    assert "absent.txt does not exist" in read("absent.txt").findings[0]
    assert "D:\\p.txt is a Windows path" in read("D:\\p.txt").findings[0]
    assert "sample_prompts is not set" in read("", sample_every_n_epochs=1).findings[0]
    assert read("") == SamplePrompts()


def test_a_prompt_without_a_size_has_that_of_the_training() -> None:
    (prompt,) = read("a cat", resolution=640, resolution_height=390).prompts
    assert (prompt.width, prompt.height) == (640, 384)  # rounded down to a multiple of 8
    (prompt,) = read("a cat --h 128", resolution=650).prompts
    assert (prompt.width, prompt.height) == (648, 128)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (f"a dog\na cat --d {'9' * 5000}\n".encode(), "p.txt"),
        (f'["a dog", {{"prompt": "a cat", "scale": {"9" * 400}}}]'.encode(), "p.json"),
    ],
)
def test_a_number_that_is_too_large_leaves_out_its_prompt_only(
    tmp_path: Path, content: bytes, name: str
) -> None:
    found = lines_of(tmp_path, content, name)
    assert [prompt.prompt for prompt in found.prompts] == ["a dog"]
    assert "2 is left out: it has a number that is too large" in found.findings[0]


@pytest.mark.parametrize("name", ["a" * 300, "a\0b.txt"])
def test_what_cannot_be_the_name_of_a_file_ends_no_training(name: str) -> None:
    found = read(name)
    assert not found.prompts and "no sample images are drawn" in found.findings[0]
