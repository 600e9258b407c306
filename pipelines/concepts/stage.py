"""In: codes, and labels of their text. Out: how well features follow each labelled concept, and what else does.

For every label the best feature, how many more it takes (splitting), whether others stand in where it is silent
(absorption), and how a linear probe, raw dimensions, neurons or other features do on the same text. And the other way
round, every feature's best rule. Chosen on one half of the documents, scored on the other. docs/CONCEPTS.md
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actstore.errors import IdentityMismatch, InputError, NotAStore
from actstore.files import json_bytes
from actstore.place import Place
from actstore.reader import ActivationStore, Store
from actstore.sealed_folder import require_unfinished, results_folder, seal_folder
from pipelines.codes.code_store import CodeStore
from pipelines.concepts.labels import LabelTable, read_labels
from pipelines.concepts.probing import find_absorption, fit_probes
from pipelines.concepts.rules import Finding, RuleScores
from pipelines.concepts.scored_units import ScoredUnits, choose_thresholds, score_rules
from pipelines.concepts.table import beside_record, concept_record, findings_text, table_bytes
from pipelines.concepts.unions import Union, find_unions
from pipelines.sae.checkpoint import load_run
from pipelines.shared import markdown
from pipelines.shared.cluster import connect, share
from pipelines.text.codec import TextCodec
from pipelines.text.tokenizer_files import store_tokenizer

SUMMARY, TABLE, FEATURES, TEXT = "concepts.json", "concepts.parquet", "features.parquet", "findings.md"
FILES = (SUMMARY, TABLE, FEATURES, TEXT)
MAIN_F1 = 0.5
"""Main features must follow their concept at least so well on the choosing half, for absorption to mean anything."""


@dataclass(frozen=True)
class ConceptsConfig:
    """What `concepts` is asked for; the names are the command's options."""

    codes: str | Path
    labels: str | None = None
    out: Path | None = None
    store: str | None = None
    run: Path | None = None
    beside: tuple[str, ...] = ()
    probe: bool = True
    workers: int = 2
    scheduler: str | None = None

    @property
    def folder(self) -> Path:
        """Where the result goes: beside the codes, unless said otherwise."""
        if self.out is not None:
            return self.out
        if "://" in str(self.codes):
            raise InputError(f"{self.codes}: codes in a bucket; say with --out where the result shall go.")
        codes = Path(self.codes)
        return codes.with_name(codes.name + ".concepts")


def concepts(config: ConceptsConfig, client: Any = None) -> dict[str, Any]:
    """Compute and publish the table of concepts. `client` is a Dask client to use instead of the configuration's.

    Raises OutputExists, LockedStore, what opening stores and labels raises, and IdentityMismatch when store or run are not
    the codes'.
    """
    folder = config.folder
    require_unfinished(folder, FILES)
    codes = CodeStore(config.codes)
    codec = store_tokenizer(codes)
    labels = read_labels(codes, codec, config.labels)
    source = _source(config, codes) if config.probe else None
    others: list[tuple[Store, ScoredUnits]] = []
    if source is not None:
        others.append((source, ScoredUnits.of(source, codes.manifest.source["site"], "raw dimensions")))
    others += [(store, scored) for url in config.beside for store, scored in _scored_at(url)]
    if len({scored.name for _, scored in others}) < len(others):
        raise InputError(f"beside: {', '.join(scored.name for _, scored in others)}: each must be another one.")
    where = connect(config.scheduler, config.workers) if client is None else nullcontext(client)
    with results_folder(folder, FILES) as place, where as connected:
        own = ScoredUnits.of(codes)
        held, scores, thresholds, unions = _follow(own, labels, codec, connected, with_tokens=True)
        rows = [
            concept_record(name, scores, i, union) for i, (name, union) in enumerate(zip(labels.names, unions, strict=True))
        ]
        if source is not None:
            mains = [union.units[: union.n_main] if _is_followed(union) else [] for union in unions]
            for row, probed in zip(rows, _probed(config, own, others[0][1], held, mains, connected), strict=True):
                row.update(probed)
        known = {} if source is None else {(source.url, source.snapshot): labels}
        for store, scored in others:
            text = (store.url, store.snapshot)
            if text not in known:
                known[text] = read_labels(store, store_tokenizer(store), config.labels)
            theirs = known[text]
            _, their_scores, _, their_unions = _follow(scored, theirs, codec, connected)
            number = {name: i for i, name in enumerate(theirs.names)}
            for row in rows:
                i = number.get(row["label"])
                row["beside"][scored.name] = None if i is None else beside_record(scored, their_scores, i, their_unions[i])
        findings = scores.finalize(thresholds, labels.names, codec.token_texts())
        return _published(place, codes, labels, rows, findings)


def find_rules(codes: CodeStore, codec: TextCodec, client: Any, labels: LabelTable | None = None) -> list[Finding]:
    """Every feature's best rule over a code store, by falling F1 on the scoring half; without labels, of Python's."""
    labels = labels or read_labels(codes, codec, None)
    scored = ScoredUnits.of(codes)
    held = _held(client, labels)
    thresholds = choose_thresholds(scored, held, client)
    scores = score_rules(scored, held, thresholds, codec.n_vocabulary, client)
    return list(scores.finalize(thresholds, labels.names, codec.token_texts()))


def findings_json(findings: list[Finding]) -> dict[str, Any]:
    """What `findings.json` beside an analysis holds."""
    return {"findings": [asdict(finding) for finding in findings]}


def _held(client: Any, labels: LabelTable) -> list[Any]:
    """The labels of each segment, for the tasks of its shards."""
    return [share(client, segment) for segment in labels.segments]


def _follow(
    scored: ScoredUnits, labels: LabelTable, codec: TextCodec, client: Any, with_tokens: bool = False
) -> tuple[list[Any], RuleScores, Any, list[Union]]:
    """(labels on the workers, rule scores, thresholds, union of each label) of what is scored."""
    held = _held(client, labels)
    thresholds = choose_thresholds(scored, held, client)
    scores = score_rules(scored, held, thresholds, codec.n_vocabulary if with_tokens else 0, client)
    return held, scores, thresholds, find_unions(scored, held, scores, thresholds, len(labels.names), client)


def _is_followed(union: Union) -> bool:
    return union.n_main > 0 and union.f1_chosen[union.n_main - 1] >= MAIN_F1


def _probed(
    config: ConceptsConfig, codes: ScoredUnits, rows: ScoredUnits, held: list[Any], mains: list[list[int]], client: Any
) -> list[dict[str, Any]]:
    """The probe's F1 and the absorption of each concept."""
    sae, record = load_run(_run_path(config, codes.open()))
    expected = codes.open().manifest.source["run_id"]
    if record.run_id != expected:
        raise IdentityMismatch(f"{config.run}: is run {record.run_id}, the codes are of {expected}; name theirs with --run.")
    fitted = fit_probes(rows, held, client)
    decoder = sae.W_dec.double().cpu().numpy()
    cosines = fitted.probes.cosines(decoder)
    absorption = find_absorption(codes, rows, held, fitted, mains, fitted.probes.along(decoder), client)
    rates, records = absorption.rates(), []
    for i, main in enumerate(mains):
        carriers = absorption.carriers[[i]].tocoo()
        order = np.lexsort((carriers.coords[1], -carriers.data))
        records.append(
            {
                "probe_f1": float(fitted.f1[i]),
                "seen": int(absorption.seen[i]) if main else None,
                "silent": int(absorption.silent[i]) if main else None,
                "absorbed": int(absorption.absorbed[i]) if main else None,
                "absorption_rate": float(rates[i]) if main and absorption.seen[i] else None,
                "absorbers": [
                    {"feature": int(f), "rows": int(n), "cosine": float(cosines[i, f])}
                    for f, n in zip(carriers.coords[1][order], carriers.data[order], strict=True)
                ],
            }
        )
    return records


def _source(config: ConceptsConfig, codes: CodeStore) -> ActivationStore:
    """The store that the codes were made from. Raises InputError when it is not where it was, or where it was said to be."""
    url = config.store or codes.manifest.provenance["store"]
    try:
        return ActivationStore(url, snapshot=codes.manifest.source["snapshot"])
    except NotAStore as error:
        raise InputError(
            f"{url}: the codes were made from this store, which is not there; name it with --store, or pass --no-probe to "
            "leave out the probe, absorption and raw dimensions."
        ) from error


def _run_path(config: ConceptsConfig, codes: Store) -> Path:
    path = config.run or Path(codes.manifest.provenance["run"])
    if not path.exists():
        raise InputError(
            f"{path}: the codes were made with this run, which is not there; name it with --run, or pass --no-probe."
        )
    return path


def _scored_at(url: str) -> list[tuple[Store, ScoredUnits]]:
    """What is to be compared at a place: the features of a code store, or every site of an activation store."""
    store = Store(url)
    if store.manifest.kind == CodeStore.kind:
        return [(store, ScoredUnits.of(CodeStore(url), name=f"features {url}"))]
    opened = ActivationStore(url)
    return [(opened, ScoredUnits.of(opened, site, name=f"{site} of {url}")) for site in opened.sites]


def _published(
    place: Place, codes: CodeStore, labels: LabelTable, rows: list[dict[str, Any]], findings: list[Finding]
) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: (-(row["f1"] or 0.0), row["label"]))
    text = findings_text(rows)
    record = {
        "codes": str(codes.url),
        "store_id": codes.store_id,
        "snapshot": codes.snapshot,
        "source": codes.manifest.source,
        "n_labels": len(labels.names),
        "documents_left_out": labels.left_out,
        "findings": text,
        "concepts": rows,
    }
    place.publish(TABLE, table_bytes(rows))
    place.publish(FEATURES, table_bytes([asdict(finding) for finding in findings]))
    place.publish(TEXT, (markdown.inline(text) + "\n").encode())
    place.publish(SUMMARY, json_bytes({"format": "actstore-concepts", "version": 1, **record}))
    seal_folder(place, "concepts", SUMMARY)
    return {"out": place.url, **record}
