"""A training run on disk: `sae.safetensors` beside `run.json`, its record (`run_record`).

The weights take rows in raw units: the input scale of training is folded into them, and recorded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actstore.errors import NotAStore
from actstore.files import file_sha256
from pipelines.sae.architectures.registry import forms, make
from pipelines.sae.base import Sae
from pipelines.sae.run_record import (
    RECORD,
    RUN_VERSION,
    WEIGHTS,
    RunRecord,
    publish_run_record,
    read_run_record,
    require_match,
)
from pipelines.sae.tensor_file import load_tensors, publish_tensors

__all__ = ["RECORD", "RUN_VERSION", "WEIGHTS", "RunRecord", "load_run", "require_match", "save_run"]


def save_run(path: Path, sae: Sae, record: RunRecord) -> RunRecord:
    """Publish a run: first the weights, flushed to disk, then the record. Returns the record with the weights' sha256."""
    publish_tensors(path / WEIGHTS, {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()})
    record = replace(record, sae_sha256=file_sha256(path / WEIGHTS))
    publish_run_record(path, record)
    return record


def load_run(path: str | Path) -> tuple[Sae, RunRecord]:
    """The SAE of a run, for rows in raw units, and its record.

    Raises NotAStore when `path` holds no finished run, or weights that are not the run's; DamagedStore, before anything is
    allocated, when the weights are not those of the architecture; DamagedStore when a weight is not finite.
    """
    record = read_run_record(path)
    weights = Path(path) / WEIGHTS
    if not weights.exists() or file_sha256(weights) != record.sae_sha256:
        raise NotAStore(f"{weights}: missing, or not this run's weights; restore them from a copy.")
    shape = (record.architecture, record.d_model, record.n_features, record.k)
    tensors = load_tensors(weights, forms(*shape))
    sae = make(*shape)
    sae.load_state_dict(tensors)
    return sae.eval().requires_grad_(False), record
