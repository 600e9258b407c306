"""Where everything lies inside a store folder."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
LOCK = "lock"
DATA = "data.zarr"
TABLES = ("tokens/ids", "documents/offsets", "documents/heldout", "documents/source")
WINDOW_TABLES = ("token_start", "n_tokens", "first_row")


def segment_group(segment: int) -> str:
    return f"segments/{segment:04d}"


def commits(store: Path, segment: int) -> Path:
    return store / "commits" / f"{segment:04d}"


def segment_record(store: Path, segment: int) -> Path:
    return commits(store, segment) / "segment.json"


def sealed_record(store: Path, segment: int) -> Path:
    return commits(store, segment) / "sealed.json"


def shard_record(store: Path, segment: int, part: str, shard: int) -> Path:
    return commits(store, segment) / part / f"{shard:06d}.json"


def array(store: Path, segment: int, name: str) -> Path:
    """Folder of a segment's array, such as `tokens/ids` or `train/acts/resid_post.3`."""
    return store / DATA / segment_group(segment) / name


def shard_object(array_folder: Path, shard: int, n_dimensions: int) -> Path:
    """The one object of a shard, under Zarr's default chunk keys."""
    return array_folder.joinpath("c", str(shard), *["0"] * (n_dimensions - 1))
