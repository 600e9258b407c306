"""In: a store. Out: shuffled batches as tensors, for any PyTorch training loop; with DataLoader workers and ranks.

    loader = DataLoader(ActivationDataset("gpt2.store", "resid_post.6", 4096), batch_size=None, num_workers=2)
    for batch in loader:  # (4096, d_model), float32
        ...

Each worker of each rank streams a share of its own; together they give every row once an epoch. The order is
arithmetic: a run continues from the number of batches that it has had.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import IterableDataset, get_worker_info

from actstore import paths
from actstore.encodings.registry import computed_encodings
from actstore.errors import InputError
from actstore.layout import ROUND_BUDGET_BYTES
from actstore.reader import ActivationStore
from actstore.stream import BatchStream


class ActivationDataset(IterableDataset[Tensor]):
    """Batches (batch_rows, d_model) of one site of a store; pass it to a DataLoader with `batch_size=None`.

    `dtype` None gives rows as they are kept (float16, bfloat16 or float32), to be widened where there is time for it,
    such as on a GPU. `rank` and `n_ranks` are those of `torch.distributed` where it is initialised. `budget_bytes` is
    shared by the workers of this rank. `start_batch` skips that many batches, given with the same number of workers.
    `snapshot` pins a store that has grown since. Raises InputError and what opening the store raises.
    """

    def __init__(
        self,
        store: str | Path | ActivationStore,
        site: str,
        batch_rows: int,
        *,
        seed: int = 0,
        part: str = "train",
        epochs: int | None = None,
        normalise: str = "none",
        dtype: torch.dtype | None = torch.float32,
        budget_bytes: int = ROUND_BUDGET_BYTES,
        rank: int | None = None,
        n_ranks: int | None = None,
        start_batch: int = 0,
        snapshot: str | None = None,
    ):
        if start_batch < 0 or (rank is None) != (n_ranks is None):
            raise InputError(f"start batch {start_batch}, rank {rank} of {n_ranks}: at least 0, and both or neither.")
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype {dtype}: activations are real numbers; choose a floating-point dtype.")
        self.store = store if isinstance(store, ActivationStore) else ActivationStore(store, snapshot=snapshot)
        self.site, self.batch_rows, self.start_batch = site, batch_rows, start_batch
        self.dtype = dtype
        self.options: dict[str, Any] = {"seed": seed, "part": part, "epochs": epochs, "normalise": normalise}
        self.budget_bytes = budget_bytes
        is_distributed = distributed.is_available() and distributed.is_initialized()
        own_rank = (distributed.get_rank(), distributed.get_world_size()) if is_distributed else (0, 1)
        self.rank, self.n_ranks = own_rank if rank is None or n_ranks is None else (rank, n_ranks)
        kept_dtype = self.store.manifest.array(paths.acts(site)).kept_as.float_dtype
        computed = normalise != "none" or kept_dtype is None
        if dtype is None and computed:
            names = ", ".join(computed_encodings())
            raise InputError(f"dtype None: {names} rows and normalised ones are computed; choose a dtype.")
        self.options["as_kept"] = not computed
        self._batch_dtype: torch.dtype = torch.float32 if computed else getattr(torch, str(kept_dtype))

    def __repr__(self) -> str:
        return f"<ActivationDataset of {self.site}, batches of {self.batch_rows:,} rows, of {self.store!r}>"

    @property
    def snapshot(self) -> str:
        """What to pin a continued run to."""
        return self.store.snapshot

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        n_workers = worker.num_workers if worker else 1
        # A loader takes batches from its workers in turn: the first one now is the one whose turn it was.
        index = ((worker.id if worker else 0) + self.start_batch) % n_workers
        stream = BatchStream(
            self.store,
            self.site,
            self.batch_rows,
            budget_bytes=self.budget_bytes // n_workers,
            rank=self.rank * n_workers + index,
            n_ranks=self.n_ranks * n_workers,
            **self.options,
        )
        given = self.start_batch // n_workers + int(index < self.start_batch % n_workers)
        stream.load_state_dict({**stream.state_dict(), "row": given * self.batch_rows})
        for batch in stream:
            yield self._tensor(batch)

    def _tensor(self, batch: NDArray[Any]) -> Tensor:
        bits = torch.from_numpy(batch.view(f"i{batch.itemsize}"))  # NumPy has no bfloat16
        kept = bits.view(self._batch_dtype)
        return kept if self.dtype is None else kept.to(self.dtype, copy=True)
