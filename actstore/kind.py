"""What lies at a place: the kind of thing, by the records that it holds, whatever wrote them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore import paths
from actstore.errors import ActstoreError, NotAStore
from actstore.open_place import open_place
from actstore.place import Place

SEAL = "seal.json"
"""The list of a finished folder's objects, which lies in it."""
MOST_BYTES = 1 << 26
"""Bytes of the longest record that is looked into."""
FORMAT = re.compile(r"actstore-([a-z][a-z-]{0,31})\Z")
RECORDS = (
    "run.json",
    "analysis.json",
    "structure.json",
    "concepts.json",
    "effects.json",
    "plan.json",
    "sweep.json",
    "evaluation.json",
    "baselines.json",
    "compare.json",
    "superposition.json",
    "demo.json",
)
"""The records by which things are known that have no manifest; each says its format, `actstore-KIND`."""
UNFINISHED = {
    "training.safetensors": "holds a training that is not finished (continue it with `train --resume`)",
    "sae.safetensors": "holds the weights of a run whose record (run.json) is missing",
    "commits": "holds a store whose manifest is missing",
}
"""What lies there before the record does, and what it means."""
WORDS = {"activations": "a store of activations", "codes": "a code store", "seal": "results"}
"""The kinds of which the name alone does not say enough."""


@dataclass(frozen=True)
class Found:
    """What lies at a place: its kind, empty for nothing that actstore wrote, and the end of a sentence that says so."""

    kind: str
    words: str


def found(url: str | Path | Place) -> Found:
    """What lies there. Records are read only as far as to know their kind: nothing is checked."""
    place = open_place(url)
    entries = place.entries()
    if not entries:
        is_there = isinstance(getattr(place, "path", None), Path) and place.path.exists()  # type: ignore[attr-defined]
        return Found("", "is an empty folder" if is_there else "nothing is there")
    if entries == {"."}:
        return Found("", "is a file")
    first = [name for name in (paths.MANIFEST, SEAL) if name in entries]
    for name in [*first, *(name for name in RECORDS if name in entries)]:
        value = _object(place, name)
        kind = value.get("kind") if name in first else None
        if name == paths.MANIFEST:
            kind = _kind_of_store(value)
        elif not isinstance(kind, str) or not FORMAT.match(f"actstore-{kind}"):
            match = FORMAT.match(str(value.get("format", "")))
            kind = match[1] if match else ""
        if kind:
            return Found(kind, f"holds {kind_words(kind)}")
    for name, words in UNFINISHED.items():
        if name in entries:
            return Found("", words)
    return Found("", "is a folder with nothing of actstore's directly in it")


def not_a(url: str | Path | Place, wanted: str, remedy: str) -> NotAStore:
    """The error of a place that does not hold what was wanted: it names what lies there instead."""
    words = found(url).words
    named = f"{words}, " if words.startswith("holds ") or words == "is a file" else ""
    return NotAStore(f"{url}: {named}not {wanted}; {remedy}")


def kind_words(kind: str) -> str:
    """
    >>> kind_words("run"), kind_words("analysis"), kind_words("effects"), kind_words("codes")
    ('a run', 'an analysis', 'effects', 'a code store')
    """
    plural = kind.endswith("s") and not kind.endswith("is")
    article = "" if plural else "an " if kind[:1] in "aeiou" else "a "
    return WORDS.get(kind, f"{article}{kind.replace('-', ' ')}")


def _kind_of_store(manifest: dict[str, Any]) -> str:
    """Empty for the manifest of something else; one that cannot be read is taken for a store's."""
    if manifest and not str(manifest.get("format", "")).startswith("actstore"):
        return ""
    identity = manifest.get("identity")
    return "codes" if isinstance(identity, dict) and identity.get("kind") == "codes" else "activations"


def _object(place: Place, name: str) -> dict[str, Any]:
    try:
        if (place.n_bytes(name) or 0) > MOST_BYTES:
            return {}
        value = json.loads(place.read(name))
    except (OSError, ValueError, RecursionError, ActstoreError):
        return {}
    return value if isinstance(value, dict) else {}
