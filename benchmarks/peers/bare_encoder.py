"""The bound of any TopK step with a bf16 encoder: its product x W_encᵀ alone, into preallocated memory."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.steps import Task, Trainer, main


def build(task: Task, sample: Tensor) -> Trainer:
    weight = torch.randn(task.features, task.d_model).bfloat16()
    rows = sample[: task.batch].bfloat16()
    product = torch.empty(task.batch, task.features, dtype=torch.bfloat16)

    def step(x: Tensor) -> None:
        torch.mm(rows, weight.T, out=product)  # not x: turning it into bf16 is no part of the product

    return Trainer(step, dict, f"torch {torch.__version__}")


if __name__ == "__main__":
    main(build)
