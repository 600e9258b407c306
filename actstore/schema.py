"""A store's manifest (identity and provenance) and the records of its segments.

Frozen dataclasses on one side, versioned JSON on the other, nothing pickled. The identity is what two collections
must share to be the same store; provenance (where the model folder was, which libraries ran) is kept but never
compared. docs/FORMAT.md is the normative description of the JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.encodings.base import Encoding
from actstore.encodings.channels import Channels
from actstore.encodings.registry import encoding_of
from actstore.errors import DamagedStore, InputError, NotAStore
from actstore.files import content_hash, parse_record, record_bytes
from actstore.layout import Layout

FORMAT_VERSION = 2
PARTS = ("train", "heldout")
"""The two splits of a segment; the index is the `part` of the plan."""


@dataclass(frozen=True)
class RowArray:
    """One value per row: `width` numbers each, or one scalar where width is 0."""

    name: str
    width: int
    dtype: str
    encoding: str

    @property
    def tail(self) -> tuple[int, ...]:
        """The shape of one row."""
        return (self.width,) if self.width else ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return max(self.width, 1) * np.dtype(self.dtype).itemsize

    @property
    def kept_as(self) -> Encoding:
        """The encoding that its name names."""
        return encoding_of(self.encoding)


ROW_PLACE_ARRAYS = (RowArray(paths.WINDOW, 0, "uint32", "raw"), RowArray(paths.POSITION, 0, "uint16", "raw"))
"""Where each row stands; the first arrays of every store."""


def site_arrays(site: str, d_model: int, encoding: str) -> list[RowArray]:
    """The row arrays that keep one site: its activations, and each row's scale where the encoding has one."""
    acts = RowArray(paths.acts(site), d_model, encoding_of(encoding).dtype, encoding)
    return [acts, RowArray(paths.scales(site), 0, "float32", "packed")] if acts.kept_as.has_scale else [acts]


def site_values(
    site: str, rows: NDArray[np.float32], encoding: Encoding, channels: Channels | None
) -> dict[str, NDArray[Any]]:
    """Rows (n, d_model) of a site as its `site_arrays` keep them, by array. Raises EncodingError."""
    kept, scale = encoding.encode(rows, channels)
    return {paths.acts(site): kept} | ({} if scale is None else {paths.scales(site): scale})


def code_arrays(k: int, index_dtype: str, value_dtype: str) -> list[RowArray]:
    """The row arrays of a code store: `k` features and their values a row."""
    return [RowArray(paths.CODE_INDEX, k, index_dtype, "packed"), RowArray(paths.CODE_VALUE, k, value_dtype, "packed")]


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights the rows came from."""

    architecture: str
    n_layer: int
    d_model: int
    weights_sha256: str


@dataclass(frozen=True)
class CorpusIdentity:
    """Which text: the specification the user gave, and a hash of what it named."""

    spec: str
    fingerprint: str


@dataclass(frozen=True)
class WindowPolicy:
    """How text becomes windows, and which positions of a window are kept as rows."""

    context: int
    bos: bool
    packing: str
    keep_special: bool
    bos_token_id: int
    separator_token_id: int

    @property
    def stride(self) -> int:
        """Tokens of the table that one window takes."""
        return self.context - int(self.bos)

    def offset(self, position: NDArray[np.integer]) -> NDArray[np.int64]:
        """Which of a window's tokens stands at each position; -1 at a start-of-text position."""
        return np.asarray(position, np.int64) - int(self.bos)

    def token_at(self, token_start: NDArray[np.integer], position: NDArray[np.integer]) -> NDArray[np.int64]:
        """The place in the token table of positions of windows that begin at `token_start`; any shapes that broadcast.

        A start-of-text position gets the place of the token after it, which tells its document.
        """
        return np.asarray(token_start + np.maximum(self.offset(position), 0), np.int64)

    def token_index(self, token_start: NDArray[np.integer], position: NDArray[np.integer]) -> NDArray[np.int64]:
        """`token_at`, but -1 for a start-of-text position, which has no token."""
        return np.where(self.offset(position) >= 0, self.token_at(token_start, position), -1)


@dataclass(frozen=True)
class Manifest:
    """Identity and provenance of a store; immutable once written.

    `kind` is "activations" or "codes". `source` is empty for activations; for codes it names the store, its
    snapshot, the run they were made from and its number of features. `provenance` is free-form and no part of the identity.
    """

    kind: str
    model: ModelIdentity
    tokenizer_sha256: str
    corpus: CorpusIdentity
    policy: WindowPolicy
    arrays: tuple[RowArray, ...]
    compute_dtype: str
    seed: int
    source: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """The fields that make two stores the same one, as plain JSON values."""
        values = asdict(self)
        del values["provenance"]
        return {**values, "arrays": list(values["arrays"])}

    @property
    def store_id(self) -> str:
        """Sixteen hex digits of the identity's sha256."""
        return content_hash(self.identity())[:16]

    @property
    def sites(self) -> list[str]:
        """The sites whose activations are kept, such as `resid_post.3`; none where the rows are codes."""
        return [paths.site_of(array.name) for array in self.arrays if paths.is_acts(array.name)]

    def encoding(self, site: str) -> Encoding:
        """How a site's rows are kept. Raises InputError when the store does not have the site."""
        return self.array(paths.acts(site)).kept_as

    def d_model(self, site: str) -> int:
        """Channels of a site. Raises InputError when the store does not have the site."""
        return self.array(paths.acts(site)).width

    @property
    def measured_sites(self) -> list[str]:
        """The sites whose rows are measured by channels."""
        return [site for site in self.sites if self.encoding(site).needs_channels]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all arrays, before compression."""
        return sum(array.row_bytes for array in self.arrays)

    def to_bytes(self) -> bytes:
        """The values as the store's record states them."""
        head = {"format": "actstore", "version": FORMAT_VERSION, "store_id": self.store_id}
        return record_bytes({**head, "identity": self.identity(), "provenance": self.provenance})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Raises NotAStore for another format or version, DamagedStore when it was changed after it was written."""
        try:
            value = json.loads(data)
        except ValueError as error:
            raise DamagedStore(
                f"{where}: the manifest is not readable as JSON ({error}); restore it from a copy."
            ) from error
        if not isinstance(value, dict) or value.get("format") != "actstore":
            raise NotAStore(f"{where}: not an actstore manifest; pass a folder that `collect` or `encode` wrote.")
        if value.get("version") != FORMAT_VERSION:
            raise NotAStore(
                f"{where}: format version {value.get('version')}, this program reads {FORMAT_VERSION}; "
                "use the actstore version that wrote it."
            )
        value = parse_record(data, f"{where}: the manifest")
        identity = cast(dict[str, Any], value["identity"])
        return cls(
            kind=identity["kind"],
            model=ModelIdentity(**identity["model"]),
            tokenizer_sha256=identity["tokenizer_sha256"],
            corpus=CorpusIdentity(**identity["corpus"]),
            policy=WindowPolicy(**identity["policy"]),
            arrays=tuple(RowArray(**array) for array in identity["arrays"]),
            compute_dtype=identity["compute_dtype"],
            seed=identity["seed"],
            source=identity["source"],
            provenance=value["provenance"],
        )

    def array(self, name: str) -> RowArray:
        """Raises InputError when the store has no such array."""
        for array in self.arrays:
            if array.name == name:
                return array
        raise InputError(f"no array {name} here; there are {', '.join(array.name for array in self.arrays)}.")


def differing_fields(ours: Manifest, theirs: Manifest) -> list[str]:
    """One `field: ours, theirs` line for every leaf of the identity in which two manifests differ."""

    def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            fields: dict[str, Any] = {}
            for key, inner in value.items():
                fields |= leaves(inner, f"{prefix}.{key}" if prefix else key)
            return fields
        if prefix == "arrays":
            return {prefix: ", ".join("{name} ({width} x {dtype}, {encoding})".format(**array) for array in value)}
        return {prefix: value}

    left, right = leaves(ours.identity()), leaves(theirs.identity())
    return [f"{key}: {left.get(key)} / {right.get(key)}" for key in sorted(left | right) if left.get(key) != right.get(key)]


@dataclass(frozen=True)
class PartRecord:
    """One split of a segment: how many windows and rows it has and how the rows are cut."""

    n_windows: int
    n_rows: int
    shard_rows: int
    chunk_rows: int

    @property
    def layout(self) -> Layout:
        return Layout(self.n_rows, self.shard_rows, self.chunk_rows)


@dataclass(frozen=True)
class SegmentRecord:
    """A segment whose token tables are complete; published before its first row is written.

    The text begins with document `first_document` of the corpus, behind the first `first_token` tokens of it, and goes
    on to document `next_document`, behind `next_token` tokens of that. `objects` maps every table object to its length
    and sha256. `environment` says what computed the rows.
    """

    store_id: str
    index: int
    first_document: int
    first_token: int
    next_document: int
    next_token: int
    n_documents: int
    n_tokens: int
    heldout_modulus: int
    parts: dict[str, PartRecord]
    environment: dict[str, Any]
    objects: dict[str, dict[str, Any]]

    @cached_property
    def content_id(self) -> str:
        """Sixteen hex digits naming the text, the windows and the cut into shards: what a shard's bytes depend on."""
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return content_hash([self.store_id, self.index, parts, self.objects])[:16]

    def is_record_of(self, record: dict[str, Any], part: str, shard: int) -> bool:
        """Whether a commit record is the one of this shard of this segment."""
        folder = paths.array(self.index, part) + "/"
        return (
            record["segment"] == self.content_id
            and record["rows"] == list(self.parts[part].layout.shard_range(shard))
            and all(name.startswith(folder) for name in record["objects"])
        )

    def to_bytes(self) -> bytes:
        return record_bytes(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> SegmentRecord:
        """Raises DamagedStore when it was changed after it was written."""
        value = parse_record(data, where)
        parts = {name: PartRecord(**part) for name, part in value["parts"].items()}
        return cls(**{**value, "parts": parts})
