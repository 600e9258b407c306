"""What training the model adds, and what the SAE adds to raw dimensions.

    python -m benchmarks.baselines demo-out

takes a finished demo and prints, side by side: the demo's SAE; the same SAE on the same model with random weights
(a demo of its own, in demo-out/random-weights); and the raw dimensions of the activations, each taken in both signs
as if it were a feature. A rule's threshold is chosen on one half of the documents and scored on the other for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cli import set_environment

set_environment()  # before torch is loaded, as the commands do

from actstore.reader import ActivationStore, Shard  # noqa: E402
from actstore.schema import PARTS  # noqa: E402
from pipelines.cluster import connect, reduce_tasks  # noqa: E402
from pipelines.concepts import HALF_BIT, Finding, RuleScores, label_store, row_labels, shard_rules  # noqa: E402
from pipelines.demo import DemoConfig, read_demo, rule_counts, run_demo  # noqa: E402
from pipelines.sae.checkpoint import load_run  # noqa: E402
from pipelines.tokens import store_tokenizer  # noqa: E402

FIRING_SHARES = (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
"""A dimension's candidate thresholds: the values above which it lies in these shares of the choosing half's rows."""
SAMPLE_ROWS = 100_000


def raw_dimension_findings(store_path: Path, workers: int) -> list[Finding]:
    """The best rule of each of the 2 d signed dimensions of a store's only site."""
    store = ActivationStore(store_path)
    site = store.site()
    codec = store_tokenizer(store)
    labels = label_store(store, codec)
    thresholds = _thresholds(store, site, labels)
    shards = [shard for part in PARTS for shard in store.shards(part)]
    with connect(None, workers) as client:
        shared = [client.scatter(bits, broadcast=True) for bits in labels]
        tasks = [
            (store_path, site, shard, shared[shard.segment], thresholds, codec.backend.get_vocab_size()) for shard in shards
        ]
        scores = reduce_tasks(client, "raw", score_raw_shard, RuleScores.merge, tasks)
    findings: list[Finding] = scores.finalize(thresholds, codec.token_texts())
    return findings


def score_raw_shard(
    store_path: Path, site: str, shard: Shard, labels: NDArray[np.uint64], thresholds: NDArray[np.float64], n_vocabulary: int
) -> RuleScores:
    """The rule scores of one shard's signed dimensions. Runs on a worker."""
    store = ActivationStore(store_path)
    rules, half = shard_rules(store, shard, labels, n_vocabulary)
    signed = _signed(store, shard, site)
    fired = [sp.csr_array((signed > bounds).astype(np.int64)) for bounds in thresholds]
    scores = RuleScores(signed.shape[1], rules.shape[1], len(thresholds))
    scores.update(fired, rules, half)
    return scores


def _signed(store: ActivationStore, shard: Shard, site: str) -> NDArray[np.float32]:
    rows = store.read(shard, f"acts/{site}")
    return np.concatenate([rows, -rows], axis=1)


def _thresholds(store: ActivationStore, site: str, labels: list[NDArray[np.uint64]]) -> NDArray[np.float64]:
    """(T, 2 d) quantiles over a sample of the choosing half's rows."""
    sample: list[NDArray[np.float32]] = []
    for shard in store.shards():
        if sum(map(len, sample)) >= SAMPLE_ROWS:
            break
        mine = (row_labels(store, shard, labels[shard.segment]) & HALF_BIT) == 0
        sample.append(_signed(store, shard, site)[mine])
    return np.quantile(np.concatenate(sample), [1 - share for share in FIRING_SHARES], axis=0)


@click.command()
@click.argument("demo_out", type=click.Path(path_type=Path))
@click.option("--workers", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(demo_out: Path, workers: int, as_json: bool) -> None:
    """Compare a finished demo with random weights and with raw dimensions."""
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
    raw = rule_counts(raw_dimension_findings(demo_out / "store", workers))
    raw_random = rule_counts(raw_dimension_findings(random_out / "store", workers))
    result = {
        "trained": trained,
        "random_weights": random,
        "raw_dimensions": raw,
        "raw_dimensions_random_weights": raw_random,
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


if __name__ == "__main__":
    main()
