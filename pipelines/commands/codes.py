"""Commands: encode rows, analyze every feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipelines.commands.lines import analysis_lines, encode_lines
from pipelines.commands.numbers import AT_LEAST_ONE, FROM_ZERO, SEED
from pipelines.commands.options import (
    JSON_OPTION,
    RUN_ARGUMENT,
    SCHEDULER_OPTION,
    STORE_ARGUMENT,
    STORE_OUT_OPTION,
    WORKERS_OPTION,
)
from pipelines.commands.output import announced, show


@click.command()
@STORE_ARGUMENT
@RUN_ARGUMENT
@STORE_OUT_OPTION
@click.option("--value-dtype", default="fp32", show_default=True, help="How values are kept: fp32 or fp16.")
@click.option(
    "--kernel",
    default="sparse-fp32",
    show_default=True,
    help="sparse-fp32: the SAE's own codes; sparse: a search in bfloat16, then exact values.",
)
@WORKERS_OPTION
@SCHEDULER_OPTION
@JSON_OPTION
def encode(as_json: bool, **options: Any) -> None:
    """Turn every row of a store into its k largest codes, and index them by feature: the code store.

    \b
    Example:
      actstore encode gpt2.store run --out codes
      actstore encode gpt2.store run --out codes.fp16 --value-dtype fp16
    """
    from pipelines.codes.stage import EncodeConfig
    from pipelines.codes.stage import encode as stage

    show(stage(announced("encode", EncodeConfig(**options))), as_json, encode_lines)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="CODES | STORE RUN")
@click.option("--out", required=True, help="Where to write it: a path, or such as s3://bucket/prefix; must be free.")
@click.option("--examples", type=AT_LEAST_ONE, default=8, show_default=True, help="Strongest firings kept for each feature.")
@click.option(
    "--random-examples", type=FROM_ZERO, default=5, show_default=True, help="Random firings kept for each feature."
)
@click.option(
    "--strata",
    type=AT_LEAST_ONE,
    default=5,
    show_default=True,
    help="Equal parts of a feature's firings by strength; one example is kept from each.",
)
@click.option("--before", type=FROM_ZERO, default=24, show_default=True, help="Tokens of context shown before a firing.")
@click.option("--after", type=FROM_ZERO, default=8, show_default=True, help="Tokens of context shown after it.")
@click.option(
    "--within",
    default="row",
    show_default=True,
    help="Features are together within one row, one document, or this number of tokens.",
)
@click.option(
    "--min-together",
    type=FROM_ZERO,
    default=0,
    show_default=True,
    help="Drop pairs seen less often; 0: keep all, above 32,768 features 3.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random examples.")
@WORKERS_OPTION
@click.option("--threads", is_flag=True, help="Threads of this process instead of worker processes.")
@SCHEDULER_OPTION
@JSON_OPTION
def analyze(sources: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """What every feature does over the whole corpus: frequency, co-occurrence, tokens, examples.

    With STORE RUN the codes are made first and kept beside the analysis, as OUT.codes.

    \b
    Example:
      actstore analyze codes --out analysis
      actstore analyze gpt2.store run --out analysis --scheduler tcp://head:8786
    """
    from pipelines.analysis.stage import AnalyzeConfig, require_place
    from pipelines.analysis.stage import analyze as stage
    from pipelines.codes.stage import EncodeConfig
    from pipelines.codes.stage import encode as encode_stage

    if len(sources) > 2:
        raise click.UsageError("pass CODES, or STORE and RUN.")
    require_place(options["out"])
    codes: str | Path = sources[0]
    if len(sources) == 2:
        codes = f"{options['out'].rstrip('/')}.codes"
        where = {name: options[name] for name in ("workers", "scheduler")}
        encode_stage(announced("encode", EncodeConfig(store=sources[0], run=Path(sources[1]), out=codes, **where)))
    record = stage(announced("analyze", AnalyzeConfig(codes=codes, **options)))
    show({"path": options["out"], **record}, as_json, analysis_lines)
