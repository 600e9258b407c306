"""The textbook lesson under its own names: collect, train, inspect, attribute, patch, ablate, count; thin over the stages.

In: a GPT-2 and some texts. Out: what each call returns, and the lines it prints. Everything stays in memory: for more
text than that, for an SAE of the standard recipe, and for figures over a corpus, use the stages.

Names, order of arguments and defaults are the textbook's; what follows a `*` is ours. Texts are run one at a time,
without start token. Where a figure is the textbook's and not the field's, its docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from actstore.errors import InputError
from actstore.plan import ROW_ORDER, permutation
from actstore.reader import ActivationStore
from pipelines.causal.textbook import (
    SITE,
    Ablated,
    ablate_feature,
    activation_patching,
    direct_logit_attribution,
    record_of,
    require_family,
)
from pipelines.evaluate.inspect import strongest
from pipelines.models.capture import capture
from pipelines.models.families.registry import family_of
from pipelines.models.forward import blocks_of
from pipelines.models.load import choose_device, load_model, model_identity, require_own_tokenizer, resolve_model
from pipelines.models.sites.site import Site
from pipelines.sae.base import Objective, Sae
from pipelines.sae.checkpoint import RunRecord, require_match, save_run
from pipelines.sae.textbook import SparseAutoencoder, sae_loss
from pipelines.shared.visible_text import say, visible
from pipelines.statistics import frequency_bands
from pipelines.text.codec import TextCodec
from pipelines.text.corpus import open_corpus
from pipelines.text.tokenizer_files import codec_of, open_tokenizer
from pipelines.train.config import TrainConfig, recorded
from pipelines.train.trainee import Recipe, Trainee

__all__ = [
    "Ablated",
    "SparseAutoencoder",
    "ablate_feature",
    "activation_patching",
    "analyze_feature_statistics",
    "collect_activations",
    "direct_logit_attribution",
    "inspect_features",
    "run_sae_pipeline",
    "sae_loss",
    "save_as_run",
    "train_sae",
]

FVE_ROWS = 1000
BLOCK_ROWS = 4096
FEATURES_SHOWN = 20
PAIRS_SHOWN = 10

SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "She opened the old door and walked slowly into the dark room.",
    "In 1969, two astronauts walked on the Moon for the first time.",
    "The doctor said that the new medicine would not cure the disease.",
    "If the price of oil rises again, the bank will raise its rates.",
    "def area(radius): return 3.14159 * radius ** 2",
    "He scored twice in the last ten minutes, and the team won the cup.",
    "Add the flour, the sugar and two eggs, then bake for forty minutes.",
)
"""What `run_sae_pipeline` looks at by default."""


class Collected(NamedTuple):
    """Rows (tokens, d_model) in float32, and what they came from."""

    activations: Tensor
    tokenizer: PreTrainedTokenizerFast
    model: nn.Module


class Pipeline(NamedTuple):
    """What `run_sae_pipeline` made."""

    sae: SparseAutoencoder
    activations: Tensor
    tokenizer: PreTrainedTokenizerFast
    model: nn.Module


class FeatureStatistics(NamedTuple):
    """`bands`: features in each; `frequency` (n_features,): shares of rows; `top` and `joint`: the most frequent features,
    and in which share of rows each two of them fire together (its diagonal: their own frequency)."""

    bands: dict[str, int]
    frequency: NDArray[np.float64]
    top: list[int]
    joint: NDArray[np.float64]


def collect_activations(
    model_name: str = "gpt2",
    layer: int = 6,
    num_samples: int = 1000,
    max_len: int = 128,
    *,
    corpus: str | Sequence[str] = "stdlib",
    seed: int = 0,
    device: str = "auto",
) -> Collected:
    """The output of block `layer` at every token of `num_samples` texts, each cut to its first `max_len` tokens.

    One text at a time, unpacked and without start token, as the textbook does. So every text's first token is a row, and in
    GPT-2 that is the attention sink, some 30 times as long as any other; `actstore collect` leaves it out.

    `model_name`: a hub id, a local folder, or `builtin`. `corpus`: what `collect --corpus` takes (by default the Python
    sources on this machine, which need no network), or a list of texts; its documents come in the order of `seed`. A
    corpus with fewer texts than `num_samples` gives all it has. Raises InputError when model, tokenizer or corpus cannot
    be had, when the model has no block `layer`, or fewer than `max_len` positions.
    """
    if num_samples < 1 or max_len < 1:
        raise InputError(f"num_samples {num_samples}, max_len {max_len}: need at least 1.")
    model = load_model(model_name, choose_device(device), "fp32").requires_grad_(False)
    tokenizer = open_tokenizer(resolve_model(model_name))
    _require_layer(model, layer, model_name)
    if max_len > _n_positions(model):
        raise InputError(f"max_len {max_len}: model {model_name} has {_n_positions(model)} positions; choose at most that.")
    texts = (document.text for document in open_corpus(corpus, seed).documents()) if isinstance(corpus, str) else corpus
    codec = codec_of(tokenizer)
    require_own_tokenizer(model_name, model, codec.n_vocabulary)
    ids = [of_text[:max_len] for of_text in codec.ids(list(islice(texts, num_samples))) if of_text]
    if not ids:
        raise InputError(f"corpus {corpus}: has no token; pass some text.")
    rows = torch.cat([_rows(model, layer, text) for text in ids])
    say(f"{model_name}, output of block {layer}: {len(rows):,} tokens of {len(ids):,} texts, {rows.shape[1]} values each")
    return Collected(rows, tokenizer, model)


def train_sae(
    activations: Tensor,
    d_model: int = 768,
    n_features: int = 4096,
    k: int = 32,
    num_epochs: int = 10,
    batch_size: int = 256,
    lr: float = 3e-4,
    sparsity_coeff: float = 1e-3,
    *,
    seed: int = 0,
) -> SparseAutoencoder:
    """Train an SAE on rows (tokens, d_model) where they lie, by the textbook's recipe, and print a line per epoch.

    Adam at a constant rate on `sae_loss`; gradient norm clipped at 1; decoder columns made unit vectors after each step;
    every row once an epoch, in an order that `seed` decides, as it does the first weights. This is `train --recipe
    textbook`, step for step, in float32 throughout.

    In the line, reconstruction and sparsity are means over the epoch's batches. FVE is the textbook's: 1 − var(residual) /
    var(sample) on the first 1,000 rows, which were trained on, both variances pooled over all elements, so that the
    spread of the channels' means counts as explained. `evaluate` gives the field's, on held-out text.
    Raises InputError for activations of another shape, or that are not finite.
    """
    rows = _checked(activations, d_model)
    if num_epochs < 1 or batch_size < 1 or not lr > 0 or sparsity_coeff < 0:
        raise InputError(
            f"num_epochs {num_epochs}, batch_size {batch_size}, lr {lr}, sparsity_coeff {sparsity_coeff}: need at least "
            "one epoch and row, a rate above 0, and a coefficient not below 0."
        )
    n_steps = num_epochs * -(-len(rows) // batch_size)
    sae = SparseAutoencoder(d_model, n_features, k, seed=seed).to(rows).to_sae()
    trainee = Trainee(sae, Recipe.textbook(lr, n_steps, Objective(sparsity_coeff, kernel="sparse-fp32")), scale=1.0)
    for epoch in range(num_epochs):
        order = torch.from_numpy(permutation(len(rows), seed, ROW_ORDER, epoch)).to(rows.device)
        sums = torch.zeros(2, dtype=rows.dtype, device=rows.device)
        for batch in order.split(batch_size):
            _, losses = trainee.step(rows[batch])
            absolute = losses.codes.values.detach().sum() / (len(batch) * n_features)
            sums += torch.stack([losses.terms["mse"].detach(), absolute])
        reconstruction, sparsity = (sums * num_epochs / n_steps).tolist()
        say(
            f"epoch {epoch + 1:>2}/{num_epochs}: reconstruction {reconstruction:.5f}, sparsity {sparsity:.5f}, "
            f"FVE {_pooled_fve(sae, rows[:FVE_ROWS]):.4f}"
        )
    textbook = SparseAutoencoder.from_sae(sae)
    textbook.trained = {"epochs": num_epochs, "batch": batch_size, "lr": lr, "l1": sparsity_coeff, "seed": seed}
    textbook.trained["tokens"] = trainee.rows_seen
    return textbook


def inspect_features(
    sae: SparseAutoencoder | Sae,
    activations: Tensor | None,
    tokenizer: PreTrainedTokenizerFast,
    model: nn.Module,
    texts: Sequence[str],
    layer: int = 6,
    top_n: int = 5,
) -> dict[int, list[tuple[str, float]]]:
    """Print the 20 features of highest mean activation over the tokens of `texts`, with the tokens that fire each most.

    Gives {feature: [(token, value), …]}, both by falling value; a feature that fires fewer than `top_n` times has fewer. Of
    `activations`, the rows it was trained on, only this is used: how often the feature fires on them, printed beside it
    (with None, nothing is). Raises InputError when no text has a token, or the SAE reads rows of another width.
    """
    codec = codec_of(tokenizer)
    _require_layer(model, layer, "given")
    ids = [of_text for of_text in codec.ids(list(texts)) if of_text]
    if not ids or top_n < 1:
        raise InputError(f"texts: {len(ids)} have a token, top_n is {top_n}; need at least 1 of each.")
    values, indices = _codes(sae, torch.cat([_rows(model, layer, _fitting(text, model, codec)) for text in ids]))
    tokens = [codec.token_text(i) for text in ids for i in text]
    rate = None if activations is None else _fired(sae, activations).mean(axis=0)
    say(f"{len(tokens)} tokens of {len(ids)} texts; features by mean activation, with the tokens that fire them most:")
    firings_of = {}
    for feature, mean, firings in strongest(values, indices, sae.n_features, FEATURES_SHOWN, top_n):
        firings_of[feature] = [(tokens[row], value) for row, value in firings]
        shown = "  ".join(f"{visible(token)!r} {value:.2f}" for token, value in firings_of[feature])
        seen = "" if rate is None else f"  fires on {rate[feature]:>6.1%}"
        say(f"feature {feature:>5}  mean {mean:>7.3f}{seen}:  {shown}")
    return firings_of


def run_sae_pipeline(
    model_name: str = "gpt2",
    layer: int = 6,
    *,
    n_features: int = 4096,
    k: int = 32,
    num_samples: int = 200,
    max_len: int = 64,
    num_epochs: int = 15,
    sparsity_coeff: float = 5e-4,
    sentences: Sequence[str] = SENTENCES,
    corpus: str | Sequence[str] = "stdlib",
    seed: int = 0,
) -> Pipeline:
    """Collect, train, and inspect eight new sentences, one after another. Errors as the three."""
    rows, tokenizer, model = collect_activations(model_name, layer, num_samples, max_len, corpus=corpus, seed=seed)
    sae = train_sae(rows, rows.shape[1], n_features, k, num_epochs=num_epochs, sparsity_coeff=sparsity_coeff, seed=seed)
    inspect_features(sae, rows, tokenizer, model, sentences, layer)
    return Pipeline(sae, rows, tokenizer, model)


def analyze_feature_statistics(sae: SparseAutoencoder | Sae, activations: Tensor, top_n: int = 20) -> FeatureStatistics:
    """How often features fire on rows (tokens, d_model), and which fire together; printed and returned.

    A feature fires where its code is above 0. Bands are shares of rows: always > 90 %, common (10, 90], rare (1, 10],
    very rare (0, 1], dead 0; the textbook counts the dead as very rare, and both figures are printed. The joint firing
    frequencies of the `top_n` most frequent features are returned as a matrix, and its ten most frequent pairs are printed.
    Two features that are each frequent also fire together often: `analyze` compares pairs with chance.
    """
    if top_n < 1:
        raise InputError(f"top_n {top_n}: need at least 1.")
    fired = _fired(sae, activations)
    n_rows, fires = fired.shape[0], fired.sum(axis=0)
    frequency, bands = fires / n_rows, frequency_bands(fires, n_rows)
    top = np.argsort(-fires, kind="stable")[:top_n].tolist()
    joint = (fired[:, top].T @ fired[:, top]).toarray() / n_rows
    say(f"{n_rows:,} rows, {len(frequency):,} features; by share of rows:")
    say(f"  always > 90 %: {bands['always']}   common (10, 90]: {bands['common']}   rare (1, 10]: {bands['rare']}")
    with_dead = bands["very rare"] + bands["dead"]
    say(f"  very rare (0, 1]: {bands['very rare']}   dead: {bands['dead']}   (the textbook's very rare: {with_dead})")
    say(f"the {len(top)} most frequent:  " + "  ".join(f"{feature} {frequency[feature]:.1%}" for feature in top))
    first, second = np.triu_indices(len(top), k=1)
    say("together in most rows (share of rows):")
    for i in np.argsort(-joint[first, second], kind="stable")[:PAIRS_SHOWN]:
        say(f"  {top[first[i]]:>5} and {top[second[i]]:>5}  {joint[first[i], second[i]]:.2%}")
    return FeatureStatistics(bands, frequency, top, joint)


def save_as_run(sae: SparseAutoencoder, out: str | Path, store: str | Path, model: nn.Module, layer: int = 6) -> RunRecord:
    """Publish an SAE as a run, for `encode`, `analyze` and all other commands; not in the textbook.

    `store` is one that `collect` wrote of the same model and layer; `model` what the SAE's rows came from. Raises
    IdentityMismatch when they are two models, InputError or WidthMismatch when the store has no such rows, and InputError
    for an SAE that `train_sae` has not made.
    """
    if not sae.trained:
        raise InputError("sae: was not made by train_sae, so how it was trained is not known; train it first.")
    opened = ActivationStore(store)
    identity = model_identity(model)
    options = {**sae.trained, "features": sae.n_features, "k": sae.k, "layer": layer, "recipe": "textbook", "auxk": 0.0}
    record = record_of(
        sae.to_sae(),
        layer,
        store_id=opened.store_id,
        snapshot=opened.snapshot,
        weights_sha256=identity.weights_sha256,
        model=opened.manifest.provenance.get("model", identity.architecture),
        rows_seen=int(sae.trained["tokens"]),
        config=recorded(TrainConfig(store=store, out=Path(out), **options)),  # type: ignore[arg-type]
    )
    require_match(Path(out), record, opened)
    return save_run(Path(out), sae.to_sae(), record)


def _require_layer(model: nn.Module, layer: int, name: str) -> None:
    n_blocks = len(blocks_of(require_family(model)))
    if not 0 <= layer < n_blocks:
        raise InputError(f"layer {layer}: model {name} has {n_blocks} blocks; choose 0 to {n_blocks - 1}.")


def _n_positions(model: nn.Module) -> int:
    return family_of(model).n_positions(model)


def _fitting(ids: list[int], model: nn.Module, codec: TextCodec) -> list[int]:
    if len(ids) > _n_positions(model):
        start = codec.text(ids[:8])
        raise InputError(f"text {start!r}…: {len(ids)} tokens, the model has {_n_positions(model)} positions; split it.")
    return ids


def _rows(model: nn.Module, layer: int, ids: list[int]) -> Tensor:
    """(tokens, d_model) output of a block for one text."""
    site = Site(SITE, layer)
    device = next(model.parameters()).device
    return capture(model, [site], torch.tensor([ids], device=device))[site.label][0].float()


def _checked(activations: Tensor, d_model: int) -> Tensor:
    """Rows in float32 or float64. Raises InputError when they are none, of another width, or not finite."""
    if activations.ndim != 2 or not len(activations):
        raise InputError(
            f"activations: have shape {tuple(activations.shape)}, needed is (tokens, d_model), at least one row."
        )
    width = activations.shape[1]
    if width != d_model:
        raise InputError(f"activations: have {width} values a row, d_model is {d_model}; pass d_model={width}, or others.")
    if not bool(activations.isfinite().all()):
        raise InputError("activations: some are NaN or infinite; collect them again in float32.")
    return activations.detach() if activations.dtype == torch.float64 else activations.detach().float()


@torch.no_grad()
def _pooled_fve(sae: Sae, sample: Tensor) -> float:
    return 1.0 - float((sample - sae(sample)[0]).var() / sample.var())


def _codes(sae: SparseAutoencoder | Sae, activations: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Values and feature indices (n, k) of rows, as NumPy arrays."""
    sparse = sae.to_sae() if isinstance(sae, SparseAutoencoder) else sae
    rows = _checked(activations, sparse.d_model).to(sparse.b_dec)
    with torch.no_grad():
        parts = [sparse.encode(block, sparse.code_width) for block in rows.split(BLOCK_ROWS)]
    values, indices = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return values, indices


def _fired(sae: SparseAutoencoder | Sae, activations: Tensor) -> sp.csr_array:
    """(n, n_features) 1 where a feature fires on a row."""
    values, indices = _codes(sae, activations)
    row, slot = np.nonzero(values > 0)
    place = row, indices[row, slot]
    return sp.csr_array((np.ones(len(row), np.int64), place), shape=(len(values), sae.n_features))
