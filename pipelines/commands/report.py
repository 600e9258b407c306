"""Commands: one HTML page."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.lines import report_lines
from pipelines.commands.numbers import AT_LEAST_ONE
from pipelines.commands.options import JSON_OPTION, OUT_OPTION
from pipelines.commands.output import announced, show


@click.command()
@click.argument("analysis")
@OUT_OPTION
@click.option("--examples", type=AT_LEAST_ONE, default=5, show_default=True, help="Examples shown for each feature.")
@JSON_OPTION
def report(as_json: bool, **options: Any) -> None:
    """One self-contained HTML page of an analysis.

    \b
    Example:
      actstore report analysis --out report.html
    """
    from pipelines.report.stage import ReportConfig
    from pipelines.report.stage import report as stage

    show(stage(announced("report", ReportConfig(**options))), as_json, report_lines)
