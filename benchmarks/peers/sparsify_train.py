"""sparsify's training (EleutherAI; `eai-sparsify` on PyPI): what its `Trainer.fit` does with the rows of a batch.

Its trainer takes a transformers model and hooks it, and has no step of its own for rows that are there already: the
lines between its hook and its optimiser are written out here, with its `SparseCoder`, its decoder for the CPU
(`embedding_bag`: its Triton kernels are for CUDA), and its default optimiser (SignSGD in a schedule-free wrapper, momentum
0.95, learning rate 5e-3/√(F/2¹⁴)). Its default has no loss of dead features.

`--autocast` puts on the CPU the bf16 autocast that its `SparseCoder.forward` has for CUDA. It has no warm-up and no decay.
"""

from __future__ import annotations

import math
from importlib.metadata import version

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor

from benchmarks.peers.steps import Task, Trainer, main

LEARNING_RATE, MOMENTUM = 5e-3, 0.95


def build(task: Task, sample: Tensor) -> Trainer:
    torch.set_float32_matmul_precision("high")
    sae = SparseCoder(task.d_model, SparseCoderConfig(num_latents=task.features, k=task.k), dtype=torch.float32)
    sae.b_dec.data = sample[: task.batch].mean(dim=0)
    lr = task.lr or LEARNING_RATE / math.sqrt(task.features / 2**14)
    optimiser = ScheduleFreeWrapper(SignSGD([{"params": sae.parameters(), "lr": lr}]), momentum=MOMENTUM)
    optimiser.train()
    rows_since_fired = torch.zeros(task.features, dtype=torch.long)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.autocast):
            out = sae(x=x, y=x, dead_mask=None, total_variance=total_variance)
        fired = torch.zeros(task.features, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            rows_since_fired.add_(len(x))
            rows_since_fired[fired] = 0

    def weights() -> dict[str, Tensor]:
        optimiser.eval()
        sae.set_decoder_norm_to_unit_norm()
        return {"W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}

    return Trainer(step, weights, version("eai-sparsify"))


if __name__ == "__main__":
    main(build)
