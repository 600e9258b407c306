"""This project's trainer with the interface of the other scripts of this folder; run by the project's own Python.

Without `--autocast`, every product is in full precision; with it, the search for the active features is in bfloat16, as
`train` does by default. Then it is also said in which share of rows that changes which features are chosen.
"""

from __future__ import annotations

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

from dataclasses import replace  # noqa: E402

from torch import Tensor  # noqa: E402

from actstore import __version__  # noqa: E402
from benchmarks.peers.steps import Task, Trainer, main  # noqa: E402
from pipelines.compute.freed_memory import keep_freed_memory  # noqa: E402
from pipelines.sae.architectures.topk import TopKSae  # noqa: E402
from pipelines.sae.base import Objective  # noqa: E402
from pipelines.sae.geometric_median import geometric_median  # noqa: E402
from pipelines.train.new_trainee import default_learning_rate  # noqa: E402
from pipelines.train.trainee import AUXK, Recipe, Trainee  # noqa: E402


def build(task: Task, sample: Tensor) -> Trainer:
    keep_freed_memory()
    scale = 1.0 / float(sample.var(dim=0).mean().sqrt())
    sae = TopKSae(task.d_model, task.features, task.k, seed=task.seed)
    sae.b_dec.data = geometric_median(sample) * scale
    objective = Objective(auxk=AUXK, kernel="sparse" if task.autocast or not task.is_measurement else "sparse-fp32")
    lr = task.lr or default_learning_rate(task.features, task.planned_steps)
    recipe = Recipe.standard(lr, task.planned_steps, task.batch, task.k / task.features, objective)
    if task.dead_rows:
        recipe = replace(recipe, revive_after_rows=task.dead_rows)
    trainee = Trainee(sae, recipe, scale)
    probe = (sample[: task.batch] * scale).clone()

    def weights() -> dict[str, Tensor]:
        sae.fold_input_scale(scale)
        return sae.state_dict()

    def facts() -> dict[str, float]:
        centred = probe - sae.b_dec.detach()
        fast, exact = (sae.search(centred, fast=fast)[0].features.view(len(probe), -1) for fast in (True, False))
        return {"rows_choosing_otherwise": float((fast != exact).any(dim=1).float().mean())}

    return Trainer(trainee.step, weights, __version__, facts)


if __name__ == "__main__":
    main(build)
