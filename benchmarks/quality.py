"""The quality of trained SAEs beside those of other trainers on the same rows.

    python -m benchmarks.quality --install FOLDER [--store STORE] [--rows 1000000] [--features 2048] [--k 32] [--json]

All trainers get the same rows in the same order, once over: shuffled rows of the built-in model (d = 192), collected
for the purpose unless `--store` names some. The same k, number of features, batch, warm-up (5 %) and decay (the last
fifth), and the same number of rows without firing after which a feature is helped; three learning rates each, three
seeds each, of initial weights and of the order. The rest is everyone's own recipe (see benchmarks/peers): how rows
are scaled, the decoder bias begins, weights begin, and dead features are revived.

The weights come back in raw units and one evaluator measures them all: variance explained (FVE) on the held-out rows, the
nats that the reconstruction adds to the model's loss on held-out text (dCE), and the share of features that fire
on none of the last tenth of the training rows. Mean and deviation over the seeds; * marks the learning rate of the
highest FVE, and when that is the lowest or highest of the three, it is said: the best may lie beyond.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray

from actstore import paths
from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from benchmarks.peers.environments import PeerFailed, Peers, add_options, choose
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.metrics.model_loss import heldout_text, reconstructing
from pipelines.models.load import load_model
from pipelines.models.sites.site import Site
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.base import Objective
from pipelines.sae.reconstruction_metrics import heldout_metrics
from pipelines.train.trainee import Recipe

OTHERS = ("saelens", "dictionary_learning")
TRAINERS = ("ours", *OTHERS)
LEARNING_RATES = {
    "ours": (6e-3, 1e-2, 1.6e-2),
    "saelens": (3e-3, 5e-3, 8e-3),
    "dictionary_learning": (6e-3, 1e-2, 1.6e-2),
}
"""Around the best of each in 390 steps. SAELens' decoder rows begin at norm 0.1, where a step goes ten times as far."""
COLLECT_TOKENS = 1_100_000
EVALUATED_ROWS = 8192
FIGURES = ("fve", "delta_ce", "dead_share", "l0", "tokens_per_s")


def own_recipe(n_rows: int, features: int, k: int) -> Recipe:
    """The recipe of `train` for this many rows; all trainers get its windows here.

    >>> own_recipe(1_000_000, 2048, 32).revive_after_rows, own_recipe(1_000_000, 2048, 32).dead_after_rows
    (10000, 100000)
    """
    return Recipe.standard(0.0, n_rows, 1, k / features, Objective())


def write_rows(store: ActivationStore, site: str, n_rows: int, batch: int, seed: int, path: Path) -> None:
    """The first whole batches of a shuffled stream, as one .npy of the store's precision."""
    n_batches = n_rows // batch
    dtype = np.float16 if store.manifest.array(paths.acts(site)).encoding == "fp16" else np.float32
    out = np.lib.format.open_memmap(path, "w+", dtype, (n_batches * batch, store.d_model(site)))
    for index, x in enumerate(islice(BatchStream(store, site, batch, seed=seed), n_batches)):
        out[index * batch : (index + 1) * batch] = x
    out.flush()


def load_sae(path: Path) -> TopKSae:
    """The SAE of an .npz that a peer's script wrote."""
    with np.load(path) as file:
        weights = {name: torch.from_numpy(file[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        sae = TopKSae(weights["W_dec"].shape[1], weights["W_dec"].shape[0], int(file["k"]))
    sae.load_state_dict(weights)
    return sae.eval().requires_grad_(False)


def train_on_rows(
    peers: Peers,
    trainer: str,
    rows: Path,
    weights: Path,
    *,
    features: int,
    k: int,
    batch: int,
    n_rows: int,
    seed: int,
    lr: float,
    dead_rows: int = 0,
) -> tuple[TopKSae, dict[str, Any]]:
    """Train on a file of `n_rows` rows in a process of its own; returns the trainer's record. Raises PeerFailed.

    `dead_rows`: after how many rows without firing a feature is helped; 0 for the recipe's.
    """
    asked = ["--rows", rows, "--out", weights, "--features", features, "--k", k, "--batch", batch, "--seed", seed]
    said = peers.run(
        trainer, *asked, "--dead-rows", dead_rows or own_recipe(n_rows, features, k).revive_after_rows, "--lr", lr
    )
    return load_sae(weights), said


def share_without_firing(sae: TopKSae, rows: NDArray[Any]) -> float:
    """The share of features that fire on none of the rows."""
    fired = torch.zeros(sae.n_features, dtype=torch.bool)
    for start in range(0, len(rows), EVALUATED_ROWS):
        values, indices = sae.encode(torch.from_numpy(rows[start : start + EVALUATED_ROWS].astype(np.float32)))
        fired[indices[values > 0]] = True
    return float((~fired).float().mean())


def measure(
    peers: Peers, store: ActivationStore, site: str, options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One record a trainer, learning rate and seed; and what failed, with its last words."""
    model = load_model(store.manifest.provenance["model"], "cpu", "fp32")
    rows_file, weights_file = folder / "rows.npy", folder / "weights.npz"
    window = own_recipe(options.rows, options.features, options.k).dead_after_rows
    shape = {"features": options.features, "k": options.k, "batch": options.batch, "n_rows": options.rows}
    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for seed in range(options.seeds):
        write_rows(store, site, options.rows, options.batch, seed, rows_file)
        rows = np.load(rows_file, mmap_mode="r")
        for place in range(3):
            for trainer in TRAINERS:
                if trainer not in peers.pythons or trainer in failed:
                    continue
                lr = (options.learning_rates or LEARNING_RATES[trainer])[place]
                try:
                    sae, run = train_on_rows(peers, trainer, rows_file, weights_file, **shape, seed=seed, lr=lr)
                except PeerFailed as error:
                    failed[trainer] = str(error)
                    continue
                found: dict[str, Any] = heldout_metrics(sae, store, site)
                replaced = {"sae": reconstructing(sae)}
                text = heldout_text(model, store, Site.parse(site), replaced, options.windows, "cpu")
                found |= text.finalize()
                found["dead_share"] = share_without_firing(sae, rows[-window:])
                record = {"trainer": trainer, "lr": lr, "seed": seed, **{name: found.get(name) for name in FIGURES}}
                records.append({**record, "tokens_per_s": run["tokens_per_s"], "version": run["version"]})
                print(json.dumps(records[-1]), file=sys.stderr)
    return records, failed


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the seeds, by trainer and learning rate, and which learning rate is best."""
    lines: list[dict[str, Any]] = []
    for trainer in TRAINERS:
        mine = [record for record in records if record["trainer"] == trainer]
        own: list[dict[str, Any]] = []
        for lr in sorted({record["lr"] for record in mine}):
            line: dict[str, Any] = {"trainer": trainer, "lr": lr, "best": False}
            for name in FIGURES:
                values = [record[name] for record in mine if record["lr"] == lr]
                line[name] = mean(values)
                line[f"{name}_deviation"] = stdev(values) if len(values) > 1 else 0.0
            own.append(line)
        if own:
            best = max(own, key=lambda line: line["fve"])
            best["best"], best["at_the_edge"] = True, best in (own[0], own[-1])
        lines += own
    return lines


def print_table(lines: list[dict[str, Any]]) -> None:
    """One line a trainer and learning rate."""
    heads = f"{'FVE, held out':>20}{'dCE, nat':>20}{'dead':>18}{'L0':>7}{'tokens/s':>11}"
    print(f"{'':22}{'lr':>9}{heads}")
    for line in lines:
        print(
            f"{line['trainer']:22}{line['lr']:>8g}{'*' if line['best'] else ' '}"
            f"{line['fve']:>12.4f} ±{line['fve_deviation']:.4f}{line['delta_ce']:>12.4f} ±{line['delta_ce_deviation']:.4f}"
            f"{line['dead_share']:>10.2%} ±{line['dead_share_deviation']:>6.2%}"
            f"{line['l0']:>7.1f}{line['tokens_per_s']:>11,.0f}"
        )
    best = {line["trainer"]: line for line in lines if line["best"]}
    for trainer, line in best.items():
        if line["at_the_edge"]:
            print(f"note: {trainer} is best at the edge of its learning rates ({line['lr']:g})")
        if trainer != "ours" and "ours" in best:
            ours = best["ours"]
            print(
                f"ours over {trainer}, both at their best: FVE {100 * (ours['fve'] - line['fve']):+.2f} points, "
                f"dCE {ours['delta_ce'] - line['delta_ce']:+.4f} nat, "
                f"dead {100 * (ours['dead_share'] - line['dead_share']):+.2f} points"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="of activations, with its model's name; else the built-in model's are collected")
    parser.add_argument("--site", help="of the store; its only one unless given")
    parser.add_argument("--layer", type=int, default=3, help="that is collected")
    parser.add_argument("--tokens", type=int, default=COLLECT_TOKENS, help="that are collected")
    parser.add_argument("--rows", type=int, default=1_000_000, help="to train on, rounded down to whole batches")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rates", type=float, nargs=3, help="for all alike, in place of each trainer's")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, for dCE")
    parser.add_argument("--json", action="store_true")
    add_options(parser, OTHERS)
    options = parser.parse_args()
    peers = choose(options, OTHERS)
    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        folder = Path(name)
        path = options.store or folder / "store"
        if options.store is None:
            collect(CollectConfig(out=path, model="builtin", layer=(options.layer,), tokens=options.tokens))
        store = ActivationStore(path)
        site = options.site or store.sites[0]
        records, failed = measure(peers, store, site, options, folder)
    lines = summarise(records)
    if options.json:
        print(json.dumps({"summary": lines, "runs": records, "skipped": peers.skipped, "failed": failed}, indent=1))
        return
    window = own_recipe(options.rows, options.features, options.k).dead_after_rows
    print(
        f"{site}, d = {store.d_model(site)}, F = {options.features}, k = {options.k}: {options.rows:,} rows in batches of "
        f"{options.batch}, {options.seeds} seeds; dead: no firing in the last {window:,} rows"
    )
    print_table(lines)
    for name, reason in {**peers.skipped, **failed}.items():
        print(f"not run: {name}: {reason}")


if __name__ == "__main__":
    main()
