"""Two threads add up a step's sums in the same order each time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch

from pipelines.sae.architectures.registry import architectures, make
from pipelines.sae.base import Objective
from pipelines.train.trainee import Recipe, Trainee

N, D, F, K = 2048, 16, 256, 16
PARALLEL_FROM = 32_768
"""Entries from which PyTorch shares an operation among threads."""


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weights_after_three_steps(architecture: str, kernel: str) -> str:
    """The sha256 of an SAE's weights; its last step had enough codes to be shared among threads."""
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    sae = make(architecture, D, F, K, seed=0)
    sae.start(rows)
    trainee = Trainee(sae, Recipe.standard(3e-3, 3, N, K / F, Objective(sae.default_l1, 1 / 32, kernel)), 1.0)
    for _ in range(3):
        _, losses = trainee.step(rows)
    assert len(losses.codes.values) >= PARALLEL_FROM
    digest = hashlib.sha256()
    for tensor in sae.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("kernel", ["sparse-fp32", "dense"])
@pytest.mark.parametrize("architecture", sorted(architectures()))
def test_a_training_repeated_on_two_threads_ends_with_the_same_bits(architecture: str, kernel: str) -> None:
    assert weights_after_three_steps(architecture, kernel) == weights_after_three_steps(architecture, kernel)
