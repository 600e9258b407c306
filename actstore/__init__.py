"""actstore: a verified, crash-safe, already-shuffled store of language-model activations.

    from actstore import ActivationStore, BatchStream

    store = ActivationStore("gpt2.store")
    for batch in BatchStream(store, "resid_post.6", batch_rows=4096):
        ...  # float32, (4096, 768)

Importing this loads no torch, no dask and no zarr until a name is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ActivationStore", "BatchStream", "Store"]

if TYPE_CHECKING:
    from actstore.reader import ActivationStore, Store
    from actstore.stream import BatchStream


def __getattr__(name: str) -> Any:
    if name in ("ActivationStore", "Store"):
        from actstore import reader

        return getattr(reader, name)
    if name == "BatchStream":
        from actstore.stream import BatchStream

        return BatchStream
    raise AttributeError(f"module 'actstore' has no attribute {name!r}")
