"""Commands: what features and parts of the model do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipelines.commands.numbers import ANY_WHOLE, AT_LEAST_ONE, FROM_ZERO, Real
from pipelines.commands.options import (
    DEVICE_OPTION,
    JSON_OPTION,
    MOVED_MODEL_OPTION,
    RUN_ARGUMENT,
    SEED_OPTION,
    SUBJECT_STORE_OPTION,
    splice_options,
)
from pipelines.commands.output import announced, show


@click.command()
@click.argument("text")
@splice_options
@click.option("--target", help="The token whose logit is attributed. Default: the most likely one.")
@click.option("--against", help="A second token: the difference of the two logits is attributed.")
@click.option(
    "--position",
    type=ANY_WHOLE,
    default=-1,
    show_default=True,
    help="Where the next token is predicted; -1: after the last one.",
)
@click.option("--by", default="head", show_default=True, help="head: each attention head; layer: each attention whole.")
@click.option("--top", type=AT_LEAST_ONE, default=12, show_default=True, help="Parts listed, by size.")
@click.option(
    "--movers",
    type=FROM_ZERO,
    default=0,
    show_default=True,
    help="Tokens listed for each part: those that it raises and lowers most.",
)
@click.option("--raw", is_flag=True, help="Attribute the logit itself, without subtracting the vocabulary's mean.")
@click.option(
    "--final-norm/--no-final-norm",
    default=True,
    show_default=True,
    help="Through the final LayerNorm; without it, as teaching code does, the sum is not exact.",
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

    show(stage(announced("attribute", AttributeConfig(**options))), as_json, attribute_lines)


@click.command()
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
@click.option(
    "--position",
    type=ANY_WHOLE,
    default=-1,
    show_default=True,
    help="Where the next token is predicted; -1: after the last one.",
)
@click.option(
    "--top",
    type=AT_LEAST_ONE,
    default=12,
    show_default=True,
    help="Features patched: those with the largest estimated effect.",
)
@click.option(
    "--steps",
    type=FROM_ZERO,
    default=0,
    show_default=True,
    help="Steps of integrated gradients; 0: one gradient. For --method attribution.",
)
@click.option(
    "--check",
    type=FROM_ZERO,
    default=0,
    show_default=True,
    help="Cells to compare with exact patching. For --method attribution.",
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

    show(stage(announced("patch", PatchConfig(**options))), as_json, patch_lines)


@click.command()
@RUN_ARGUMENT
@click.argument("text")
@click.option(
    "--feature", multiple=True, type=FROM_ZERO, help="Feature to ablate; repeatable. Default: all that fire in the text."
)
@click.option(
    "--set-to",
    default="zero",
    show_default=True,
    help="zero; mean over rows, of --analysis or else of the text; firing or row: a value drawn from --codes.",
)
@click.option(
    "--at",
    default="fired",
    show_default=True,
    help="Where the feature is set: where it fired, at all rows, or at the last row.",
)
@click.option("--each", is_flag=True, help="Ablate at each of these positions alone.")
@click.option(
    "--error",
    default="keep",
    show_default=True,
    help="keep: only the feature changes; drop: the reconstruction replaces the rows, and its effect is shown too.",
)
@click.option("--top", type=AT_LEAST_ONE, default=5, show_default=True, help="Next tokens shown.")
@click.option(
    "--features", type=AT_LEAST_ONE, default=10, show_default=True, help="Without --feature: features listed, by effect."
)
@click.option("--analysis", help="An analysis of this run; for --set-to mean.")
@click.option("--codes", help="A code store of this run; for --set-to firing or row.")
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

    show(ablate_features(announced("ablate", AblateConfig(**options))), as_json, ablate_lines)


@click.command()
@RUN_ARGUMENT
@click.argument("feature", type=FROM_ZERO)
@click.argument("text")
@click.option(
    "--strength",
    multiple=True,
    type=Real(),
    default=[0.0, 0.5, 1.0],
    show_default=True,
    help="Strength of the change; repeatable, the texts are shown side by side.",
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
    help="Unit of a strength: norm, the mean norm of the store's rows; peak, the feature's peak in --analysis; or raw.",
)
@click.option(
    "--at",
    default="all",
    show_default=True,
    help="Where the feature is changed: all rows, the prompt's, the prompt's last, or the generated ones.",
)
@click.option("--tokens", type=AT_LEAST_ONE, default=40, show_default=True, help="Tokens to generate.")
@click.option(
    "--temperature",
    type=Real(0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 takes the most probable token.",
)
@SEED_OPTION
@click.option("--cache/--no-cache", default=True, show_default=True, help="Keep keys and values from step to step.")
@click.option("--analysis", help="An analysis of this run; for --unit peak.")
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

    show(stage(announced("steer", SteerConfig(**options))), as_json, steer_lines)


@click.command()
@RUN_ARGUMENT
@click.argument("codes")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder; continued if it holds these effects.")
@click.option("--features", multiple=True, type=FROM_ZERO, help="Feature to measure; repeatable. Default: all that fire.")
@click.option("--top", type=FROM_ZERO, default=0, show_default=True, help="Instead: the N most frequent features; 0: all.")
@click.option(
    "--firings",
    type=AT_LEAST_ONE,
    default=64,
    show_default=True,
    help="Most firings of each feature, each in another window.",
)
@click.option(
    "--measure", default="firing", show_default=True, help="Predictions at the firing position, or the mean of it and later."
)
@click.option(
    "--resamples", type=AT_LEAST_ONE, default=1000, show_default=True, help="Resamples of documents, for the intervals."
)
@click.option("--analysis", help="An analysis of this run; adds densities and tokens.")
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

    show(stage(announced("effects", EffectsConfig(**options))), as_json, effects_lines)


@click.command()
@RUN_ARGUMENT
@click.argument("feature", type=FROM_ZERO, required=False)
@click.option(
    "--top",
    type=AT_LEAST_ONE,
    default=10,
    show_default=True,
    help="Tokens listed for a feature, or features listed in the table.",
)
@click.option("--sort", default="kurtosis", show_default=True, help="Order of the table: kurtosis, skew, peak or id.")
@click.option(
    "--windows",
    type=AT_LEAST_ONE,
    default=64,
    show_default=True,
    help="Windows over which the final LayerNorm's mean scale is taken.",
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

    show(stage(announced("lens", LensConfig(**options))), as_json, lens_lines)
