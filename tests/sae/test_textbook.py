"""The textbook recipe is the textbook's loop, and its figures are the textbook's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.base import Objective
from pipelines.train.trainee import Recipe, Trainee

D_MODEL, N_FEATURES, K, BATCH, N_STEPS, LR, L1 = 24, 96, 6, 64, 50, 3e-3, 1e-2


def textbook(batches: list[Tensor], start: TopKSae) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights, losses and pooled FVE of the loop as it is written in textbooks, in dense operators."""
    dtype = batches[0].dtype
    encoder = nn.Linear(D_MODEL, N_FEATURES, dtype=dtype)
    decoder = nn.Linear(N_FEATURES, D_MODEL, bias=False, dtype=dtype)
    b_pre = nn.Parameter(torch.zeros(D_MODEL, dtype=dtype))
    with torch.no_grad():
        encoder.weight.copy_(start.W_enc)
        encoder.bias.copy_(start.b_enc)
        decoder.weight.copy_(start.W_dec.T)
    parameters = [*encoder.parameters(), *decoder.parameters(), b_pre]
    optimiser = torch.optim.Adam(parameters, lr=LR)
    losses, explained = [], []
    for x in batches:
        pre = encoder(x - b_pre)
        top = torch.topk(pre, K, dim=-1)
        features = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        reconstruction = decoder(features) + b_pre
        loss = ((x - reconstruction) ** 2).mean() + L1 * features.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            decoder.weight /= decoder.weight.norm(dim=0, keepdim=True)
        losses.append(float(loss.detach()))
        explained.append(float(1 - (x - reconstruction).detach().var() / x.var()))
    weights = {"W_enc": encoder.weight, "b_enc": encoder.bias, "W_dec": decoder.weight.T, "b_dec": b_pre}
    return {name: weight.detach() for name, weight in weights.items()}, losses, explained


@pytest.mark.parametrize("kernel", ["sparse", "sparse-fp32", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fifty_steps_are_those_of_an_independent_loop(dtype: torch.dtype, kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_MODEL, generator=generator, dtype=dtype)
    batches = [3 * torch.rand(BATCH, 40, generator=generator, dtype=dtype) ** 8 @ directions + 1 for _ in range(N_STEPS)]
    sae = TopKSae(D_MODEL, N_FEATURES, K).to(dtype)
    sae.initialise_as_linear(seed=0)
    expected, expected_losses, expected_explained = textbook(batches, sae)

    trainee = Trainee(sae, Recipe.textbook(LR, N_STEPS, Objective(l1=L1, auxk=1.0, kernel=kernel)), scale=1.0)
    losses, explained = [], []
    for x in batches:
        found = trainee.metrics(*trainee.step(x))
        losses.append(found["loss"])
        explained.append(found["fve_pooled"])
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(explained), torch.tensor(expected_explained), rtol=1e-3, atol=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    if dtype == torch.float64:
        for name, weight in expected.items():
            assert float((getattr(sae, name).detach() - weight).abs().max()) < 1e-8, name


def test_pooled_explained_variance_is_not_the_standard_one() -> None:
    """Channels of unlike means: pooling counts the spread of the means as variance to be explained."""
    x = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(1)) + 10 * torch.arange(D_MODEL)
    trainee = Trainee(TopKSae(D_MODEL, N_FEATURES, K), Recipe.textbook(LR, 1, Objective()), scale=1.0)
    figures = trainee.metrics(*trainee.step(x))
    assert figures["fve_pooled"] > figures["fve"] + 0.1
