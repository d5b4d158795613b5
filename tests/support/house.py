"""The package as a house: `python -m tests.support.house [CHECKOUT]` counts its rooms, floors, arrows and circles.

A room is a file or folder right under the package, an arrow an import of one room by another, wherever it stands. A room is one
floor above the highest room that it imports; rooms that import each other share a floor. A circle is a group of files that
import each other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support import ROOT

Imports = Mapping[str, set[str]]  # what each file or room imports


def files(root: Path) -> Imports:
    """The files of a checkout."""
    from tests.test_layout import imported, modules

    every = modules(root)
    return {name: imported(path, every) & every.keys() - {name} for name, path in every.items()}


def rooms(imports: Imports) -> Imports:
    """The rooms of these files."""
    found: dict[str, set[str]] = {}
    for name, others in imports.items():
        found.setdefault(room_of(name), set()).update(map(room_of, others))
    return {room: others - {room} for room, others in found.items()}


def room_of(module: str) -> str:
    """The first part of a module's name below the package; the package's own file is a room too."""
    return [*module.split("."), "__init__"][1]


def circles(house: Imports) -> list[set[str]]:
    """Groups that reach each other."""
    reached = {room: _reached(house, room) for room in house}
    groups = {frozenset({room, *(other for other in found if room in reached[other])}) for room, found in reached.items()}
    return [set(group) for group in groups if len(group) > 1]


def floors(house: Imports) -> dict[str, int]:
    """The floor of each room, from 1 up."""
    circle = {room: frozenset(group) for group in circles(house) for room in group}
    done: dict[str, int] = {}

    def floor(room: str) -> int:
        own = circle.get(room, frozenset({room}))
        if room not in done:
            below = {other for member in own for other in house[member]} - own
            height = 1 + max(map(floor, sorted(below)), default=0)
            done.update(dict.fromkeys(own, height))
        return done[room]

    return {room: floor(room) for room in sorted(house)}


def _reached(house: Imports, start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = house[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def main(root: str = str(ROOT)) -> None:
    """Print a checkout's house, top floor first."""
    imports = files(Path(root))
    house = rooms(imports)
    height = floors(house)
    for floor in range(max(height.values()), 0, -1):
        print(f"{floor:2}  {', '.join(room for room, own in height.items() if own == floor)}")
    arrows = sum(map(len, house.values()))
    found = circles({name: others - {"dp_flash_hf"} for name, others in imports.items() if name != "dp_flash_hf"})
    print(f"{len(house)} rooms, {max(height.values())} floors, {arrows} arrows, {len(found)} circles")
    for circle in found:
        print("circle:", ", ".join(sorted(circle)))


if __name__ == "__main__":
    main(*sys.argv[1:])
