"""The rules that keep the rooms apart, read from the imports, and the promises about what starting up costs."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from rooms import ORDER, START, backward, circle, floors, import_graph, imported_names, modules, room_graph, room_of

ROOT = Path(__file__).resolve().parents[2]
GRAPH = import_graph(ROOT)
ROOMS = room_graph(GRAPH)
PIPELINES = [name for name in GRAPH if name.startswith("pipelines.")]

STORE_LIBRARIES = frozenset({"numpy", "zarr", "numcodecs", "google_crc32c", "msgspec", "obstore"})
"""What `actstore/` may import besides the standard library and itself."""

COMPOSERS = frozenset(
    {
        "pipelines.demo",
        "pipelines.lesson",
        "pipelines.train.sweep",
        "pipelines.evaluate.baselines",
        "pipelines.evaluate.of_sweep",
    }
)
"""Modules whose work is to call stages one after another."""

MOST_ROOMS, MOST_FLOORS, MOST_ARROWS = 26, 8, 140
HEAVY = ("torch", "dask", "distributed", "zarr", "transformers", "datasets", "pyarrow", "scipy")
HELP_SECONDS = 0.5


def is_stage(module: str) -> bool:
    """Whether a module runs a command: it is called `stage`, or it defines the options that a command is asked for."""
    if module.endswith(".stage"):
        return True
    tree = ast.parse(modules(ROOT)[module].read_text(encoding="utf-8"))
    defines = any(isinstance(node, ast.ClassDef) and node.name.endswith("Config") for node in tree.body)
    return defines and not module.endswith(".config")


STAGES = frozenset(name for name in PIPELINES if is_stage(name))


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("module", [name for name in GRAPH if top(name) == "actstore"])
def test_the_store_imports_only_its_own_libraries(module: str) -> None:
    allowed = STORE_LIBRARIES | sys.stdlib_module_names | {"actstore"}
    if module == START:
        allowed |= {"cli"}  # the installed command starts the command line
    assert {top(name) for name in imported_names(modules(ROOT)[module], module)} <= allowed


@pytest.mark.parametrize("module", PIPELINES)
def test_pipelines_never_import_the_command_line(module: str) -> None:
    imported = set(imported_names(modules(ROOT)[module], module))
    assert "cli" not in {top(name) for name in imported}
    assert START not in imported


def test_a_room_imports_only_rooms_before_it() -> None:
    assert set(ROOMS) <= set(ORDER), "ORDER names every room"
    assert backward(ROOMS) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle({name: others for name, others in GRAPH.items() if name != START}) == []


def test_the_name_of_a_class_means_one_thing() -> None:
    owners: dict[str, list[str]] = {}
    for module, path in modules(ROOT).items():
        if top(module) != "benchmarks":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]:
                owners.setdefault(name, []).append(module)
    assert {name: where for name, where in owners.items() if len(where) > 1} == {}


def test_the_house_stays_small() -> None:
    assert len(ROOMS) <= MOST_ROOMS
    assert max(floors(ROOMS).values()) <= MOST_FLOORS
    assert sum(len(others) for others in ROOMS.values()) <= MOST_ARROWS


@pytest.mark.parametrize("module", PIPELINES)
def test_stages_are_imported_by_commands_and_composers_alone(module: str) -> None:
    if module in COMPOSERS or room_of(module) == "commands":
        return
    assert GRAPH[module] & STAGES == set(), "move what is shared into a part of the room, or meet in a file"


def test_the_architecture_page_lists_the_rooms_in_their_order() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)(?:/|\.py)?` \|", page.partition("## The store")[0], re.MULTILINE)
    assert listed == list(ORDER)


def test_the_command_line_imports_nothing_of_the_tests_or_benchmarks() -> None:
    imported = {top(name) for module in ("cli", *PIPELINES) for name in imported_names(modules(ROOT)[module], module)}
    assert imported.isdisjoint({"tests", "benchmarks"})


def test_every_command_is_on_a_page_or_in_the_readme() -> None:
    from cli import cli

    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = set(re.findall(r"(?:cli\.py|actstore)\s+([a-z][a-z-]*)", text))
    assert set(cli.list_commands(click.Context(cli))) - shown == set()


def loaded_by(code: str) -> set[str]:
    """Which of the heavy modules a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split()) if run.stdout.strip() else set()


@pytest.mark.parametrize(
    "code",
    [
        "import actstore",
        "import cli",
        "from click.testing import CliRunner as R; from cli import cli; assert R().invoke(cli, ['--help']).exit_code == 0",
    ],
    ids=["import actstore", "import cli", "--help"],
)
def test_starting_up_loads_no_heavy_library(code: str) -> None:
    assert loaded_by(code) == set()


def test_every_commands_help_loads_no_heavy_library() -> None:
    code = """
from click.testing import CliRunner
from cli import cli
for name in cli.list_commands(None):
    result = CliRunner().invoke(cli, [name, '--help'])
    assert result.exit_code == 0, (name, result.output)
"""
    assert loaded_by(code) == set()


COMMAND_MODULES = sorted({"cli", *(name for name in PIPELINES if room_of(name) == "commands")})
AT_START = frozenset(
    {
        "click",
        "actstore",
        "actstore.errors",
        "pipelines.shared.environment",
        "pipelines.shared.error_line",
        "pipelines.shared.visible_text",
    }
)
"""What the command line may import before a command runs, besides the standard library and its own room."""


@pytest.mark.parametrize("module", COMMAND_MODULES)
def test_a_command_imports_its_stage_when_it_runs(module: str) -> None:
    tree = ast.parse(modules(ROOT)[module].read_text(encoding="utf-8"))
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    own = {name for name in imported if name.startswith("pipelines.commands")}
    assert {name for name in imported - own - AT_START if top(name) not in sys.stdlib_module_names} == set()


def test_the_entry_point_stays_a_table() -> None:
    assert len((ROOT / "cli.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_help_takes_under_half_a_second() -> None:
    """Processor time, best of three: equal to the wall clock on an idle machine, and without false alarms on a busy one."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < HELP_SECONDS
