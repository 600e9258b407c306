"""Commands: what lies on disk, its faults, another encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipelines.commands.lines import info_lines, recode_lines, repair_lines
from pipelines.commands.numbers import ANY_WHOLE
from pipelines.commands.options import JSON_OPTION, LEVEL_OPTION, STORE_ARGUMENT, STORE_OUT_OPTION
from pipelines.commands.output import announced, key_lines, show


@click.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@JSON_OPTION
def ls(folder: Path, as_json: bool) -> None:
    """List the stores, codes, runs, analyses and other results below a folder, and what was made from what.

    \b
    Example:
      actstore ls experiments
    """
    from pipelines.stores.listing import list_folder, listing_lines

    show([vars(listed) for listed in list_folder(folder)], as_json, listing_lines)


@click.command()
@click.argument("path")
@click.option(
    "--row", type=ANY_WHOLE, help="Instead, for a store: the token, document and text behind a row of the training split."
)
@JSON_OPTION
def info(path: str, row: int | None, as_json: bool) -> None:
    """What a store, a run, codes, an analysis, a sweep or another result is, what it was made from, its size and figures.

    \b
    Example:
      actstore info gpt2.store
      actstore info run
      actstore info gpt2.store --row 123456
    """
    if row is not None:
        from pipelines.text.row_text import describe_row

        show(describe_row(path, row), as_json, key_lines)
        return
    from pipelines.stores.facts import facts

    show(facts(path), as_json, info_lines)


@click.command()
@click.argument("path")
@LEVEL_OPTION
@JSON_OPTION
def verify(path: str, level: str, as_json: bool) -> None:
    """Compare what actstore wrote with what was committed; name each fault; exit 1 when there is one.

    PATH is a store, codes, a run, an analysis or other results, or a folder: then all below it is compared.

    \b
    meta  every record, and that every object is there and as long as it was
    crc   and the crc32c of every chunk of a store, the sha256 of all else
    full  and the sha256 of every object

    \b
    Example:
      actstore verify gpt2.store --level crc
      actstore verify experiments
    """
    from actstore.errors import DamagedStore
    from pipelines.stores.care import verify as stage
    from pipelines.stores.care import what_is_damaged

    faults = stage(path, level)
    show({"path": path, "level": level, "faults": faults}, as_json, lambda v: v["faults"] or [f"{path}: no fault found"])
    if faults:
        remedies = {
            "a store": f"`actstore repair {path}` drops what is damaged, and the command that wrote the store then fills "
            "exactly that in again.",
            "several": "`actstore repair STORE` mends a store; restore all else from a copy, or make it again.",
            "results": "restore it from a copy, or make it again at another --out.",
        }
        raise DamagedStore(f"{path}: {len(faults)} faults; {remedies[what_is_damaged(path)]}")


@click.command()
@STORE_ARGUMENT
@LEVEL_OPTION
@JSON_OPTION
def repair(store: str, level: str, as_json: bool) -> None:
    """Drop what is damaged, so that the command that wrote the store fills exactly that in again.

    \b
    Example:
      actstore repair gpt2.store
      actstore collect --out gpt2.store ...   # as before: computes what was dropped
    """
    from pipelines.stores.care import repair as stage

    show(stage(store, level), as_json, repair_lines)


@click.command()
@STORE_ARGUMENT
@STORE_OUT_OPTION
@click.option("--encoding", default="int8", show_default=True, help="How rows are kept there: fp16, fp32, bf16 or int8.")
@JSON_OPTION
def recode(as_json: bool, **options: Any) -> None:
    """Copy a store into another encoding: the same rows in the same order, and what that costs in accuracy.

    \b
    Example:
      actstore recode gpt2.store --out gpt2.int8.store --encoding int8
    """
    from pipelines.stores.care import RecodeConfig
    from pipelines.stores.care import recode as stage

    show(stage(announced("recode", RecodeConfig(**options))), as_json, recode_lines)
