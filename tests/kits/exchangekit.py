"""Runs of every architecture that no training made: SAEs none of whose parameters is at its start."""

from __future__ import annotations

from pathlib import Path

import torch

from actstore.reader import ActivationStore
from pipelines.sae.architectures.registry import make
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, save_run


def moved_sae(architecture: str, d_model: int, n_features: int, k: int, seed: int = 0) -> Sae:
    """An SAE of unit decoder rows whose other parameters are all of their own."""
    generator = torch.Generator().manual_seed(seed)
    sae = make(architecture, d_model, n_features, k, seed=seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in sae.named_buffers():
            if name == "threshold":
                buffer.copy_(torch.rand((), generator=generator))
    return sae


def write_run(folder: Path, sae: Sae, store: Path, site: str) -> RunRecord:
    """The SAE as a run of a store."""
    opened = ActivationStore(store)
    record = RunRecord(
        architecture=sae.architecture,
        d_model=sae.d_model,
        n_features=sae.n_features,
        k=sae.k,
        code_width=sae.code_width or 7,
        site=site,
        store_id=opened.store_id,
        snapshot=opened.snapshot,
        weights_sha256=opened.manifest.model.weights_sha256,
        model="a model",
        bos=True,
        input_scale=0.5,
        rows_seen=100,
        history=[[0, 1]],
        config={"store": str(store)},
        metrics={"dead_features": 0, "dead_window_rows": 100},
    )
    return save_run(folder, sae, record)
