"""The processes that train one SAE together, as `torchrun` starts them; a single process is one rank of one.

Each rank reads its own rows; gradients are averaged, so that a step is one on the rows of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def is_first_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def device_of_rank(device: str) -> str:
    """The device of its own that this process uses, where several on a machine train on CUDA."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    n_ranks: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def average(self, tensors: list[Tensor]) -> None:
        """Make each tensor the mean of all ranks'."""
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.n_ranks

    def any_of(self, mask: Tensor) -> None:
        """Make a uint8 mask 1 where any rank's is."""
        dist.all_reduce(mask, op=dist.ReduceOp.MAX)

    def agree(self, value: bool, device: str) -> bool:
        """Whether it is true on any rank."""
        if self.n_ranks == 1:
            return value
        mask = torch.tensor([value], dtype=torch.uint8, device=device)
        self.any_of(mask)
        return bool(mask)

    def mean(self, figures: dict[str, float], device: str) -> dict[str, float]:
        """Each figure averaged over the ranks; those that are equal on all stay as they are."""
        if self.n_ranks == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
        self.average([values])
        return {name: type(own)(value) for (name, own), value in zip(figures.items(), values.tolist(), strict=True)}


@contextmanager
def ranks_of_environment(device: str) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, connected while the block runs: NCCL on CUDA devices, else gloo."""
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1:
        yield Ranks()
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), n_ranks)
    finally:
        dist.destroy_process_group()
