"""In: a run, a store, the model. Out: the SAE's figures, and beside them those of the baselines that an SAE has to beat.

Beside a PCA and the raw dimensions with as many numbers a row, there are three SAEs of the run's shape and recipe, each
trained on `--baseline-tokens` rows: the same one again, when the run itself saw more; one whose decoder stays at random
directions; and one on a model with random weights, which has rows and text figures of its own. This calls stages.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actstore.errors import InputError
from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.compute.freed_memory import keep_freed_memory
from pipelines.evaluate.stage import (
    EvaluateConfig,
    evaluate,
    evaluation_lines,
    kept_beside,
    linear_fve,
    load_same_model,
    pca_basis,
    require_heldout,
)
from pipelines.metrics.model_loss import Replace, heldout_text, reconstructing
from pipelines.models.load import choose_device, load_model, resolve_model
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, load_run
from pipelines.sae.reconstruction_metrics import RowMetrics, heldout_metrics, heldout_rows
from pipelines.shared.progress import track
from pipelines.train.config import TrainConfig, config_of
from pipelines.train.new_trainee import Samples, default_learning_rate, new_trainee
from pipelines.train.ranks import Ranks

BASELINES = "baselines"
RANDOM_MODEL = "SAE on random model weights"


@dataclass(frozen=True)
class BaselinesConfig(EvaluateConfig):
    """What `evaluate` is asked for when baselines may be wanted; the names are the command's options."""

    baselines: bool = False
    baseline_tokens: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline_tokens < 0:
            raise InputError(f"baseline-tokens {self.baseline_tokens}: need at least 1, or 0 for as many as the run saw.")


def evaluate_beside_baselines(config: BaselinesConfig) -> dict[str, Any]:
    """`evaluate`; and, when asked for, `baselines`, a row of figures each, kept in `baselines_folder`."""
    if config.baselines and "batch" not in load_run(config.run)[1].config:
        raise InputError(f"{config.run}: was imported, and baselines repeat the run's training; leave out --baselines.")
    figures = evaluate(config)
    return {**figures, "baselines": compare(config, figures)} if config.baselines else figures


def compare(config: BaselinesConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """The baselines of a run whose own figures are given; `saved` as in `evaluate`."""
    store = ActivationStore(config.store, snapshot=figures["snapshot"])
    with kept_beside(baselines_folder(config, store.snapshot), BASELINES) as keep:
        compared = _compared(config, store, figures)
        return {**compared, "saved": keep(compared)}


def baselines_folder(config: BaselinesConfig, snapshot: str) -> Path:
    """Where baselines are kept: what they depend on is the folder's name.

    >>> config = BaselinesConfig(run=Path("run"), store="store", windows=64)
    >>> baselines_folder(config, "0123456789abcdef").as_posix()
    'run/baselines/0123456789abcdef-windows64-rows1000000'
    """
    return config.run / BASELINES / f"{snapshot}-windows{config.windows}-rows{config.baseline_tokens}"


def _compared(config: BaselinesConfig, store: ActivationStore, figures: dict[str, Any]) -> dict[str, Any]:
    _, record = load_run(config.run)
    device = choose_device(config.device)
    batch = config_of(record.config, f"{config.run}: config").batch
    n_rows = max(1, min(config.baseline_tokens or record.rows_seen, record.rows_seen) // batch) * batch
    random_model = _on_random_model(config, record, store, n_rows, device)

    train_config = same_training(record, n_rows)
    shorter = "SAE, the same, shorter training"
    saes = {} if n_rows == record.rows_seen else {shorter: train_sae(train_config, store, record.site, n_rows, device)}
    frozen = "SAE, decoder frozen at random"
    saes[frozen] = train_sae(train_config, store, record.site, n_rows, device, frozen_decoder=True)
    linear = linear_baselines(store, record.site, figures["l0"], figures["fve"], device)

    replacements = {name: reconstructing(own) for name, own in saes.items()}
    replacements |= {name: replace_rows for name, (_, replace_rows) in linear.items()}
    model = load_same_model(config.model or record.model, store, device)
    text = heldout_text(model, store, Site.parse(record.site), replacements, config.windows, device)
    rows: list[dict[str, Any]] = [{"name": "SAE of this run", "trained_rows": record.rows_seen, **figures}]
    rows += [
        {"name": name, "trained_rows": n_rows, **heldout_metrics(own, store, record.site), **text.finalize(name)}
        for name, own in saes.items()
    ]
    rows.append({"name": RANDOM_MODEL, **random_model})
    rows += [
        {"name": name, **linear_metrics(store, record.site, n_numbers, replace_rows, device), **text.finalize(name)}
        for name, (n_numbers, replace_rows) in linear.items()
    ]
    kept = ("name", "trained_rows", "left_out", *COLUMNS)
    return {
        "run_id": record.run_id,
        "store_id": store.store_id,
        "snapshot": store.snapshot,
        "site": record.site,
        "windows": config.windows,
        "rows": [{key: row[key] for key in kept if key in row} for row in rows],
    }


COLUMNS = {
    "fve": "FVE",
    "l0": "L0",
    "cosine": "cosine",
    "l2_ratio": "l2 ratio",
    "dead_share": "dead",
    "delta_ce": "ΔCE",
    "ce_loss_score": "CE score",
    "ce_loss_score_mean": "vs mean",
    "kl": "KL",
    "kl_score": "KL score",
}
"""The figures that are compared, and their headings."""
SCORES = ("ce_loss_score", "ce_loss_score_mean", "kl_score")


def same_training(record: RunRecord, n_rows: int) -> TrainConfig:
    """The configuration of a run's training, for `n_rows` rows. A default learning rate becomes the default of the shorter
    training."""
    config = config_of(record.config, f"run {record.run_id}: config", tokens=n_rows)
    default = default_learning_rate(config.features, max(1, record.rows_seen // config.batch))
    return replace(config, lr=0.0) if math.isclose(config.lr, default) else config


def train_sae(
    config: TrainConfig, store: ActivationStore, site: str, n_rows: int, device: str, *, frozen_decoder: bool = False
) -> Sae:
    """An SAE in raw units, trained as `train` does and kept in memory; with a frozen decoder, the decoder stays as it
    started."""
    keep_freed_memory()
    n_steps = max(1, n_rows // config.batch)
    trainee = new_trainee(config, site, store, n_steps, device, Ranks(), Samples(), fresh=True)
    trainee.sae.W_dec.requires_grad_(not frozen_decoder)
    stream = iter(BatchStream(store, site, config.batch, seed=config.order_seed))
    with closing(stream), track("baseline", n_steps * config.batch) as progress:  # type: ignore[type-var]
        for rows in islice(stream, n_steps):
            trainee.step(torch.from_numpy(rows).to(device))
            progress.advance(len(rows))
    trainee.sae.fold_input_scale(trainee.scale)
    return trainee.sae.eval().requires_grad_(False)


def linear_baselines(
    store: ActivationStore, site: str, l0: float, fve: float, device: str
) -> dict[str, tuple[int, Replace]]:
    """Numbers a row, and the rows made from them: PCA and raw dimensions with as many as the SAE has active
    features, and the PCA that explains as much as the SAE, however many components that takes."""
    d_model = store.d_model(site)
    basis, mean = pca_basis(store, site, d_model)
    n_same = max(1, min(d_model, round(l0)))
    n_needed = min(d_model, 1 + int(np.searchsorted(linear_fve(store, site, basis, mean), fve)))
    centre = torch.from_numpy(mean).float().to(device)
    projections = {
        n: projecting(torch.from_numpy(basis[:, :n].copy()).float().to(device), centre) for n in sorted({n_same, n_needed})
    }
    names = {n: f"PCA, {n} components" + (" (the SAE's FVE)" if n == n_needed else "") for n in projections}
    return {
        **{names[n]: (n, project) for n, project in projections.items()},
        f"{n_same} largest raw dimensions": (n_same, keeping_largest(n_same, centre)),
    }


def projecting(basis: Tensor, mean: Tensor) -> Replace:
    """Rows by their projections on orthonormal columns (d, n), around a mean (d,)."""
    return lambda rows: mean + (rows - mean) @ basis @ basis.T


def keeping_largest(n: int, mean: Tensor) -> Replace:
    """Rows by their n coordinates that are farthest from the mean (d,), the others set to it."""

    def replace_rows(rows: Tensor) -> Tensor:
        centred = rows - mean
        largest = torch.topk(centred.abs(), n, dim=1, sorted=False).indices
        return mean + torch.zeros_like(centred).scatter(1, largest, centred.gather(1, largest))

    return replace_rows


def linear_metrics(store: ActivationStore, site: str, n_numbers: int, replace_rows: Replace, device: str) -> dict[str, Any]:
    """The figures of replaced rows over the held-out split, each made of `n_numbers` numbers."""
    metrics = RowMetrics.empty(store.d_model(site), 0)
    for x in heldout_rows(store, site):
        batch = torch.from_numpy(x).to(device)
        metrics.update(batch, replace_rows(batch), n_codes=n_numbers * len(x))
    return metrics.finalize()


def random_weights_model(name: str, folder: Path, seed: int) -> str:
    """A GPT-2 of a model's shape and tokenizer, with weights drawn as before any training, in a folder; made once."""
    if folder.exists():
        return str(folder)
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    source = resolve_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config.from_pretrained(source, trust_remote_code=False))
    unfinished = folder.with_name(f".{folder.name}.tmp")
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)
    return str(folder)


def _on_random_model(
    config: BaselinesConfig, record: RunRecord, store: ActivationStore, n_rows: int, device: str
) -> dict[str, Any]:
    """The figures of an SAE of the same shape on a model with random weights; `left_out` says why where there is none."""
    manifest, site = store.manifest, Site.parse(record.site)
    n_tokens = min(n_rows, sum(segment.n_tokens for segment in store.segments))
    beside = config.run if os.access(config.run, os.W_OK) else None  # where there is room for a run, and not in memory
    with tempfile.TemporaryDirectory(prefix=".baselines-", dir=beside) as temporary:
        folder = Path(temporary)
        try:
            model_folder = random_weights_model(config.model or record.model, folder / "model", record.config["seed"])
            asked = CollectConfig(
                out=folder / "store",
                model=model_folder,
                corpus=manifest.corpus.spec,
                layer=(site.layer,),
                site=(site.name,),
                tokens=n_tokens,
                context=manifest.policy.context,
                encoding=manifest.encoding(record.site).name,
                compute_dtype=manifest.compute_dtype,
                device=config.device,
                seed=manifest.seed,
                packing=manifest.policy.packing,
                bos=manifest.policy.bos,
                keep_special=manifest.policy.keep_special,
            )
            collect(asked)
            own = ActivationStore(folder / "store")
            require_heldout(own)
        except InputError as error:
            return {"left_out": str(error)}
        sae = train_sae(same_training(record, n_rows), own, record.site, n_rows, device)
        model: nn.Module = load_model(model_folder, device, "fp32")
        text = heldout_text(model, own, site, {"sae": reconstructing(sae)}, config.windows, device)
        return {"trained_rows": n_rows, **heldout_metrics(sae, own, record.site), **text.finalize()}


def lines(figures: dict[str, Any]) -> list[str]:
    """What `evaluate` prints, with the table of baselines where they were asked for."""
    if "baselines" not in figures:
        return evaluation_lines(figures)
    compared = figures["baselines"]
    width = max(len(row["name"]) for row in compared["rows"])
    table = [f"{'':<{width}}{'trained on':>12}" + "".join(f"{heading:>10}" for heading in COLUMNS.values())]
    for row in compared["rows"]:
        if "left_out" in row:
            table.append(f"{row['name']:<{width}}  left out: {row['left_out']}")
            continue
        trained = f"{row['trained_rows']:,}" if "trained_rows" in row else ""
        table.append(f"{row['name']:<{width}}{trained:>12}" + "".join(_cell(row, column) for column in COLUMNS))
    return [
        *evaluation_lines(figures),
        "",
        *table,
        f"{RANDOM_MODEL}: rows and loss are that model's own; no scores, since its loss hardly depends on its activations.",
        f"saved: {compared['saved'] or 'no, the folder of the run cannot be written to'}",
    ]


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or (row["name"] == RANDOM_MODEL and column in SCORES):
        return f"{'–':>10}"
    formats: dict[str, Callable[[float], str]] = {"l0": "{:.1f}".format, "dead_share": "{:.1%}".format}
    formats["delta_ce"] = "{:+.4f}".format
    return f"{formats.get(column, '{:.4f}'.format)(value):>10}"
