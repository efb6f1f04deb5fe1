"""Stand-ins for what a front end needs beside its own code: its user interface, and the package toml."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
from types import ModuleType
from typing import Any

import tomlkit


class Anything:
    """A stand-in for everything of a module that is not installed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __enter__(self) -> Anything:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __bool__(self) -> bool:
        return False


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
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
        module.__getattr__ = lambda name: Anything if name[:1].isupper() else Anything()  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def toml_module() -> ModuleType:
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
