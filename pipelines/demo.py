"""The whole chain on the built-in GPT-2 and the Python sources on this machine: collect, train, evaluate, encode,
analyze, find rules, report. Each step is the stage that a user would call by a command.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore.errors import InputError, OutputExists
from actstore.files import json_bytes, publish_json
from actstore.folder import Folder
from actstore.reader import ActivationStore
from actstore.sealed_folder import add_object, is_sealed, open_sealed, seal_folder
from pipelines.analysis.reader import Analysis
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.codes.code_store import CodeStore
from pipelines.codes.stage import EncodeConfig, encode
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.concepts.stage import Finding, find_rules, findings_json
from pipelines.evaluate.baselines import random_weights_model
from pipelines.evaluate.stage import EvaluateConfig, evaluate
from pipelines.report.stage import ReportConfig, report
from pipelines.sae.checkpoint import RECORD as RUN_RECORD
from pipelines.sae.checkpoint import load_run
from pipelines.shared.cluster import connect
from pipelines.text.tokenizer_files import store_tokenizer
from pipelines.train.config import TrainConfig
from pipelines.train.stage import train

FEATURES, K, BATCH = 2048, 16, 2048
GOOD_F1 = 0.7
SHOWN_FINDINGS = 20
RESULT = "demo.json"


@dataclass(frozen=True)
class DemoConfig:
    """What `demo` is asked for; the names are the command's options."""

    out: Path
    layer: int = 3
    tokens: int = 1_100_000
    rows: int = 3_000_000
    random_weights: bool = False
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 20_000 or self.rows < BATCH:
            raise InputError(f"tokens {self.tokens}, rows {self.rows}: need at least 20,000 and {BATCH:,}.")


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run every step that has no output yet, below `config.out`; returns the figures and the findings.

    An interrupted demo is continued by running it again. Raises OutputExists when a finished one is there.
    """
    out = config.out
    page = out / "report.html"
    if is_sealed(out):
        raise OutputExists(f"{out}: holds a finished demo (see {page}); choose another --out, or move it away.")
    with Folder(out).lock():
        return _chain(config, page)


def _chain(config: DemoConfig, page: Path) -> dict[str, Any]:
    out, started = config.out, time.monotonic()
    store, run, codes, analysis = (out / name for name in ("store", "run", "codes", "analysis"))
    model = random_weights_model("builtin", out / "model", config.seed) if config.random_weights else "builtin"
    collected = collect(CollectConfig(out=store, model=model, layer=(config.layer,), tokens=config.tokens, seed=config.seed))
    if (run / RUN_RECORD).exists():
        _, made = load_run(run)
        if (made.config["tokens"], made.config["seed"]) != (config.rows, config.seed):
            raise OutputExists(
                f"{run}: was trained on {made.config['tokens']:,} rows with seed {made.config['seed']}, asked were "
                f"{config.rows:,} and {config.seed}; choose another --out, or ask for what is there."
            )
    else:
        train(
            TrainConfig(
                store=store,
                out=run,
                features=FEATURES,
                k=K,
                tokens=config.rows,
                batch=BATCH,
                seed=config.seed,
            )
        )
    figures = evaluate(EvaluateConfig(run=run, store=store))
    with connect(None, config.workers) as client:
        encode(EncodeConfig(store=store, run=run, out=codes), client)
        if not is_sealed(analysis):
            analyze(AnalyzeConfig(codes=codes, out=analysis), client)
        opened = CodeStore(codes)
        codec = store_tokenizer(opened)
        findings = find_rules(opened, codec, client)
    add_object(Folder(analysis), "findings.json", json_bytes(findings_json(good_findings(findings))))
    if not page.exists():
        report(ReportConfig(analysis=analysis, out=page))
    record = Analysis(analysis).record
    result = {
        "out": str(out),
        "page": str(page),
        "model": "random weights" if config.random_weights else "builtin",
        "layer": config.layer,
        "tokens": collected["tokens"],
        "rows": record.n_rows,
        "store_bytes_per_million_tokens": ActivationStore(store).disk_bytes * 1e6 / collected["tokens"],
        "codes_bytes_per_million_tokens": opened.disk_bytes * 1e6 / collected["tokens"],
        "features": FEATURES,
        "k": K,
        "bands": record.bands,
        "evaluation": figures,
        "rules": rule_counts(findings),
        "findings": [asdict(finding) for finding in shown_findings(findings)],
        "seconds": time.monotonic() - started,
    }
    publish_json(out / RESULT, {"format": "actstore-demo", "version": 1, **result})
    seal_folder(Folder(out), "demo", RESULT, [RESULT, page.name])
    return result


def rule_counts(findings: list[Finding]) -> dict[str, int]:
    """How many features follow a rule with F1 of at least 0.7, and how many different rules those are, by kind."""
    good = good_findings(findings)
    kinds = {kind: len({f.rule for f in good if f.kind == kind}) for kind in ("place", "after", "token")}
    return {"features": len(good), "rules": sum(kinds.values()), **{f"rules_{kind}": n for kind, n in kinds.items()}}


def good_findings(findings: list[Finding]) -> list[Finding]:
    """Those with F1 of at least 0.7: rules of place by F1 first, then of the token before, then the commonest tokens."""
    order = {"place": 0, "after": 1, "token": 2}
    good = [finding for finding in findings if finding.f1 >= GOOD_F1]
    return sorted(good, key=lambda f: (order[f.kind], -f.firings if f.kind == "token" else -f.f1, f.feature))


def shown_findings(findings: list[Finding]) -> list[Finding]:
    """The best feature of each rule, in the same order; the first twenty."""
    best: dict[str, Finding] = {}
    for finding in findings:
        best.setdefault(finding.rule, finding)
    return [finding for finding in good_findings(findings) if best[finding.rule] is finding][:SHOWN_FINDINGS]


def demo_lines(result: dict[str, Any]) -> list[str]:
    """The short table the demo ends with."""
    figures, rules = result["evaluation"], result["rules"]
    pca = f"{figures['pca_components']}-component PCA: {figures['pca_fve']:.1%}"
    facts = {
        "variance explained, held out": f"{figures['fve']:.1%} ({pca})",
        "loss with the reconstruction": f"{figures['ce_sae']:.3f} nat ({figures['delta_ce']:+.3f} over the clean model's)",
        "silent features": f"{figures['silent_share']:.1%} over the last {figures['silent_window_rows']:,} training rows",
        "firing frequency": ", ".join(f"{name} {n:,}" for name, n in result["bands"].items()),
        "features that follow a rule": f"{rules['features']:,} (F1 >= {GOOD_F1}), {rules['rules']} different rules",
        "disk per million tokens": f"store {result['store_bytes_per_million_tokens'] / 1e6:,.0f} MB, "
        f"codes {result['codes_bytes_per_million_tokens'] / 1e6:,.0f} MB",
    }
    width = max([len(finding["rule"]) for finding in result["findings"]] or [4])
    return [
        "",
        f"layer {result['layer']}, {result['model']}: {result['rows']:,} rows, {result['features']:,} features, {K} a row",
        *(f"  {name:<29} {fact}" for name, fact in facts.items()),
        "",
        f"{'feature':>8}  {'fires on':<{width}}  precision  recall    F1   (on documents the rule was not chosen on)",
        *(
            f"{f['feature']:>8}  {f['rule']:<{width}}  {f['precision']:>9.2f}  {f['recall']:>6.2f}  {f['f1']:.2f}"
            for f in result["findings"]
        ),
        "",
        f"took {result['seconds']:.0f} s; look at {result['page']}",
    ]


def read_demo(out: str | Path) -> dict[str, Any]:
    """The result of a finished demo."""
    if not is_sealed(out):
        raise InputError(f"{out}: holds no finished demo; run `demo --out {out}` first.")
    result: dict[str, Any] = open_sealed(out, "demo", "demo").record()
    return result
