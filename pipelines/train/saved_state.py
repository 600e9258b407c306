"""The saved state of an unfinished training: one file, `training.safetensors`.

The file is replaced as a whole, so an interruption leaves the last saved state. Each SAE's tensors are named by its number;
everything else is JSON in the file's header, beside the sha256 of that JSON and of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from safetensors import SafetensorError, safe_open
from torch import Tensor

from actstore.checked_json import Count, Hex16, checked, parse_json
from actstore.errors import DamagedStore
from pipelines.sae.tensor_file import Form, forms_of, making, publish_tensors, require_finite, require_forms
from pipelines.train.trainee import Counts

STATE = "training.safetensors"
STATE_VERSION = 4
"""The version of file and recipe; other versions are refused."""
FACTS, VERSION, SUM = "actstore", "version", "sha256"
"""What the header has besides the tensors: the facts as JSON, the version, the sha256 of facts and tensors."""


@dataclass(frozen=True)
class Facts:
    """What a training needs besides tensors. Lists have one entry for each SAE.

    `snapshot` is the store's, `configs` are the options as they are recorded, `metrics` the last logged ones, `log_bytes`
    the lengths of the logs, `history` is that of `RunRecord`, `diverged` has the rows after which SAEs were left out, by
    their number.
    """

    snapshot: Hex16
    rows_seen: Count
    diverged: dict[str, Count]
    configs: Annotated[list[dict[str, str | int | float | bool | None]], Meta(min_length=1)]
    counts: list[Counts]
    metrics: list[dict[str, int | float]]
    log_bytes: list[Count]
    history: list[Annotated[list[Count], Meta(min_length=2, max_length=2)]]

    def alive(self) -> list[int]:
        """The SAEs that are still trained, by number."""
        return [index for index in range(len(self.configs)) if str(index) not in self.diverged]


@dataclass(frozen=True)
class Saved:
    """A saved state: the tensors of every SAE, and the facts that the training needs besides."""

    path: Path
    tensors: list[dict[str, Tensor]]
    facts: Facts

    def require_trainees(self, forms: Sequence[dict[str, Form]]) -> None:
        """Raises DamagedStore unless the tensors are those of the SAEs in training, and those of each SAE alive finite."""
        for index, (tensors, needed) in enumerate(zip(self.tensors, forms, strict=True)):
            begun = {name: form for name, form in needed.items() if not name.startswith("adam/") or name in tensors}
            require_forms(self.path, forms_of(tensors), begun)
            if index in self.facts.alive():
                require_finite(self.path, {name: tensor for name, tensor in tensors.items() if name.startswith("sae/")})


def save_state(folder: Path, trainees: list[dict[str, Tensor]], facts: Facts) -> None:
    """Publish the tensors of every SAE and the other facts of the training, in place of the former state."""
    tensors = {f"{index}/{name}": tensor for index, of_one in enumerate(trainees) for name, tensor in of_one.items()}
    text = json.dumps(asdict(facts), allow_nan=False)
    header = {FACTS: text, VERSION: str(STATE_VERSION), SUM: _digest(text, tensors)}
    publish_tensors(folder / STATE, tensors, header)


def load_state(folder: Path) -> Saved | None:
    """The state that `save_state` saved; None when there is none. Raises DamagedStore when a bit of the file was changed."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            if header.get(VERSION) != str(STATE_VERSION):
                stated = header.get(VERSION, "not stated")[:20]
                raise _damaged(path, f"version {stated}, this actstore trains by version {STATE_VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    text = header.get(FACTS, "")
    if header.keys() != {FACTS, VERSION, SUM} or header[SUM] != _digest(text, tensors):
        raise _damaged(path, "its facts or tensors are not those that were saved")
    try:
        facts = checked(parse_json(text.encode(), "its facts"), Facts, "its facts")
    except DamagedStore as error:
        raise _damaged(path, str(error)) from error
    if fault := _fault(facts):
        raise _damaged(path, fault)
    return Saved(path, _by_trainee(path, tensors, len(facts.configs)), facts)


def discard_state(folder: Path) -> None:
    """Remove the state of a finished training, whose runs are published."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(making(folder / STATE), ignore_errors=True)


def _fault(facts: Facts) -> str:
    """What does not fit together in facts whose types are right; empty when all does."""
    n, alive = len(facts.configs), facts.alive()
    if not n == len(facts.counts) == len(facts.metrics) == len(facts.log_bytes):
        return f"{n} configs, {len(facts.counts)} counts, {len(facts.metrics)} metrics, {len(facts.log_bytes)} logs"
    if not alive or len(alive) + len(facts.diverged) != n:
        return f"{len(facts.diverged)} of {n} SAEs diverged, by the numbers {', '.join(facts.diverged)[:50]}"
    lead = facts.counts[alive[0]]
    if lead.rows_seen != facts.rows_seen or any(facts.counts[index] != lead for index in alive):
        return f"its SAEs are at different steps, or not at the {facts.rows_seen:,} rows that it states"
    return ""


def _by_trainee(path: Path, tensors: dict[str, Tensor], n_trainees: int) -> list[dict[str, Tensor]]:
    trainees: list[dict[str, Tensor]] = [{} for _ in range(n_trainees)]
    numbers = {str(index): index for index in range(n_trainees)}
    for name, tensor in tensors.items():
        index, _, short_name = name.partition("/")
        if index not in numbers:
            raise _damaged(path, f"tensor {name!r} belongs to none of {n_trainees} SAEs")
        trainees[numbers[index]][short_name] = tensor
    return trainees


def _damaged(path: Path, what: str) -> DamagedStore:
    return DamagedStore(f"{path}: cannot be continued from ({what}); move it away and train anew.")


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{STATE_VERSION} {len(text)} {text}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).numpy().data)
    return digest.hexdigest()
