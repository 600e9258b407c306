"""In: a run. Out: the files of another tool. And back: in, a file and a store; out, a run.

An imported run states the store that it was imported for, and no training: `rows_seen`
is 0 and `config` has the file, its format and its origin in place of options.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from actstore.errors import IdentityMismatch, InputError, OutputExists
from actstore.files import require_free_space
from actstore.lease import held_file
from actstore.reader import ActivationStore
from actstore.sealed_folder import require_unfinished, results_folder
from pipelines.exchange.format import Origin, format_named
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import WEIGHTS, RunRecord, load_run, require_match, save_run
from pipelines.sae.row_sample import SAMPLE_ROWS, n_silent, sample_rows, usual_code_width
from pipelines.sae.tensor_file import making

LEFT_OVER = (WEIGHTS, making(Path(WEIGHTS)).name)
"""What an import that was killed leaves: a run exists by its record alone."""


@dataclass(frozen=True)
class ExportConfig:
    """What `export` is asked for; the names are the command's options."""

    run: Path
    out: Path
    format: str = "npz"


@dataclass(frozen=True)
class ImportConfig:
    """What `import` is asked for; the names are the command's options."""

    file: Path
    store: str | Path
    out: Path
    format: str = "npz"


def export_run(config: ExportConfig) -> dict[str, Any]:
    """Write a run as another tool's files; returns their paths, the run's id and its architecture.

    Raises InputError for an architecture that the format cannot keep, OutputExists, NotAStore or NoSpace; nothing is
    written then.
    """
    chosen = format_named(config.format)
    sae, record = load_run(config.run)
    if record.architecture not in chosen.architectures:
        raise InputError(
            f"{config.run}: its architecture is {record.architecture}, {chosen.name} keeps "
            f"{', '.join(chosen.architectures)}; choose another --format, or a run of those."
        )
    files = chosen.files(config.out)
    with ExitStack() as held:
        for path in files:
            require_free(path)
            held.enter_context(held_file(path))
        for path in files:
            require_free(path)
        chosen.write(sae, record, config.out)
    return {
        "files": [str(path) for path in files],
        "format": chosen.name,
        "run_id": record.run_id,
        "architecture": record.architecture,
    }


def import_run(config: ImportConfig) -> dict[str, Any]:
    """Make a run of another tool's file, for the rows of a store; returns its record as plain values.

    Raises InputError for a file that cannot be read or a store without its site, WidthMismatch, IdentityMismatch,
    OutputExists or NoSpace; nothing is written then.
    """
    chosen = format_named(config.format)
    require_unfinished(config.out, LEFT_OVER)
    sae, origin = chosen.read(config.file)
    store = ActivationStore(config.store)
    record = record_of(config, chosen.name, sae, origin, store)
    require_free_space(config.out, 12 * sae.n_features * sae.d_model, "the imported run")
    with results_folder(config.out, LEFT_OVER):
        record = save_run(config.out, sae, record)
    return {"run": str(config.out), "run_id": record.run_id, **asdict(record)}


def record_of(config: ImportConfig, name: str, sae: Sae, origin: Origin, store: ActivationStore) -> RunRecord:
    """The record of an imported run. Silent features and the width of codes are measured on a sample of the store's rows.

    Raises what `require_match` does, and IdentityMismatch when the file names other weights of the language model.
    """
    weights = store.manifest.model.weights_sha256
    if origin.weights_sha256 not in ("", weights):
        raise IdentityMismatch(
            f"{config.file}: the SAE was trained on a model with weights {origin.weights_sha256[:12]}, {store.url} comes "
            f"from {weights[:12]}; pass a store of the same model."
        )
    known = {
        "architecture": sae.architecture,
        "d_model": sae.d_model,
        "n_features": sae.n_features,
        "k": sae.k,
        "site": origin.site,
        "store_id": store.store_id,
        "snapshot": store.snapshot,
        "weights_sha256": weights,
        "model": store.manifest.provenance.get("model", store.manifest.model.architecture),
        "bos": store.manifest.policy.bos,
        "input_scale": 1.0,
        "rows_seen": 0,
        "history": [],
        "config": {"store": str(config.store), "file": str(config.file), "format": name, "origin": asdict(origin)},
    }
    require_match(config.file, RunRecord(**known, code_width=0, metrics={}), store)
    rows = torch.from_numpy(sample_rows(store, origin.site, SAMPLE_ROWS, 0))
    width = sae.code_width or origin.code_width or usual_code_width(sae, rows)
    return RunRecord(
        **known,
        code_width=min(width, sae.n_features),
        metrics={"dead_features": n_silent(sae, rows), "dead_window_rows": len(rows)},
    )


def require_free(path: Path) -> None:
    """Raises OutputExists where something is."""
    if path.exists():
        raise OutputExists(f"{path}: exists; choose another --out, or move it away.")


def export_lines(result: dict[str, Any]) -> list[str]:
    """What `export` prints."""
    return [f"run {result['run_id']}, {result['architecture']}, as {result['format']}:", *map(str, result["files"])]


def import_lines(result: dict[str, Any]) -> list[str]:
    """What `import` prints."""
    origin, metrics = result["config"]["origin"], result["metrics"]
    return [
        f"run {result['run_id']}: {result['site']}, {result['architecture']}, {result['n_features']:,} features, "
        f"k {result['k']}, {result['code_width']} codes of a row kept",
        f"from {origin['model'] or 'a model that the file does not name'}, run {origin['run_id'] or 'not named'}; "
        f"{metrics['dead_features']:,} features silent in {metrics['dead_window_rows']:,} rows of the store",
    ]
