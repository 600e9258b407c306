"""SAELens' TopK training: its `TopKTrainingSAE` in its `SAETrainer`, fed with rows in place of an activation store.

A step is what `SAETrainer.fit` does with a batch. Everything not named here is SAELens' default, among it the loss of
dead features with coefficient 1, and top k by codes times decoder norms. `--autocast` is the trainer's option. Its
`use_sparse_activations` is left out: on a CPU with torch 2.13 the backward pass ends in an error (`aten::view`, SparseCPU).

Trained on the rows of a file, they are scaled as its documentation does (`expected_average_only_in`: mean norm
√d_model, estimated on the first rows, and not on batches taken out of the run), the learning rate warms up over 5 %
and falls over the last fifth, and the window after which a feature is dead, which it counts in steps, is as asked.
"""

from __future__ import annotations

import sae_lens
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.peers.steps import Task, Trainer, main

LEARNING_RATE = 3e-4


def build(task: Task, sample: Tensor) -> Trainer:
    scaling = "none" if task.is_measurement else "expected_average_only_in"
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=task.d_model, d_sae=task.features, k=task.k, normalize_activations=scaling)
    )
    lr = task.lr or LEARNING_RATE
    config = SAETrainerConfig(
        total_training_samples=task.planned_steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=lr,
        lr_end=lr / 10,  # as its runner sets it; its default, a constant rate, does not look at it, but wants one
        lr_warm_up_steps=task.warm_up_steps,
        lr_decay_steps=task.decay_steps,
        autocast=task.autocast,
        **({"dead_feature_window": max(1, task.dead_rows // task.batch)} if task.dead_rows else {}),
    )
    trainer = SAETrainer(config, sae, iter(()))
    if scaling != "none":
        trainer.activation_scaler.estimate_scaling_factor(task.d_model, iter([sample]), n_batches_for_norm_estimate=1)

    def step(x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    def weights() -> dict[str, Tensor]:
        if trainer.activation_scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        state = sae.state_dict()
        sae.process_state_dict_for_saving_inference(state)
        return {"W_enc": state["W_enc"].T, "b_enc": state["b_enc"], "W_dec": state["W_dec"], "b_dec": state["b_dec"]}

    return Trainer(step, weights, sae_lens.__version__)


if __name__ == "__main__":
    main(build)
