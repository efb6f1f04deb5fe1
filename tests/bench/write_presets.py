"""Write training files as the front ends of sd-scripts write them, for ``bench_presets``.

    python -m tests.bench.write_presets OUT --kohya-ss DIR --notebook FILE.ipynb … --lora-scripts DIR --window DIR
    python -m tests.bench.write_presets OUT --easy DIR      # with a Python that has PySide6, tomlkit and Pillow

Each front end's own code runs, out of a checkout that is given: kohya_ss' ``train_model`` with each of its presets, the
cells of Colab notebooks with each choice of their forms, the window of LoRA_Easy_Training_Scripts without a screen, and
that of lora-scripts (``parseParams``, with node), each with each choice of its forms. Nothing of theirs is part of this
repository. What kohya_ss and the notebooks import for their user interface are stand-ins that do nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.front_end_kohya_ss import record, write_kohya_ss
from tests.bench.front_end_notebooks import write_notebook
from tests.bench.front_end_standins import StandIns, toml_module
from tests.bench.front_end_windows import record_lora_scripts, write_easy, write_lora_scripts


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--kohya-ss", type=Path, help="a checkout of kohya_ss")
    parser.add_argument("--record", type=Path, help="tests/data/kohya_ss_presets.json, to be recorded anew")
    parser.add_argument("--notebook", type=Path, nargs="*", default=[], help="notebooks that write TOML")
    parser.add_argument(
        "--leave-arguments",
        action="store_true",
        help="notebooks: keep optimizer_args as they are if another optimizer is chosen",
    )
    parser.add_argument("--easy", type=Path, help="a checkout of LoRA_Easy_Training_Scripts; needs PySide6")
    parser.add_argument("--lora-scripts", type=Path, help="a checkout of lora-scripts")
    parser.add_argument("--window", type=Path, help="a checkout of lora-gui-dist, the window of lora-scripts")
    parser.add_argument(
        "--record-fields", type=Path, help="tests/data/lora_scripts_fields.json, to be recorded anew"
    )
    arguments = parser.parse_args(words)
    out = arguments.out.absolute()
    sys.meta_path.append(StandIns())
    sys.modules["toml"] = toml_module()
    signal.signal(signal.SIGALRM, _too_long)
    if arguments.kohya_ss:
        _report("kohya_ss", write_kohya_ss(arguments.kohya_ss.absolute(), out / "kohya_ss"))
        if arguments.record:
            _report("recorded", record(arguments.kohya_ss.absolute(), arguments.record, out))
    for notebook in arguments.notebook:
        written = write_notebook(notebook, out / "colab", leave_arguments=arguments.leave_arguments)
        _report(notebook.stem, written)
    if arguments.easy:
        _report("LoRA_Easy_Training_Scripts", write_easy(arguments.easy.absolute(), out / "easy"))
    if arguments.window and arguments.record_fields:
        _report("recorded", record_lora_scripts(arguments.window, arguments.record_fields))
    if arguments.lora_scripts and arguments.window:
        _report(
            "lora-scripts",
            write_lora_scripts(arguments.lora_scripts, arguments.window, out / "lora-scripts"),
        )


def _too_long(*_: object) -> None:
    raise TimeoutError("a cell waits for something")


def _report(name: str, written: int) -> None:
    print(f"{name}: {written} files")


if __name__ == "__main__":
    main()
