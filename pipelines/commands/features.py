"""Commands: look at features, one or many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipelines.commands.numbers import AT_LEAST_ONE, FROM_ZERO
from pipelines.commands.options import DEVICE_OPTION, JSON_OPTION, MOVED_MODEL_OPTION, RUN_ARGUMENT
from pipelines.commands.output import announced, show

FIRINGS_SHOWN = 50
"""Firings that a terminal shows unless told otherwise."""


@click.command()
@click.argument("analysis")
@click.option("--sort", default="frequency", show_default=True, help="frequency, mean, peak, documents, burstiness or id.")
@click.option("--top", type=AT_LEAST_ONE, default=20, show_default=True, help="Features listed.")
@click.option("--joint", is_flag=True, help="The joint frequencies of the most frequent features (20 at most) instead.")
@JSON_OPTION
def features(analysis: str, sort: str, top: int, joint: bool, as_json: bool) -> None:
    """List features with their firing frequency, strength, documents and tokens.

    \b
    Example:
      actstore features analysis --sort peak --top 50
      actstore features analysis --joint --top 10
    """
    from pipelines.analysis.cards import feature_rows, features_lines, joint_lines, joint_rows
    from pipelines.analysis.reader import Analysis

    if joint:
        show(joint_rows(Analysis(analysis), top), as_json, joint_lines)
        return
    show(feature_rows(Analysis(analysis), sort, top), as_json, features_lines)


@click.command()
@click.argument("analysis")
@click.argument("feature_id", type=FROM_ZERO, metavar="ID")
@click.option("--examples", default="top", show_default=True, help="top, strata (one of each fifth by strength) or random.")
@click.option("--firings", is_flag=True, help="Instead: its firings over the whole corpus, strongest first.")
@click.option("--top", type=AT_LEAST_ONE, help=f"Firings listed. Default: {FIRINGS_SHOWN}, with --json all.")
@click.option("--codes", help="For --firings: where the analysis' code store is, if it was moved.")
@JSON_OPTION
def feature(
    analysis: str, feature_id: int, examples: str, firings: bool, top: int | None, codes: str | None, as_json: bool
) -> None:
    """Show one feature: how often, how strongly and where it fires, on which tokens, with which others; examples.

    \b
    Example:
      actstore feature analysis 317
      actstore feature analysis 317 --examples strata
      actstore feature analysis 317 --firings --top 200
    """
    from pipelines.analysis.cards import feature_card, feature_lines, firings_lines
    from pipelines.analysis.firings import feature_firings
    from pipelines.analysis.reader import Analysis

    if firings:
        limit = top if top or as_json else FIRINGS_SHOWN
        show(feature_firings(Analysis(analysis), feature_id, codes, limit), as_json, firings_lines)
        return
    if top or codes:
        raise click.UsageError("--top and --codes are for --firings.")
    show(feature_card(Analysis(analysis), feature_id, examples), as_json, feature_lines)


@click.command()
@click.argument("analysis")
@click.argument("text")
@click.option("--top", type=AT_LEAST_ONE, default=10, show_default=True, help="Features listed for each token.")
@JSON_OPTION
def search(analysis: str, text: str, top: int, as_json: bool) -> None:
    """Which features fire on a token, or on the tokens of a text, and on little else.

    A leading space counts: ' Paris' and 'Paris' are different tokens.

    \b
    Example:
      actstore search analysis ' Paris'
      actstore search analysis docstring
    """
    from pipelines.analysis.reader import Analysis
    from pipelines.analysis.search import search as stage
    from pipelines.analysis.search import search_lines

    show(stage(Analysis(analysis), text, top), as_json, search_lines)


@click.command()
@RUN_ARGUMENT
@click.option("--texts", required=True, type=click.Path(path_type=Path), help="A file with one text on each line.")
@click.option("--features", type=AT_LEAST_ONE, default=20, show_default=True, help="Features shown, by mean activation.")
@click.option("--tokens", type=AT_LEAST_ONE, default=5, show_default=True, help="Firings shown for each feature.")
@MOVED_MODEL_OPTION
@DEVICE_OPTION
@JSON_OPTION
def inspect(as_json: bool, **options: Any) -> None:
    """Which features are most active on new sentences, and which tokens fire them.

    \b
    Example:
      actstore inspect run --texts sentences.txt
    """
    from pipelines.evaluate.inspect import InspectConfig
    from pipelines.evaluate.inspect import inspect as stage
    from pipelines.evaluate.inspect_lines import inspect_lines

    show(stage(announced("inspect", InspectConfig(**options))), as_json, inspect_lines)
