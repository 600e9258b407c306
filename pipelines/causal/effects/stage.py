"""In: a run, its code store, the model. Out: what ablating each feature does to predictions, over rows where it fires.

At each sampled firing the feature is set to 0 at that row alone, the error term kept, and the prediction made there is
compared with the normal one: KL(normal ‖ ablated) and the rise of the loss at the next token, in nats, and the change of
every token's logit. By default only the prediction at the firing position counts; `measure="later"` takes the mean over
it and every later position of its window.

Features go in batches small enough for their sums over the vocabulary; windows go through the model in blocks, each
once a batch, and what has been measured is published with every block: the same command goes on there. Once the table is
published, the parts that it was made of are removed; the same command then measures nothing, and joins the table anew.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actstore.checked_json import checked, parse_json
from actstore.errors import InputError, OutputExists
from actstore.files import content_hash, json_bytes, publish_json, require_free_space
from actstore.folder import Folder
from actstore.place import Place
from actstore.sealed_folder import SealedFolder, contents, is_sealed, seal_folder, unseal
from pipelines.analysis.reader import open_run_analysis
from pipelines.causal.effects.measure import Measured, measure, measured_bytes
from pipelines.causal.effects.table import (
    MIN_FIRINGS,
    RECORD,
    TABLE,
    feature_table,
    listed_features,
    measured_only,
    read_table,
    summary,
    table_bytes,
)
from pipelines.causal.engine.drawn_firings import DrawnFirings, draw_firings
from pipelines.causal.engine.language_model import Spliced, open_spliced
from pipelines.codes.code_store import CodeStore, open_run_codes
from pipelines.models.forward import unembedding
from pipelines.shared.progress import track
from pipelines.shared.visible_text import say

MEASURES = ("firing", "later")
PLAN, PARTS = "plan.json", "parts"
SUMS_BYTES = 1 << 28
"""Most bytes for a batch of features' sums over the vocabulary."""


@dataclass(frozen=True)
class EffectsConfig:
    """What `effects` is asked for; the names are the command's options.

    `features`: these; else the `top` most frequent; else all that fire. `firings` of each are drawn at most.
    """

    run: Path
    codes: str | Path
    out: Path
    features: tuple[int, ...] = ()
    top: int = 0
    firings: int = 64
    measure: str = "firing"
    resamples: int = 1000
    analysis: str | Path | None = None
    seed: int = 0
    store: str | None = None
    model: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputError(f"measure {self.measure!r}: choose one of {', '.join(MEASURES)}.")
        if self.firings < 1 or self.top < 0 or self.resamples < 1:
            raise InputError(
                f"firings {self.firings}, top {self.top}, resamples {self.resamples}: need at least 1 (top: 0)."
            )
        if self.features and self.top:
            raise InputError(f"features {self.features}, top {self.top}: choose one of the two.")


def effects(config: EffectsConfig) -> dict[str, Any]:
    """Measure, and publish `effects.parquet` (a row for each feature) and `effects.json` in OUT.

    Raises what `open_spliced` raises; IdentityMismatch for codes or an analysis of another run; LockedStore while another
    process writes in OUT; OutputExists when OUT holds something else, or effects of another configuration; NoSpace when the
    disk cannot hold what is measured.
    """
    spliced = open_spliced(config.run, config.store, config.model, config.device)
    codes = open_run_codes(str(config.codes), spliced.record.run_id, str(config.run))
    for feature in config.features:
        spliced.require_feature(feature)
    analysis = None
    if config.analysis is not None:
        run = spliced.record.run_id
        analysis = open_run_analysis(config.analysis, run, "the SAE's run", "pass its analysis.")
    plan = _plan(config, spliced, codes)
    place = Folder(config.out)
    _require_own(place, plan)
    with place.lock():
        _require_own(place, plan)
        if place.exists(RECORD):
            before = _published(place)
            rows, n_rows = measured_only(before[0]), before[1]
        else:
            rows, n_rows = _measured(config, spliced, codes, plan)
        unseal(place)
        place.publish(TABLE, table_bytes(rows, analysis))
        record = {**plan, "rows": n_rows, **summary(rows, analysis)}
        place.publish(RECORD, json_bytes(record))
        shutil.rmtree(config.out / PARTS, ignore_errors=True)
        seal_folder(place, "effects", RECORD, [PLAN, RECORD, TABLE])
    return {"out": str(config.out), **record}


def _published(place: Place) -> tuple[list[dict[str, Any]], int]:
    """The rows of the table that is there, and the number of rows drawn from. Raises DamagedStore when either is damaged;
    without a seal, which a kill took, they are read as they are: each was published whole."""
    read = SealedFolder(place).read if is_sealed(place) else place.read
    record = parse_json(read(RECORD), f"{place}/{RECORD}")
    n_rows = checked(record.get("rows") if isinstance(record, dict) else None, int, f"{place}/{RECORD}: rows")
    return read_table(read(TABLE)), n_rows


def _measured(
    config: EffectsConfig, spliced: Spliced, codes: CodeStore, plan: dict[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """A row for each feature, and the number of rows drawn from; goes on where OUT was left."""
    firings = _draw(config, codes)
    if not listed_features(firings):
        say(
            f"effects: no feature has {MIN_FIRINGS} of its {config.firings} firings at most in two documents, so that no "
            f"list is made, only {TABLE}; for lists, stop, and take another --out and more --firings.",
            err=True,
        )
    features = np.unique(firings.feature)
    n_vocabulary = len(unembedding(spliced.lm.model))
    step = max(1, SUMS_BYTES // (4 * n_vocabulary))
    # a part stays until the next state of it is whole, so that there is room for one more
    needed_bytes = measured_bytes(len(firings), len(features) + min(step, len(features)), n_vocabulary)
    plan_id = _begin(config.out, plan, needed_bytes)
    rows = []
    with track("effects", len(firings), "firings") as progress:
        for number, first in enumerate(range(0, len(features), step)):
            own = features[first : first + step]
            mine = firings.take(np.isin(firings.feature, own))
            path = config.out / PARTS / f"{number:04d}.npz"
            measured = Measured.load(path, plan_id) or Measured.empty(len(mine), len(own), n_vocabulary)
            progress.advance(measured.done)
            for n in measure(spliced, codes, mine, measured, config.measure, partial(measured.save, path, plan_id)):
                progress.advance(n)
            rows += feature_table(mine, own, measured, spliced.lm.codec, config.resamples, config.seed)
    return rows, firings.rows


def _draw(config: EffectsConfig, codes: CodeStore) -> DrawnFirings:
    """The firings that are measured. Raises InputError when no feature asked for fires.

    Features that are named may be drawn from the feature index. The most frequent features are drawn by a scan of all codes,
    since the draw depends on the firings of all features."""
    wanted = np.array(config.features, np.int64) if config.features else None
    firings = draw_firings(codes, wanted, config.firings, config.seed)
    if config.top:
        most = np.argsort(-firings.total, kind="stable")[: config.top]
        firings = firings.take(np.isin(firings.feature, most))
    if not len(firings):
        raise InputError(f"{config.codes}: none of the features asked for fires where a next token follows.")
    return firings


def _plan(config: EffectsConfig, spliced: Spliced, codes: CodeStore) -> dict[str, Any]:
    """What a measurement depends on: another plan needs another OUT."""
    return {
        "format": "actstore-effects",
        "version": 1,
        "run_id": spliced.record.run_id,
        "codes_id": codes.store_id,
        "snapshot": codes.snapshot,
        "site": spliced.record.site,
        "asked_features": list(config.features),
        "top": config.top,
        "firings": config.firings,
        "measure": config.measure,
        "resamples": config.resamples,
        "seed": config.seed,
    }


def _require_own(place: Place, plan: dict[str, Any]) -> None:
    """Raises OutputExists when OUT holds anything but what was begun with the same plan."""
    if place.exists(PLAN):
        before = parse_json(place.read(PLAN), f"{place}/{PLAN}")
        if before != plan:
            names = [name for name in plan if not isinstance(before, dict) or before.get(name) != plan[name]]
            there = before if isinstance(before, dict) else {}
            shown = ", ".join(f"{name} {there.get(name)!r} there, {plan[name]!r} now" for name in names)
            raise OutputExists(f"{place}: holds other effects ({shown}); choose another --out.")
    elif contents(place):
        raise OutputExists(f"{place}: exists and is not empty; choose another --out.")


def _begin(out: Path, plan: dict[str, Any], needed_bytes: int) -> str:
    """Make OUT if it is not begun; gives the plan's id. Raises NoSpace where less is free than is still to be written."""
    there = sum(path.stat().st_size for path in (out / PARTS).glob("*.npz"))
    require_free_space(out, max(0, needed_bytes - there), "what is measured of each feature, kept until its table is made,")
    if not (out / PLAN).exists():
        out.mkdir(parents=True, exist_ok=True)
        publish_json(out / PLAN, plan)
    (out / PARTS).mkdir(exist_ok=True)
    return content_hash(plan)[:16]
