"""SAELens' cached activations, read shuffled: rows a second of batches from its mixing buffer.

    saelens/bin/python benchmarks/peers/saelens_stream.py CACHE [--rows N] [--buffer-rows N] [--batch-rows N]

Run by the Python of an environment that has SAELens, on a folder that `saelens_collect` wrote. A training run reads
such a cache as this script does: an `ActivationsStore` with `cached_activations_path`, whose iterator joins what it
reads to its buffer, permutes the buffer when it is full, gives out all but half of it and fills it again.

Measured is the time to take batches of `--batch-rows` rows in fp32 from that iterator. One pass over the whole cache
comes first and is not measured: it brings the files into the page cache and the buffer to its steady state. Left out
are imports and opening the cache. There is no model, and no device but the CPU.

`--read-windows` is SAELens' `store_batch_size_prompts`, the windows read at once (32 unless set). Every read copies the
whole buffer, so large reads are faster; the default here is half the buffer, the largest read that leaves the buffer
at its asked size.
`--unshuffled` reads the cache in order, in reads of that many windows, without the buffer: the bound of its reader.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens.training.activations_store import ActivationsStore
    from torch import Tensor

QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def open_cache(arguments: argparse.Namespace) -> ActivationsStore:
    """The cache as SAELens opens it, its shape taken from what is on disk."""
    import datasets
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    features = datasets.load_from_disk(str(arguments.cache)).features
    hook_name = next(name for name in features if name != "token_ids")
    context, d_model = features[hook_name].shape
    if arguments.buffer_rows % context:
        raise SystemExit(
            f"--buffer-rows {arguments.buffer_rows}: the cache's windows have {context} rows; choose a multiple"
        )
    return ActivationsStore(
        model=None,  # only asked for when activations are computed
        dataset=None,
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=context,
        d_in=d_model,
        n_batches_in_buffer=arguments.buffer_rows // context,  # the buffer counts windows, whatever the name says
        total_training_tokens=arguments.rows,
        store_batch_size_prompts=arguments.read_windows or max(arguments.buffer_rows // 2 // context, 1),
        train_batch_size_tokens=arguments.batch_rows,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(arguments.cache),
    )


def batches_of(store: ActivationsStore, unshuffled: bool) -> Iterator[Tensor]:
    """Batches without end: mixed by SAELens' buffer, or as they lie in the cache."""
    if not unshuffled:
        yield from store
    while True:
        try:
            yield store.get_raw_llm_batch(raise_on_epoch_end=True)[0]
        except StopIteration:  # the end of the cache; the next read begins again
            continue


def take_rows(batches: Iterator[Tensor], n_rows: int) -> tuple[int, float]:
    """(rows, seconds) of taking at least `n_rows` rows, one value of every batch looked at."""
    taken, checksum, started = 0, 0.0, time.perf_counter()
    while taken < n_rows:
        batch = next(batches)
        taken += len(batch)
        checksum += float(batch[0, 0])
    return taken, time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows a second in the steady state, after one pass over the cache."""
    import sae_lens
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    store = open_cache(arguments)
    dataset = store.cached_activation_dataset
    assert dataset is not None
    batches = batches_of(store, arguments.unshuffled)
    cache_rows = len(dataset) * store.context_size
    take_rows(batches, cache_rows)
    n_rows, seconds = take_rows(batches, arguments.rows)
    return {
        "rows": n_rows,
        "seconds": seconds,
        "rows_per_s": n_rows / seconds,
        "cache_rows": cache_rows,
        "d_model": store.d_in,
        "batch_rows": store.store_batch_size_prompts * store.context_size if arguments.unshuffled else arguments.batch_rows,
        "buffer_rows": 0 if arguments.unshuffled else arguments.buffer_rows,
        "read_windows": store.store_batch_size_prompts,
        "threads": torch.get_num_threads(),
        "sae_lens": sae_lens.__version__,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="a folder written by saelens_collect")
    parser.add_argument("--rows", type=int, default=262_144, help="rows to measure")
    parser.add_argument("--batch-rows", type=int, default=4096)
    parser.add_argument("--buffer-rows", type=int, default=32_768)
    parser.add_argument("--read-windows", type=int, default=0, help="windows read at once; 0 for half the buffer")
    parser.add_argument("--unshuffled", action="store_true", help="read in order, without the mixing buffer")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 for torch's own choice")
    arguments = parser.parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
