"""Commands: train SAEs, measure how well they explain."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import click

from pipelines.commands.lines import train_lines
from pipelines.commands.numbers import ANY_WHOLE, AT_LEAST_ONE, FROM_ZERO, SEED, TORCH_SEED, Real, Whole
from pipelines.commands.options import (
    DEVICE_OPTION,
    JSON_OPTION,
    MOVED_MODEL_OPTION,
    OUT_OPTION,
    RUN_ARGUMENT,
    STORE_ARGUMENT,
)
from pipelines.commands.output import announced, show, sole


@click.command()
@STORE_ARGUMENT
@OUT_OPTION
@click.option("--layer", multiple=True, type=ANY_WHOLE, help="Layer of the store; needed when the store holds several. *")
@click.option("--site", multiple=True, default=["resid_post"], show_default=True, help="Site of that layer. *")
@click.option(
    "--architecture",
    multiple=True,
    default=["topk"],
    show_default=True,
    help="topk, batchtopk, matryoshka, relu, jumprelu or gated. *",
)
@click.option("--features", multiple=True, type=AT_LEAST_ONE, default=[4096], show_default=True, help="Width of the SAE. *")
@click.option(
    "--k", multiple=True, type=AT_LEAST_ONE, default=[32], show_default=True, help="Features active in each row. *"
)
@click.option(
    "--tokens", "--rows", "tokens", type=FROM_ZERO, default=0, help="Rows to train on; 0: as many as --epochs says."
)
@click.option(
    "--epochs", type=Real(0, 1e6, is_open=True), default=1.0, show_default=True, help="Passes over the store's rows."
)
@click.option("--batch", type=Whole(2), default=4096, show_default=True, help="Rows in a step.")
@click.option(
    "--lr",
    multiple=True,
    type=Real(0),
    default=[0.0],
    help="Learning rate; 0: 2e-4 / sqrt(features / 16384), more in short runs. *",
)
@click.option(
    "--l1",
    multiple=True,
    type=Real(0),
    default=[0.0],
    help="Coefficient of the mean absolute code; 0: the architecture's. *",
)
@click.option(
    "--auxk", type=Real(0), default=0.03125, show_default=True, help="Weight of the loss that revives dead features."
)
@click.option(
    "--recipe", default="standard", show_default=True, help="standard, or textbook: constant rate, Linear start, clip at 1."
)
@click.option("--kernel", default="auto", show_default=True, help="How a step is computed: sparse, sparse-fp32 or dense.")
@click.option(
    "--seed",
    multiple=True,
    type=TORCH_SEED,
    default=[0],
    show_default=True,
    help="Seed of the first weights. *",
)
@click.option("--order-seed", default=0, show_default=True, type=SEED, help="Seed of the order of the rows.")
@DEVICE_OPTION
@click.option(
    "--checkpoint-minutes",
    type=Real(0),
    default=10.0,
    show_default=True,
    help="Minutes between saved states; 0: only when stopped.",
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
    from pipelines.models.load import choose_device
    from pipelines.train.ranks import is_first_process
    from pipelines.train.sweep import comparison_lines, grid, sweep

    asked = {name: sole(options[name]) for name in vars(grid(options)[0])}
    announced("train", SimpleNamespace(**asked), auto=("lr", "l1"))
    started = time.monotonic()
    result = sweep(options)
    if is_first_process():
        result |= {"seconds": round(time.monotonic() - started, 1), "device": choose_device(options["device"])}
        if "runs" in result:
            show(result, as_json, comparison_lines)
        else:
            show({"path": options["out"], **result}, as_json, train_lines)


@click.command()
@RUN_ARGUMENT
@STORE_ARGUMENT
@click.option(
    "--windows", type=AT_LEAST_ONE, default=128, show_default=True, help="Held-out windows to run the language model on."
)
@click.option("--pca", type=AT_LEAST_ONE, default=16, show_default=True, help="Components of the PCA beside the SAE.")
@MOVED_MODEL_OPTION
@DEVICE_OPTION
@click.option(
    "--baselines", is_flag=True, help="Also measure PCA, raw dimensions, a random decoder, and a model with random weights."
)
@click.option(
    "--baseline-tokens",
    type=FROM_ZERO,
    default=1_000_000,
    show_default=True,
    help="Rows on which the baselines' SAEs are trained, at most those of the run; 0: the run's.",
)
@JSON_OPTION
def evaluate(as_json: bool, **options: Any) -> None:
    """How well an SAE explains held-out rows, and what its reconstruction does to the model's loss.

    RUN may be a sweep: each of its runs is evaluated. The figures are kept beside the run, in RUN/evaluations, by the
    store's snapshot and the options.

    \b
    Example:
      actstore evaluate run gpt2.store
      actstore evaluate run gpt2.store --baselines
    """
    from pipelines.evaluate.baselines import BaselinesConfig
    from pipelines.evaluate.of_sweep import evaluate_all, lines

    show(evaluate_all(announced("evaluate", BaselinesConfig(**options))), as_json, lines)
