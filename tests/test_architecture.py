"""The rules that keep the parts apart, read from the imports, and the promises about what starting up costs."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STORE_LIBRARIES = frozenset({"numpy", "zarr", "numcodecs", "google_crc32c", "obstore"})
"""What `actstore/` may import besides the standard library and itself."""

LEAVES = frozenset(
    {
        "analysis",
        "analysis_arrays",
        "association",
        "builtin",
        "capture",
        "cluster",
        "code_store",
        "corpus",
        "cosines",
        "feature_index",
        "hub",
        "index_build",
        "made_store",
        "memory",
        "pairs",
        "products",
        "progress",
        "recipe",
        "row_metrics",
        "sae",
        "shards",
        "statistics",
        "stdlib",
        "surveying",
        "tables",
        "terminal",
        "text_metrics",
        "tokens",
        "training",
        "windows",
    }
)
"""Modules (or subpackages) of `pipelines` that any other may import."""

COMPOSERS = frozenset({"baselines", "demo", "lesson", "sweep"})
"""Modules of `pipelines` whose work is to call the stages one after another."""

HEAVY = ("torch", "dask", "distributed", "zarr", "transformers", "datasets", "pyarrow", "scipy")
HELP_SECONDS = 0.5


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too; `from a import b` gives `a` and `a.b`."""
    found: set[str] = set()
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def part(name: str) -> str:
    """`pipelines.sae.topk` -> `sae`; the package itself -> ''."""
    return name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("path", sources("actstore"), ids=module_of)
def test_the_store_imports_only_its_own_libraries(path: Path) -> None:
    allowed = STORE_LIBRARIES | sys.stdlib_module_names | {"actstore"}
    if path.name == "__main__.py":
        allowed |= {"cli"}  # the installed command starts the command line
    assert {top(name) for name in imports_of(path)} <= allowed


@pytest.mark.parametrize("path", sources("pipelines"), ids=module_of)
def test_pipelines_never_import_the_command_line(path: Path) -> None:
    imported = imports_of(path)
    assert "cli" not in {top(name) for name in imported}
    assert "actstore.__main__" not in imported


@pytest.mark.parametrize("path", sources("pipelines"), ids=module_of)
def test_stages_meet_only_in_leaf_modules(path: Path) -> None:
    own = part(module_of(path))
    if own in COMPOSERS:
        return
    stages = {path.relative_to(ROOT / "pipelines").parts[0].removesuffix(".py") for path in sources("pipelines")}
    imported = {part(name) for name in imports_of(path) if top(name) == "pipelines"}
    assert imported & stages <= LEAVES | {own}, "move what is shared to a leaf module, or meet in a file"


def test_the_command_line_imports_nothing_of_the_tests_or_benchmarks() -> None:
    assert {top(name) for name in imports_of(ROOT / "cli.py")}.isdisjoint({"tests", "benchmarks"})


def test_every_command_is_in_the_readme() -> None:
    from cli import cli

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"(?:cli\.py|actstore)\s+([a-z][a-z-]*)", readme))
    assert set(cli.commands) - shown == set()


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
for name in cli.commands:
    result = CliRunner().invoke(cli, [name, '--help'])
    assert result.exit_code == 0, (name, result.output)
"""
    assert loaded_by(code) == set()


def test_the_help_takes_under_half_a_second() -> None:
    """Processor time, best of three: the wall clock of an idle machine, and no false alarm on a busy one."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < HELP_SECONDS
