"""`export` and `import`: runs as the files of other tools, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

FORMAT_OPTION = click.option(
    "--format", default="npz", show_default=True, help="Which tool's files; a name that is none lists them all."
)
OUT_OPTION = click.option("--out", required=True, type=click.Path(path_type=Path), help="Where to write it; must be free.")
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
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

    result = export_run(ExportConfig(**options))
    click.echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else "\n".join(export_lines(result)))


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

    result = import_run(ImportConfig(**options))
    click.echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else "\n".join(import_lines(result)))
