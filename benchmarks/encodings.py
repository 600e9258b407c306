"""What each encoding of rows takes on disk and loses, and whether an SAE can tell.

    python -m benchmarks.encodings [--tokens 300000] [--json]

First, made-up rows with the outlier dimensions of GPT-2's residual stream (d = 768): bytes a row of the written store,
and the unexplained variance Σ‖x − x'‖² / Σ‖x − mean x‖² over the other dimensions, since the outliers' variance
would hide any error. Then the built-in model: one fp32 store, recoded, SAEs of three seeds trained from each copy with
the same orders and recipe, and all of them evaluated on the held-out rows of the fp32 store.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from actstore import paths
from actstore.encodings.registry import activation_encodings
from actstore.reader import ActivationStore
from actstore.recode import recode_store
from benchmarks.madestore import OUTLIERS, SITE, make_store
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.sae.checkpoint import load_run
from pipelines.sae.reconstruction_metrics import heldout_metrics
from pipelines.train.config import TrainConfig
from pipelines.train.stage import train

N_ROWS, D_MODEL = 50_000, 768
SEEDS = (0, 1, 2)
LARGEST_SHARE, LARGEST_FVU, LARGEST_FVE_POINTS = 0.45, 2e-4, 0.2


def outlier_rows_table(folder: Path) -> dict[str, dict[str, float]]:
    """Bytes a row and unexplained variance of each encoding, on rows with outlier dimensions."""
    source = ActivationStore(make_store(folder / "fp32", N_ROWS, D_MODEL, "fp32"))
    exact = np.concatenate([source.read(shard, paths.acts(SITE)) for shard in source.shards()]).astype(np.float64)
    plain = np.setdiff1d(np.arange(D_MODEL), [channel for channel, _, _ in OUTLIERS])
    found = {}
    for encoding in activation_encodings():
        if encoding != "fp32":
            recode_store(folder / "fp32", folder / encoding, encoding)
        store = ActivationStore(folder / encoding)
        kept = np.concatenate([store.read(shard, paths.acts(SITE)) for shard in store.shards()])
        n_bytes = sum(size for name, size in store.place.names().items() if f"/acts/{SITE}" in name or "/scales/" in name)
        total = np.square(exact - exact.mean(axis=0))
        missed = np.square(exact - kept)
        found[encoding] = {
            "bytes_per_row": n_bytes / len(exact),
            "unexplained": missed[:, plain].sum() / total[:, plain].sum(),
            "unexplained_with_outliers": missed.sum() / total.sum(),
        }
    for row in found.values():
        row["of_fp16"] = row["bytes_per_row"] / found["fp16"]["bytes_per_row"]
    return found


def trained_table(folder: Path, n_tokens: int, layer: int) -> dict[str, tuple[float, float]]:
    """Variance explained on held-out fp32 rows by SAEs trained from each encoding: mean and deviation over seeds."""
    exact = folder / "built-in"
    collect(CollectConfig(out=exact, model="builtin", layer=(layer,), tokens=n_tokens, encoding="fp32"))
    found = {}
    for encoding in activation_encodings():
        copy = exact
        if encoding != "fp32":
            copy = folder / f"built-in-{encoding}"
            recode_store(exact, copy, encoding)
        scores = []
        for seed in SEEDS:
            run = folder / f"run-{encoding}-{seed}"
            train(TrainConfig(store=copy, out=run, features=2048, k=16, epochs=2, seed=seed))
            scores.append(heldout_metrics(load_run(run)[0], ActivationStore(exact), f"resid_post.{layer}")["fve"])
        found[encoding] = (mean(scores), stdev(scores))
    return found


def holds(rows: dict[str, dict[str, float]], trained: dict[str, tuple[float, float]]) -> bool:
    points = 100 * abs(trained["int8"][0] - trained["fp32"][0])
    small, exact = rows["int8"]["of_fp16"] <= LARGEST_SHARE, rows["int8"]["unexplained"] <= LARGEST_FVU
    return small and exact and points <= LARGEST_FVE_POINTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = outlier_rows_table(Path(folder))
        trained = trained_table(Path(folder), options.tokens, options.layer)
    if options.json:
        value: dict[str, Any] = {"rows": rows, "fve_of_trained_sae": trained}
        print(json.dumps(value, indent=1))
    else:
        print(f"{N_ROWS:,} rows x {D_MODEL} with outlier dimensions; SAE of the built-in model, {options.tokens:,} tokens")
        heads = f"{'bytes a row':>12}{'of fp16':>9}{'unexplained':>13}{'with outliers':>15}"
        print(f"{'':6}{heads}{'FVE of SAE':>12}{'points':>8}{'± seeds':>8}")
        for name, row in rows.items():
            print(
                f"{name:6}{row['bytes_per_row']:>12.0f}{row['of_fp16']:>9.3f}{row['unexplained']:>13.1e}"
                f"{row['unexplained_with_outliers']:>15.1e}{trained[name][0]:>12.4f}"
                f"{100 * (trained[name][0] - trained['fp32'][0]):>+8.2f}{100 * trained[name][1]:>8.2f}"
            )
        print(
            f"asked of int8: <= {LARGEST_SHARE} of fp16, unexplained <= {LARGEST_FVU:g}, "
            f"SAE within {LARGEST_FVE_POINTS} points of fp32's"
        )
    raise SystemExit(0 if holds(rows, trained) else 1)


if __name__ == "__main__":
    main()
