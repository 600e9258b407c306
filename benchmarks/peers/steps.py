"""What the scripts that train an SAE share: their options, the rows, the clock, the memory, and the line of JSON.

    PYTHON -m benchmarks.peers.NAME --features 4096 --k 32 --batch 4096 --steps 20 [--autocast]
    PYTHON -m benchmarks.peers.NAME --rows ROWS.npy --out WEIGHTS.npz --features 2048 --k 32 --lr 1e-3 --seed 0

NAME is `textbook`, `saelens_train`, `dictionary_learning_train`, `sparsify_train`, `bare_encoder` or `ours`; PYTHON that
of the environment that has it; run from the repository's root. The first form measures steps on made-up rows, the
same for all; the second trains on the rows of a file, in their order, and keeps the weights. The last line
of the output is JSON: `tokens_per_s`, `peak_rss_mb` and `version`, among others.

Measured is what a trainer does between being handed a batch of fp32 rows and being ready for the next. The first
steps are not measured. Needs NumPy and torch, and nothing of this project.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WARM_UP_STEPS = 2
LEAST_STEPS = 2
MADE_BATCHES = 4
"""Number of different batches of made-up rows, which are used in turn."""
PLANNED_STEPS = 10_000
"""The length of run that a trainer on made-up rows gets, so that every timed step is in the middle of its schedule."""
SAMPLE_ROWS = 32_768


@dataclass(frozen=True)
class Task:
    """A trainer's options. `lr` and `dead_rows` 0 take its own default."""

    d_model: int
    features: int
    k: int
    batch: int
    planned_steps: int
    autocast: bool
    lr: float
    seed: int
    dead_rows: int
    is_measurement: bool
    """Made-up rows, to be timed: rows are taken as they are, and the schedule is the trainer's own."""

    @property
    def warm_up_steps(self) -> int:
        """5 % of the run."""
        return max(1, self.planned_steps // 20)

    @property
    def decay_steps(self) -> int:
        """The last fifth of the run, over which the learning rate falls to 0."""
        return max(1, self.planned_steps // 5)


@dataclass(frozen=True)
class Trainer:
    """One training step on fp32 rows (batch, d_model); and the SAE so far, in raw units and feature-major."""

    step: Callable[[Tensor], Any]
    weights: Callable[[], dict[str, Tensor]]
    """W_enc (F, d), b_enc (F,), W_dec (F, d), b_dec (d,) of relu(top k of (x − b_dec) W_encᵀ + b_enc) W_dec + b_dec."""
    version: str
    facts: Callable[[], dict[str, float]] = dict
    """Further fields about the trained SAE."""


def made_rows(n_rows: int, d_model: int, seed: int = 0) -> NDArray[np.float32]:
    """(n, d) sums of 24 of 4·d unit directions, chosen with Zipf-like frequency, of exponential strength, and noise.

    Bytes are the same wherever NumPy's are: only draws and elementwise fp32 arithmetic.
    """
    rng = np.random.default_rng(seed)
    n_directions, n_active = 4 * d_model, 24
    directions = rng.standard_normal((n_directions, d_model), dtype=np.float32)
    directions /= np.sqrt(np.square(directions, dtype=np.float32).sum(axis=1, keepdims=True, dtype=np.float32))
    share = np.cumsum(1.0 / np.arange(10, 10 + n_directions))
    rows = rng.standard_normal((n_rows, d_model), dtype=np.float32) * np.float32(0.02)
    for _ in range(n_active):
        chosen = np.searchsorted(share, rng.random(n_rows) * share[-1])
        rows += directions[chosen] * (rng.standard_exponential((n_rows, 1), dtype=np.float32) + np.float32(0.5))
    return rows


def peak_rss_mb() -> float:
    """The most memory this process has held, in MB: Linux's VmHWM.

    Not `ru_maxrss`, which a process that was started by a larger one inherits.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is only known on Linux")


def measure(trainer: Trainer, batches: Iterator[Tensor], steps: int, seconds: float) -> tuple[int, float]:
    """(steps, seconds) of at most `steps` steps, of fewer once `seconds` are over."""
    for batch in islice(batches, WARM_UP_STEPS):
        trainer.step(batch)
    done, started = 0, time.perf_counter()
    for batch in islice(batches, steps):
        trainer.step(batch)
        done += 1
        if done >= LEAST_STEPS and time.perf_counter() - started > seconds:
            break
    return done, time.perf_counter() - started


def train(trainer: Trainer, rows: NDArray[Any], batch: int) -> tuple[int, float]:
    """(steps, seconds) of a pass over all whole batches of the rows, in order; reading them is not measured."""
    n_steps, seconds = len(rows) // batch, 0.0
    for step in range(n_steps):
        x = torch.from_numpy(rows[step * batch : (step + 1) * batch].astype(np.float32))
        started = time.perf_counter()
        trainer.step(x)
        seconds += time.perf_counter() - started
    return n_steps, seconds


def run(options: argparse.Namespace, build: Callable[[Task, Tensor], Trainer]) -> dict[str, Any]:
    """Build a trainer, let it step, and say what it took."""
    rows: NDArray[Any]
    if options.rows:
        rows = np.load(options.rows, mmap_mode="r")
        planned = len(rows) // options.batch
    else:
        rows = made_rows(MADE_BATCHES * options.batch, options.d_model)
        planned = PLANNED_STEPS
    task = Task(
        d_model=rows.shape[1],
        features=options.features,
        k=options.k,
        batch=options.batch,
        planned_steps=planned,
        autocast=options.autocast,
        lr=options.lr,
        seed=options.seed,
        dead_rows=options.dead_rows,
        is_measurement=options.rows is None,
    )
    sample = torch.from_numpy(rows[: max(SAMPLE_ROWS, options.batch)].astype(np.float32))
    torch.manual_seed(task.seed)
    trainer = build(task, sample)
    del sample
    before = peak_rss_mb()
    result: dict[str, Any] = {}
    if options.rows:
        steps, seconds = train(trainer, rows, options.batch)
        weights = {name: tensor.detach().float().contiguous().numpy() for name, tensor in trainer.weights().items()}
        np.savez(options.out, k=options.k, **weights)
    else:
        result["rows_sha256"] = hashlib.sha256(rows.tobytes()).hexdigest()
        batches = cycle(torch.from_numpy(rows).split(options.batch))
        steps, seconds = measure(trainer, batches, options.steps, options.seconds)
    peak = peak_rss_mb()
    return result | {
        **trainer.facts(),
        "tokens_per_s": steps * options.batch / seconds,
        "peak_rss_mb": peak,
        "rss_before_mb": before,
        "version": trainer.version,
        "steps": steps,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(build: Callable[[Task, Tensor], Trainer]) -> None:
    """The command line of a script that trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, required=True)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=768, help="of made-up rows")
    parser.add_argument("--steps", type=int, default=20, help="to measure, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="after which measuring ends")
    parser.add_argument("--autocast", action="store_true", help="products in bf16")
    parser.add_argument("--rows", type=Path, help="an .npy of (rows, d_model) to train on, in this order")
    parser.add_argument("--out", type=Path, help="where the trained weights go, an .npz")
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dead-rows", type=int, default=0, help="rows without firing after which a feature is dead")
    options = parser.parse_args()
    if bool(options.rows) != bool(options.out):
        parser.error("--rows and --out go together")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with redirect_stdout(sys.stderr):
        result = run(options, build)
    print(json.dumps(result))
