"""What a format of another tool's files is, and the formats by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import pipelines.exchange.formats
from actstore.errors import InputError
from actstore.folder_registry import modules_of
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord


@dataclass(frozen=True)
class Origin:
    """What a file says of where its SAE comes from. Empty or 0 where the file is silent.

    `site` is a site of a store, `run_id` the run that was exported, `weights_sha256` that of the language model,
    `code_width` how many codes of a row are kept.
    """

    site: str
    model: str = ""
    weights_sha256: str = ""
    run_id: str = ""
    code_width: int = 0


class Format(Protocol):
    """One format: a module of `formats/` has one as its `FORMAT`.

    `architectures` are those that a file can hold without loss of a code. The SAE that `read` gives subtracts b_dec from
    its rows and has unit decoder rows, as all of ours: a format whose files differ folds the difference into the weights.
    """

    name: str
    architectures: tuple[str, ...]

    def files(self, out: Path) -> list[Path]:
        """All files that `write` makes. Raises InputError when `out` cannot be the name of such a file."""
        ...

    def write(self, sae: Sae, record: RunRecord, out: Path) -> None:
        """Publish a run of one of `architectures`; the files are free."""
        ...

    def read(self, path: Path) -> tuple[Sae, Origin]:
        """The SAE of a file, and its origin. The file may come from a stranger: nothing in it is run, and every value is
        checked.

        Raises InputError, naming the fault, both values and the remedy.
        """
        ...


@cache
def formats() -> dict[str, Format]:
    """Every format by its name.

    >>> "npz" in formats()
    True
    """
    return {module.FORMAT.name: module.FORMAT for module in modules_of(pipelines.exchange.formats)}


def format_named(name: str) -> Format:
    """Raises InputError, listing what there is, when there is no format of that name."""
    if name not in formats():
        raise InputError(f"format {name!r}: there is none of that name; choose one of {', '.join(sorted(formats()))}.")
    return formats()[name]
