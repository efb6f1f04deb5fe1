"""Training files as the windows of LoRA_Easy_Training_Scripts (Qt) and lora-scripts (JavaScript) save them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomlkit

# LoRA_Easy_Training_Scripts


def write_easy(checkout: Path, out: Path) -> int:
    """What its window saves (MainWidget.save_toml): as it starts, with each check box, with each choice of a list."""
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    sys.path.insert(0, str(checkout))
    qt: Any = importlib.import_module("PySide6.QtWidgets")
    out.mkdir(parents=True, exist_ok=True)
    application = qt.QApplication([])
    with contextlib.chdir(checkout):
        window: Any = importlib.import_module("main_ui_files.MainUI").MainWidget()
        for subset in window.subset_widget.dataset_args.values():
            subset["image_dir"] = "images/10_kai figure"
        arguments = window.args_widget
        for field in arguments.findChildren(qt.QLineEdit):
            if field.objectName() in ("base_model_input", "output_folder_input"):
                field.setText("base.safetensors" if "base" in field.objectName() else "output")
        flux = arguments.flux_widget
        boxes = [box for box in arguments.findChildren(qt.QCheckBox) if not flux.isAncestorOf(box)]
        choices = [choice for choice in arguments.findChildren(qt.QComboBox) if not flux.isAncestorOf(choice)]
        names = set()

        def save(name: str) -> None:
            names.add(name)
            window.save_toml(out / f"{name}.toml")

        save("default")
        for box in boxes:
            if box.objectName() and box.isEnabled():
                box.click()
                save(box.objectName())
                box.click()
        for choice in (choice for choice in choices if choice.objectName() and choice.isEnabled()):
            first = choice.currentIndex()
            for index in range(choice.count()):
                choice.setCurrentIndex(index)
                text = re.sub(r"\W+", "-", choice.currentText())
                save(f"{choice.objectName()}={text}")
            choice.setCurrentIndex(first)
        algorithms = next(c for c in arguments.findChildren(qt.QComboBox) if c.objectName() == "algo_select")
        for index in range(algorithms.count()):  # check boxes of the network act with LyCORIS only
            algorithms.setCurrentIndex(index)
            for box in arguments.network_widget.findChildren(qt.QCheckBox):
                if box.objectName() and box.isEnabled():
                    box.click()
                    save(f"{re.sub(r'[^A-Za-z]+', '-', algorithms.currentText())}-{box.objectName()}")
                    box.click()
    del application
    return len(names)


# lora-scripts


def write_lora_scripts(checkout: Path, window: Path, out: Path) -> int:
    """What the window saves, with its fields as they are and with each other choice: parseParams, run by node."""
    if shutil.which("node") is None:
        print("  node is not installed")
        return 0
    fields = _fields_of_window((checkout / "mikazuki" / "schema").resolve())
    forms = {name: {**fields, **change} for name, change in _changes(fields)}
    out.mkdir(parents=True, exist_ok=True)
    for name, table in _saved(window, forms).items():
        (out / f"{name}.toml").write_text(tomlkit.dumps(table), encoding="utf-8")
        (out / f"{name}-fields.json").write_text(json.dumps(forms[name], indent=1), encoding="utf-8")
    return 2 * len(forms)


def record_lora_scripts(window: Path, file: Path) -> int:
    """Write into a JSON list of {"fields": …} what the window saves for each."""
    cases = json.loads(file.read_text(encoding="utf-8"))
    saved = _saved(window, {str(number): case["fields"] for number, case in enumerate(cases)})
    for number, case in enumerate(cases):
        case["saved"] = saved[str(number)]
    lines = ",\n".join(json.dumps(case) for case in cases)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return len(cases)


def _saved(window: Path, forms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What parseParams of the window makes of fields."""
    script = next(
        p for p in (window / "dist" / "assets").glob("layout.*.js") if "parseParams=" in p.read_text("utf-8")
    )
    code = script.read_text(encoding="utf-8")
    start, end = code.index("const pathParams="), code.index("BasicLoraParams={")
    program = (
        code[start:end].rstrip(",")
        + ";const fs=require('fs');const forms=JSON.parse(fs.readFileSync(0,'utf8'));const out={};"
        "for(const n in forms){try{out[n]=parseParams(forms[n],'lora-master')}catch(e){out[n]={error:String(e)}}}"
        "console.log(JSON.stringify(out))"
    )
    answer = subprocess.run(
        ["node", "-e", program], input=json.dumps(forms), capture_output=True, text=True, check=True
    )
    found: dict[str, dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return found


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
