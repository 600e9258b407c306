"""Named tensors as one safetensors file, which is published whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from actstore.files import fsync_path


def making(path: Path) -> Path:
    """The folder in which a file at `path` is written. It exists only meanwhile, or after an interruption."""
    return path.with_name(f".{path.name}.making")


def publish_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to `path`, replace the former file, and flush to disk.

    The file is first written in a folder of its own, `making(path)`: safetensors writes under a random name, and an
    interruption would leave that file behind.
    """
    folder = making(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / path.name, metadata=metadata)
    fsync_path(folder / path.name)
    os.replace(folder / path.name, path)
    fsync_path(path.parent)
    folder.rmdir()
