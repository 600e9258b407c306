"""Commands: run a model over a corpus into a store."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import JSON_OPTION, collect_options
from pipelines.commands.output import announced, key_lines, show


@click.command()
@collect_options
@click.option("--resume", is_flag=True, help="Say that a store is there to be continued; a plain re-run does the same.")
@JSON_OPTION
def collect(as_json: bool, resume: bool, **options: Any) -> None:
    """Run the model once over a corpus and write, extend or finish a store.

    \b
    Example:
      actstore collect --out gpt2.store --model gpt2 --corpus 'books/*.txt' --layer 6 --tokens 1000000
    """
    from actstore.errors import NotAStore
    from actstore.open_place import open_place
    from pipelines.collect.config import CollectConfig
    from pipelines.collect.stage import collect as stage

    if resume and not open_place(options["out"]).entries():
        raise NotAStore(f"{options['out']}: nothing to resume; leave --resume out to begin a new store.")
    show(stage(announced("collect", CollectConfig(**options))), as_json, key_lines)


@click.command()
@collect_options
@JSON_OPTION
def estimate(as_json: bool, **options: Any) -> None:
    """What `collect` with the same options would take here: rows, bytes, memory and time. Writes nothing.

    \b
    Example:
      actstore estimate --out gpt2.store --model gpt2 --corpus 'books/*.txt' --layer 6 --tokens 100000000
    """
    from pipelines.collect.config import CollectConfig
    from pipelines.collect.estimate import estimate as stage

    show(stage(announced("estimate", CollectConfig(**options))), as_json, key_lines)
