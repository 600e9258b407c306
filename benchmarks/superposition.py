"""The toy model's transition over several seeds, and how far an SAE's directions are from random ones.

    python -m benchmarks.superposition [demo-out/run ...]

For each sparsity the number of features kept, the least and the most over the seeds; with runs, the root mean square
of all pairs' cosines and the mean cosine with the nearest direction, of the decoder and of as many random directions.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

from pipelines.compare.superposition import SuperpositionConfig, decoder_cosines, train_toy  # noqa: E402
from pipelines.sae.checkpoint import load_run  # noqa: E402


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--seeds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(runs: tuple[Path, ...], seeds: int, as_json: bool) -> None:
    """How many features the toy keeps, over seeds; directions of runs beside random ones."""
    config = SuperpositionConfig(out=Path("unused"))
    kept = np.stack([train_toy(replace(config, seed=seed)).kept for seed in range(seeds)])
    cosines = {str(run): decoder_cosines(load_run(run)[0].W_dec.numpy(), 0) for run in runs}
    if as_json:
        result = {"densities": config.densities.tolist(), "kept": kept.tolist(), "cosines": cosines}
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(f"{config.features} features in {config.dimensions} dimensions, {seeds} seeds")
    for density, own in zip(config.densities, kept.T, strict=True):
        click.echo(f"1 - S = {density:<7.3f} kept {own.min():>3} to {own.max():>2}")
    for path, found in cosines.items():
        for name in ("decoder", "random"):
            rms, nearest = math.sqrt(found[name]["mean_square"]), found[name]["mean_nearest"]
            largest = found[name]["largest"]
            click.echo(f"{path}: {name:<8} rms cosine {rms:.3f}, nearest {nearest:.3f}, largest {largest:.3f}")


if __name__ == "__main__":
    main()
