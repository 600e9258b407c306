"""In: an analysis, its code store. Out: pairs, communities and implications of features beyond a null.

They are chosen on one half of the documents and tested on the other.

The null is drawn in Dask tasks (docs/STRUCTURE.md says how); choosing takes seconds and happens here. Neither the language
model nor the activations are needed; a run adds what its decoder directions say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import IdentityMismatch, InputError
from actstore.files import json_bytes, require_free_space
from actstore.place import Place
from actstore.sealed_folder import require_unfinished, results_folder, seal_folder
from pipelines.analysis.reader import PAIRS, STRUCTURE, Analysis
from pipelines.codes.code_store import CodeStore
from pipelines.shared.cluster import connect
from pipelines.shared.parquet import parquet_bytes
from pipelines.structure import choose, facts
from pipelines.structure.naming import Naming
from pipelines.structure.null import Pairs, candidates
from pipelines.structure.null_rounds import MIN_EXPECTATION, Q, judge_draws, observe
from pipelines.structure.page import findings_page
from pipelines.structure.sample import Sample, sample_halves
from pipelines.text.tokenizer_files import store_tokenizer

STRUCTURE_VERSION = 1
RECORD, PAGE, COMMUNITIES = "structure.json", "findings.md", "communities.parquet"
FILES = (RECORD, PAGE, COMMUNITIES, PAIRS)
NULL_DRAWS = 20
"""Further draws, each judged as if it were observed."""
MIN_DRAWS = 20
MAX_ROWS = 1 << 24
"""A draw packs the number of a block, of which there may be as many as rows, into 24 bits."""


@dataclass(frozen=True)
class StructureConfig:
    """What `structure` is asked for; the names are the command's options."""

    analysis: str | Path
    codes: str | None = None
    run: Path | None = None
    out: Path | None = None
    draws: int = 100
    rows: int = 200_000
    block_rows: int = 1024
    min_lift: float = 2.0
    seed: int = 0
    workers: int = 2
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.draws < MIN_DRAWS:
            raise InputError(f"draws {self.draws}: a null needs at least {MIN_DRAWS}; 100 stand behind a claim.")
        if not 1 <= self.rows <= MAX_ROWS or self.block_rows < 2:
            raise InputError(
                f"rows {self.rows:,}, block_rows {self.block_rows}: need 1 to {MAX_ROWS:,} rows, in blocks of at least 2."
            )
        if not self.min_lift > 1:
            raise InputError(f"min_lift {self.min_lift}: a pair fires together more often than in the null above 1.")

    @property
    def folder(self) -> Path:
        """The folder of the result, by default inside the analysis."""
        if self.out is not None:
            return self.out
        if "://" in str(self.analysis):
            raise InputError(f"{self.analysis}: an analysis in a bucket; say with --out where the result shall go.")
        return Path(self.analysis) / STRUCTURE


def structure(config: StructureConfig, client: Any = None) -> dict[str, Any]:
    """Seek structure and publish it; returns what `structure.json` holds.

    `client` is a Dask client to use instead of the one the configuration asks for. Raises NotAStore, IdentityMismatch,
    InputError, OutputExists, LockedStore, NoSpace; nothing is published then.
    """
    require_unfinished(config.folder, FILES)
    analysis = Analysis(config.analysis)
    codes = CodeStore(analysis.record.codes if config.codes is None else config.codes)
    if codes.store_id != analysis.record.codes_id:
        raise IdentityMismatch(
            f"{codes.url}: holds codes {codes.store_id}, {config.analysis} was made from {analysis.record.codes_id}; "
            "name the right ones with --codes."
        )
    directions = None if config.run is None else _directions(config.run, analysis)
    require_free_space(config.folder, 2 * facts.MAX_PAIRS * 300, "the structure")
    with results_folder(config.folder, FILES) as place:
        if client is not None:
            return _structure(config, analysis, codes, directions, client, place)
        with connect(config.scheduler, config.workers) as own_client:
            return _structure(config, analysis, codes, directions, own_client, place)


def _structure(
    config: StructureConfig,
    analysis: Analysis,
    codes: CodeStore,
    directions: NDArray[np.float32] | None,
    client: Any,
    place: Place,
) -> dict[str, Any]:
    samples = sample_halves(codes, config.rows, config.block_rows, config.seed, client)
    naming = Naming(analysis, codes, store_tokenizer(codes), samples[1])
    sought = seek(client, samples, config.draws, config.min_lift, config.seed, directions, naming)
    tables: dict[str, dict[str, NDArray]] = {}
    of_pairs, tables[PAIRS] = facts.pairs_facts(sought)
    of_communities, tables[COMMUNITIES] = facts.communities_facts(sought)
    record = {
        "format": "actstore-structure",
        "version": STRUCTURE_VERSION,
        **{name: getattr(analysis.record, name) for name in ("codes_id", "snapshot", "run_id", "site", "corpus", "model")},
        "settings": {
            **{name: getattr(config, name) for name in ("draws", "rows", "block_rows", "min_lift", "seed")},
            "q": Q,
            "min_expectation": MIN_EXPECTATION,
            "null_draws_judged": NULL_DRAWS,
            "run": None if config.run is None else str(config.run),
        },
        "sample": [facts.sample_facts(sample) for sample in samples],
        "pairs": of_pairs,
        "communities": of_communities,
        "implications": facts.implications_facts(sought),
        "duplicates": facts.duplicates_facts(sought),
        "hubs": facts.hubs_facts(sought),
        "cosine": facts.cosine_facts(sought),
    }
    _publish(place, record, tables)
    return record


def seek(
    client: Any,
    samples: tuple[Sample, Sample],
    draws: int,
    min_lift: float,
    seed: int,
    directions: NDArray[np.float32] | None,
    naming: Naming,
) -> facts.Sought:
    """Draw, judge and choose on the first sample; then draw and judge on the second. `seed` is that of the draws.

    Raises InputError where no pair of features could be tested.
    """
    pairs = candidates(samples[0].table, 0.8 * MIN_EXPECTATION)
    if not len(pairs):
        raise InputError(
            f"codes: in {samples[0].table.n_rows:,} rows no two features are expected together {MIN_EXPECTATION:g} times; "
            "ask for more --rows, or encode more text."
        )
    cosines = None if directions is None else _cosines(directions, pairs)
    levels = choose.ladder(min_lift)
    first = observe(client, "half 1", samples[0].table, pairs, (seed, 0), draws, np.full((1, len(pairs)), -1))
    further = range(draws, draws + NULL_DRAWS)
    null_draws = judge_draws(client, first, pairs, (seed, 0), further, levels, cosines)
    communities = [choose.find_communities(first, pairs, level, seed) for level in levels]
    groups = choose.number_on([choose.pair_groups(own, pairs) for own in communities])
    second = observe(client, "half 2", samples[1].table, pairs, (seed, 1), draws, groups)
    return facts.Sought(min_lift, seed, pairs, first, second, samples[1], null_draws, communities, groups, cosines, naming)


def _directions(run: Path, analysis: Analysis) -> NDArray[np.float32]:
    """(F, d) unit decoder directions. Raises IdentityMismatch for another run than the analysis is of."""
    from pipelines.sae.checkpoint import load_run

    sae, record = load_run(run)
    if record.run_id != analysis.record.run_id:
        raise IdentityMismatch(
            f"{run}: is run {record.run_id}, {analysis.place} was made from {analysis.record.run_id}; pass that one."
        )
    rows = sae.W_dec.numpy().astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _cosines(directions: NDArray[np.float32], pairs: Pairs, step: int = 1 << 16) -> NDArray[np.float32]:
    """(P,) cosine of the decoder directions of each pair."""
    left, right = pairs.ids
    cosines = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), step):
        part = slice(start, start + step)
        cosines[part] = np.einsum("pd,pd->p", directions[left[part]], directions[right[part]])
    return cosines


def _publish(place: Place, record: dict[str, Any], tables: dict[str, dict[str, NDArray]]) -> None:
    for name, columns in tables.items():
        place.publish(name, parquet_bytes(columns))
    place.publish(PAGE, findings_page(record).encode())
    place.publish(RECORD, json_bytes(record))
    seal_folder(place, STRUCTURE, RECORD)
