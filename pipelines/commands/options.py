"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipelines.commands.numbers import ANY_WHOLE, AT_LEAST_ONE, FROM_ZERO, SEED, Whole

STORE_ARGUMENT = click.argument("store")
RUN_ARGUMENT = click.argument("run", type=click.Path(path_type=Path))
OUT_OPTION = click.option("--out", required=True, type=click.Path(path_type=Path), help="Where to write it; must be free.")
DEVICE_OPTION = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one."
)
STORE_OUT_OPTION = click.option(
    "--out", required=True, help="Where to write it: a path, or such as s3://bucket/prefix; continued if it is there."
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
SEED_OPTION = click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of every order and draw.")
WORKERS_HELP = "Local Dask worker processes; 0: in this process."
WORKERS_OPTION = click.option("--workers", type=FROM_ZERO, default=2, show_default=True, help=WORKERS_HELP)
LEVEL_OPTION = click.option(
    "--level",
    default="full",
    show_default=True,
    type=click.Choice(["meta", "crc", "full"]),
    help="How much is read and compared.",
)
SUBJECT_STORE_OPTION = click.option("--store", help="Where the store that the run was trained on is, if it was moved.")
MOVED_MODEL_OPTION = click.option("--model", help="Where the language model is, if it was moved.")
SCHEDULER_OPTION = click.option("--scheduler", help="Address of a running Dask scheduler, such as tcp://host:8786.")
COLLECT_OPTIONS = (
    STORE_OUT_OPTION,
    click.option("--model", default="gpt2", show_default=True, help="`builtin`, a hub id, or a local transformers folder."),
    click.option(
        "--corpus",
        default="stdlib",
        show_default=True,
        help="stdlib, a path or glob[#column] of text, JSON, CSV or Parquet, or hf:name[:config][:split][#column].",
    ),
    click.option(
        "--layer", multiple=True, type=ANY_WHOLE, help="Block to read; repeat for several. Default: the middle one."
    ),
    click.option(
        "--site",
        multiple=True,
        default=["resid_post"],
        show_default=True,
        help="resid_pre, resid_post, attn_out, mlp_out or mlp_hidden (the MLP's neurons); repeatable.",
    ),
    click.option(
        "--tokens", type=AT_LEAST_ONE, default=1_000_000, show_default=True, help="Tokens of text in the finished store."
    ),
    click.option(
        "--context",
        type=Whole(2),
        default=128,
        show_default=True,
        help="Positions the model sees at once, start token included.",
    ),
    click.option("--encoding", default="fp16", show_default=True, help="How rows are kept: fp16, fp32, bf16 or int8."),
    click.option(
        "--compute-dtype", default="fp32", show_default=True, help="Dtype in which the model computes: fp32 or bf16."
    ),
    DEVICE_OPTION,
    click.option(
        "--batch-windows", type=AT_LEAST_ONE, default=32, show_default=True, help="Most windows in one forward pass."
    ),
    SEED_OPTION,
    click.option(
        "--packing",
        default="packed",
        show_default=True,
        help="packed: documents one after another; document: each on its own.",
    ),
    click.option("--bos/--no-bos", default=True, show_default=True, help="Begin every window with the start-of-text token."),
    click.option("--keep-special", is_flag=True, help="Keep position 0 and separators as rows, too."),
    click.option(
        "--shard-mib",
        type=AT_LEAST_ONE,
        default=128,
        show_default=True,
        help="Target size of a shard; an interruption loses at most one. At least 8,192 rows.",
    ),
    click.option("--mixed-hardware", is_flag=True, help="Continue on a machine whose rows differ in their last bits."),
    click.option("--workers", type=FROM_ZERO, default=0, show_default=True, help=WORKERS_HELP),
    SCHEDULER_OPTION,
)
"""What `collect` and `estimate` are asked for."""


def collect_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(COLLECT_OPTIONS):
        command = option(command)
    return command


def splice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the model, and with a run its SAE, come from."""
    for option in (
        click.option("--model", help="`builtin`, a hub id, or a folder. Default: the run's, else gpt2."),
        click.option("--store", help="Where the run's store is, if it was moved."),
        click.option("--run", type=click.Path(path_type=Path), help="A run whose SAE splits its site into features."),
    ):
        command = option(command)
    return command
