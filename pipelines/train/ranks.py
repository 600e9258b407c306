"""The processes that train one SAE together, started by `torchrun`; a single process is one rank of one.

Each rank reads its own rows. Gradients are averaged, so that a step uses the rows of all ranks.
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
    """The device of this process: where several processes of a machine train on CUDA, each has its own."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


@dataclass(frozen=True)
class Ranks:
    """This process's number among the processes that train together."""

    rank: int = 0
    n_ranks: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks."""
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.n_ranks

    def any_of(self, mask: Tensor) -> None:
        """Set a uint8 mask to 1 wherever any rank's mask is 1."""
        dist.all_reduce(mask, op=dist.ReduceOp.MAX)

    def agree(self, value: bool, device: str) -> bool:
        """Whether `value` is true on any rank."""
        if self.n_ranks == 1:
            return value
        mask = torch.tensor([value], dtype=torch.uint8, device=device)
        self.any_of(mask)
        return bool(mask)

    def mean(self, figures: dict[str, float], device: str) -> dict[str, float]:
        """Each figure averaged over the ranks, in its own type; figures that are equal on all ranks do not change."""
        if self.n_ranks == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
        self.average([values])
        return {name: type(figure)(value) for (name, figure), value in zip(figures.items(), values.tolist(), strict=True)}


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
