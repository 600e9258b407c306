"""What a corpus, a prompt or a name holds cannot act on the terminal that shows it: every command, on a hostile corpus."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from modelkit import run_cli

from cli import cli
from pipelines.shared.visible_text import visible

TITLE, CLEAR = "\x1b]0;owned\x07", "\x9b2J"
HOSTILE = f"{TITLE}{CLEAR}\x08\x7f\u202e\u2066\u200b\u2028\ufeff\ue000\ufe0f"
NAME = f"na{TITLE}{CLEAR}\u202e<b>`x`"
"""Part of the names of files and folders."""
SENTENCE = f"The cat{HOSTILE} sat\x00 on the mat.\r\n"
ANSWERS = ("--metric", "log_probability", "--direction", "noising", "--target", "\x1b")


def assert_nothing_acts(result: Result) -> Result:
    """Each line printed is printable text in UTF-8, and so survives being made visible unchanged."""
    for stream in (result.stdout_bytes, result.stderr_bytes):
        for line in stream.decode("utf-8").split("\n"):
            assert visible(line) == line, line
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def invoke(*arguments: object) -> Result:
    return assert_nothing_acts(CliRunner().invoke(cli, [str(argument) for argument in arguments]))


def shown(*arguments: object) -> str:
    """What a command that succeeds prints."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, client: Any) -> Path:
    """A folder of a hostile name with a model, a corpus, and all that is made from them."""
    from pipelines.analysis.stage import AnalyzeConfig, analyze
    from pipelines.codes.stage import EncodeConfig, encode
    from pipelines.structure.stage import StructureConfig, structure

    folder = tmp_path_factory.mktemp("world") / NAME
    texts = folder / f"texts {NAME}"
    texts.mkdir(parents=True)
    for i in range(40):
        (texts / f"{i}{NAME}.txt").write_bytes(f"{i} {SENTENCE * (2 + i % 3)}".encode())
    shutil.copytree(model_folder, folder / "model")
    from_model = ("--model", folder / "model", "--corpus", texts, "--layer", 1, "--context", 32, "--encoding", "fp32")
    shown("collect", "--out", folder / "store", "--tokens", 20_000, *from_model)
    shown("train", folder / "store", "--out", folder / "run", "--features", 32, "--k", 4, "--batch", 128, "--epochs", 2)
    encode(EncodeConfig(store=str(folder / "store"), run=folder / "run", out=str(folder / "codes")), client)
    analyze(AnalyzeConfig(codes=str(folder / "codes"), out=str(folder / "analysis")), client)
    structure(StructureConfig(analysis=folder / "analysis", draws=20), client)
    return folder


def frequent(world: Path) -> int:
    """A feature that fires often."""
    rows = json.loads(shown("features", world / "analysis", "--json"))
    return int(rows[0]["feature"])


LOOKING: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "ls": lambda w: ("ls", w),
    "info store": lambda w: ("info", w / "store"),
    "info row": lambda w: ("info", w / "store", "--row", 40),
    "info run": lambda w: ("info", w / "run"),
    "info codes": lambda w: ("info", w / "codes"),
    "info analysis": lambda w: ("info", w / "analysis"),
    "verify": lambda w: ("verify", w / "store", "--level", "meta"),
    "features": lambda w: ("features", w / "analysis"),
    "feature": lambda w: ("feature", w / "analysis", frequent(w)),
    "feature strata": lambda w: ("feature", w / "analysis", frequent(w), "--examples", "strata"),
    "firings": lambda w: ("feature", w / "analysis", frequent(w), "--firings"),
    "search": lambda w: ("search", w / "analysis", f"cat{HOSTILE}"),
    "evaluate": lambda w: ("evaluate", w / "run", w / "store", "--windows", 4),
    "inspect": lambda w: ("inspect", w / "run", "--texts", w / "sentences"),
    "attribute": lambda w: ("attribute", f"The cat{HOSTILE}", "--model", w / "model", "--movers", 3),
    "patch": lambda w: ("patch", f"{CLEAR}a", f"{CLEAR}b", *ANSWERS, "--model", w / "model"),
    "patch blocks": lambda w: ("patch", f"{HOSTILE}a", f"{HOSTILE}b", *ANSWERS, "--model", w / "model"),
    "ablate": lambda w: ("ablate", w / "run", f"The cat{HOSTILE}"),
    "steer": lambda w: ("steer", w / "run", frequent(w), f"The cat{HOSTILE}", "--tokens", 5),
    "lens": lambda w: ("lens", w / "run", frequent(w), "--windows", 4),
    "lens table": lambda w: ("lens", w / "run", "--windows", 4),
    "compare": lambda w: ("compare", w / "run", w / "run", "--store", w / "store"),
}  # fmt: skip


@pytest.mark.parametrize("command", LOOKING)
@pytest.mark.parametrize("as_json", [False, True], ids=["lines", "json"])
def test_nothing_from_the_corpus_or_a_name_acts_on_the_terminal(command: str, as_json: bool, world: Path) -> None:
    (world / "sentences").write_bytes(SENTENCE.replace("\r\n", "").encode() + b"\n")
    said = shown(*LOOKING[command](world), *(["--json"] if as_json else []))
    if as_json:
        json.loads(said)


def test_the_colours_of_a_terminal_are_all_that_it_is_told(world: Path) -> None:
    arguments = [str(argument) for argument in LOOKING["patch"](world)]
    result = CliRunner().invoke(cli, arguments, color=True)
    assert result.exit_code == 0, result.stderr
    colours = re.compile(r"\x1b\[[0-9;]*m")
    assert colours.search(result.stdout)
    assert colours.sub("", result.stdout) == "".join(
        f"{visible(line)}\n" for line in colours.sub("", result.stdout).splitlines()
    )


def test_json_holds_the_true_text(world: Path) -> None:
    card = json.loads(shown("feature", world / "analysis", frequent(world), "--firings", "--json"))
    assert all(NAME in firing["document"] for firing in card["firings"])
    assert any(TITLE in firing["before"] + firing["token"] + firing["after"] for firing in card["firings"])
    facts = json.loads(shown("info", world / "store", "--json"))
    assert str(world) in facts["path"]


def test_lines_show_what_the_text_holds(world: Path) -> None:
    said = shown("feature", world / "analysis", frequent(world), "--firings")
    assert "␛]0;owned␇<U+009B>2J" in said
    assert visible(NAME) in said


def test_findings_are_markdown_in_which_no_name_is_markup(world: Path) -> None:
    page = (world / "analysis/structure/findings.md").read_text(encoding="utf-8")
    assert all(line == visible(line) for line in page.split("\n"))
    outside = "".join(part for line in page.split("\n") for part in line.split("``")[::2])
    assert "<b>" not in outside


def test_the_head_of_a_page_shows_names_as_text(world: Path, tmp_path: Path) -> None:
    shown("report", world / "analysis", "--out", tmp_path / "page.html")
    head = (tmp_path / "page.html").read_text(encoding="utf-8").partition('id="data"')[0]
    assert visible(f"texts {NAME}").replace("<", "&lt;").replace(">", "&gt;") in head
    assert all(line == visible(line) for line in head.split("\n"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", NAME),
        ("ls", NAME),
        ("verify", NAME),
        ("features", NAME),
        ("inspect", NAME, "--texts", NAME),
        ("collect", "--out", NAME, "--model", NAME, "--corpus", "stdlib"),
        ("collect", "--out", NAME, "--model", "builtin", "--corpus", NAME),
        ("collect", "--out", NAME, "--site", NAME),
        ("attribute", NAME, "--model", "builtin", "--target", NAME),
        ("patch", NAME, NAME, "--model", "builtin", "--metric", NAME),
        ("info", NAME, "--row", NAME),
        (NAME,),
        ("info", "a", NAME),
        ("info", f"--{NAME}"),
        ("verify", "a", "--level", NAME),
        ("train", f"ftp://{NAME}", "--out", "x"),
        ("import", NAME, "--store", NAME, "--out", NAME),
        ("concepts", NAME),
        ("info", "two\nlines"),
    ],
)
def test_an_error_shows_a_hostile_name_in_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.rstrip("\n").endswith(errors[0])


def test_a_traceback_is_visible_text(tmp_path: Path) -> None:
    result = run_cli("--debug", "info", tmp_path / NAME)
    assert result.returncode == 1
    assert "Traceback (most recent call last):" in result.stderr
    assert all(line == visible(line) for line in result.stderr.split("\n"))
    assert visible(NAME) in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_names_that_are_no_text_are_shown_by_number(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\x1b[2J")
    (tmp_path / name).mkdir()
    assert "caf<U+DCE9>␛[2J" in invoke("info", tmp_path / name).stderr
    assert json.loads(shown("ls", tmp_path / name, "--json")) == []


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_a_terminal_without_a_letter_gets_its_escape(encoding: str, tmp_path: Path) -> None:
    result = run_cli("info", tmp_path / "大\x1b", PYTHONIOENCODING=encoding)
    assert result.returncode == 1
    assert "\\u5927\\u241b" in result.stderr
    assert "Traceback" not in result.stderr
