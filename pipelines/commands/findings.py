"""Commands: what features have to do with each other, with concepts, with other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipelines.commands.numbers import AT_LEAST_ONE, Real, Whole
from pipelines.commands.options import JSON_OPTION, OUT_OPTION, SCHEDULER_OPTION, SEED_OPTION, WORKERS_OPTION
from pipelines.commands.output import announced, show


@click.command()
@click.argument("analysis")
@click.option("--codes", help="Where the analysis' code store is, if it was moved.")
@click.option("--run", type=click.Path(path_type=Path), help="The run of the analysis, for its decoder directions.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write it. Default: ANALYSIS/structure.")
@click.option(
    "--draws", type=Whole(20), default=100, show_default=True, help="Draws of the null on either half of the documents."
)
@click.option(
    "--rows",
    type=AT_LEAST_ONE,
    default=200_000,
    show_default=True,
    help="Rows that are read, in whole documents of both halves.",
)
@click.option(
    "--block-rows",
    type=Whole(2),
    default=1024,
    show_default=True,
    help="Most rows of a document that a draw deals together.",
)
@click.option(
    "--min-lift",
    type=Real(1, is_open=True),
    default=2.0,
    show_default=True,
    help="A lift over the null from which an effect counts as large.",
)
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

    show(stage(announced("structure", StructureConfig(**options))), as_json, summary_lines)


@click.command()
@click.argument("codes")
@click.option("--labels", help="A file of labelled ranges (.jsonl, .parquet), or `python`, the default for Python text.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the result. Default: CODES.concepts.")
@click.option("--store", help="Where the codes' store is, if it was moved.")
@click.option("--run", type=click.Path(path_type=Path), help="Where the codes' run is, if it was moved.")
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

    show(stage(announced("concepts", ConceptsConfig(**options))), as_json, concept_lines)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN RUN [RUN...]")
@click.option(
    "--store", multiple=True, help="Rows to encode by each run: one store for all, or one for each, in their order."
)
@click.option("--codes", multiple=True, help="Instead: the codes of each run, in their order.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write figures and a table of all features there.")
@click.option(
    "--rows", type=AT_LEAST_ONE, default=100_000, show_default=True, help="Rows on which co-activation is measured."
)
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

    show(stage(announced("compare", CompareConfig(**options))), as_json, compare_lines)


@click.command()
@OUT_OPTION
@click.option("--run", type=click.Path(path_type=Path), help="Also: this run's decoder directions beside random ones.")
@click.option("--features", type=AT_LEAST_ONE, default=20, show_default=True, help="Features of the toy model.")
@click.option("--dimensions", type=AT_LEAST_ONE, default=5, show_default=True, help="Dimensions of the toy model.")
@click.option(
    "--importance",
    type=Real(0, 1, is_open=True),
    default=0.9,
    show_default=True,
    help="Importance of each feature relative to the one before.",
)
@click.option(
    "--sparsities",
    type=Whole(2),
    default=9,
    show_default=True,
    help="Instances trained, at densities 1 - S from 1 down to 0.01.",
)
@click.option("--steps", type=AT_LEAST_ONE, default=3000, show_default=True, help="Training steps.")
@click.option("--batch", type=AT_LEAST_ONE, default=512, show_default=True, help="Rows in a step of each instance.")
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

    show(stage(announced("superposition", SuperpositionConfig(**options))), as_json, superposition_lines)
