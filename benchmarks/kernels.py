"""Which form of a TopK step is fastest where: the measurements behind `pipelines.sae.kernels.choose_kernel`.

    python -m benchmarks.kernels [--repetitions 5] [--device cpu]

A step is the losses, their gradients, Adam and the decoder's norms, on rows that are sums of unit directions. Steps of
the kernels take turns. Exits with 1 where the rule's choice is more than a quarter slower than the best.
"""

from __future__ import annotations

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

import argparse  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from statistics import median  # noqa: E402

import torch  # noqa: E402

from pipelines.compute.freed_memory import keep_freed_memory  # noqa: E402
from pipelines.sae.architectures.topk import TopKSae  # noqa: E402
from pipelines.sae.base import Objective  # noqa: E402
from pipelines.sae.kernels import KERNELS, choose_kernel  # noqa: E402
from pipelines.train.trainee import Recipe, Trainee  # noqa: E402

SHAPES = (
    # d_model, features, k, batch rows
    (64, 128, 8, 1024),
    (64, 256, 8, 4096),
    (64, 512, 32, 4096),
    (192, 256, 16, 1024),
    (192, 512, 16, 4096),
    (192, 1024, 32, 4096),
    (192, 2048, 32, 4096),
    (768, 512, 32, 4096),
    (768, 1024, 32, 4096),
    (768, 1024, 128, 4096),
    (768, 4096, 32, 4096),
    (768, 4096, 32, 1024),
)
TOLERATED = 1.25


def step_seconds(d_model: int, n_features: int, k: int, n_rows: int, device: str, repetitions: int) -> dict[str, float]:
    """Median time of a step with each kernel."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_model, d_model, generator=generator)
    chosen = torch.randint(0, len(directions), (n_rows, 24), generator=generator)
    rows = (directions[chosen] * torch.rand(n_rows, 24, 1, generator=generator)).sum(dim=1).to(device) / d_model**0.5
    trainees = {}
    for kernel in KERNELS:
        sae = TopKSae(d_model, n_features, k).to(device)
        trainees[kernel] = Trainee(sae, Recipe.standard(1e-3, 1000, n_rows, k / n_features, Objective(kernel=kernel)), 1.0)
    found: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for _ in range(repetitions + 2):
        for kernel, trainee in trainees.items():
            started = time.perf_counter()
            trainee.step(rows)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            found[kernel].append(time.perf_counter() - started)
    return {kernel: median(times[2:]) for kernel, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_freed_memory()
    print(f"{'d':>5}{'F':>7}{'k':>5}{'batch':>7}" + "".join(f"{kernel:>15}" for kernel in KERNELS) + "   ms a step; rule")
    is_right = True
    for shape in SHAPES:
        found = step_seconds(*shape, options.device, options.repetitions)
        chosen = choose_kernel(*shape[:3])
        is_right &= found[chosen] <= TOLERATED * min(found.values())
        line = "".join(f"{1e3 * found[kernel]:>15.2f}" for kernel in KERNELS)
        print("{:>5}{:>7}{:>5}{:>7}".format(*shape) + f"{line}   {chosen}")
    if not is_right:
        sys.exit("the rule's choice is more than a quarter slower than the best")


if __name__ == "__main__":
    main()
