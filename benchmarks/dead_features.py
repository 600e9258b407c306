"""How many features die, with and without the loss that revives them, in a training that kills many.

    python -m benchmarks.dead_features [--store STORE]

Few features a row and a high learning rate, on layer 3 of the built-in model. Dead is a feature that has not fired in
the last tenth of the training's rows. Exits with 1 when fewer than 30 % die without help, or more than 5 % with it.
"""

from __future__ import annotations

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

import argparse  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

from pipelines.collect.config import CollectConfig  # noqa: E402
from pipelines.collect.stage import collect  # noqa: E402
from pipelines.sae.checkpoint import load_run  # noqa: E402
from pipelines.train.config import TrainConfig  # noqa: E402
from pipelines.train.stage import train  # noqa: E402
from pipelines.train.trainee import AUXK  # noqa: E402

LEAST_WITHOUT, MOST_WITH = 0.30, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="else rows of the built-in model are collected")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    found: dict[float, list[tuple[float, float]]] = {0.0: [], AUXK: []}
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        if not options.store:
            collect(CollectConfig(out=store, model="builtin", corpus="stdlib", layer=(3,), tokens=1_100_000))
        for seed in range(options.seeds):
            for auxk, results in found.items():
                run = Path(folder) / f"run-{seed}-{auxk}"
                shape = {"features": options.features, "k": options.k, "tokens": options.rows, "batch": 1024}
                train(TrainConfig(store=store, out=run, **shape, lr=options.lr, auxk=auxk, seed=seed))
                metrics = load_run(run)[1].metrics
                results.append((metrics["dead_features"] / options.features, metrics["fve"]))
    for auxk, results in found.items():
        shares, scores = zip(*results, strict=True)
        dead = ", ".join(f"{share:.1%}" for share in shares)
        print(f"auxk {auxk:<8g} dead {dead}   FVE of the last batch {', '.join(f'{score:.3f}' for score in scores)}")
    print(f"asked: at least {LEAST_WITHOUT:.0%} without, at most {MOST_WITH:.0%} with")
    if min(share for share, _ in found[0.0]) < LEAST_WITHOUT or max(share for share, _ in found[AUXK]) > MOST_WITH:
        sys.exit(1)


if __name__ == "__main__":
    main()
