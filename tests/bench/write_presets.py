"""Write training files as the front ends of sd-scripts write them, for ``bench_presets``.

    python -m tests.bench.write_presets OUT --kohya-ss DIR --notebook FILE.ipynb … --lora-scripts DIR --window DIR

Each front end's own code runs, out of a checkout that is given: kohya_ss' ``train_model`` with each of its presets,
the cells of the Colab notebooks with each choice of their forms, and the window of lora-scripts (``parseParams``, with
node) with each choice of its forms. Nothing of theirs is part of this repository. Their user interfaces are not needed:
their modules are stand-ins that do nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import io
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tomlkit
from PIL import Image


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--kohya-ss", type=Path, help="a checkout of kohya_ss")
    parser.add_argument("--record", type=Path, help="tests/data/kohya_ss_presets.json, to be recorded anew")
    parser.add_argument("--notebook", type=Path, nargs="*", default=[], help="notebooks that write TOML")
    parser.add_argument("--lora-scripts", type=Path, help="a checkout of lora-scripts")
    parser.add_argument("--window", type=Path, help="a checkout of lora-gui-dist, the window of lora-scripts")
    arguments = parser.parse_args(words)
    out = arguments.out.absolute()
    sys.meta_path.append(_StandIns())
    sys.modules["toml"] = _toml()
    signal.signal(signal.SIGALRM, _too_long)
    if arguments.kohya_ss:
        _report("kohya_ss", _write_kohya_ss(arguments.kohya_ss.absolute(), out / "kohya_ss"))
        if arguments.record:
            _report("recorded", _record(arguments.kohya_ss.absolute(), arguments.record, out))
    for notebook in arguments.notebook:
        _report(notebook.stem, _write_notebook(notebook, out / "colab"))
    if arguments.lora_scripts and arguments.window:
        _report(
            "lora-scripts",
            _write_lora_scripts(arguments.lora_scripts, arguments.window, out / "lora-scripts"),
        )


def _too_long(*_: object) -> None:
    raise TimeoutError("a cell waits for something")


def _report(name: str, written: int) -> None:
    print(f"{name}: {written} files")


# Their code without their user interface


class _Anything:
    """A stand-in for everything of a module that is not installed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __enter__(self) -> _Anything:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __bool__(self) -> bool:
        return False


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module that nothing else finds."""

    names = (
        "gradio",
        "easygui",
        "psutil",
        "rich",
        "google",
        "IPython",
        "tkinter",
        "requests",
        "library",
        "accelerate",
    )

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: _Anything if name[:1].isupper() else _Anything()  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _toml() -> ModuleType:
    """The interface of the package toml, which all of them write with; it leaves out what is None."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(entry) for key, entry in value.items() if entry is not None}
        return [cleaned(entry) for entry in value] if isinstance(value, list | tuple) else value

    module = ModuleType("toml")
    module.dumps = lambda table: tomlkit.dumps(cleaned(table))  # type: ignore[attr-defined]
    module.dump = lambda table, file: file.write(tomlkit.dumps(cleaned(table)))  # type: ignore[attr-defined]
    module.loads = lambda text: tomlkit.parse(text).unwrap()  # type: ignore[attr-defined]
    return module


# kohya_ss


def _write_kohya_ss(checkout: Path, out: Path) -> int:
    """Each LoRA preset for SD1.5 and SDXL, opened in the window and started: its config_lora-DATE.toml, and the preset
    itself as JSON."""
    window = _KohyaSS(checkout, out / ".places")
    written = 0
    folders = (checkout / "presets" / "lora", checkout / "test" / "config")
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        preset = json.loads(path.read_text(encoding="utf-8"))
        if "LoRA_type" not in preset or preset["LoRA_type"] == "Flux1":
            continue
        if (text := window.start(preset, path.stem)) is None:
            print(f"  kohya_ss writes nothing for {path.name}")
            continue
        for folder, name, content in (
            ("toml", f"{path.stem}.toml", text),
            ("json", path.name, path.read_text("utf-8")),
        ):
            (out / folder).mkdir(parents=True, exist_ok=True)
            (out / folder / name).write_text(content, encoding="utf-8")
        written += 1
    return written


def _record(checkout: Path, file: Path, out: Path) -> int:
    """Write into a JSON list of {"preset": …} what kohya_ss writes for each, without the places of this machine."""
    window = _KohyaSS(checkout, out / ".places")
    cases = json.loads(file.read_text(encoding="utf-8"))
    for case in cases:
        text = window.start(case["preset"], "kai")
        table = tomlkit.parse(text or "").unwrap()
        case["written"] = {name: value for name, value in table.items() if str(out) not in str(value)}
    lines = ",\n".join(json.dumps(case) for case in cases)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return len(cases)


class _KohyaSS:
    """The window of kohya_ss: a preset is opened in it, and started."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        sys.path.insert(0, str(checkout))
        self.gui: Any = importlib.import_module("kohya_gui.lora_gui")
        self.common: Any = importlib.import_module("kohya_gui.common_gui")
        vars(self.gui).update(executor=_Anything(), get_executable_path=lambda *_: "accelerate")
        logging.disable()
        self.usual = _window_values(checkout / "kohya_gui")
        self.names = _parameters(checkout / "kohya_gui" / "lora_gui.py", "train_model")
        self.places = _places(folder)

    def start(self, preset: dict[str, Any], name: str) -> str | None:
        """The TOML that is written for a preset; None if it does not start."""
        places = self.places
        opened = self.common.update_my_data(dict(preset))
        fields = {field: self.usual.get(field, "") for field in self.names}
        fields |= {field: value for field, value in opened.items() if value is not None and field in fields}
        fields |= {field: str(place) for field, place in places.items()} | {
            "headless": True,
            "print_only": True,
        }
        fields["dataset_config"] = str(places["dataset_config"]) if preset.get("dataset_config") else ""
        fields |= dict.fromkeys(("reg_data_dir", "vae", "network_weights", "resume"), "") | {
            "output_name": name
        }
        shutil.rmtree(places["output_dir"])
        places["output_dir"].mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            self.gui.train_model(**fields)
        found = sorted(places["output_dir"].glob("config_lora-*.toml"))
        return found[-1].read_text(encoding="utf-8") if found else None


def _places(folder: Path) -> dict[str, Path]:
    """Files and folders that kohya_ss looks for before it starts."""
    images = folder / "images" / "10_kai figure"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        Image.new("RGB", (512, 512), (number * 60, 90, 200)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("kai, standing", encoding="utf-8")
    base, dataset = folder / "base.safetensors", folder / "dataset.toml"
    base.touch()
    dataset.write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nnum_repeats = 2\n", encoding="utf-8"
    )
    (folder / "output").mkdir(exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    return {
        "pretrained_model_name_or_path": base,
        "train_data_dir": images.parent,
        "output_dir": folder / "output",
        "logging_dir": folder / "logs",
        "dataset_config": dataset,
    }


def _parameters(path: Path, function: str) -> list[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [argument.arg for argument in node.args.args]
    raise ValueError(f"{path} has no {function}")


def _window_values(folder: Path) -> dict[str, Any]:
    """The values of the fields of the window before anything is opened: ``name = gr.Slider(value=…)``."""
    found: dict[str, Any] = {
        "learning_rate": 0.0001,
        "lr_scheduler": "cosine",
        "lr_warmup": 10,
        "lr_warmup_steps": 0,
    }
    for path in [*sorted(folder.glob("class_*.py")), folder / "lora_gui.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
                continue
            target, call = node.targets[0], node.value
            name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
            if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "gr":
                value = next((word.value for word in call.keywords if word.arg == "value"), None)
                if isinstance(value, ast.Call) and value.args:  # self.config.get("basic.epoch", 1)
                    value = value.args[-1]
                if isinstance(value, ast.Constant):
                    found.setdefault(name, value.value)
                elif isinstance(value, ast.Name) and value.id in constants:
                    found.setdefault(name, constants[value.id])
                elif isinstance(value, ast.UnaryOp) and isinstance(value.operand, ast.Constant):
                    found.setdefault(name, -value.operand.value)  # type: ignore[operator]
                else:
                    kind = call.func.attr
                    found.setdefault(name, {"Checkbox": False, "Number": 0, "Slider": 0}.get(kind, ""))
    return found


# Colab notebooks

_FORM = re.compile(r"^(\w+) *= *(.+?) *#@?\s*@?param *(\[.*?\]|\{.*?\})?", re.MULTILINE)


def _write_notebook(path: Path, out: Path) -> int:
    """The TOML that a notebook writes: with its form as it is, and with each other choice of each list."""
    cells = [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    texts = [_python("".join(cell["source"])) for cell in cells]
    texts = [text for text in texts if _WRITES.search(text) and "gen_img" not in text]
    folder = out / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, changed in _choices(texts):
        for number, text in enumerate(_run_cells(changed)):
            (folder / f"{name}-{number}.toml").write_text(text, encoding="utf-8")
            written += 1
    return written


# Cells that say something of the network, the optimizer or the training; not those that upload or draw.
_WRITES = re.compile(r"network_module *=|optimizer_type *=|[\"']network_module[\"']|train_batch_size *=")
_COMMAND = re.compile(r"^([ \t]*)[!%](?:[^\n]*\\\n)*[^\n]*$", re.MULTILINE)


def _python(cell: str) -> str:
    """A cell without commands of the shell and of the notebook, and without the start of everything."""
    return re.sub(r"^main\(\)\s*$", "", _COMMAND.sub(r"\1pass", cell), flags=re.MULTILINE)


def _choices(cells: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    yield "default", list(cells)
    for place, cell in enumerate(cells):
        for match in _FORM.finditer(cell):
            name, value, listed = match.groups()
            try:
                choices = ast.literal_eval(listed) if (listed or "").startswith("[") else []
                choices = [*choices, *([True, False] if value in ("True", "False") else [])]
                for choice in [entry for entry in choices if entry != ast.literal_eval(value)]:
                    line = match[0].replace(value, repr(choice), 1)
                    changed = [*cells[:place], cell.replace(match[0], line, 1), *cells[place + 1 :]]
                    yield f"{name}={re.sub(r'[^A-Za-z0-9.]+', '-', str(choice))[:40]}", changed
            except (SyntaxError, ValueError):
                continue


def _run_cells(cells: Sequence[str]) -> list[str]:
    """Run the cells, and return every training configuration among what they would write."""
    written: list[dict[str, Any]] = []
    toml = sys.modules["toml"]
    plain: Callable[[Any], str] = toml.dumps

    def keep(table: Any) -> str:
        written.append(table)
        return plain(table)

    toml.dumps = keep  # type: ignore[attr-defined]
    names: dict[str, Any] = {
        "__name__": "notebook",
        "open": lambda *_, **__: io.StringIO("MemTotal: 13000000 kB"),
        "print": lambda *_: None,
    }
    names["os"] = _os()
    try:
        for cell in cells:
            _run_cell(cell, names)
        _run_cell("create_config()" if "create_config" in names else "", names)
    finally:
        toml.dumps = plain  # type: ignore[attr-defined]
    return [
        plain(table)
        for table in written
        if "network_module" in json.dumps(table, default=str) and len(table) > 2
    ]


def _run_cell(cell: str, names: dict[str, Any]) -> None:
    """Run a cell; a name that an earlier cell would have set is a text. A cell that needs the Colab machine ends."""
    try:
        code = compile(re.sub(r"^import os\s*$", "", cell, flags=re.MULTILINE), "notebook", "exec")
    except SyntaxError as error:
        sys.stderr.write(f"  {error}\n")
        return
    for _ in range(40):
        try:
            signal.setitimer(signal.ITIMER_REAL, 2.0)
            exec(code, names)
            return
        except NameError as error:
            names[error.name] = _missing(str(error.name))
        except Exception as error:
            if "toml" in cell:
                sys.stderr.write(f"  {type(error).__name__}: {error}\n")
            return
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _missing(name: str) -> Any:
    """A module that an earlier cell would have imported, or a text."""
    if name in ("ast", "glob", "random", "re", "time"):
        return importlib.import_module(name)
    return "meta_lat.json" if "json" in name else ""


def _os() -> ModuleType:
    """The module os, which changes no folder and makes none."""
    import os

    module = ModuleType("os")
    module.__dict__.update(os.__dict__)
    module.chdir = module.makedirs = lambda *_, **__: None  # type: ignore[attr-defined]
    module.walk = lambda *_: iter(())  # type: ignore[attr-defined]
    return module


# lora-scripts


def _write_lora_scripts(checkout: Path, window: Path, out: Path) -> int:
    """What the window saves, with its fields as they are and with each other choice: parseParams, run by node."""
    if shutil.which("node") is None:
        print("  node is not installed")
        return 0
    script = next(
        p for p in (window / "dist" / "assets").glob("layout.*.js") if "parseParams=" in p.read_text("utf-8")
    )
    code = script.read_text(encoding="utf-8")
    start, end = code.index("const pathParams="), code.index("BasicLoraParams={")
    fields = _fields_of_window((checkout / "mikazuki" / "schema").resolve())
    forms = {name: {**fields, **change} for name, change in _changes(fields)}
    program = (
        code[start:end].rstrip(",")
        + ";const fs=require('fs');const forms=JSON.parse(fs.readFileSync(0,'utf8'));const out={};"
        "for(const n in forms){try{out[n]=parseParams(forms[n],'lora-master')}catch(e){out[n]={error:String(e)}}}"
        "console.log(JSON.stringify(out))"
    )
    answer = subprocess.run(
        ["node", "-e", program], input=json.dumps(forms), capture_output=True, text=True, check=True
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, table in json.loads(answer.stdout.splitlines()[-1]).items():
        (out / f"{name}.toml").write_text(tomlkit.dumps(table), encoding="utf-8")
        (out / f"{name}-fields.json").write_text(json.dumps(forms[name], indent=1), encoding="utf-8")
    return 2 * len(forms)


def _fields_of_window(folder: Path) -> dict[str, Any]:
    """The fields with a default value in the schema of the window."""
    found: dict[str, Any] = {}
    for name in ("shared.ts", "lora-master.ts"):
        text = (folder / name).read_text(encoding="utf-8")
        for match in re.finditer(
            r"(\w+): Schema\.\w+\([^\n]*?\.default\((\"[^\"]*\"|'[^']*'|[\w.+-]+)\)", text
        ):
            value = match[2].strip("'\"") if match[2][0] in "'\"" else json.loads(match[2])
            found[match[1]] = value
        for match in re.finditer(r"\b([a-z]\w+): Schema\.union\(\[[^\]]*\]\)\.default\(\"([^\"]*)\"\)", text):
            found[match[1]] = match[2]
    return found


_OPTIMIZERS = (
    *("AdamW", "PagedAdamW8bit", "RAdamScheduleFree", "Lion", "Lion8bit", "PagedLion8bit", "SGDNesterov"),
    *(
        "SGDNesterov8bit",
        "DAdaptation",
        "DAdaptAdam",
        "DAdaptAdaGrad",
        "DAdaptAdanIP",
        "DAdaptLion",
        "DAdaptSGD",
    ),
    *("AdaFactor", "Prodigy", "prodigyplus.ProdigyPlusScheduleFree", "pytorch_optimizer.CAME"),
)


def _changes(fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "default", {}
    yield "sdxl", {"model_train_type": "sdxl-lora", "resolution": "1024,1024"}
    lists = {
        "lycoris_algo": ["locon", "loha", "lokr", "ia3", "dylora", "glora", "diag-oft", "boft"],
        "network_module": ["networks.dylora", "networks.oft", "lycoris.kohya"],
        "lr_scheduler": ["linear", "cosine", "polynomial", "constant", "constant_with_warmup"],
        "loss_type": ["l1", "l2", "huber", "smooth_l1"],
        "mixed_precision": ["no", "fp16"],
        "optimizer_type": list(_OPTIMIZERS),
    }
    for name, choices in lists.items():
        for choice in choices:
            extra = {"network_module": "lycoris.kohya"} if name == "lycoris_algo" else {}
            yield f"{name}={choice}", {name: choice, **extra}
    for name in (
        "enable_block_weights",
        "enable_preview",
        "network_train_unet_only",
        "full_bf16",
        "sdpa",
        "color_aug",
    ):
        yield name, {name: True}
    yield "warmup", {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100}
    yield "noise", {"multires_noise_iterations": 6, "multires_noise_discount": 0.3, "min_snr_gamma": 5}


if __name__ == "__main__":
    main()
