"""What the objects of a store are called: names relative to the store, with `/`."""

from __future__ import annotations

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
DATA = "data.zarr"
COMMITS = "commits"
TABLES = ("tokens/ids", "documents/offsets", "documents/heldout", "documents/source")
WINDOW_TABLES = ("token_start", "n_tokens", "first_row")
INDEX = f"{DATA}/index"
"""The group of a code store's feature index: every firing, feature by feature."""
INDEX_RECORD = f"{COMMITS}/index.json"
INDEX_RUNS = "index-runs"
"""Sorted runs of firings, while the index is being made."""


def segment_group(segment: int) -> str:
    """The Zarr group of a segment, inside `data.zarr`."""
    return f"segments/{segment:04d}"


def commits(segment: int) -> str:
    return f"{COMMITS}/{segment:04d}"


def segment_record(segment: int) -> str:
    return f"{commits(segment)}/segment.json"


def sealed_record(segment: int) -> str:
    return f"{commits(segment)}/sealed.json"


def shard_record(segment: int, part: str, shard: int) -> str:
    return f"{commits(segment)}/{part}/{shard:06d}.json"


def environment_record(segment: int, probe: str) -> str:
    """What another machine was, whose rows differ in their last bits and were accepted."""
    return f"{commits(segment)}/mixed-{probe}.json"


def array(segment: int, name: str) -> str:
    """The folder of a segment's array, such as `tokens/ids` or `train/acts/resid_post.3`."""
    return f"{DATA}/{segment_group(segment)}/{name}"


def shard_object(segment: int, part: str, array_name: str, shard: int, n_dimensions: int) -> str:
    """The one object of a shard, under Zarr's default chunk keys."""
    return "/".join([array(segment, f"{part}/{array_name}"), "c", str(shard), *["0"] * (n_dimensions - 1)])


def index_object(name: str, shard: int) -> str:
    """The object of a shard of an array of the feature index."""
    return f"{INDEX}/{name}/c/{shard}"
