"""In: two runs or more. Out: which features they share, by decoder direction and by what they fire on.

Decoder: each feature's best cosine with a feature of the other run, and a one-to-one matching. Co-activation: the same rows,
read from stores or code stores of the same text, encoded by each; the correlation of two features' activations over them
(and the Jaccard index of their firings). Beside both stands what chance gives: random directions, and the same codes
with their rows shuffled. With three runs or more, a feature's stability is its mean best cosine over the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore.errors import InputError
from actstore.files import json_bytes
from actstore.sealed_folder import results_folder, seal_folder
from pipelines.compare.coactivation import best_correlations, correlations
from pipelines.compare.same_rows import Source, code_source, encoded_source, shared_codes
from pipelines.compare.table import CLOSE
from pipelines.metrics.directions import MOST_MATCHED, best_cosines, match_one_to_one, random_directions, unit_rows
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, load_run
from pipelines.shared.parquet import parquet_bytes

SUMMARY, TABLE = FILES = "compare.json", "features.parquet"


@dataclass(frozen=True)
class CompareConfig:
    """What `compare` is asked for; the names are the command's options."""

    runs: tuple[Path, ...]
    store: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    out: Path | None = None
    rows: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise InputError(f"runs: {len(self.runs)} given; pass at least 2 to compare.")
        if self.store and self.codes:
            raise InputError("store, codes: both given; pass --store for rows to encode, or --codes that are there.")
        for name, given, allowed in (
            ("store", self.store, (0, 1, len(self.runs))),
            ("codes", self.codes, (0, len(self.runs))),
        ):
            if len(given) not in allowed:
                one = "one for all, or " if name == "store" else ""
                raise InputError(
                    f"{name}: {len(given)} given for {len(self.runs)} runs; pass {one}one for each, in their order."
                )
        if self.rows < 1:
            raise InputError(f"rows {self.rows}: need at least 1.")


@dataclass
class Compared:
    """A run, its decoder directions (F, d), and, where rows were read, its codes of them (n, F)."""

    name: str
    record: RunRecord
    directions: NDArray[np.float32]
    codes: sp.csr_array | None = None
    fires: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def live(self) -> NDArray[np.int64]:
        """Features that fire in the rows; all, where none were read."""
        return np.arange(len(self.directions)) if self.codes is None else np.flatnonzero(self.fires)

    def weights(self) -> NDArray[np.float64]:
        """(live,) share of all firings; equal ones where no rows were read."""
        fires = np.ones(len(self.directions)) if self.codes is None else self.fires.astype(np.float64)
        return np.asarray(fires[self.live] / max(fires[self.live].sum(), 1))


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare every pair of runs, and publish the result where `out` is given.

    Raises OutputExists, LockedStore, what loading runs and stores raises, and InputError when nothing can be compared by.
    """
    if config.out is None:
        return {"out": None, **_compared(config)[0]}
    with results_folder(config.out, FILES) as place:
        result, features = _compared(config)
        place.publish(TABLE, parquet_bytes(features))
        place.publish(SUMMARY, json_bytes({"format": "actstore-compare", "version": 1, **result}))
        seal_folder(place, "compare", SUMMARY)
    return {"out": str(config.out), **result}


def _compared(config: CompareConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, a row for each feature of each run)."""
    loaded = [load_run(path) for path in config.runs]
    runs = [
        Compared(name, record, unit_rows(sae.W_dec.numpy()))
        for name, (sae, record) in zip(_names(config), loaded, strict=True)
    ]
    n_rows = 0
    if sources := _sources(config, loaded):
        for run, codes in zip(runs, shared_codes(sources, config.rows), strict=True):
            run.codes, run.fires = codes, np.diff(codes.tocsc().indptr).astype(np.int64)
        n_rows = runs[0].codes.shape[0] if runs[0].codes is not None else 0
    if not sources and len({run.record.d_model for run in runs}) > 1:
        widths = ", ".join(f"{run.name} {run.record.d_model}" for run in runs)
        raise InputError(
            f"d_model: {widths}: directions of different widths have no cosine; pass --store or --codes, to compare by rows."
        )
    pairs = [compare_pair(one, other, config.seed) for one, other in combinations(runs, 2)]
    features = _feature_table(runs)
    figures = {
        "runs": [_run_record(run, config, i) for i, run in enumerate(runs)],
        "rows": n_rows,
        "pairs": pairs,
        "stability": _stability(runs, features),
    }
    return figures, features


def compare_pair(one: Compared, other: Compared, seed: int) -> dict[str, Any]:
    """What two runs share, by decoder and, where rows were read, by co-activation. Figures are given for `one`'s live
    features with partners in `other`, and for `other`'s with partners in `one`."""
    figures: dict[str, Any] = {"one": one.name, "other": other.name, "live": [len(one.live), len(other.live)]}
    left_out = []
    if one.record.d_model == other.record.d_model:
        figures["decoder"] = _decoder(one, other, seed)
    else:
        left_out.append(
            f"d_model {one.record.d_model} and {other.record.d_model}: directions of different widths have no cosine"
        )
    if one.codes is not None and other.codes is not None:
        figures["coactivation"] = _coactivation(one, other, seed)
    return figures | ({"left_out": left_out} if left_out else {})


def _decoder(one: Compared, other: Compared, seed: int) -> dict[str, Any]:
    a, b = one.directions[one.live], other.directions[other.live]
    chance = random_directions(len(b), one.record.d_model, seed)
    there, back = best_cosines(a, b)[0], best_cosines(b, a)[0]
    return {
        "mean_best": [_mean(there), _mean(back)],
        "random": _mean(best_cosines(a, chance)[0]),
        "shared": [_shares(there, one.weights()), _shares(back, other.weights())],
        "one_to_one": _one_to_one(a, b, lambda x, y: x @ y.T),
    }


def _coactivation(one: Compared, other: Compared, seed: int) -> dict[str, Any]:
    assert one.codes is not None
    assert other.codes is not None
    a, b = one.codes[:, one.live].tocsc(), other.codes[:, other.live].tocsc()
    there, jaccard, _ = best_correlations(a, b)
    back, jaccard_back, _ = best_correlations(b, a)
    shuffled = other.codes[np.random.default_rng(seed).permutation(other.codes.shape[0])][:, other.live].tocsc()
    return {
        "mean_best": [_mean(there), _mean(back)],
        "mean_best_jaccard": [_mean(jaccard), _mean(jaccard_back)],
        "random": _mean(best_correlations(a, shuffled)[0]),
        "shared": [_shares(there, one.weights()), _shares(back, other.weights())],
        "one_to_one": _one_to_one(a, b, lambda x, y: correlations(x, y)[0]),
    }


def _one_to_one(a: Any, b: Any, similarity: Any) -> dict[str, Any]:
    """The one-to-one matching of two sets of features; None where they are too many."""
    sizes = [x.shape[1] if sp.issparse(x) else len(x) for x in (a, b)]
    if max(sizes) > MOST_MATCHED:
        return {"left_out": f"{max(sizes):,} live features, one to one are at most {MOST_MATCHED:,} matched"}
    if not min(sizes):
        return {"left_out": "no live feature"}
    table = similarity(a, b)
    partner = match_one_to_one(table)
    pairs = np.flatnonzero(partner >= 0)
    matched = table[pairs, partner[pairs]]
    return {"pairs": len(pairs), "mean": _mean(matched), **{f"share_{bound}": _mean(matched >= bound) for bound in CLOSE}}


def _shares(best: NDArray[np.float32], weights: NDArray[np.float64]) -> dict[str, float]:
    """The share of features with a partner of at least this similarity, and the share of all firings that these features
    have."""
    shares = {}
    for bound in CLOSE:
        shares[f"features_{bound}"] = _mean(best >= bound)
        shares[f"firings_{bound}"] = float(weights[best >= bound].sum())
    return shares


def _feature_table(runs: list[Compared]) -> list[dict[str, Any]]:
    """A row a feature: how often it fires, its best partner in every other run by either means, and its stability."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        n = len(run.directions)
        columns: dict[str, list[Any]] = {"run": [run.name] * n, "feature": list(range(n))}
        columns["fires"] = [None] * n if run.codes is None else run.fires.tolist()
        cosines = []
        for other in runs:
            if other is run:
                own: list[Any] = [None] * n
                columns |= {f"{kind} {other.name}": own for kind in ("cosine", "partner", "correlation", "coactive partner")}
                continue
            cosine, partner, correlation, coactive = _partners(run, other)
            if cosine is not None:
                cosines.append(cosine)
            for kind, values in (
                ("cosine", cosine),
                ("partner", partner),
                ("correlation", correlation),
                ("coactive partner", coactive),
            ):
                columns[f"{kind} {other.name}"] = [None] * n if values is None else values.tolist()
        is_alive = np.isin(np.arange(n), run.live)
        enough = len(cosines) >= 2 and len(cosines) == len(runs) - 1
        stability = np.mean(cosines, axis=0) if enough else None
        columns["stability"] = [float(stability[i]) if stability is not None and is_alive[i] else None for i in range(n)]
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows


def _partners(run: Compared, other: Compared) -> tuple[Any, Any, Any, Any]:
    """For every feature: the largest cosine with a live feature of the other run, that feature, the largest correlation, and
    its feature.

    The latter two are None for a feature that does not fire in the rows.
    """
    cosine = partner = correlation = coactive = None
    if run.record.d_model == other.record.d_model and len(other.live):
        cosine, which = best_cosines(run.directions, other.directions[other.live])
        partner = other.live[which]
    if run.codes is not None and other.codes is not None and len(other.live):
        found, _, which = best_correlations(run.codes.tocsc(), other.codes[:, other.live].tocsc())
        correlation, coactive = (column.astype(object) for column in (found, other.live[which]))
        for column in (correlation, coactive):
            column[run.fires == 0] = None
    return cosine, partner, correlation, coactive


def _stability(runs: list[Compared], features: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean and quartiles of the live features' stability in each run; None with fewer than three, or other widths."""
    stability = {}
    for run in runs:
        values = [row["stability"] for row in features if row["run"] == run.name and row["stability"] is not None]
        if not values:
            return None
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        stability[run.name] = {"mean": float(np.mean(values)), "q25": low, "median": middle, "q75": high}
    return stability


def _sources(config: CompareConfig, loaded: list[tuple[Sae, RunRecord]]) -> list[Source]:
    if config.codes:
        return [
            code_source(url, record, path) for url, (_, record), path in zip(config.codes, loaded, config.runs, strict=True)
        ]
    if not config.store:
        return []
    stores = config.store * len(loaded) if len(config.store) == 1 else config.store
    return [
        encoded_source(url, sae, record, path) for url, (sae, record), path in zip(stores, loaded, config.runs, strict=True)
    ]


def _names(config: CompareConfig) -> list[str]:
    """A name for each run: its folder's name, its path where two folders have the same name, with a number where a run is
    given twice."""
    short = [path.absolute().name for path in config.runs]
    names = short if len(set(short)) == len(short) else [str(path) for path in config.runs]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _run_record(run: Compared, config: CompareConfig, i: int) -> dict[str, Any]:
    record = run.record
    return {
        "name": run.name,
        "path": str(config.runs[i]),
        "run_id": record.run_id,
        "architecture": record.architecture,
        "site": record.site,
        "d_model": record.d_model,
        "n_features": record.n_features,
        "k": record.k,
        "live": len(run.live),
    }


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0
