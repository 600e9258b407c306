"""`run.json`, the record that makes a run exist: what the SAE is and where it came from. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore.errors import IdentityMismatch, InputError, NotAStore, WidthMismatch
from actstore.files import content_hash, publish_json, read_json
from actstore.kind import not_a
from actstore.reader import ActivationStore

RUN_VERSION = 2
RECORD, WEIGHTS = "run.json", "sae.safetensors"
SHOWN_RUNS = 5


@dataclass(frozen=True)
class RunRecord:
    """What an SAE is and where it came from.

    `weights_sha256` belongs to the language model, `sae_sha256` to the SAE's file. `bos` says whether the windows began with
    a start-of-text token. At most `code_width` codes of a row are kept. `history` holds [rows seen, ranks] at the start and
    wherever the number of ranks changed.
    """

    architecture: str
    d_model: int
    n_features: int
    k: int
    code_width: int
    site: str
    store_id: str
    snapshot: str
    weights_sha256: str
    model: str
    bos: bool
    input_scale: float
    rows_seen: int
    history: list[list[int]]
    config: dict[str, Any]
    metrics: dict[str, float]
    sae_sha256: str = ""

    @property
    def run_id(self) -> str:
        """Sixteen hex digits of the record's sha256."""
        return content_hash(asdict(self))[:16]


def publish_run_record(path: Path, record: RunRecord) -> None:
    """Write the record of a run whose weights are on disk."""
    publish_json(
        path / RECORD, {"format": "actstore-run", "version": RUN_VERSION, **asdict(record), "run_id": record.run_id}
    )


def read_run_record(path: Path) -> RunRecord:
    """The record of a run, without the weights.

    Raises NotAStore when `path` holds no finished run of this version, or a record that was changed.
    """
    if not (path / RECORD).exists():
        raise not_a(path, f"a finished run (no {RECORD})", _remedy(path))
    value = read_json(path / RECORD)
    if value.pop("format", None) != "actstore-run" or value.pop("version", None) != RUN_VERSION:
        raise NotAStore(f"{path}: not a run of format version {RUN_VERSION}; use the actstore version that wrote it.")
    if value.pop("run_id", None) != content_hash(value)[:16]:
        raise NotAStore(f"{path / RECORD}: was changed after it was written; restore it from a copy.")
    return RunRecord(**value)


def _remedy(path: Path) -> str:
    """What to pass in place of a folder that holds no run: of a sweep, one of its runs."""
    runs = sorted(record.parent.name for record in path.glob(f"*/{RECORD}")) if path.is_dir() else []
    more = f" and {len(runs) - SHOWN_RUNS} more" if len(runs) > SHOWN_RUNS else ""
    named = f": {', '.join(runs[:SHOWN_RUNS])}{more}" if runs else ""
    return f"pass one of the runs in it{named}." if runs else "pass a folder that `train` wrote."


def require_match(path: Path, record: RunRecord, store: ActivationStore) -> None:
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
