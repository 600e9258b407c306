"""Writes the help of every command into the page that asks for it, word for word as `actstore COMMAND --help` prints it."""

from __future__ import annotations

from typing import Any

import click

PLACE = "{{ the help of every command }}"
HELP_WIDTH = 88


def help_of(command: click.Command, name: str, parent: click.Context | None = None) -> tuple[str, click.Context]:
    """What `--help` prints, and the context in which a group finds its commands."""
    settings = {**command.context_settings, "max_content_width": HELP_WIDTH, "terminal_width": HELP_WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    return command.get_help(context), context


def every_help(group: click.Group, name: str) -> str:
    """A heading and a block for each command, in the order of their names. A group that loads lazily is asked for each."""
    shown, context = help_of(group, name)
    sections = [f"```text\n{shown}\n```"]
    for each in group.list_commands(context):
        command = group.get_command(context, each)
        assert command is not None, each
        sections.append(f"## {name} {each}\n\n```text\n{help_of(command, each, context)[0]}\n```")
    return "\n\n".join(sections)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    if PLACE not in markdown:
        return markdown
    from cli import cli

    return markdown.replace(PLACE, every_help(cli, "actstore"))
