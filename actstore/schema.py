"""A store's manifest (identity and provenance) and the records of its segments.

Frozen dataclasses on one side, versioned JSON on the other, nothing pickled. The identity is what two collections
must share to be the same store; provenance (where the model folder was, which libraries ran) is kept but never
compared. docs/FORMAT.md is the normative description of the JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from actstore import paths
from actstore.checked_json import Count, Hex16, Width, checked, one_of, parse_json
from actstore.encodings.base import Encoding
from actstore.encodings.channels import Channels
from actstore.encodings.registry import encoding_of, encodings
from actstore.errors import DamagedStore, InputError, NotAStore
from actstore.files import Entry, content_hash, parse_record, record_bytes

FORMAT_VERSION = 3
TABLE_CHUNK = 1 << 20
"""Values of a table in one object."""
PARTS = ("train", "heldout")
"""The two splits of a segment; the index is the `part` of the plan."""
NUMBERS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)] + ["float16", "float32", "float64"]
"""The dtypes of arrays."""


@dataclass(frozen=True)
class RowArray:
    """One value per row: `width` numbers each, or one scalar where width is 0."""

    name: paths.ArrayName
    width: Width
    dtype: Annotated[str, one_of(*NUMBERS)]
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
    n_layer: Count
    d_model: Width
    weights_sha256: str


@dataclass(frozen=True)
class CorpusIdentity:
    """Which text: the specification the user gave, and a hash of what it named."""

    spec: str
    fingerprint: str


@dataclass(frozen=True)
class WindowPolicy:
    """How text becomes windows, and which positions of a window are kept as rows."""

    context: Annotated[int, Meta(ge=1, le=1 << 24)]
    bos: bool
    packing: Annotated[str, one_of("packed", "document")]
    keep_special: bool
    bos_token_id: Width
    separator_token_id: Width

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

    kind: Annotated[str, one_of("activations", "codes")]
    model: ModelIdentity
    tokenizer_sha256: str
    corpus: CorpusIdentity
    policy: WindowPolicy
    arrays: tuple[RowArray, ...]
    compute_dtype: Annotated[str, one_of("fp32", "bf16")]
    seed: Annotated[int, Meta(ge=0)]
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
        value = parse_json(data, f"{where}: the manifest")
        if not isinstance(value, dict) or value.get("format") != "actstore":
            raise NotAStore(f"{where}: not an actstore manifest; pass a folder that `collect` or `encode` wrote.")
        if value.get("version") != FORMAT_VERSION:
            raise NotAStore(
                f"{where}: format version {value.get('version')}, this program reads {FORMAT_VERSION}; "
                "use the actstore version that wrote it."
            )
        record = checked(parse_record(data, f"{where}: the manifest"), _ManifestRecord, f"{where}: the manifest")
        manifest = checked({**record.identity, "provenance": record.provenance}, cls, f"{where}: the manifest")
        if what := _contradiction(manifest, record, f"{where}: the manifest"):
            raise DamagedStore(f"{where}: the manifest: {what}; restore it from a copy.")
        return manifest

    def array(self, name: str) -> RowArray:
        """Raises InputError when the store has no such array."""
        for array in self.arrays:
            if array.name == name:
                return array
        raise InputError(f"no array {name} here; there are {', '.join(array.name for array in self.arrays)}.")


@dataclass(frozen=True)
class _ManifestRecord:
    """The fields of `manifest.json`."""

    format: str
    version: int
    store_id: str
    identity: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class CodeSource:
    """What the rows of a code store were made from: a store at a snapshot, one site of it, and a run."""

    store_id: Hex16
    snapshot: Hex16
    run_id: Hex16
    site: paths.SiteName
    n_features: Annotated[int, Meta(ge=1, le=1 << 24)]
    kernel: str = ""


@dataclass(frozen=True)
class RecodedSource:
    """Which store a store in another encoding was made from."""

    store_id: Hex16


def _contradiction(manifest: Manifest, record: _ManifestRecord, where: str) -> str:
    """What in a manifest of the right fields cannot be; empty when nothing is."""
    if record.store_id != manifest.store_id:
        return f"store_id {record.store_id}, but its identity gives {manifest.store_id}"
    checked(record.provenance.get("tokenizer_files"), dict[paths.FileName, Entry], f"{where}: tokenizer_files")
    if manifest.kind == "codes":
        source = checked(manifest.source, CodeSource, f"{where}: source")
        expected = code_arrays(
            manifest.arrays[-1].width if manifest.arrays else 0,
            np.min_scalar_type(source.n_features - 1).name,
            manifest.arrays[-1].dtype if manifest.arrays else "",
        )
    else:
        if manifest.source:
            checked(manifest.source, RecodedSource, f"{where}: source")
        for site in manifest.sites:
            if (encoding := manifest.array(paths.acts(site)).encoding) not in encodings():
                return f"{site} is kept as {encoding}; there are {', '.join(encodings())}"
        expected = [
            array
            for site in manifest.sites
            for array in site_arrays(site, manifest.d_model(site), manifest.array(paths.acts(site)).encoding)
        ]
    expected = [*ROW_PLACE_ARRAYS, *expected]
    is_expected = len(expected) == len(manifest.arrays) > len(ROW_PLACE_ARRAYS)
    if not is_expected or not all(map(_is_kept_as, manifest.arrays, expected)):
        return f"its arrays {[array.name for array in manifest.arrays]} are not those of a store of {manifest.kind}"
    if any(array.width < 1 for array in expected if array.name.startswith(("acts/", "codes/"))):
        return "an array of width 0"
    return ""


def _is_kept_as(array: RowArray, expected: RowArray) -> bool:
    """Whether an array is the expected one; integers and codes may also be of a wider dtype, packed or not."""
    plain = {"raw", "packed"}
    as_plain = {array.encoding, expected.encoding} <= plain and np.can_cast(expected.dtype, array.dtype, "safe")
    return (array.name, array.width) == (expected.name, expected.width) and (array == expected or as_plain)


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
