"""Training files as kohya_ss writes them, by its own ``update_my_data`` and ``train_model``."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import io
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import tomlkit
from PIL import Image

from tests.bench.front_end_standins import Anything


def write_kohya_ss(checkout: Path, out: Path) -> int:
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


def record(checkout: Path, file: Path, out: Path) -> int:
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
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(folder):  # kohya_ss writes logs into the current folder
            self.gui: Any = importlib.import_module("kohya_gui.lora_gui")
            self.common: Any = importlib.import_module("kohya_gui.common_gui")
        vars(self.gui).update(executor=Anything(), get_executable_path=lambda *_: "accelerate")
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
        fields |= dict.fromkeys(("reg_data_dir", "vae", "resume"), "") | {"output_name": name}
        begins_from = preset.get("network_weights") or preset.get("lora_network_weights")
        fields["network_weights"] = str(places["network_weights"]) if begins_from else ""
        places["network_weights"].touch()  # only so that kohya_ss finds it
        shutil.rmtree(places["output_dir"])
        places["output_dir"].mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(self.folder):
            self.gui.train_model(**fields)
        places["network_weights"].unlink()
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
        "network_weights": folder / "lora.safetensors",
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
