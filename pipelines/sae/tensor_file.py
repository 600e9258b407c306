"""Named tensors as one safetensors file, which is published whole or not at all, and read only as what it must be."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actstore.errors import DamagedStore
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
    try:
        save_file(tensors, folder / path.name, metadata=metadata)
    except SafetensorError as error:
        raise _of_the_disk(error, path) from error
    fsync_path(folder / path.name)
    os.replace(folder / path.name, path)
    fsync_path(path.parent)
    folder.rmdir()


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, as the file's header states them. Raises DamagedStore when there is no such header."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except (SafetensorError, ValueError, TypeError, OverflowError) as error:
        raise DamagedStore(f"{path}: not a readable safetensors file ({error}); restore it from a copy.") from error


def load_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, of the names, shapes and dtypes of `expected`.

    Raises DamagedStore, before any is read, when the file has others; and when a value is not finite.
    """
    stated = shapes_in(path)
    for name in sorted(stated.keys() | expected.keys()):
        theirs, ours = stated.get(name), tuple(expected[name].shape) if name in expected else None
        if theirs != ours:
            raise DamagedStore(f"{path}: {name} has shape {theirs}, {ours} is needed; restore it from a copy.")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise DamagedStore(f"{path}: {name} is {tensor.dtype}, not {expected[name].dtype}; restore it from a copy.")
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedStore(f"{path}: {name} has values that are not finite; restore it from a copy, or train anew.")
    return tensors


def _of_the_disk(error: SafetensorError, path: Path) -> OSError:
    """What the operating system said, which safetensors gives as text only: `... (os error 28)`."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        raise error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
