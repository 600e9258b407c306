"""dictionary_learning's TopK training: `TopKTrainer.update`, called as its `trainSAE` does.

Everything not named here is its default, among it the loss of dead features with 1/32. Its package imports nnsight for
a buffer that computes activations; nothing of that is in a training step, so an empty stand-in takes nnsight's
place, and the environment needs torch, einops and tqdm alone.

`--autocast` is what `trainSAE` does on CUDA with `autocast_dtype=bfloat16`, here on the CPU, where version 0.1.0 leaves
autocast out: it would only round the rows.

Trained on the rows of a file, they are scaled as by `trainSAE(normalize_activations=True)`, the learning rate warms up
over 5 % and falls over the last fifth, and the window after which a feature is dead is as asked.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.peers.steps import Task, Trainer, main


def load_trainer() -> type:
    """`TopKTrainer`, without nnsight."""
    if "nnsight" not in sys.modules:
        stand_in = ModuleType("nnsight")
        stand_in.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stand_in
    from dictionary_learning.trainers.top_k import TopKTrainer

    return TopKTrainer


def build(task: Task, sample: Tensor) -> Trainer:
    trainer = load_trainer()(
        steps=task.planned_steps,
        activation_dim=task.d_model,
        dict_size=task.features,
        k=task.k,
        layer=0,
        lm_name="none",
        lr=task.lr or None,
        warmup_steps=task.warm_up_steps,
        decay_start=task.planned_steps - task.decay_steps,
        seed=task.seed,
        device="cpu",
    )
    if task.dead_rows:
        trainer.dead_feature_threshold = task.dead_rows
    scale = 1.0 if task.is_measurement else float(sample.square().sum(dim=1).mean().sqrt())
    n_steps = 0

    def step(x: Tensor) -> None:
        nonlocal n_steps
        if scale != 1.0:
            x = x / scale
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.autocast):
            trainer.update(n_steps, x.bfloat16() if task.autocast else x)
        n_steps += 1

    def weights() -> dict[str, Tensor]:
        sae = trainer.ae
        sae.scale_biases(scale)
        return {
            "W_enc": sae.encoder.weight,
            "b_enc": sae.encoder.bias,
            "W_dec": sae.decoder.weight.T,
            "b_dec": sae.b_dec,
        }

    return Trainer(step, weights, version("dictionary-learning"))


if __name__ == "__main__":
    main(build)
