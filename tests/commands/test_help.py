"""What `--help` says: every command in one line below its heading, and lists of names that are those of the program."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from actstore.errors import InputError
from cli import COMMANDS, cli
from pipelines.analysis.reader import SORTS
from pipelines.codes.stage import EncodeConfig
from pipelines.sae.architectures.registry import architectures
from pipelines.sae.kernels import KERNELS
from pipelines.train.trainee import RECIPES


def help_of(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments), env={"COLUMNS": "80"})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_commands_line_is_whole_at_80_columns(option: str) -> None:
    shown = help_of(option)
    assert "..." not in shown.replace("[ARGS]...", "")
    assert max(map(len, shown.splitlines())) <= 80
    lines = {tuple(re.split(r"  +", line.strip(), maxsplit=1)) for line in shown.splitlines()}
    for rows in COMMANDS.values():
        for name, (_, line) in rows.items():
            assert (name, line) in lines


def test_commands_stand_below_the_headings_in_the_order_of_the_work() -> None:
    shown = [line for line in help_of("--help").partition("Begin:")[2].splitlines() if line]
    headings = [line.removesuffix(":") for line in shown if not line.startswith(" ")]
    assert ["Begin", *headings] == [heading for heading, rows in COMMANDS.items() if rows]
    names = [line.split()[0] for line in shown if line.startswith(" ")]
    assert names == cli.list_commands(click.Context(cli))


def test_a_heading_without_commands_is_not_shown_and_a_row_is_enough_to_add_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "Nothing yet", {})
    assert "Nothing yet" not in help_of("--help")
    monkeypatch.setitem(COMMANDS, "Nothing yet", {"again": ("demo", "One more.")})
    assert re.search(r"^Nothing yet:\n  again +One more\.$", help_of("--help"), re.MULTILINE)


def test_a_command_that_is_none_is_a_wrong_usage() -> None:
    result = CliRunner().invoke(cli, ["no-such-command"])
    assert (result.exit_code, "No such command" in result.stderr) == (2, True)


def option_help(command: str, option: str) -> str:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    (text,) = [p.help for p in found.params if isinstance(p, click.Option) and option in p.opts]
    return str(text)


def names_in(text: str) -> list[str]:
    """`fp16, fp32 or int8` -> its words, without what stands in brackets."""
    return re.split(r",\s*(?:or\s+)?|\s+or\s+", re.sub(r"\s*\([^)]*\)", "", text).strip(" .*"))


def refused_by(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    return result.stderr.splitlines()[-1]


def test_the_help_of_collect_names_every_site_and_encoding(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    asked = ("collect", "--out", tmp_path / "x", "--model", model_folder, "--corpus", texts)
    sites = refused_by(*asked, "--site", "nonsense").partition("known sites are ")[2]
    assert sorted(names_in(option_help("collect", "--site").partition(";")[0])) == sorted(names_in(sites))
    encodings = refused_by(*asked, "--encoding", "nonsense").partition("choose from ")[2].partition(";")[0]
    for command in ("collect", "recode"):
        assert names_in(option_help(command, "--encoding").partition(": ")[2]) == names_in(encodings)


def test_the_help_of_patch_names_every_site() -> None:
    sites = refused_by("patch", "a", "b", "--site", "nonsense").partition("known are ")[2]
    named = [words.split()[0] for words in names_in(option_help("patch", "--site"))]
    assert named == names_in(sites)


def test_the_help_of_features_names_every_order() -> None:
    assert names_in(option_help("features", "--sort")) == list(SORTS)


def test_the_help_of_train_names_every_architecture_kernel_and_recipe() -> None:
    assert set(names_in(option_help("train", "--architecture"))) == set(architectures())
    assert set(names_in(option_help("train", "--kernel").partition(": ")[2])) == set(KERNELS)
    assert set(names_in(option_help("train", "--recipe").partition(":")[0])) == set(RECIPES)


def test_the_help_of_encode_names_its_kernels() -> None:
    named = re.findall(r"([\w-]+):", option_help("encode", "--kernel"))
    with pytest.raises(InputError, match="choose"):
        EncodeConfig(store="s", run="r", out="o", kernel="nonsense")  # type: ignore[arg-type]
    for kernel in named:
        EncodeConfig(store="s", run="r", out="o", kernel=kernel)  # type: ignore[arg-type]
    assert set(named) == set(KERNELS) - {"dense"}
