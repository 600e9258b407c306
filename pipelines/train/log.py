"""A training's metrics: always written to `metrics.jsonl`, and to TensorBoard or Weights & Biases where asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from actstore.errors import DamagedStore, InputError
from actstore.files import content_hash

METRICS = "metrics.jsonl"


class MetricsLog:
    """One JSON object per line. A resumed training keeps the first `n_bytes` of the file and writes later lines anew."""

    def __init__(
        self,
        folder: Path,
        n_bytes: int,
        *,
        rows_seen: int = 0,
        tensorboard: bool = False,
        wandb: dict[str, Any] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if n_bytes and (not path.exists() or path.stat().st_size < n_bytes):
            raise DamagedStore(f"{path}: has lost lines that were saved; move the training away and train anew.")
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        self._file.truncate(n_bytes)
        self._file.seek(n_bytes)
        self._board = _board(folder, rows_seen) if tensorboard else None
        self._run = _wandb(folder, wandb) if wandb is not None else None

    @property
    def n_bytes(self) -> int:
        """The file's length, after flushing it to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def write(self, metrics: dict[str, float]) -> None:
        self._file.write((json.dumps(metrics) + "\n").encode())
        self._file.flush()
        rows = int(metrics["rows"])
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, rows)
        if self._run is not None:
            self._run.log(metrics, step=rows)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def _board(folder: Path, rows_seen: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"tensorboard: cannot be loaded ({error}); pip install 'actstore[tensorboard]', or leave it out."
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=rows_seen + 1)


def _wandb(folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"wandb: cannot be loaded ({error}); pip install 'actstore[wandb]', or leave it out.") from error
    run_id = content_hash([str(folder.absolute()), config])[:16]  # equal when the training is resumed
    return wandb.init(
        project="actstore", id=run_id, name=folder.name, dir=str(folder), config=config, resume="allow", reinit="create_new"
    )
