"""This project's trainer with the interface of the other scripts of this folder; run by the project's own Python.

The step is that of `pipelines.train`, without the log and the progress line.
"""

from __future__ import annotations

from cli import set_environment

set_environment()  # before torch is loaded, as the commands do

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from actstore import __version__  # noqa: E402
from benchmarks.peers.steps import Task, Trainer, main  # noqa: E402
from pipelines.sae.topk import TopKSae, geometric_median  # noqa: E402
from pipelines.train import default_learning_rate  # noqa: E402


def build(task: Task, sample: Tensor) -> Trainer:
    if task.autocast:
        raise SystemExit("ours: has no bf16 encoder yet")
    scale = 1.0 / float(sample.var(dim=0).mean().sqrt())
    sae = TopKSae(task.d_model, task.features, task.k, seed=task.seed)
    sae.b_dec.data = geometric_median(sample) * scale
    lr = task.lr or default_learning_rate(task.features, task.planned_steps)
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / task.warm_up_steps, (task.planned_steps - s) / task.decay_steps)
    )
    last_fired = torch.zeros(sae.n_features, dtype=torch.int64)
    n_steps = 0

    def step(rows: Tensor) -> None:
        nonlocal n_steps
        x = rows * scale
        reconstruction, values, indices = sae(x)
        loss = (reconstruction - x).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        sae.project_decoder_gradient()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        sae.normalise_decoder()
        n_steps += 1
        last_fired[indices[values > 0]] = n_steps * task.batch

    def weights() -> dict[str, Tensor]:
        sae.fold_input_scale(scale)
        return sae.state_dict()

    return Trainer(step, weights, __version__)


if __name__ == "__main__":
    main(build)
