"""Measured effects as a table: means with bootstrap intervals over documents, and the lists that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.files import publish_bytes
from pipelines.analysis.reader import Analysis
from pipelines.causal.engine.drawn_firings import DrawnFirings
from pipelines.shared.parquet import parquet_bytes
from pipelines.shared.visible_text import visible
from pipelines.text.tokens import TextCodec

RECORD, TABLE = "effects.json", "effects.parquet"
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap that an interval lies between."""
ANALYSED = ("density", "band", "peak", "tokens")
"""Columns that are joined from an analysis."""
N_TOKENS = 5
LISTED = 20
MIN_FIRINGS = 20
"""Least measured firings of a feature in a list."""


class Measurement(Protocol):
    """What `effects` measured of a batch of features."""

    kl: NDArray[np.float64]
    loss: NDArray[np.float64]
    shift: NDArray[np.float32]


def feature_table(
    firings: DrawnFirings, features: NDArray[np.int64], effects: Measurement, codec: TextCodec, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each feature: how often it fires, mean KL and rise of the loss with their intervals, tokens.

    `promoted` tokens are those whose logit the feature raises, so that ablating it lowers them most; `suppressed` the
    other way. `weight` is the mean change of the centred logit that the feature brings about.
    """
    bounds = np.searchsorted(firings.feature, np.append(features, features[-1] + 1)).tolist()
    rows = []
    for i, feature in enumerate(features.tolist()):
        mine = slice(bounds[i], bounds[i + 1])
        n = bounds[i + 1] - bounds[i]
        document = firings.segment[mine] << 40 | firings.document[mine]
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, feature], np.uint64)))
        values, weight = np.stack([effects.kl[mine], effects.loss[mine]], axis=1), firings.weight[mine].astype(np.float64)
        mean = weight @ values / weight.sum()
        low, high = document_interval(values, weight, document, resamples, generator)
        brought = -effects.shift[i].astype(np.float64) / firings.weight[mine].sum()
        up, down = np.argsort(-brought, kind="stable")[:N_TOKENS], np.argsort(brought, kind="stable")[:N_TOKENS]
        rows.append(
            {
                "feature": feature,
                "fires": int(firings.total[feature]),
                "frequency": float(firings.total[feature] / firings.rows),
                "measured": int(n),
                "documents": len(np.unique(document)),
                "kl": float(mean[0]),
                "kl_low": float(low[0]),
                "kl_high": float(high[0]),
                "loss": float(mean[1]),
                "loss_low": float(low[1]),
                "loss_high": float(high[1]),
                "value": float(weight @ firings.value[mine] / weight.sum()),
                "promoted": [codec.token_text(t) for t in up.tolist()],
                "promoted_weight": brought[up].tolist(),
                "suppressed": [codec.token_text(t) for t in down.tolist()],
                "suppressed_weight": brought[down].tolist(),
            }
        )
    return rows


def document_interval(
    values: NDArray[np.float64],
    weight: NDArray[np.float64],
    document: NDArray[np.int64],
    resamples: int,
    generator: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile intervals (low, high), (c,) each, of the column means of values (n, c) with weights (n,).

    Whole documents are drawn with replacement, as many as there are: firings of one document are alike. NaN where there is
    only one. Source: Davison and Hinkley 1997, section 3.8.
    """
    _, cluster = np.unique(document, return_inverse=True)
    n = int(cluster.max()) + 1
    if n < 2:
        nothing = np.full(values.shape[1], np.nan)
        return nothing, nothing
    sums = np.zeros((n, values.shape[1] + 1))
    np.add.at(sums, cluster, weight[:, None] * np.column_stack([values, np.ones(len(values))]))
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=resamples) @ sums
    low, high = np.percentile(drawn[:, :-1] / drawn[:, -1:], INTERVAL, axis=0)
    return low, high


def publish_table(path: Path, rows: list[dict[str, Any]], analysis: Analysis | None) -> None:
    """Write a parquet file with a row for each feature, joined to the analysis where there is one."""
    joined = [row if analysis is None else {**row, **_analysed(analysis, row["feature"])} for row in rows]
    publish_bytes(path, parquet_bytes(joined))


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a published table, with what was joined to them. To join them to another analysis: `measured_only`."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def measured_only(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as `publish_table` got them, without the columns of an analysis."""
    return [{name: value for name, value in row.items() if name not in ANALYSED} for row in rows]


def _analysed(analysis: Analysis, feature: int) -> dict[str, Any]:
    return {
        "density": float(analysis.frequency[feature]),
        "band": analysis.band(feature),
        "peak": float(analysis.peak[feature]),
        "tokens": [token.text for token in analysis.top_tokens(feature, 3)],
    }


def summary(rows: list[dict[str, Any]], analysis: Analysis | None = None) -> dict[str, Any]:
    """Medians over the features, and four lists of at most 20.

    `strongest` by mean KL; `weakest`. Frequent but inert: among the quarter that fires most, the interval of the mean KL
    lies below the median feature's mean KL; least KL first. Rare but decisive: among the quarter that fires least, it lies
    above; most KL first. Features with fewer than 20 measured firings, or firings of one document, are in no list.
    """
    sure = [row for row in rows if row["measured"] >= MIN_FIRINGS and row["documents"] > 1]
    by_kl = sorted(sure, key=lambda row: (-row["kl"], row["feature"]))
    facts: dict[str, Any] = {"n_features": len(rows), "n_firings": sum(row["measured"] for row in rows)}
    if sure:
        median = float(np.median([row["kl"] for row in sure]))
        rare, frequent = np.quantile([row["frequency"] for row in sure], (0.25, 0.75)).tolist()
        inert = [row for row in by_kl[::-1] if row["frequency"] >= frequent and row["kl_high"] < median]
        decisive = [row for row in by_kl if row["frequency"] <= rare and row["kl_low"] > median]
        facts |= {"median_kl": median, "median_loss": float(np.median([row["loss"] for row in sure]))}
        facts |= {"rare_below": rare, "frequent_above": frequent, "n_inert": len(inert), "n_decisive": len(decisive)}
    else:
        inert, decisive = [], []
    lists = {"strongest": by_kl, "weakest": by_kl[::-1], "frequent_but_inert": inert, "rare_but_decisive": decisive}
    for name, own in lists.items():
        facts[name] = [row if analysis is None else {**row, **_analysed(analysis, row["feature"])} for row in own[:LISTED]]
    return facts


def effects_lines(record: dict[str, Any], n: int = 10) -> list[str]:
    """The lists as tables."""
    where = "the firing position" if record["measure"] == "firing" else "the firing position and all later ones (mean)"
    lines = [
        f"{record['site']}: {record['n_firings']:,} firings of {record['n_features']:,} features, each ablated alone; "
        f"KL(normal ‖ ablated) in nats at {where}"
    ]
    if "median_kl" not in record:
        return [*lines, f"no feature has {MIN_FIRINGS} measured firings in two documents; raise --firings."]
    lines.append(f"median feature: KL {record['median_kl']:.4f}, loss {record['median_loss']:+.4f}")
    titles = {
        "strongest": "strongest",
        "frequent_but_inert": f"frequent, inert: {record['n_inert']:,} of those over {record['frequent_above']:.2%} of rows",
        "rare_but_decisive": f"rare, decisive: {record['n_decisive']:,} of those under {record['rare_below']:.3%}",
    }
    for name, title in titles.items():
        lines.append(f"{title}")
        lines.append(f"{'feature':>9} {'fires':>8} {'KL':>7} {'95 % interval':>15} {'loss':>8}  promotes")
        for row in record[name][:n]:
            interval = f"{row['kl_low']:.3f} – {row['kl_high']:.3f}"
            tokens = "  ".join(repr(visible(text)) for text in row["promoted"][:4])
            on = "  fires on " + " ".join(repr(visible(t)) for t in row["tokens"][:2]) if "tokens" in row else ""
            lines.append(
                f"{row['feature']:>9} {row['frequency']:>8.3%} {row['kl']:>7.4f} {interval:>15} {row['loss']:>+8.4f}  "
                f"{tokens}{on}"
            )
    return lines
