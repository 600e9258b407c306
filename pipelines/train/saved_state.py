"""The saved state of an unfinished training: one file, `training.safetensors`.

The file is replaced as a whole, so an interruption leaves the last saved state. Each SAE's tensors are named by its number;
everything else is JSON in the file's header, with the sha256 of that JSON and of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from actstore.checked_json import Count, Hex16, checked, parse_json
from actstore.errors import DamagedStore
from pipelines.sae.tensor_file import making, publish_tensors

STATE = "training.safetensors"
STATE_VERSION = 4
"""The version of file and recipe; other versions are refused."""


@dataclass(frozen=True)
class Counts:
    """How far an SAE's training is."""

    n_steps: Count
    rows_seen: Count


@dataclass(frozen=True)
class Facts:
    """What a training needs besides its tensors.

    `diverged` maps the number of an SAE that was left out to its rows; `configs`, `counts`, `metrics` and `log_bytes` have
    an entry for each SAE. `history` holds [rows seen, ranks] where the number of ranks changed.
    """

    snapshot: Hex16
    rows_seen: Count
    diverged: dict[str, Count]
    configs: list[dict[str, Any]]
    counts: list[Counts]
    metrics: list[dict[str, int | float]]
    log_bytes: list[Count]
    history: list[list[Count]]


Saved = tuple[list[dict[str, Tensor]], Facts]
"""The tensors of every SAE, and the facts that the training needs besides."""


def save_state(folder: Path, trainees: list[dict[str, Tensor]], facts: Facts) -> None:
    """Publish the tensors of every SAE and the other facts of the training, in place of the former state."""
    tensors = {f"{index}/{name}": tensor for index, of_one in enumerate(trainees) for name, tensor in of_one.items()}
    text = json.dumps({**asdict(facts), "version": STATE_VERSION}, allow_nan=False)
    publish_tensors(folder / STATE, tensors, {"actstore": text, "sha256": _digest(text, tensors)})


def load_state(folder: Path) -> Saved | None:
    """The state that `save_state` saved; None when there is none. Raises DamagedStore when the file was changed."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError, TypeError, OverflowError) as error:
        raise _damaged(path, str(error)) from error
    text = metadata.get("actstore", "")
    if metadata.get("sha256") != _digest(text, tensors):
        said = text.partition('"version": ')[2].rstrip("}")
        is_older = said.isdecimal() and int(said) < STATE_VERSION
        raise _damaged(path, f"version {said}, this actstore trains by {STATE_VERSION}" if is_older else "it was changed")
    value = checked(parse_json(text.encode(), str(path)), dict[str, Any], str(path))
    if (version := value.pop("version", None)) != STATE_VERSION:
        raise _damaged(path, f"version {version}, this actstore trains by version {STATE_VERSION}")
    facts = checked(value, Facts, str(path))
    trainees: list[dict[str, Tensor]] = [{} for _ in facts.configs]
    for name, tensor in tensors.items():
        index, _, short_name = name.partition("/")
        if not (index.isdecimal() and index.isascii() and int(index) < len(trainees)):
            raise _damaged(path, f"a tensor {name[:40]!r} belongs to none of its {len(trainees)} SAEs")
        trainees[int(index)][short_name] = tensor
    if not len(facts.counts) == len(facts.metrics) == len(facts.log_bytes) == len(trainees):
        raise _damaged(path, f"{len(trainees)} SAEs, but counts of {len(facts.counts)}")
    return trainees, facts


def discard_state(folder: Path) -> None:
    """Remove the state of a finished training, whose runs are published."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(making(folder / STATE), ignore_errors=True)


def _damaged(path: Path, what: str) -> DamagedStore:
    return DamagedStore(f"{path}: cannot be continued from ({what}); move it away and train anew.")


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode("utf-8", errors="replace") + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
