"""`run.json`, the record that makes a run exist: what the SAE is and where it came from. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from actstore.checked_json import Count, Hex16, Hex64, checked, parse_json
from actstore.errors import DamagedStore, IdentityMismatch, InputError, NotAStore, WidthMismatch
from actstore.files import content_hash, publish_json
from actstore.kind import not_a
from actstore.reader import ActivationStore

RUN_VERSION = 2
RECORD, WEIGHTS = "run.json", "sae.safetensors"
SHOWN_RUNS = 5
LARGEST_RECORD = 16 << 20
"""Bytes of the longest `run.json` that is read: a record has a few kilobytes."""
AtLeastOne = Annotated[int, Meta(ge=1, le=1 << 24)]
"""Numbers a row: a width that is not zero."""
SiteLabel = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]{1,100}\.[0-9]{1,6}\Z")]
Value = str | int | float | bool | None
Options = dict[str, Value | dict[str, Value]]
"""What a configuration holds: plain values, and one level of them below a name."""


@dataclass(frozen=True)
class RunRecord:
    """What an SAE is and where it came from.

    `weights_sha256` belongs to the language model, `sae_sha256` to the SAE's file. `bos` says whether the windows began with
    a start-of-text token. At most `code_width` codes of a row are kept. `history` holds [rows seen, ranks] at the start and
    wherever the number of ranks changed.
    """

    architecture: str
    d_model: AtLeastOne
    n_features: AtLeastOne
    k: AtLeastOne
    code_width: AtLeastOne
    site: SiteLabel
    store_id: Hex16
    snapshot: Hex16
    weights_sha256: Hex64
    model: str
    bos: bool
    input_scale: Annotated[float, Meta(gt=0)]
    rows_seen: Count
    history: list[Annotated[list[Count], Meta(min_length=2, max_length=2)]]
    config: dict[str, Any]
    metrics: dict[str, int | float]
    sae_sha256: Hex64 = ""

    @property
    def run_id(self) -> str:
        """Sixteen hex digits of the record's sha256."""
        return content_hash(asdict(self))[:16]

    def option(self, name: str) -> Any:
        """An option of the training. Raises InputError for a run that does not say it, such as one saved from memory."""
        if name not in self.config:
            raise InputError(f"run {self.run_id}: its config has no {name}; pass it, or a run that `train` wrote.")
        return self.config[name]

    def figure(self, name: str) -> int | float:
        """A figure of the training. Raises InputError for a run that does not have it, such as one saved from memory."""
        if name not in self.metrics:
            raise InputError(f"run {self.run_id}: its metrics have no {name}; pass a run that `train` or `import` wrote.")
        return self.metrics[name]

    def __repr__(self) -> str:
        """What a reader asks first, on one line; `vars` has all of it."""
        fve = f", FVE {self.metrics['fve']:.3f}" if "fve" in self.metrics else ""
        return (
            f"<RunRecord {self.run_id}: {self.architecture} of {self.site}, {self.d_model:,} -> {self.n_features:,} "
            f"features, k {self.k}, {self.rows_seen:,} rows seen{fve}, store {self.store_id}, snapshot {self.snapshot}>"
        )


def publish_run_record(path: Path, record: RunRecord) -> None:
    """Write the record of a run whose weights are on disk."""
    publish_json(
        path / RECORD, {"format": "actstore-run", "version": RUN_VERSION, **asdict(record), "run_id": record.run_id}
    )


def read_run_record(path: str | Path) -> RunRecord:
    """The record of a run, without the weights.

    Raises NotAStore when `path` holds no finished run of this version, or a record that was changed; DamagedStore when the
    record holds what no run has.
    """
    file = Path(path) / RECORD
    if not file.exists():
        raise not_a(path, f"a finished run (no {RECORD})", _remedy(Path(path)))
    if (n_bytes := file.stat().st_size) > LARGEST_RECORD:
        raise DamagedStore(f"{file}: {n_bytes:,} bytes, a record has at most {LARGEST_RECORD:,}; restore it from a copy.")
    value = parse_json(file.read_bytes(), str(file))
    if (
        not isinstance(value, dict)
        or value.pop("format", None) != "actstore-run"
        or value.pop("version", None) != RUN_VERSION
    ):
        raise NotAStore(f"{path}: not a run of format version {RUN_VERSION}; use the actstore version that wrote it.")
    if value.pop("run_id", None) != content_hash(value)[:16]:
        raise NotAStore(f"{file}: was changed after it was written; restore it from a copy.")
    record = checked(value, RunRecord, str(file))
    checked(record.config, Options, f"{file}: config")
    if not record.k <= record.n_features >= record.code_width:
        raise DamagedStore(
            f"{file}: k {record.k} and {record.code_width} codes of a row kept, of {record.n_features} features; restore it "
            "from a copy."
        )
    return record


def _remedy(path: Path) -> str:
    """What to pass in place of a folder that holds no run: of a sweep, one of its runs."""
    runs = sorted(record.parent.name for record in path.glob(f"*/{RECORD}")) if path.is_dir() else []
    more = f" and {len(runs) - SHOWN_RUNS} more" if len(runs) > SHOWN_RUNS else ""
    named = f": {', '.join(runs[:SHOWN_RUNS])}{more}" if runs else ""
    return f"pass one of the runs in it{named}." if runs else "pass a folder that `train` wrote."


def require_match(path: str | Path, record: RunRecord, store: ActivationStore) -> None:
    """Raises InputError, WidthMismatch or IdentityMismatch unless the run's SAE fits the store's rows."""
    if record.site not in store.sites:
        raise InputError(
            f"{path}: the SAE reads {record.site}, {store.url} holds {', '.join(store.sites)}; "
            "pass a store of that site, or train on this one."
        )
    if record.d_model != store.d_model(record.site):
        raise WidthMismatch(
            f"{path}: the SAE has d_model={record.d_model}, {store.url} has d_model={store.d_model(record.site)}; "
            "train a new SAE, or pass a store of the same model."
        )
    if record.weights_sha256 != store.manifest.model.weights_sha256:
        raise IdentityMismatch(
            f"{path}: the SAE was trained on a model with weights {record.weights_sha256[:12]}, {store.url} comes from "
            f"{store.manifest.model.weights_sha256[:12]}; pass a store of the same model."
        )
