"""Commands: run a model over a corpus into a store."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.lines import collect_lines, estimate_lines
from pipelines.commands.options import JSON_OPTION, collect_options
from pipelines.commands.output import announced, show


@click.command()
@collect_options
@click.option(
    "--resume", is_flag=True, help="Require a store to continue; without the option an existing store is continued too."
)
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
    result = stage(announced("collect", CollectConfig(**options)))
    show(result | device_here(options), as_json, collect_lines)


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
    from pipelines.models.load import choose_device

    result = stage(announced("estimate", CollectConfig(**options)))
    show(result | {"device": choose_device(options["device"])}, as_json, estimate_lines)


def device_here(options: dict[str, Any]) -> dict[str, str]:
    """The device that `--device` became; nothing where workers choose, each its own."""
    from pipelines.models.load import choose_device

    return {} if options["workers"] or options["scheduler"] else {"device": choose_device(options["device"])}
