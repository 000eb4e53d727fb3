"""The house of docs/design.md: a room imports from its own row's left or from below, and never the other way round."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ROOT / "src" / "bitwright"
ROOMS = {path.stem for path in CODE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
# The API, which looks into every room, and the readable twin, which nobody needs at run time.
OUTSIDE = {"__init__", "reference"}


def rows() -> list[list[str]]:
    """The rooms of the drawing, the top row first."""
    drawing = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("```")[1]
    found = [[word for word in line.split() if word in ROOMS] for line in drawing.splitlines()]
    return [row for row in found if row]


def imports(room: str) -> Iterator[tuple[Path, str]]:
    """(file, room that it imports), but for type checkers alone."""
    files = [CODE / f"{room}.py"] if (CODE / f"{room}.py").exists() else sorted((CODE / room).rglob("*.py"))
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        unseen = {id(node) for test in ast.walk(tree) if is_for_types(test) for node in ast.walk(test)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in unseen:
                module = (node.module or "").split(".")
                names = [alias.name for alias in node.names] if module == ["bitwright"] else module[1:2]
                if module[0] == "bitwright":
                    yield from ((file, name) for name in names if name in ROOMS - {room})


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_room_is_in_the_drawing_once() -> None:
    assert sorted(room for row in rows() for room in row) == sorted(ROOMS - OUTSIDE)


@pytest.mark.parametrize("room", sorted(ROOMS - OUTSIDE))
def test_arrows_point_down(room: str) -> None:
    house = rows()
    row = next(i for i, rooms in enumerate(house) if room in rooms)
    allowed = {name for rooms in house[row + 1 :] for name in rooms}
    allowed |= set(house[row][: house[row].index(room)])
    for file, other in imports(room):
        assert other in allowed, f"{file.relative_to(ROOT)} imports {other}"
