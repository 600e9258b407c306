"""How much training the model adds, and how much the SAE adds to raw dimensions and neurons.

    python -m benchmarks.baselines demo-out

takes a finished demo and prints, side by side: the demo's SAE; the same SAE on the same model with random weights
(a demo of its own, in demo-out/random-weights); the raw dimensions of the activations, each taken in both signs as if it
were a feature; and, concept by concept, also the neurons of the layer's MLP (a store of its own, in demo-out/neurons).
Whatever is chosen is chosen on one half of the documents and scored on the other for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

from actstore.files import read_json  # noqa: E402
from actstore.reader import ActivationStore  # noqa: E402
from pipelines.collect.config import CollectConfig  # noqa: E402
from pipelines.collect.stage import collect  # noqa: E402
from pipelines.concepts.labels import read_labels  # noqa: E402
from pipelines.concepts.rules import Finding  # noqa: E402
from pipelines.concepts.scored_units import ScoredUnits, choose_thresholds, score_rules  # noqa: E402
from pipelines.concepts.stage import SUMMARY, ConceptsConfig, concepts  # noqa: E402
from pipelines.concepts.table import concept_lines  # noqa: E402
from pipelines.demo import DemoConfig, read_demo, rule_counts, run_demo  # noqa: E402
from pipelines.sae.checkpoint import load_run  # noqa: E402
from pipelines.shared.cluster import connect, share  # noqa: E402
from pipelines.text.tokenizer_files import store_tokenizer  # noqa: E402

NEURON_TOKENS = 300_000
"""Tokens of the demo's text; neurons take four times the space of the residual stream."""


def raw_dimension_findings(store_path: Path, client: Any) -> list[Finding]:
    """The best rule of each of the 2 d signed dimensions of a store's only site."""
    store = ActivationStore(store_path)
    codec, scored = store_tokenizer(store), ScoredUnits.of(store, store.site())
    labels = read_labels(store, codec, None)
    held = [share(client, segment) for segment in labels.segments]
    thresholds = choose_thresholds(scored, held, client)
    scores = score_rules(scored, held, thresholds, codec.n_vocabulary, client)
    return list(scores.finalize(thresholds, labels.names, codec.token_texts()))


def concept_table(demo_out: Path, random_out: Path, layer: int, client: Any) -> dict[str, Any]:
    """The table of concepts of a demo's SAE, beside neurons and the SAE on random weights; kept in its folder."""
    config = ConceptsConfig(
        codes=demo_out / "codes",
        store=str(demo_out / "store"),
        run=demo_out / "run",
        out=demo_out / "baselines.concepts",
        beside=(str(demo_out / "neurons"), str(random_out / "codes")),
    )
    if (config.folder / SUMMARY).exists():
        return {"out": str(config.folder), **read_json(config.folder / SUMMARY)}
    tokens = min(NEURON_TOKENS, read_demo(demo_out)["tokens"])
    seed = ActivationStore(demo_out / "store").manifest.seed
    collect(
        CollectConfig(
            out=demo_out / "neurons", model="builtin", layer=(layer,), site=("mlp_hidden",), tokens=tokens, seed=seed
        )
    )
    return concepts(config, client)


@click.command()
@click.argument("demo_out", type=click.Path(path_type=Path))
@click.option("--workers", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(demo_out: Path, workers: int, as_json: bool) -> None:
    """Compare a finished demo with random weights, with raw dimensions and with neurons."""
    trained = read_demo(demo_out)
    random_out = demo_out / "random-weights"
    if not (random_out / "demo.json").exists():
        _, run = load_run(demo_out / "run")
        run_demo(
            DemoConfig(
                out=random_out,
                layer=trained["layer"],
                tokens=trained["tokens"],
                rows=run.rows_seen,
                random_weights=True,
                workers=workers,
                seed=run.config["seed"],
            )
        )
    random = read_demo(random_out)
    with connect(None, workers) as client:
        table = concept_table(demo_out, random_out, trained["layer"], client)
        raw = rule_counts(raw_dimension_findings(demo_out / "store", client))
        raw_random = rule_counts(raw_dimension_findings(random_out / "store", client))
    result = {
        "trained": trained,
        "random_weights": random,
        "raw_dimensions": raw,
        "raw_dimensions_random_weights": raw_random,
        "concepts": table,
    }
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(f"{'':<46}{'trained':>12}{'random weights':>16}")
    for label, key in (
        ("variance explained, held out", "fve"),
        ("the same of a 16-component PCA", "pca_fve"),
        ("unexplained variance over the PCA's", "unexplained_over_pca"),
        ("silent features at the end of training (share)", "silent_share"),
        ("loss added by the reconstruction (nat)", "delta_ce"),
    ):
        click.echo(f"{label:<46}{trained['evaluation'][key]:>12.3f}{random['evaluation'][key]:>16.3f}")
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (f"SAE features that follow a rule (of {trained['features']:,})", trained["rules"], random["rules"]),
        ("signed raw dimensions that follow a rule", raw, raw_random),
    ]
    for label, left, right in rows:
        click.echo(f"{label:<46}{left['features']:>12,}{right['features']:>16,}")
        for kind, meaning in (("place", "place in the text"), ("after", "the token before"), ("token", "the token itself")):
            click.echo(
                f"{'  different rules about ' + meaning:<46}{left['rules_' + kind]:>12,}{right['rules_' + kind]:>16,}"
            )
    click.echo()
    for line in concept_lines(table):
        click.echo(line)


if __name__ == "__main__":
    main()
