"""The table of concepts: a record a concept, the lines a terminal shows, a Parquet file, and a paragraph in plain words."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from pipelines.concepts.rules import RuleScores
from pipelines.concepts.scored_units import ScoredUnits
from pipelines.concepts.unions import SHOWN_K, Union
from pipelines.shared.parquet import parquet_bytes

MIN_ROWS = 20
"""A concept needs as many rows on each half."""
GOOD_F1 = 0.7


def concept_record(label: str, scores: RuleScores, rule: int, union: Union) -> dict[str, Any]:
    """What features make of a concept. Without figures where it has too few rows, or where no feature follows it."""
    n_chosen, n_scored = int(scores.holds[0, rule]), int(scores.holds[1, rule])
    record: dict[str, Any] = {"label": label, "rows": n_chosen + n_scored, "rows_scored": n_scored, "beside": {}}
    if min(n_chosen, n_scored) < MIN_ROWS or not union.units:
        return (
            record
            | dict.fromkeys(("feature", "threshold", "precision", "recall", "f1", "f1_chosen", "f1_2", "f1_5"))
            | {
                "main_features": [],
                "union": [],
            }
        )
    return record | {
        "feature": union.units[0],
        "threshold": union.thresholds[0],
        "precision": union.precision,
        "recall": union.recall,
        "f1": union.at(1),
        "f1_chosen": union.f1_chosen[0],
        **{f"f1_{k}": union.at(k) for k in SHOWN_K[1:]},
        "main_features": union.units[: union.n_main],
        "union": [
            {"feature": unit, "threshold": threshold, "f1": f1, "f1_chosen": chosen}
            for unit, threshold, f1, chosen in zip(union.units, union.thresholds, union.f1, union.f1_chosen, strict=True)
        ],
    }


def beside_record(scored: ScoredUnits, scores: RuleScores, rule: int, union: Union) -> dict[str, Any] | None:
    """What other units make of the same concept; None where it has too few rows there."""
    if min(int(n) for n in scores.holds[:, rule]) < MIN_ROWS:
        return None
    names = [scored.unit_name(unit) for unit in union.units]
    return {"rows_scored": int(scores.holds[1, rule]), "unit": names[0] if names else None} | {
        f"f1_{k}" if k > 1 else "f1": union.at(k) for k in SHOWN_K
    }


def table_bytes(rows: list[dict[str, Any]]) -> bytes:
    """The records as a Parquet file, a column each; what holds several values is JSON text."""

    def flat(row: dict[str, Any]) -> dict[str, Any]:
        columns = {key: value for key, value in row.items() if key != "beside"}
        for name, own in row.get("beside", {}).items():
            for figure in ("unit", "f1", "f1_2", "f1_5"):
                columns[f"{name}: {figure}"] = (own or {}).get(figure)
        return {key: json.dumps(value) if isinstance(value, list) else value for key, value in columns.items()}

    return parquet_bytes([flat(row) for row in rows])


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The concepts with rows enough."""
    return [row for row in rows if row["f1"] is not None]


def concept_lines(result: dict[str, Any]) -> list[str]:
    """The table of concepts, best first, and the paragraph."""
    rows = measured(result["concepts"])
    others = list(rows[0]["beside"]) if rows else []
    with_probe = bool(rows) and "probe_f1" in rows[0]
    width = max([len(row["label"]) for row in rows] or [7])
    head = f"{'concept':<{width}}{'rows':>9}{'feature':>9}{'prec.':>7}{'recall':>8}{'F1':>6}{'k=2':>6}{'k=5':>6}{'main':>6}"
    head += f"{'probe':>7}{'absorbed':>10}" if with_probe else ""
    lines = [head + "".join(f"{f'[{i}]':>7}" for i in range(1, len(others) + 1))]
    for row in rows:
        line = f"{row['label']:<{width}}{row['rows']:>9,}{row['feature']:>9}{row['precision']:>7.2f}{row['recall']:>8.2f}"
        line += f"{row['f1']:>6.2f}{row['f1_2']:>6.2f}{row['f1_5']:>6.2f}{len(row['main_features']):>6}"
        if with_probe:
            rate = row["absorption_rate"]
            line += f"{row['probe_f1']:>7.2f}{'–' if rate is None else f'{rate:.1%}':>10}"
        for name in others:
            own = row["beside"][name]
            line += f"{'–' if own is None else format(own['f1'], '.2f'):>7}"
        lines.append(line)
    if rows:
        means = [fmean(row[key] for row in rows) for key in ("f1", "f1_2", "f1_5")]
        line = f"{'mean':<{width}}{'':>33}" + "".join(f"{mean:>6.2f}" for mean in means) + f"{'':>6}"
        line += f"{fmean(row['probe_f1'] for row in rows):>7.2f}{'':>10}" if with_probe else ""
        lines.append(line + "".join(f"{_mean_beside(rows, name, 'f1'):>7.2f}" for name in others))
    few = len(result["concepts"]) - len(rows)
    return [
        *lines,
        *(f"[{i}] F1 of the best of: {name}" for i, name in enumerate(others, start=1)),
        *([f"{few} labels have fewer than {MIN_ROWS} rows on one half, or no feature, and are left out."] if few else []),
        *(
            [f"{result['documents_left_out']:,} labelled documents are not in the store."]
            if result["documents_left_out"]
            else []
        ),
        "",
        result["findings"],
        "",
        f"saved: {result['out']}",
    ]


def findings_text(rows: list[dict[str, Any]]) -> str:
    """What the table says, in a paragraph."""
    rows = measured(rows)
    if not rows:
        return "No label has rows enough on both halves of the documents to say anything of it."
    good = [row for row in rows if row["f1"] >= GOOD_F1]
    best = max(rows, key=lambda row: row["f1"])
    split = [row for row in rows if len(row["main_features"]) > 1]
    said = [
        f"Of {len(rows)} concepts {len(good)} have a feature with F1 of at least {GOOD_F1} on the documents it was not "
        f"chosen on, the best {best['label']!r} (feature {best['feature']}, {best['f1']:.2f}); the mean is "
        f"{fmean(row['f1'] for row in rows):.2f} with one feature, {fmean(row['f1_2'] for row in rows):.2f} with two, "
        f"{fmean(row['f1_5'] for row in rows):.2f} with up to five.",
        f"{len(split)} are split: another feature raises F1 by more than 0.03.",
    ]
    if split:
        most = max(split, key=lambda row: row["union"][len(row["main_features"]) - 1]["f1"] - row["f1"])
        together = most["union"][len(most["main_features"]) - 1]["f1"]
        said.append(
            f"The clearest is {most['label']!r}: {most['f1']:.2f} with one, {together:.2f} with its "
            f"{len(most['main_features'])} main features {', '.join(map(str, most['main_features']))}."
        )
    if "probe_f1" in rows[0]:
        said.append(f"A linear probe of the rows has a mean F1 of {fmean(row['probe_f1'] for row in rows):.2f}.")
        known = [row for row in rows if row["absorption_rate"] is not None]
        if known:
            most = max(known, key=lambda row: row["absorption_rate"])
            said.append(
                f"Absorption could be measured for {len(known)} concepts, whose main features have F1 of at least 0.5: in "
                f"{fmean(row['absorption_rate'] for row in known):.1%} of the rows in which the probe sees the concept "
                f"(mean) all main features are silent and one other feature carries it, at most "
                f"{most['absorption_rate']:.1%} ({most['label']!r}{_absorbers(most)})."
            )
    said += [
        f"The best of {name} has a mean F1 of {_mean_beside(rows, name, 'f1'):.2f} alone and "
        f"{_mean_beside(rows, name, 'f1_5'):.2f} with up to five, and F1 of at least {GOOD_F1} for "
        f"{sum((row['beside'][name] or {'f1': 0})['f1'] >= GOOD_F1 for row in rows)} concepts."
        for name in rows[0]["beside"]
    ]
    return " ".join(said)


def _absorbers(row: dict[str, Any]) -> str:
    first = row["absorbers"][:1]
    return f", by feature {first[0]['feature']} in {first[0]['rows']:,} of {row['absorbed']:,} rows" if first else ""


def _mean_beside(rows: list[dict[str, Any]], name: str, figure: str) -> float:
    return fmean([row["beside"][name][figure] for row in rows if row["beside"][name] is not None] or [0.0])
