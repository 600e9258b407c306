"""`analysis.json`, the record of an analysis: what was counted, and of which codes. The folder's seal makes it whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from actstore.checked_json import Count, Hex16, Positive, Width, checked, parse_json
from actstore.errors import NotAStore
from actstore.open_place import open_place
from actstore.sealed_folder import SealedFolder, is_sealed, open_sealed

ANALYSIS_VERSION = 3
FORMAT, KIND, RECORD = "actstore-analysis", "analysis", "analysis.json"
EXAMPLE_KINDS = ("top", "strata", "random")
MOST_SLOTS = 1 << 16

Name = Annotated[str, Meta(pattern=r"^[0-9A-Za-z._-]{1,64}\Z")]
"""An id of what the codes were made from; that of a made store may be a word."""
Slots = tuple[Annotated[int, Meta(ge=0, le=MOST_SLOTS)], Annotated[int, Meta(ge=0, le=MOST_SLOTS)]]
"""The places [first, last) of an example array that one kind of examples has."""


@dataclass(frozen=True)
class AnalysisRecord:
    """What `analysis.json` says. `n_vocabulary`, `context`, `n_documents` and `n_parts` are the lengths of `rows/tokens`,
    `positions`, `documents` and `parts`; `store_id`, `run_id`, `site` and `kernel` are the source of the codes."""

    codes_id: Hex16
    snapshot: str
    store_id: Name
    run_id: Name
    site: str
    codes: str
    run: str
    store: str
    model: str
    corpus: str
    n_rows: Count
    n_features: Annotated[int, Meta(ge=1, le=1 << 24)]
    k: Positive
    n_vocabulary: Width
    context: Count
    n_documents: Count
    n_parts: Count
    bands: dict[str, Count]
    focus: Annotated[int, Meta(ge=0, le=MOST_SLOTS)]
    example_width: Annotated[int, Meta(ge=1, le=1 << 24)]
    example_slots: dict[str, Slots]
    quantiles: list[float]
    seed: int
    bos_token_id: Count
    separator_token_id: Count
    within: str
    min_together: Count
    pairs: Count
    pairs_kept: Count
    kernel: str | None = None

    def __post_init__(self) -> None:
        bounds = [self.example_slots.get(kind, (-1, -1)) for kind in EXAMPLE_KINDS]
        ends = [0, *(last for _, last in bounds)]
        if set(self.example_slots) != set(EXAMPLE_KINDS) or any(
            first != end or last < first for (first, last), end in zip(bounds, ends, strict=False)
        ):
            raise ValueError(f"example_slots {self.example_slots}: not {', '.join(EXAMPLE_KINDS)}, one after another")
        if self.focus >= self.example_width:
            raise ValueError(f"focus {self.focus}: beyond the {self.example_width} tokens of an example")
        if sum(self.bands.values()) != self.n_features:
            raise ValueError(f"bands: count {sum(self.bands.values())} features of {self.n_features}")

    @property
    def n_slots(self) -> int:
        """Examples that are kept of a feature, at most."""
        return self.example_slots[EXAMPLE_KINDS[-1]][1]

    def value(self) -> dict[str, Any]:
        """What the file holds."""
        return {"format": FORMAT, "version": ANALYSIS_VERSION, **asdict(self)}


def open_analysis(path: str | Path) -> tuple[SealedFolder, AnalysisRecord]:
    """A finished analysis and its record.

    Raises NotAStore when `path` holds none, or one of another format version; IncompleteStore for one that is not
    finished, DamagedStore for one that differs from its seal.
    """
    place = open_place(path)
    if not is_sealed(place) and place.exists(RECORD):
        _require_version(parse_json(place.read(RECORD), f"{path}/{RECORD}"), path)  # a version before 3 has no seal
    opened = open_sealed(place, KIND, "analyze")
    value, where = opened.record(), f"{path}/{RECORD}"
    _require_version(value, path)
    return opened, checked({name: value[name] for name in value if name not in ("format", "version")}, AnalysisRecord, where)


def read_analysis_record(path: str | Path) -> AnalysisRecord:
    """The record of a finished analysis. Raises as `open_analysis` does."""
    return open_analysis(path)[1]


def _require_version(value: Any, path: str | Path) -> None:
    version = value.get("version") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if version != ANALYSIS_VERSION:
        codes = value.get("codes") if isinstance(value, dict) else None
        raise NotAStore(
            f"{path}: an analysis of format version {version}, this actstore reads {ANALYSIS_VERSION}; its codes "
            f"are still good: `actstore analyze {codes if isinstance(codes, str) else 'CODES'} --out ANOTHER`."
        )
