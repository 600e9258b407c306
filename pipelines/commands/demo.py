"""Commands: the whole chain, from the built-in model to a page."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.numbers import ANY_WHOLE, AT_LEAST_ONE, Whole
from pipelines.commands.options import JSON_OPTION, OUT_OPTION, SEED_OPTION, WORKERS_OPTION
from pipelines.commands.output import announced, show


@click.command()
@OUT_OPTION
@click.option(
    "--layer", type=ANY_WHOLE, default=3, show_default=True, help="Block whose residual stream is explained, 0 to 5."
)
@click.option("--tokens", type=Whole(20_000), default=1_100_000, show_default=True, help="Tokens of the corpus to collect.")
@click.option(
    "--rows", type=AT_LEAST_ONE, default=3_000_000, show_default=True, help="Rows to train on; a row is seen several times."
)
@click.option(
    "--random-weights", is_flag=True, help="Use the same model with random weights, to see what its training adds."
)
@WORKERS_OPTION
@SEED_OPTION
@JSON_OPTION
def demo(as_json: bool, **options: Any) -> None:
    """The whole chain on the built-in GPT-2 and the Python sources on this machine; offline.

    \b
    Example:
      actstore demo --out demo-out
    """
    from pipelines.demo import DemoConfig, demo_lines, run_demo

    result = run_demo(announced("demo", DemoConfig(**options)))
    show(result, as_json, demo_lines)
