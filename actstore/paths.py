"""The names of a store's objects, relative to the store, and of its arrays, relative to their segment; with `/`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from msgspec import Meta

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"
_SITE = r"[A-Za-z][A-Za-z0-9_]{0,99}\.[0-9]{1,6}"
FileName = Annotated[str, Meta(pattern=rf"^{_PART}\Z")]
"""A file of `tokenizer/`, as a manifest may name it."""
ObjectName = Annotated[str, Meta(pattern=rf"^data\.zarr(/{_PART})+\Z")]
"""An object below `data.zarr`, as a record may name it: no part of the name begins with a dot."""
RecordName = Annotated[str, Meta(pattern=rf"^commits(/{_PART})+\Z")]
SiteName = Annotated[str, Meta(pattern=rf"^{_SITE}\Z")]
ArrayName = Annotated[str, Meta(pattern=rf"^((rows|codes)/[a-z]+|rows|values|(acts|scales)/{_SITE})\Z")]
"""A row array, or one of a feature index."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
DATA = "data.zarr"
COMMITS = "commits"
TOKEN_IDS = "tokens/ids"
DOCUMENT_OFFSETS, DOCUMENT_HELDOUT, DOCUMENT_SOURCE = "documents/offsets", "documents/heldout", "documents/source"
DOCUMENT_KEYS = "documents/keys"
TABLES = (TOKEN_IDS, DOCUMENT_OFFSETS, DOCUMENT_HELDOUT, DOCUMENT_SOURCE, DOCUMENT_KEYS)
TOKEN_START, N_TOKENS, FIRST_ROW = WINDOW_TABLES = ("token_start", "n_tokens", "first_row")
WINDOW, POSITION = ROW_PLACES = ("rows/window", "rows/position")
"""The row arrays that say where each row stands."""
CODE_INDEX, CODE_VALUE = CODES = "codes/index", "codes/value"
"""The row arrays of a code store."""
_ACTS, _SCALES, _CHANNELS = "acts/", "scales/", "channels/"
INDEX = f"{DATA}/index"
"""The group of a code store's feature index: every firing, feature by feature."""
INDEX_RECORD = f"{COMMITS}/index.json"
INDEX_RUNS = "index-runs"
"""Sorted runs of firings, while the index is being made."""


def acts(site: str) -> str:
    """The row array of a site's activations."""
    return _ACTS + site


def scales(site: str) -> str:
    """The row array of the scales beside a site's activations."""
    return _SCALES + site


def channels(site: str) -> str:
    """The table of a site's channel means and deviations."""
    return _CHANNELS + site


def is_acts(array_name: str) -> bool:
    """Whether a row array holds a site's activations."""
    return array_name.startswith(_ACTS)


def site_of(array_name: str) -> str:
    """The site whose activations a row array holds.

    >>> site_of(acts("resid_post.3"))
    'resid_post.3'
    """
    return array_name.removeprefix(_ACTS)


def window_table(part: str, name: str) -> str:
    """A table of one of `WINDOW_TABLES`, a value for each window of a split."""
    return f"{part}/windows/{name}"


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


def shards_of_records(names: Collection[str], segment: int, part: str, n_shards: int) -> list[int]:
    """The shards below `n_shards` of a part whose commit records are among some names, in order."""
    prefix = f"{commits(segment)}/{part}/"
    numbers = (name.removeprefix(prefix).removesuffix(".json") for name in names if name.startswith(prefix))
    shards = {int(number) for number in numbers if number.isdecimal() and number.isascii()}
    return sorted(shard for shard in shards if shard < n_shards and shard_record(segment, part, shard) in names)


def environment_record(segment: int, probe: str) -> str:
    """The environment record of another machine whose rows differ in their last bits and were accepted."""
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
