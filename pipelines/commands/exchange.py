"""`export` and `import`: runs as the files of other tools, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipelines.commands.options import JSON_OPTION, OUT_OPTION, RUN_ARGUMENT
from pipelines.commands.output import announced, show

FORMAT_OPTION = click.option(
    "--format", default="npz", show_default=True, help="Format of the files; an unknown name lists all formats."
)


@click.command("export")
@RUN_ARGUMENT
@FORMAT_OPTION
@OUT_OPTION
@JSON_OPTION
def export_command(as_json: bool, **options: Any) -> None:
    """Write a run as the files of another tool.

    \b
    Example:
      actstore export run --format npz --out params.npz
    """
    from pipelines.exchange.stage import ExportConfig, export_lines, export_run

    show(export_run(announced("export", ExportConfig(**options))), as_json, export_lines)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@FORMAT_OPTION
@click.option("--store", required=True, help="A store of the rows that the SAE reads: of its model and site.")
@OUT_OPTION
@JSON_OPTION
def import_command(as_json: bool, **options: Any) -> None:
    """Make a run of another tool's file, for evaluate, encode, ablate and all other commands that take a run.

    \b
    Example:
      actstore import params.npz --store gpt2.store --out imported
    """
    from pipelines.exchange.stage import ImportConfig, import_lines, import_run

    show(import_run(announced("import", ImportConfig(**options))), as_json, import_lines)
