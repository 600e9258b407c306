"""Named tensors as one safetensors file, that is whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from actstore.files import fsync_path


def making(path: Path) -> Path:
    """The folder in which a file at `path` is written; there only while it is, or after a kill."""
    return path.with_name(f".{path.name}.making")


def publish_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to `path`, in place of what was there, and onto the disk.

    In a folder of their own first: safetensors writes to a random name, which a kill would leave lying.
    """
    folder = making(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / path.name, metadata=metadata)
    fsync_path(folder / path.name)
    os.replace(folder / path.name, path)
    fsync_path(path.parent)
    folder.rmdir()
