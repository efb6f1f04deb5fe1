"""An import-linter contract: a room is entered by its front door.

A room is a package.  Its ``__init__.pyi`` names what other rooms may use, and modules outside the room import that
from the package itself.  A module of another room is imported only if the front door names the module as a whole.
"""

from __future__ import annotations

import ast
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class FrontDoor(Contract):
    """No module outside a room imports a module inside it that the room's front door does not name."""

    rooms = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        found = []
        rooms: list[str] = self.rooms  # type: ignore[assignment]  # a field gives its value
        for room in rooms:
            inside = {room, *graph.find_descendants(room)}
            named = {f"{room}.{module}" for module in named_modules(room)}
            for imported in sorted(inside - {room} - named):
                for importer in sorted(graph.find_modules_that_directly_import(imported) - inside):
                    found.append(f"{importer} imports {imported}: import it from {room} (its __init__.pyi)")
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["found"]:
            output.print_error(line)


def named_modules(room: str) -> set[str]:
    """The modules that a front door hands on as a whole (``from . import module as module``), or an inner room.

    A function that has its module's name counts too: in ``from room import name`` the two look alike.
    """
    stub = Path(*room.split(".")) / "__init__.pyi"
    imports = [n for n in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
    return {alias.name for n in imports for alias in n.names if n.module in (None, alias.name)}
