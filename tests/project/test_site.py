"""The site is built from docs/ without network or warnings, holds every page, and has every command's own help."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS) for path in DOCS.rglob("*.md"))
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def load(name: str) -> ModuleType:
    """A helper of the site, as mkdocs loads it: from its file."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of mkdocs fails the build."""
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **NO_NETWORK, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def page_of(site: Path, name: Path) -> str:
    return (site / name.with_suffix(".html")).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES, ids=str)
def test_every_page_is_on_the_site_and_in_its_navigation(name: Path, site: Path) -> None:
    other = Path("index.md" if name == Path("FORMAT.md") else "FORMAT.md")
    assert "<h1" in page_of(site, name)
    assert f'href="{name.with_suffix(".html")}"' in page_of(site, other).partition("<article")[0]


@pytest.mark.parametrize("name", PAGES, ids=str)
def test_no_page_loads_anything_from_elsewhere(name: Path, site: Path) -> None:
    loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\">\s]+)", page_of(site, name))
    loaded += re.findall(r"<link[^>]*\shref=\"?([^\">\s]+)[^>]*rel=\"?stylesheet", page_of(site, name))
    assert loaded
    assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []


def test_the_site_has_the_help_of_every_command(site: Path) -> None:
    from cli import cli

    text = html.unescape(re.sub(r"<[^>]+>", "", page_of(site, Path("reference/commands.md"))))
    for name in cli.list_commands(click.Context(cli)):
        assert f"Usage: actstore {name} " in text, name


def test_a_group_that_loads_its_commands_when_asked_is_shown_whole() -> None:
    class Lazy(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return ["one", "two"]

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return click.Command(cmd_name, help=f"Does {cmd_name}.", params=[click.Option(["--deep"], help="How deep.")])

    shown = load("command_help").every_help(Lazy("tool", context_settings={"help_option_names": ["-h", "--help"]}), "tool")
    assert re.findall(r"^## (.*)$", shown, re.MULTILINE) == ["tool one", "tool two"]
    assert shown.count("How deep.") == 2
    assert shown.count("-h, --help") == 3


def test_a_doctest_is_shown_as_code() -> None:
    pytest.importorskip("griffe", reason="the site needs the extra `docs`")
    module = load("doctest_fences")
    assert module.fenced("A sum.\n\n>>> 1 + 1\n2\n\nMore.") == "A sum.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."
    assert module.fenced("No example: a >>> b.") == "No example: a >>> b."


def test_the_reference_shows_the_public_names(site: Path) -> None:
    page = page_of(site, Path("reference/python.md"))
    for name in ("ActivationStore", "BatchStream", "ActivationDataset", "load_run", "Analysis", "collect_activations"):
        assert re.search(rf'id="[\w.]*\.{name}"', page), name
    assert "&gt;&gt;&gt;" in page
    assert "<blockquote>" not in page, "a doctest was read as a quotation"


def test_no_file_names_the_address_of_a_package_index() -> None:
    """Pip's own configuration says where packages come from."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    words = (b"py" + b"pi.org", b"index" + b"-url", b"INDEX" + b"_URL", b"download." + b"pytorch")
    files = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    contents = {str(file): file.read_bytes() for file in files if file.is_file()}
    assert [name for name, content in contents.items() if any(word in content for word in words)] == []


def test_the_glossary_defines_each_word_once() -> None:
    """A word with two meanings says of what each meaning is: "probe of a machine", "probe of a concept"."""
    glossary = (DOCS / "GLOSSARY.md").read_text(encoding="utf-8")
    defined = [
        " ".join((word + of).lower().split())
        for entry in re.split(r"^- ", glossary, flags=re.MULTILINE)
        for word, of in re.findall(r"(?:^|\. |\), |, )\*\*([^*]+)\*\*((?: (?:of|over) [^:*.]{1,30}| \([^)]*\))?):", entry)
    ]
    assert len(defined) > 100
    assert sorted({word for word in defined if defined.count(word) > 1}) == []
