"""The saved state of an unfinished training: one file, `training.safetensors`.

The file is replaced as a whole, so an interruption leaves the last saved state. Each SAE's tensors are named by its number;
everything else is JSON in the file's header, with the sha256 of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from actstore.errors import DamagedStore
from pipelines.sae.tensor_file import making, publish_tensors

STATE = "training.safetensors"
STATE_VERSION = 3
"""The version of file and recipe; other versions are refused."""
Saved = tuple[list[dict[str, Tensor]], dict[str, Any]]
"""The tensors of every SAE, and the facts that the training needs besides."""


def save_state(folder: Path, trainees: list[dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Publish the tensors of every SAE and the other facts of the training, in place of the former state."""
    tensors = {f"{index}/{name}": tensor for index, of_one in enumerate(trainees) for name, tensor in of_one.items()}
    header = {**facts, "version": STATE_VERSION, "sha256": _digest(tensors)}
    publish_tensors(folder / STATE, tensors, {"actstore": json.dumps(header)})


def load_state(folder: Path) -> Saved | None:
    """The state that `save_state` saved; None when there is none. Raises DamagedStore when the file was changed."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["actstore"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    version = facts.pop("version", None)
    if version != STATE_VERSION:
        raise _damaged(path, f"version {version}, this actstore trains by version {STATE_VERSION}")
    if facts.pop("sha256", None) != _digest(tensors):
        raise _damaged(path, "its tensors are not those that were saved")
    trainees: list[dict[str, Tensor]] = []
    for name, tensor in tensors.items():
        index, _, short_name = name.partition("/")
        while len(trainees) <= int(index):
            trainees.append({})
        trainees[int(index)][short_name] = tensor
    return trainees, facts


def discard_state(folder: Path) -> None:
    """Remove the state of a finished training, whose runs are published."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(making(folder / STATE), ignore_errors=True)


def _damaged(path: Path, what: str) -> DamagedStore:
    return DamagedStore(f"{path}: cannot be continued from ({what}); move it away and train anew.")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).numpy().data)
    return digest.hexdigest()
