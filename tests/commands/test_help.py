"""What `--help` says: every command in one line below its heading, and lists of names that are those of the program."""

from __future__ import annotations

import re
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner

from actstore.errors import InputError
from cli import COMMANDS, cli
from pipelines.codes.stage import EncodeConfig
from pipelines.collect.config import CollectConfig
from pipelines.sae.architectures.registry import architectures
from pipelines.sae.kernels import KERNELS
from pipelines.stores.care import RecodeConfig
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
    return re.split(r",\s*|\s+or\s+", re.sub(r"\s*\([^)]*\)", "", text).strip(" .*"))


def offered(refused: Callable[[], object]) -> list[str]:
    """The names that an error about an unknown name lists."""
    with pytest.raises(InputError) as error:
        refused()
    return names_in(re.split(r"choose from |known sites are ", str(error.value))[1].split(";")[0])


def collecting(**given: object) -> Callable[[], object]:
    return lambda: CollectConfig(out="x", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "option", "refused"),
    [
        ("collect", "--site", collecting(site=("nonsense",))),
        ("collect", "--encoding", collecting(encoding="nonsense")),
        ("recode", "--encoding", lambda: RecodeConfig("x", "y", "nonsense")),
    ],
)
def test_the_help_names_what_the_program_knows(command: str, option: str, refused: Callable[[], object]) -> None:
    text = option_help(command, option)
    assert sorted(names_in(text.partition(": ")[2] or text)) == sorted(offered(refused))


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
