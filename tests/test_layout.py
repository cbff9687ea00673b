"""Imports run one way: a room imports only rooms that stand above it in the list, and no module imports a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [
    "shards.errors",
    "shards.progress",
    "shards.storage",
    "shards.shares",
    "shards.index",
    "shards.samples",
    "shards.order",
    "shards.build",
    "shards.views",
    "pipeline.settings",
    "pipeline.logs",
    "pipeline.distributed",
    "pipeline.safety",
    "pipeline.guards",
    "pipeline.attacks",
    "pipeline.config",
    "pipeline.training",
    "pipeline.evaluation",
    "pipeline.audit",
    "pipeline.doctor",
    "pipeline.cli",
]
# An optimised trigger is fitted on any CLIP that the audit can load.
EXCEPTIONS = {("pipeline/attacks/surrogate.py", "pipeline.audit")}


def room_of(module):
    return ".".join(module.split(".")[:2])


def imported(path):
    """Rooms that a module imports, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (room_of(name) for name in names if name.split(".")[0] in ("shards", "pipeline"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_stands_above_it(room):
    place = ROOT / room.replace(".", "/")
    for path in [place.with_suffix(".py")] if not place.is_dir() else sorted(place.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        for other in set(imported(path)) - {room}:
            assert ROOMS.index(other) < ROOMS.index(room) or (name, other) in EXCEPTIONS, f"{name} imports {other}"


def test_every_room_is_in_the_list():
    found = {f"{top}.{path.stem}" for top in ("shards", "pipeline") for path in (ROOT / top).iterdir()}
    assert {name for name in found if not name.endswith(("__", "README"))} == set(ROOMS)


def test_what_other_programs_import_has_one_place():
    from shards import IsSafe
    from shards.order import safe_mask

    assert IsSafe is safe_mask.IsSafe


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported_names(path):
    """Dotted names of all modules that a module imports, with what it takes out of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or '.'}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def is_test(part):
    return part == "conftest" or part.startswith("test_")


def test_no_module_imports_a_test_or_a_conftest():
    for path in TESTS:
        for name in imported_names(path):
            top, *parts = name.split(".")
            wrong = is_test(top) or top == "tests" and any(map(is_test, parts))
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}; what tests share stands in tests/helpers"


def test_tests_stand_in_the_room_that_they_test():
    for top in ("shards", "pipeline"):
        rooms = {room.split(".")[1] for room in ROOMS if room.startswith(top)}
        for path in (ROOT / "tests" / top).rglob("test_*.py"):
            room = path.stem.removeprefix("test_") if path.parent.name == top else path.parent.name
            assert room in rooms and top in (path.parent.name, path.parents[1].name), path.relative_to(ROOT)


def test_names_of_tests_are_short():
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(f"def {node.name}") < 80, f"{path.relative_to(ROOT)}: {node.name}"
