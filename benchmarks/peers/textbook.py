"""The loop of a textbook: a dense encoder, top k by scatter, a dense decoder, autograd, Adam.

Squared error plus an L1 of the codes, gradient norm clipped at 1, decoder columns made unit vectors after each step.
Written down here on its own, so that it shares nothing with what it is compared to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.steps import Task, Trainer, main

SPARSITY_COEFFICIENT, LEARNING_RATE = 1e-3, 3e-4


class SparseAutoencoder(nn.Module):
    def __init__(self, d_model: int, n_features: int, k: int):
        super().__init__()
        self.k = k
        self.encoder = nn.Linear(d_model, n_features)
        self.decoder = nn.Linear(n_features, d_model, bias=False)
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.normalise()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(self.encoder(x - self.b_pre), self.k, dim=-1)
        features = torch.zeros(*x.shape[:-1], self.encoder.out_features, dtype=values.dtype)
        features = features.scatter(-1, indices, torch.relu(values))
        return self.decoder(features) + self.b_pre, features

    @torch.no_grad()
    def normalise(self) -> None:
        self.decoder.weight.data = nn.functional.normalize(self.decoder.weight.data, dim=0)


def build(task: Task, sample: Tensor) -> Trainer:
    sae = SparseAutoencoder(task.d_model, task.features, task.k)
    optimiser = torch.optim.Adam(sae.parameters(), lr=task.lr or LEARNING_RATE)

    def step(x: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.autocast):
            reconstruction, features = sae(x)
            loss = (reconstruction - x).pow(2).mean() + SPARSITY_COEFFICIENT * features.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        sae.normalise()

    def weights() -> dict[str, Tensor]:
        return {
            "W_enc": sae.encoder.weight,
            "b_enc": sae.encoder.bias,
            "W_dec": sae.decoder.weight.T,
            "b_dec": sae.b_pre,
        }

    return Trainer(step, weights, f"torch {torch.__version__}")


if __name__ == "__main__":
    main(build)
