"""The modules of the standard library that the built-in model learns from, and their tokens.

The split is by top-level package or module, so that no held-out file has a sibling in the training set. `data.json` in the
model's folder pins every module name with the SHA-256 of its bytes. This records exactly what the model saw, and
`read_pinned` reports where the running Python's files differ.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pipelines.shared.stdlib_sources import StdlibFile, stdlib_files

SPLITS = ("train", "dev", "test")
DEV_PACKAGES = frozenset({"cmd", "csv", "fractions", "glob", "queue", "wsgiref", "zoneinfo"})
TEST_PACKAGES = frozenset(
    {"calendar", "contextlib", "heapq", "http", "json", "logging", "sched", "shlex", "statistics", "textwrap"}
)
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class SourceModule:
    """One module: its name, split and text, the SHA-256 of its bytes and its length in UTF-8 bytes."""

    name: str
    split: str
    text: str
    sha256: str
    n_bytes: int


def split_of(package: str) -> str:
    """The split of a top-level package: `train`, `dev` or `test`."""
    if package in TEST_PACKAGES:
        return "test"
    return "dev" if package in DEV_PACKAGES else "train"


def read_document(file: StdlibFile, split: str | None = None) -> SourceModule:
    """The module as a document. Every source file of the standard library is UTF-8."""
    content = file.path.read_bytes()
    text = content.decode("utf-8")
    digest = hashlib.sha256(content).hexdigest()
    return SourceModule(file.name, split or split_of(file.package), text, digest, len(content))


def read_documents(splits: Iterable[str] = SPLITS) -> dict[str, list[SourceModule]]:
    """The running Python's modules by split, each split sorted by module name."""
    documents: dict[str, list[SourceModule]] = {split: [] for split in splits}
    for file in stdlib_files():
        split = split_of(file.package)
        if split in documents:
            documents[split].append(read_document(file, split))
    return documents


def data_record(documents: dict[str, list[SourceModule]]) -> dict:
    """The content of `data.json`: the Python version and, for each split, module name -> SHA-256 of its bytes."""
    record: dict = {"python_version": platform.python_version()}
    for split, members in documents.items():
        record[split] = {document.name: document.sha256 for document in members}
    return record


@dataclass(frozen=True)
class PinnedDocuments:
    """The pinned modules in the running Python, and how its files differ from the pinned ones.

    `documents` holds every pinned module that is present, in the pinned order. `changed` names the modules with other
    bytes, `missing` the absent ones, each as `split/module`.
    """

    python_version: str
    documents: dict[str, list[SourceModule]]
    changed: tuple[str, ...]
    missing: tuple[str, ...]

    def difference(self) -> str | None:
        """A sentence on how the running Python differs from the pinned one, or None if the files are equal."""
        if not self.changed and not self.missing:
            return None
        n_pinned = sum(len(members) for members in self.documents.values()) + len(self.missing)
        return (
            f"the model was made from Python {self.python_version}, this is Python "
            f"{platform.python_version()}: of {n_pinned} pinned modules {len(self.changed)} have other bytes "
            f"and {len(self.missing)} are absent here; what is present is used, so the numbers are not those "
            f"of the model card (run under Python {self.python_version} to get them)"
        )


def read_pinned(data_json: Path) -> PinnedDocuments:
    """Find the modules of `data.json` in the running Python, and compare their bytes."""
    if not data_json.is_file():
        raise FileNotFoundError(f"{data_json} does not exist; python -m pipelines.models.builtin.train makes it")
    record = json.loads(data_json.read_text(encoding="utf-8"))
    present = {file.name: file for file in stdlib_files()}
    documents: dict[str, list[SourceModule]] = {split: [] for split in SPLITS}
    changed, missing = [], []
    for split in SPLITS:
        for name, sha256 in record[split].items():
            if name not in present:
                missing.append(f"{split}/{name}")
                continue
            document = read_document(present[name], split)
            documents[split].append(document)
            if document.sha256 != sha256:
                changed.append(f"{split}/{name}")
    return PinnedDocuments(record["python_version"], documents, tuple(changed), tuple(missing))


def encode_documents(tokenizer: Tokenizer, documents: list[SourceModule]) -> list[np.ndarray]:
    """Token ids of each document, int64 (n_tokens,), beginning with `<|endoftext|>`."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [np.array([end_of_text, *encoding.ids], dtype=np.int64) for encoding in encodings]
