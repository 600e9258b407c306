"""The command line: parse, build one frozen config, call a stage, print; nothing else.

Every stage is imported inside its command, so that `--help` loads no torch, dask or zarr.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import click

from actstore import __version__
from actstore.errors import ActstoreError
from pipelines.commands.exchange import export_command, import_command
from pipelines.shared.environment import set_environment

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
SEED_OPTION = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**64 - 1), help="Seed of every order and draw."
)
WORKERS_OPTION = click.option("--workers", default=2, show_default=True, help="Local Dask worker processes.")
LEVEL_OPTION = click.option(
    "--level", default="full", show_default=True, type=click.Choice(["meta", "crc", "full"]), help="How much is read."
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
        help="stdlib, a path or glob[#column], or hf:name[:config][:split][#column].",
    ),
    click.option("--layer", multiple=True, type=int, help="Block to read; repeat for several. Default: the middle one."),
    click.option(
        "--site",
        multiple=True,
        default=["resid_post"],
        show_default=True,
        help="resid_pre, resid_post, attn_out, mlp_out or mlp_hidden (the MLP's neurons); repeatable.",
    ),
    click.option("--tokens", default=1_000_000, show_default=True, help="Tokens of text the store shall hold."),
    click.option(
        "--context", default=128, show_default=True, help="Positions the model sees at once, start token included."
    ),
    click.option("--encoding", default="fp16", show_default=True, help="How rows are kept: fp16, fp32, bf16 or int8."),
    click.option("--compute-dtype", default="fp32", show_default=True, help="What the model computes in: fp32 or bf16."),
    DEVICE_OPTION,
    click.option("--batch-windows", default=32, show_default=True, help="Windows in one forward pass, at most."),
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
        "--shard-mib", default=128, show_default=True, help="Size of a shard, which a kill can cost; at least 8,192 rows."
    ),
    click.option("--mixed-hardware", is_flag=True, help="Continue on a machine whose rows differ in their last bits."),
    click.option("--workers", default=0, show_default=True, help="Local Dask worker processes; 0: in this process."),
    SCHEDULER_OPTION,
)
"""What `collect` and `estimate` are asked for."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class _Commands(click.Group):
    """Turns every expected failure into one line and its exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        debug = "--debug" in sys.argv
        try:
            super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("stopped; everything committed is kept.", err=True)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ActstoreError, OSError) as error:
            if debug or (isinstance(error, OSError) and not error.filename and error.errno not in FULL_DISK):
                raise
            click.echo(f"error: {_one_line(error)}", err=True)
            sys.exit(1)
        sys.exit(0)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, ActstoreError):
        where = error.filename or "the output"
        remedy = (
            "free some space and run the same command again"
            if error.errno in FULL_DISK
            else "check the path and its permissions"
        )
        return f"{where}: {error.strerror}; {remedy}; everything committed is kept."
    return " ".join(str(error).split())


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


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Run a language model once, keep its activations, train sparse autoencoders, see what the features do.

    \b
    Example:
      actstore demo --out demo-out
    """
    if debug:
        logging.basicConfig(level=logging.INFO)
    set_environment()


@cli.command()
@OUT_OPTION
@click.option("--layer", default=3, show_default=True, help="Block whose residual stream is explained, 0 to 5.")
@click.option("--tokens", default=1_100_000, show_default=True, help="Tokens of the corpus to collect.")
@click.option("--rows", default=3_000_000, show_default=True, help="Rows to train on; a row is seen several times.")
@click.option("--random-weights", is_flag=True, help="The same model with random weights: what training it adds.")
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

    result = run_demo(_shown("demo", DemoConfig(**options)))
    _print(result, as_json, demo_lines)


@cli.command()
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
    _print(stage(_shown("collect", CollectConfig(**options))), as_json, _key_lines)


@cli.command()
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

    _print(stage(_shown("estimate", CollectConfig(**options))), as_json, _key_lines)


@cli.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@JSON_OPTION
def ls(folder: Path, as_json: bool) -> None:
    """List the stores, codes, runs and analyses below a folder, and what was made from what.

    \b
    Example:
      actstore ls experiments
    """
    from pipelines.stores.listing import list_folder, listing_lines

    _print([vars(listed) for listed in list_folder(folder)], as_json, listing_lines)


@cli.command()
@STORE_ARGUMENT
@click.option("--row", type=int, help="Instead: the token, document and text behind a row of the training split.")
@JSON_OPTION
def info(store: str, row: int | None, as_json: bool) -> None:
    """What a store of activations or codes is, where it came from, and how large it is.

    \b
    Example:
      actstore info gpt2.store
      actstore info gpt2.store --row 123456
    """
    if row is not None:
        from pipelines.text.row_text import describe_row

        _print(describe_row(store, row), as_json, _key_lines)
        return
    from actstore.reader import Store

    opened = Store(store, partial=True)
    manifest = opened.manifest
    planned = sum(record.layout.n_shards for segment in opened.segments for record in segment.parts.values())
    committed = sum(len(opened.shards(part)) for part in ("train", "heldout"))
    rows = {part: opened.n_rows(part) for part in ("train", "heldout")}
    tokens = sum(segment.n_tokens for segment in opened.segments)
    values = {
        "store_id": opened.store_id,
        "snapshot": opened.snapshot,
        "kind": manifest.kind,
        "model": manifest.provenance.get("model"),
        "weights": manifest.model.weights_sha256[:16],
        "corpus": manifest.corpus.spec,
        "tokens": tokens,
        "rows": rows,
        "shards_committed": committed,
        "shards_planned": planned,
        "arrays": {array.name: f"{array.width or 1} x {array.encoding} ({array.dtype})" for array in manifest.arrays},
        "context": manifest.policy.context,
        "compute_dtype": manifest.compute_dtype,
        "seed": manifest.seed,
        "disk_bytes": opened.disk_bytes,
        "disk_bytes_per_million_tokens": round(opened.disk_bytes * 1e6 / max(tokens, 1)),
        "source": manifest.source,
    }
    _print(values, as_json, _key_lines)


@cli.command()
@STORE_ARGUMENT
@LEVEL_OPTION
@JSON_OPTION
def verify(store: str, level: str, as_json: bool) -> None:
    """Compare a store with what was committed; name each fault's shard and array; exit 1 when there is one.

    \b
    meta  every record, and that every object is there and as long as it was
    crc   and the crc32c of every chunk
    full  and the sha256 of every object

    \b
    Example:
      actstore verify gpt2.store --level crc
    """
    from actstore.errors import DamagedStore
    from pipelines.stores.care import verify as stage

    faults = stage(store, level)
    _print(
        {"store": store, "level": level, "faults": faults}, as_json, lambda v: v["faults"] or [f"{store}: no fault found"]
    )
    if faults:
        raise DamagedStore(
            f"{store}: {len(faults)} faults; `actstore repair {store}` drops what is damaged, and the command that wrote "
            "the store then fills exactly that in again."
        )


@cli.command()
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

    _print(stage(store, level), as_json, _key_lines)


@cli.command()
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

    _print(stage(_shown("recode", RecodeConfig(**options))), as_json, _key_lines)


@cli.command()
@STORE_ARGUMENT
@OUT_OPTION
@click.option("--layer", multiple=True, type=int, help="Which layer of the store; needed when it holds several. *")
@click.option("--site", multiple=True, default=["resid_post"], show_default=True, help="Which site of that layer. *")
@click.option(
    "--architecture",
    multiple=True,
    default=["topk"],
    show_default=True,
    help="topk, batchtopk, matryoshka, relu, jumprelu or gated. *",
)
@click.option("--features", multiple=True, type=int, default=[4096], show_default=True, help="Width of the SAE. *")
@click.option("--k", multiple=True, type=int, default=[32], show_default=True, help="Features active in each row. *")
@click.option("--tokens", "--rows", "tokens", default=0, help="Rows to train on; 0: as many as --epochs says.")
@click.option("--epochs", default=1.0, show_default=True, help="Passes over the store's rows.")
@click.option("--batch", default=4096, show_default=True, help="Rows in a step.")
@click.option(
    "--lr",
    multiple=True,
    type=float,
    default=[0.0],
    help="Learning rate; 0: 2e-4 / sqrt(features / 16384), more in short runs. *",
)
@click.option(
    "--l1", multiple=True, type=float, default=[0.0], help="Coefficient of the mean absolute code; 0: the architecture's. *"
)
@click.option("--auxk", default=0.03125, show_default=True, help="Weight of the loss that revives dead features.")
@click.option(
    "--recipe", default="standard", show_default=True, help="standard, or textbook: constant rate, Linear start, clip at 1."
)
@click.option("--kernel", default="auto", show_default=True, help="How a step is computed: sparse, sparse-fp32 or dense.")
@click.option(
    "--seed",
    multiple=True,
    type=click.IntRange(0, 2**63 - 1),
    default=[0],
    show_default=True,
    help="Of the first weights. *",
)
@click.option(
    "--order-seed", default=0, show_default=True, type=click.IntRange(0, 2**64 - 1), help="Seed of the order of the rows."
)
@DEVICE_OPTION
@click.option(
    "--checkpoint-minutes", default=10.0, show_default=True, help="Time between saved states; 0: when stopped only."
)
@click.option("--resume", is_flag=True, help="Continue a training that was stopped or killed.")
@click.option("--tensorboard", is_flag=True, help="Also write the metrics for TensorBoard, in RUN/tensorboard.")
@click.option("--wandb", is_flag=True, help="Also send the metrics to Weights & Biases.")
@JSON_OPTION
def train(as_json: bool, **options: Any) -> None:
    """Train sparse autoencoders on batches streamed from a store.

    Options marked * can be repeated: every combination is trained, all in one pass over the store.

    \b
    Example:
      actstore train gpt2.store --out run --features 24576 --k 32 --epochs 2
      actstore train gpt2.store --out sweep --k 16 --k 32 --k 64 --seed 0 --seed 1
      torchrun --nproc-per-node 2 -m actstore train gpt2.store --out run
    """
    from pipelines.train.ranks import is_first_process
    from pipelines.train.sweep import comparison_lines, grid, sweep

    _shown("train", SimpleNamespace(**{name: _sole(options[name]) for name in vars(grid(options)[0])}))
    found = sweep(options)
    if is_first_process():
        _print(found, as_json, lambda v: comparison_lines(v) if "runs" in v else _key_lines(v))


@cli.command()
@RUN_ARGUMENT
@STORE_ARGUMENT
@click.option("--windows", default=128, show_default=True, help="Held-out windows to run the language model on.")
@click.option("--pca", default=16, show_default=True, help="Components of the PCA that the SAE is compared with.")
@MOVED_MODEL_OPTION
@DEVICE_OPTION
@click.option(
    "--baselines", is_flag=True, help="Beside it: PCA, raw dimensions, a random decoder, a model with random weights."
)
@click.option(
    "--baseline-tokens",
    default=1_000_000,
    show_default=True,
    help="Rows that the baselines' SAEs are trained on, at most those of the run; 0: as many.",
)
@JSON_OPTION
def evaluate(as_json: bool, **options: Any) -> None:
    """How well an SAE explains held-out rows, and what its reconstruction does to the model's loss.

    The figures are kept beside the run, in evaluation.json.

    \b
    Example:
      actstore evaluate run gpt2.store
      actstore evaluate run gpt2.store --baselines
    """
    from pipelines.evaluate.baselines import BaselinesConfig, evaluate_beside_baselines, lines

    _print(evaluate_beside_baselines(_shown("evaluate", BaselinesConfig(**options))), as_json, lines)


@cli.command()
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

    _print(stage(_shown("encode", EncodeConfig(**options))), as_json, _key_lines)


@cli.command()
@click.argument("sources", nargs=-1, required=True, metavar="CODES | STORE RUN")
@click.option("--out", required=True, help="Where to write it: a path, or such as s3://bucket/prefix; must be free.")
@click.option("--examples", default=8, show_default=True, help="Strongest firings kept for each feature.")
@click.option("--random-examples", default=5, show_default=True, help="Random firings kept for each feature.")
@click.option(
    "--strata", default=5, show_default=True, help="Parts of a feature's firings by strength; one example of each."
)
@click.option("--before", default=24, show_default=True, help="Tokens of context shown before a firing.")
@click.option("--after", default=8, show_default=True, help="Tokens of context shown after it.")
@click.option("--within", default="row", show_default=True, help="What is together: row, document, or a number of tokens.")
@click.option(
    "--min-together", default=0, show_default=True, help="Drop pairs seen less often; 0: keep all, above 32,768 features 3."
)
@click.option("--seed", default=0, show_default=True, help="Of the random examples.")
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
        encode_stage(_shown("encode", EncodeConfig(store=sources[0], run=Path(sources[1]), out=codes, **where)))
    _print(stage(_shown("analyze", AnalyzeConfig(codes=codes, **options))), as_json, _key_lines)


@cli.command()
@click.argument("analysis")
@click.option("--codes", help="Where its code store is, if it was moved.")
@click.option("--run", type=click.Path(path_type=Path), help="Its run, for what decoder directions say.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write it. Default: ANALYSIS/structure.")
@click.option("--draws", default=100, show_default=True, help="Draws of the null on either half of the documents.")
@click.option("--rows", default=200_000, show_default=True, help="Rows to look at, of whole documents of both halves.")
@click.option("--block-rows", default=1024, show_default=True, help="Most rows of a document that a draw deals together.")
@click.option("--min-lift", default=2.0, show_default=True, help="How many times the null a large effect is.")
@SEED_OPTION
@WORKERS_OPTION
@SCHEDULER_OPTION
@JSON_OPTION
def structure(as_json: bool, **options: Any) -> None:
    """Which features fire together beyond chance: pairs, communities, implications, against a null that keeps burstiness.

    They are chosen on one half of the documents and tested on the other; findings.md says what was found.

    \b
    Example:
      actstore structure demo-out/analysis --run demo-out/run
    """
    from pipelines.structure.page import summary_lines
    from pipelines.structure.stage import StructureConfig
    from pipelines.structure.stage import structure as stage

    _print(stage(_shown("structure", StructureConfig(**options))), as_json, summary_lines)


@cli.command()
@click.argument("codes")
@click.option(
    "--labels", help="A file of labelled ranges (.jsonl, .parquet), or `python`, the default where the text is that."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the result. Default: CODES.concepts.")
@click.option("--store", help="The store the codes were made from, if it was moved.")
@click.option("--run", type=click.Path(path_type=Path), help="The run they were made with, if it was moved.")
@click.option("--beside", multiple=True, help="Codes or a store of the same text to compare with; repeatable.")
@click.option(
    "--probe/--no-probe",
    default=True,
    show_default=True,
    help="Linear probes, absorption and raw dimensions: reads the store.",
)
@WORKERS_OPTION
@SCHEDULER_OPTION
@JSON_OPTION
def concepts(as_json: bool, **options: Any) -> None:
    """How well features follow labelled concepts: the best one's F1, splitting, absorption, and what else does.

    \b
    Example:
      actstore concepts codes
      actstore concepts codes --labels animals.jsonl --beside neurons.store --beside random.codes
    """
    from pipelines.concepts.stage import ConceptsConfig
    from pipelines.concepts.stage import concepts as stage
    from pipelines.concepts.table import concept_lines

    _print(stage(_shown("concepts", ConceptsConfig(**options))), as_json, concept_lines)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN RUN [RUN...]")
@click.option(
    "--store", multiple=True, help="Rows to encode by each run: one store for all, or one for each, in their order."
)
@click.option("--codes", multiple=True, help="Instead: the codes of each run, in their order.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write figures and a table of all features there.")
@click.option("--rows", default=100_000, show_default=True, help="Rows that co-activation is measured on.")
@SEED_OPTION
@JSON_OPTION
def compare(as_json: bool, **options: Any) -> None:
    """Which features runs share, by decoder cosine and by what they fire on; stability over three seeds or more.

    \b
    Example:
      actstore compare run-seed0 run-seed1 run-seed2 --store gpt2.store --out compared
    """
    from pipelines.compare.stage import CompareConfig
    from pipelines.compare.stage import compare as stage
    from pipelines.compare.table import compare_lines

    _print(stage(_shown("compare", CompareConfig(**options))), as_json, compare_lines)


@cli.command()
@OUT_OPTION
@click.option("--run", type=click.Path(path_type=Path), help="Also: this run's decoder directions beside random ones.")
@click.option("--features", default=20, show_default=True, help="Features of the toy model.")
@click.option("--dimensions", default=5, show_default=True, help="Dimensions it has for them.")
@click.option("--importance", default=0.9, show_default=True, help="Of each feature over the one before it.")
@click.option("--sparsities", default=9, show_default=True, help="Instances, from 1 - S = 1 down to 0.01.")
@click.option("--steps", default=3000, show_default=True, help="Training steps.")
@click.option("--batch", default=512, show_default=True, help="Rows in a step of each instance.")
@SEED_OPTION
@JSON_OPTION
def superposition(as_json: bool, **options: Any) -> None:
    """The toy model of superposition over sparsity, and an SAE's directions against chance; figures and plots.

    \b
    Example:
      actstore superposition --out superposition --run run
    """
    from pipelines.compare.superposition import SuperpositionConfig, superposition_lines
    from pipelines.compare.superposition import superposition as stage

    _print(stage(_shown("superposition", SuperpositionConfig(**options))), as_json, superposition_lines)


@cli.command()
@click.argument("analysis")
@click.option("--sort", default="frequency", show_default=True, help="frequency, mean, peak, documents, burstiness or id.")
@click.option("--top", default=20, show_default=True, help="How many to list.")
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
        _print(joint_rows(Analysis(analysis), top), as_json, joint_lines)
        return
    _print(feature_rows(Analysis(analysis), sort, top), as_json, features_lines)


@cli.command()
@click.argument("analysis")
@click.argument("feature_id", type=int, metavar="ID")
@click.option("--examples", default="top", show_default=True, help="top, strata (one of each fifth by strength) or random.")
@JSON_OPTION
def feature(analysis: str, feature_id: int, examples: str, as_json: bool) -> None:
    """Show one feature: how often, how strongly and where it fires, on which tokens, with which others; examples.

    \b
    Example:
      actstore feature analysis 317
      actstore feature analysis 317 --examples strata
    """
    from pipelines.analysis.cards import feature_card, feature_lines
    from pipelines.analysis.reader import Analysis

    _print(feature_card(Analysis(analysis), feature_id, examples), as_json, feature_lines)


@cli.command()
@click.argument("analysis")
@click.argument("text")
@click.option("--top", default=10, show_default=True, help="How many features to list.")
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

    _print(stage(Analysis(analysis), text, top), as_json, search_lines)


@cli.command()
@RUN_ARGUMENT
@click.option("--texts", required=True, type=click.Path(path_type=Path), help="A file with one text on each line.")
@click.option("--features", default=20, show_default=True, help="How many features to show, by mean activation.")
@click.option("--tokens", default=5, show_default=True, help="How many firings of each.")
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

    _print(stage(_shown("inspect", InspectConfig(**options))), as_json, inspect_lines)


@cli.command()
@click.argument("text")
@splice_options
@click.option("--target", help="The token whose logit is attributed. Default: the most likely one.")
@click.option("--against", help="A second token: the difference of the two logits is attributed.")
@click.option("--position", default=-1, show_default=True, help="Where the next token is predicted; -1: after the last one.")
@click.option("--by", default="head", show_default=True, help="head: each attention head; layer: each attention whole.")
@click.option("--top", default=12, show_default=True, help="How many parts to list.")
@click.option("--movers", default=0, show_default=True, help="Tokens that each part raises and lowers most.")
@click.option("--raw", is_flag=True, help="The logit as it is, and not less the vocabulary's mean.")
@click.option(
    "--final-norm/--no-final-norm", default=True, show_default=True, help="Without it, as teaching code does: not exact."
)
@DEVICE_OPTION
@JSON_OPTION
def attribute(as_json: bool, **options: Any) -> None:
    """Which embeddings, heads, MLPs, or features of an SAE make the logit of a token. The parts sum to the logit.

    \b
    Example:
      actstore attribute 'The Eiffel Tower is in the city of' --model gpt2 --target ' Paris' --against ' Rome'
      actstore attribute 'for i in range(' --run run --movers 5
    """
    from pipelines.causal.attribute.stage import AttributeConfig, attribute_lines
    from pipelines.causal.attribute.stage import attribute as stage

    _print(stage(_shown("attribute", AttributeConfig(**options))), as_json, attribute_lines)


@cli.command()
@click.argument("clean")
@click.argument("corrupt", required=False)
@splice_options
@click.option(
    "--site",
    default="resid_pre",
    show_default=True,
    help="resid_pre, resid_post, attn_out, mlp_out, head_out, or features of the SAE of --run.",
)
@click.option(
    "--metric", help="logit_difference, log_probability, probability or kl. Default: the first; without CORRUPT the second."
)
@click.option(
    "--direction", default="denoising", show_default=True, help="denoising: clean into corrupt; noising: corrupt into clean."
)
@click.option(
    "--method", default="exact", show_default=True, help="exact, or attribution: all cells estimated by one backward pass."
)
@click.option("--target", help="The clean text's next token. Default: the most likely one.")
@click.option("--against", help="The corrupt text's next token. Default: the most likely one.")
@click.option("--position", default=-1, show_default=True, help="Where the next token is predicted; -1: after the last one.")
@click.option("--top", default=12, show_default=True, help="How many features to patch: those of largest estimated effect.")
@click.option(
    "--steps", default=0, show_default=True, help="Of integrated gradients; 0: one gradient. For --method attribution."
)
@click.option(
    "--check", default=0, show_default=True, help="Cells to compare with exact patching. For --method attribution."
)
@click.option("--out", type=click.Path(path_type=Path), help="Also draw the grid, as .png or .svg.")
@SEED_OPTION
@DEVICE_OPTION
@JSON_OPTION
def patch(as_json: bool, **options: Any) -> None:
    """Put one text's activations into the other's run, place by place, and see what that does to the answer.

    Without CORRUPT, with --site features: what ablating each feature does.

    \b
    Example:
      actstore patch 'When Mary and John went out, John gave it to' 'When Mary and John went out, Mary gave it to'
      actstore patch 'for i in range(' 'for i in sorted(' --run run --site features --out features.png
      actstore patch 'for i in range(' --run run --site features --method attribution --check 100
    """
    from pipelines.causal.patch.stage import PatchConfig, patch_lines
    from pipelines.causal.patch.stage import patch as stage

    _print(stage(_shown("patch", PatchConfig(**options))), as_json, patch_lines)


@cli.command()
@RUN_ARGUMENT
@click.argument("text")
@click.option(
    "--feature", multiple=True, type=int, help="Feature to ablate; repeatable. Default: all that fire in the text."
)
@click.option(
    "--set-to",
    default="zero",
    show_default=True,
    help="zero; mean over rows, of --analysis or else of the text; firing or row: a value drawn from --codes.",
)
@click.option("--at", default="fired", show_default=True, help="Where it is set: where it fired, at all rows, or the last.")
@click.option("--each", is_flag=True, help="Ablate at each of these positions alone.")
@click.option(
    "--error",
    default="keep",
    show_default=True,
    help="keep: only the feature changes; drop: in the SAE's reconstruction, whose own effect is shown beside.",
)
@click.option("--top", default=5, show_default=True, help="Next tokens shown.")
@click.option("--features", default=10, show_default=True, help="Without --feature: how many to list, by effect.")
@click.option("--analysis", help="Of this run; for --set-to mean.")
@click.option("--codes", help="Of this run; for --set-to firing or row.")
@SEED_OPTION
@SUBJECT_STORE_OPTION
@MOVED_MODEL_OPTION
@DEVICE_OPTION
@JSON_OPTION
def ablate(as_json: bool, **options: Any) -> None:
    """What a text's next-token predictions owe to features: each set to another value, everything else kept.

    \b
    Example:
      actstore ablate run 'def load(path):' --feature 317
      actstore ablate run 'def load(path):' --error drop --set-to mean --analysis analysis
    """
    from pipelines.causal.ablate.stage import AblateConfig, ablate_features, ablate_lines

    _print(ablate_features(_shown("ablate", AblateConfig(**options))), as_json, ablate_lines)


@cli.command()
@RUN_ARGUMENT
@click.argument("feature", type=int)
@click.argument("text")
@click.option(
    "--strength",
    multiple=True,
    type=float,
    default=[0.0, 0.5, 1.0],
    show_default=True,
    help="Repeatable: the texts come side by side.",
)
@click.option(
    "--mode",
    default="add",
    show_default=True,
    help="add the feature's direction, clamp its code to a value, or scale its code.",
)
@click.option(
    "--unit",
    default="norm",
    show_default=True,
    help="Of a strength: norm, the mean norm of the store's rows; peak, the feature's in --analysis; or raw.",
)
@click.option("--at", default="all", show_default=True, help="all rows, those of the prompt, its last, or generated ones.")
@click.option("--tokens", default=40, show_default=True, help="Tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0: always the most probable token.")
@SEED_OPTION
@click.option("--cache/--no-cache", default=True, show_default=True, help="Keep keys and values from step to step.")
@click.option("--analysis", help="Of this run; for --unit peak.")
@SUBJECT_STORE_OPTION
@MOVED_MODEL_OPTION
@DEVICE_OPTION
@JSON_OPTION
def steer(as_json: bool, **options: Any) -> None:
    """What the model writes while a feature is added, clamped or scaled: several strengths side by side.

    \b
    Example:
      actstore steer run 317 'import os' --strength 0 --strength 0.5 --strength 1
      actstore steer run 317 'import os' --mode clamp --unit peak --analysis analysis --temperature 0.7 --seed 1
    """
    from pipelines.causal.steer.stage import SteerConfig, steer_lines
    from pipelines.causal.steer.stage import steer as stage

    _print(stage(_shown("steer", SteerConfig(**options))), as_json, steer_lines)


@cli.command()
@RUN_ARGUMENT
@click.argument("codes")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder; continued if it holds these effects.")
@click.option("--features", multiple=True, type=int, help="Feature to measure; repeatable. Default: all that fire.")
@click.option("--top", default=0, show_default=True, help="Instead: so many of the most frequent.")
@click.option("--firings", default=64, show_default=True, help="Of each feature at most, each in another window.")
@click.option(
    "--measure", default="firing", show_default=True, help="Predictions at the firing position, or the mean of it and later."
)
@click.option("--resamples", default=1000, show_default=True, help="Of documents, for the intervals.")
@click.option("--analysis", help="Of this run; adds densities and tokens.")
@SEED_OPTION
@SUBJECT_STORE_OPTION
@MOVED_MODEL_OPTION
@DEVICE_OPTION
@JSON_OPTION
def effects(as_json: bool, **options: Any) -> None:
    """What ablating each feature does over the corpus: KL, loss and tokens, at rows where it fires.

    \b
    Example:
      actstore effects run codes --out effects --analysis analysis
      actstore effects run codes --out effects-317 --features 317 --firings 512 --measure later
    """
    from pipelines.causal.effects.stage import EffectsConfig
    from pipelines.causal.effects.stage import effects as stage
    from pipelines.causal.effects.table import effects_lines

    _print(stage(_shown("effects", EffectsConfig(**options))), as_json, effects_lines)


@cli.command()
@RUN_ARGUMENT
@click.argument("feature", type=int, required=False)
@click.option("--top", default=10, show_default=True, help="Tokens of a feature, or features of the table.")
@click.option("--sort", default="kurtosis", show_default=True, help="Of the table: kurtosis, skew, peak or id.")
@click.option(
    "--windows", default=64, show_default=True, help="Windows that the final LayerNorm's mean scale is taken over."
)
@SUBJECT_STORE_OPTION
@MOVED_MODEL_OPTION
@DEVICE_OPTION
@JSON_OPTION
def lens(as_json: bool, **options: Any) -> None:
    """Which tokens a feature's direction promotes by the direct path alone; without FEATURE, a table of all.

    \b
    Example:
      actstore lens run 317
      actstore lens run --sort kurtosis --top 20
    """
    from pipelines.causal.lens.stage import LensConfig, lens_lines
    from pipelines.causal.lens.stage import lens as stage

    _print(stage(_shown("lens", LensConfig(**options))), as_json, lens_lines)


@cli.command()
@click.argument("analysis")
@OUT_OPTION
@click.option("--examples", default=5, show_default=True, help="Examples shown for each feature.")
@JSON_OPTION
def report(as_json: bool, **options: Any) -> None:
    """One self-contained HTML page of an analysis.

    \b
    Example:
      actstore report analysis --out report.html
    """
    from pipelines.report.stage import ReportConfig
    from pipelines.report.stage import report as stage

    _print(stage(_shown("report", ReportConfig(**options))), as_json, _key_lines)


def _shown(command: str, config: Any) -> Any:
    """Say on stderr what a command runs with, defaults included."""
    given = {name: value for name, value in vars(config).items() if value not in (None, ())}
    fields = (f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in given.items())
    click.echo(f"{command}: {' '.join(fields)}".replace("\n", "⏎"), err=True)
    return config


def _sole(value: Any) -> Any:
    """The value of an option that can be repeated and was not."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _print(value: Any, as_json: bool, lines: Callable[[Any], Any]) -> None:
    if as_json:
        click.echo(json.dumps(value, indent=1, default=str, ensure_ascii=False))
    else:
        for line in lines(value):
            click.echo(line)


def _key_lines(values: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *_key_lines(value, indent + "  ")] if value else []
        else:
            shown = f"{value:,}" if type(value) is int else f"{value:.4f}" if type(value) is float else value
            lines.append(f"{indent}{key:<{max(1, 30 - len(indent))}} {shown}")
    return lines


cli.add_command(export_command)
cli.add_command(import_command)

if __name__ == "__main__":
    cli()
