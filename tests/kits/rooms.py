"""The house as its imports draw it: rooms, arrows between them, floors, circles; and the rules that keep it in order.

    python tests/kits/rooms.py [CHECKOUT]

A room is `actstore/`, `benchmarks/`, `cli.py`, or one entry of `pipelines/`: a folder or a module. An arrow leads from a
room to one that it imports, inside functions and under TYPE_CHECKING too. A room stands one floor above the highest room
that it imports. Only source text is read; nothing is run.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ORDER = (
    "actstore",
    "compute",
    "shared",
    "sae",
    "text",
    "models",
    "torch_stream",
    "metrics",
    "collect",
    "train",
    "statistics",
    "codes",
    "analysis",
    "stores",
    "evaluate",
    "concepts",
    "structure",
    "compare",
    "causal",
    "report",
    "exchange",
    "demo",
    "lesson",
    "commands",
    "cli",
    "benchmarks",
)
"""Every room, in the order in which data flows: a room imports only rooms before it."""

START = "actstore.__main__"
"""The installed command: the one module of `actstore/` that imports a later room."""
PACKAGES = ("actstore", "pipelines", "benchmarks")
BY_NAME = {"cli": "pipelines.commands"}
"""Module -> the package whose modules it imports by their names, from a table."""

Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the product, by its dotted name."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))] + [root / "cli.py"]
    found = {}
    for path in files:
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too; `from a import b` gives `a` and `a.b`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def import_graph(root: Path) -> Graph:
    """Module -> the modules of the product that it imports, each by its own file."""
    known = modules(root)
    graph: Graph = {}
    for module, path in known.items():
        names = {name for name in imported_names(path, module) if name in known and name != module}
        # `from a.b import c` names a.b as well as a.b.c: where c is a module, the package's own file is not what is meant.
        graph[module] = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    for module, package in BY_NAME.items():
        graph[module] |= {name for name in known if name.startswith(f"{package}.")}
    return graph


def room_of(module: str) -> str:
    """`pipelines.sae.base` -> `sae`; `cli` -> `cli`; the package `pipelines` itself -> `pipelines`."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "pipelines" and rest else first


def room_graph(graph: Graph) -> Graph:
    """Room -> the other rooms that it imports."""
    rooms: Graph = {room_of(module): set() for module in graph if module not in (START, "pipelines")}
    for module, names in graph.items():
        if module not in (START, "pipelines"):
            rooms.setdefault(room_of(module), set()).update(
                {room_of(name) for name in names} - {room_of(module), "pipelines"}
            )
    return rooms


def circle(graph: Graph) -> list[str]:
    """Some circle of imports; empty where there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(rooms: Graph) -> dict[str, int]:
    """Room -> its floor, 1 for what imports no other room. Raises CycleError when rooms form a circle."""
    level: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        level[room] = 1 + max((level[other] for other in rooms.get(room, ())), default=0)
    return level


def backward(rooms: Graph) -> list[tuple[str, str]]:
    """Arrows from a room to a later one, or to one that ORDER does not name."""
    place = {room: i for i, room in enumerate(ORDER)}
    far = len(ORDER)
    return [(a, b) for a, others in rooms.items() for b in others if place.get(a, far) <= place.get(b, far)]


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]
    graph = import_graph(root)
    rooms = room_graph(graph)
    names = sorted(rooms)
    level = {} if circle(rooms) else floors(rooms)
    print(f"rooms    {len(names)}")
    print(f"floors   {max(level.values(), default=0)}")
    print(f"arrows   {sum(len(others) for others in rooms.values())}")
    back = len(backward(rooms)) if set(rooms) <= set(ORDER) else "rooms are not those of ORDER"
    print(f"arrows back: {back}, {START}: {sum(room_of(name) != 'actstore' for name in graph[START])}")
    print(f"circle of rooms: {' -> '.join(circle(rooms)) or 'none'}")
    print(f"circle of files: {' -> '.join(circle(graph)) or 'none'}")
    for floor in sorted(set(level.values()), reverse=True):
        print(f"floor {floor}: {', '.join(room for room in names if level[room] == floor)}")
    lengths = sorted((len(path.read_text(encoding="utf-8").splitlines()), name) for name, path in modules(root).items())
    product = [(n, name) for n, name in lengths if not name.startswith("benchmarks") and n > 1]
    print(
        f"median module {product[len(product) // 2][0]} lines; longest: " + ", ".join(f"{b} {a}" for a, b in product[:-6:-1])
    )


if __name__ == "__main__":
    main()
