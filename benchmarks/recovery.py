"""Whether a trained SAE finds the features that rows were made of.

    python -m benchmarks.recovery [--problem independent] [--seeds 0 1 2] [--tokens 8000000] [--json]
                                  [--tool actstore saelens dictionary_learning --install FOLDER]

Two problems of 1,024 true features in 192 dimensions (`pipelines.stores.made.synthetic`): independent ones, whose
frequencies fall as rank^-0.5, and 128 parents with 7 children each, one of which fires with its parent in the mean
(rank^-1). SAEs of as many features as there are, and of twice as many, are trained from a store of each; directions are
compared with the truth, codes on held-out rows. `pipelines.stores.made.recovery` has the definitions. A seed is that of
the SAE and its batches; the problem stays the same.

The other tools train on the same rows in the same batches, with their own recipes (see `benchmarks.quality`), each at one
learning rate, which was not searched for (`LEARNING_RATES`: SAELens' is half the others', as its best is there; `--lr`
is for all). Features are helped after as many rows without firing as in `train`; `--dead-rows` is for the others only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from actstore.reader import ActivationStore
from benchmarks.peers.environments import Peers, add_options, choose
from benchmarks.quality import OTHERS, train_on_rows, write_rows
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import load_run
from pipelines.stores.made.recovery import Recovery, measure
from pipelines.stores.made.synthetic import Superposition, write_synthetic_store
from pipelines.train.stage import TrainConfig, train

BATCH_ROWS = 1024
"""Four times the steps of the default batch from the same rows; rare features need steps more than exact gradients."""
HELDOUT_ROWS = 20_000
ENCODE_ROWS = 4096

LEARNING_RATES = {"actstore": 2e-3, "saelens": 1e-3, "dictionary_learning": 2e-3}

Encode = Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True)
class Problem:
    """True features, and the least figure for a dictionary: `figure` of its `Recovery` is at least `asked`."""

    truth: Superposition
    figure: str
    asked: float


@dataclass(frozen=True)
class Dictionary:
    """A trained SAE of any tool: decoder directions (F, d_model) in the space of the rows, and a function from rows
    (n, d_model) to the values and the indices, both (n, k), of their codes."""

    decoder: NDArray[np.float32]
    encode: Encode


PROBLEMS = {
    "independent": Problem(Superposition(d_model=192, n_features=1024, k=8, zipf=0.5), "matched_cosine", 0.98),
    "hierarchy": Problem(
        Superposition(d_model=192, n_features=1024, k=14, kind="hierarchy", group_size=8, within=1 / 7), "recall", 0.75
    ),
}


@dataclass(frozen=True)
class Run:
    """A training for a tool: its SAE of `features` features on the first `tokens` rows of a store's shuffled stream."""

    store: Path
    out: Path
    features: int
    k: int
    tokens: int
    lr: float
    seed: int


def train_actstore(run: Run) -> Dictionary:
    train(TrainConfig(**vars(run), order_seed=run.seed, batch=BATCH_ROWS))
    return dictionary_of(load_run(run.out)[0])


def train_peer(peers: Peers, tool: str, run: Run, dead_rows: int) -> Dictionary:
    store, rows, weights = ActivationStore(run.store), run.out.with_suffix(".npy"), run.out.with_suffix(".npz")
    write_rows(store, store.sites[0], run.tokens, BATCH_ROWS, run.seed, rows)
    shape = {"features": run.features, "k": run.k, "batch": BATCH_ROWS, "n_rows": run.tokens}
    sae, _ = train_on_rows(peers, tool, rows, weights, **shape, seed=run.seed, lr=run.lr, dead_rows=dead_rows)
    rows.unlink()
    return dictionary_of(sae)


def dictionary_of(sae: TopKSae) -> Dictionary:
    def encode(rows: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        values, indices = sae.encode(torch.from_numpy(rows))
        return values.numpy(), indices.numpy()

    return Dictionary(sae.W_dec.numpy(), encode)


def sparse_codes(dictionary: Dictionary, rows: NDArray[np.float32]) -> csr_matrix:
    """(n, F) codes of rows."""
    found = []
    for start in range(0, len(rows), ENCODE_ROWS):
        values, indices = dictionary.encode(rows[start : start + ENCODE_ROWS])
        row = np.repeat(np.arange(len(values)), values.shape[1])
        found.append(csr_matrix((values.ravel(), (row, indices.ravel())), (len(values), len(dictionary.decoder))))
    return vstack(found, format="csr")


def recovery_of(dictionary: Dictionary, truth: Superposition, first_row: int) -> Recovery:
    """Over the held-out rows, which begin at `first_row`."""
    last_row = first_row + HELDOUT_ROWS
    codes = sparse_codes(dictionary, truth.rows(first_row, last_row))
    return measure(dictionary.decoder, codes, truth.directions, truth.codes(first_row, last_row), truth.parents)


def measured(options: argparse.Namespace, peers: Peers, folder: Path) -> list[dict[str, Any]]:
    """One line for each problem, tool, dictionary size and seed."""
    found = []
    for name in options.problem:
        truth = PROBLEMS[name].truth
        store = write_synthetic_store(folder / name, truth, options.rows, HELDOUT_ROWS, "fp16")
        for tool in options.tool:
            for times in options.times:
                for seed in options.seeds:
                    lr, features = options.lr or LEARNING_RATES[tool], times * truth.n_features
                    out = folder / f"{name}-{tool}-{times}-{seed}"
                    run = Run(store, out, features, round(truth.k), options.tokens, lr, seed)
                    start = time.perf_counter()
                    ours = tool == "actstore"
                    dictionary = train_actstore(run) if ours else train_peer(peers, tool, run, options.dead_rows)
                    seconds = time.perf_counter() - start
                    figures = asdict(recovery_of(dictionary, truth, options.rows))
                    line = {"problem": name, "tool": tool, "times": times, "seed": seed, "lr": lr, "s": seconds, **figures}
                    print(json.dumps(line), file=sys.stderr)
                    found.append(line)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Every run, and under the runs of a kind their mean."""
    shown = [
        f"{'problem':13}{'tool':21}{'F/true':>6}{'seed':>6}{'MMCS':>8}{'matched':>9}{'recall':>8}"
        f"{'dead':>6}{'split':>7}{'absorbed':>10}{'s':>6}"
    ]
    for kind in dict.fromkeys((line["problem"], line["tool"], line["times"]) for line in lines):
        own = [line for line in lines if (line["problem"], line["tool"], line["times"]) == kind]
        figures = ("mmcs", "matched_cosine", "recall", "n_dead", "n_split", "n_absorbed", "s")
        average = {"seed": "mean", **{name: mean(line[name] for line in own) for name in figures}}
        for line in [*own, average]:
            shown.append(
                f"{kind[0]:13}{kind[1]:21}{kind[2]:>6}{line['seed']:>6}{line['mmcs']:>8.3f}{line['matched_cosine']:>9.3f}"
                f"{line['recall']:>8.3f}{line['n_dead']:>6.0f}{line['n_split']:>7.0f}{line['n_absorbed']:>10.0f}{line['s']:>6.0f}"
            )
        if kind[1] == "actstore":
            problem = PROBLEMS[kind[0]]
            verdict = "met" if average[problem.figure] >= problem.asked else "missed"
            shown.append(f"{'':13}asked: {problem.figure.replace('_', ' ')} >= {problem.asked:g}: {verdict}")
    return "\n".join(shown)


def holds(lines: list[dict[str, Any]]) -> bool:
    """Whether the project's own SAEs reach what is asked in every problem, in the mean over seeds, at every size."""
    kinds = {(line["problem"], line["times"]) for line in lines if line["tool"] == "actstore"}
    return all(
        mean(
            line[PROBLEMS[problem].figure]
            for line in lines
            if (line["tool"], line["problem"], line["times"]) == ("actstore", problem, times)
        )
        >= PROBLEMS[problem].asked
        for problem, times in kinds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--tool", nargs="+", choices=["actstore", *OTHERS], default=["actstore"])
    parser.add_argument("--times", nargs="+", type=int, default=[1, 2], help="features of the SAE over true features")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the store")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="rows to train on")
    parser.add_argument("--lr", type=float, help="for all tools alike, in place of each one's own")
    parser.add_argument("--dead-rows", type=int, default=0, help="without firing, after which others help a feature")
    parser.add_argument("--json", action="store_true")
    add_options(parser, OTHERS)
    options = parser.parse_args()
    peers = choose(options, tuple(tool for tool in options.tool if tool in OTHERS))
    if peers.skipped:
        parser.error("; ".join(f"{tool}: {reason}" for tool, reason in peers.skipped.items()))
    with tempfile.TemporaryDirectory() as folder:
        lines = measured(options, peers, Path(folder))
    if options.json:
        print(json.dumps({"options": vars(options), "runs": lines}, indent=1, default=str))
    else:
        print(f"{options.tokens:,} rows in batches of {BATCH_ROWS}, k = the true mean")
        print(table(lines))
    raise SystemExit(0 if holds(lines) else 1)


if __name__ == "__main__":
    main()
