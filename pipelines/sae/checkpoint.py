"""A training run on disk: `sae.safetensors` and `run.json`, the record that makes the run exist.

The weights are in raw units: whatever scaling the trainer used is folded in, and recorded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from actstore.errors import IdentityMismatch, InputError, NotAStore, WidthMismatch
from actstore.files import content_hash, object_entry, publish_json, read_json
from actstore.reader import ActivationStore
from pipelines.sae.architectures.registry import make
from pipelines.sae.base import Sae
from pipelines.sae.tensor_file import publish_tensors

RUN_VERSION = 2
RECORD, WEIGHTS = "run.json", "sae.safetensors"


@dataclass(frozen=True)
class RunRecord:
    """Where an SAE came from and what it is. `weights_sha256` is the language model's, `sae_sha256`
    that of the SAE's file; `bos` says whether its windows began with a start-of-text token; `code_width` codes of a row
    are kept; `history` holds [rows seen, ranks] at the start, and wherever the number of ranks changed."""

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


def save_run(path: Path, sae: Sae, record: RunRecord) -> RunRecord:
    """Publish a run: weights first, flushed, then the record, completed with their sha256, which is returned."""
    publish_tensors(path / WEIGHTS, {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()})
    record = replace(record, sae_sha256=object_entry((path / WEIGHTS).read_bytes())["sha256"])
    publish_json(
        path / RECORD, {"format": "actstore-run", "version": RUN_VERSION, **asdict(record), "run_id": record.run_id}
    )
    return record


def load_run(path: Path) -> tuple[Sae, RunRecord]:
    """The SAE of a run, in raw units, and its record. Raises NotAStore when `path` holds no finished run."""
    if not (path / RECORD).exists():
        raise NotAStore(f"{path}: not a finished run (no {RECORD}); pass a folder that `train` wrote.")
    value = read_json(path / RECORD)
    if value.pop("format", None) != "actstore-run" or value.pop("version", None) != RUN_VERSION:
        raise NotAStore(f"{path}: not a run of format version {RUN_VERSION}; use the actstore version that wrote it.")
    if value.pop("run_id", None) != content_hash(value)[:16]:
        raise NotAStore(f"{path / RECORD}: was changed after it was written; restore it from a copy.")
    record = RunRecord(**value)
    sae = make(record.architecture, record.d_model, record.n_features, record.k)
    weights = path / WEIGHTS
    if not weights.exists() or object_entry(weights.read_bytes())["sha256"] != record.sae_sha256:
        raise NotAStore(f"{weights}: missing, or not this run's weights; restore them from a copy.")
    sae.load_state_dict(load_file(weights))
    return sae.eval().requires_grad_(False), record


def require_match(path: Path, record: RunRecord, store: ActivationStore) -> None:
    """Raises InputError, WidthMismatch or IdentityMismatch unless a run's SAE reads rows such as the store's."""
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
