"""In: what a collection was asked for. Out: model, corpus and manifest, checked against each other; nothing written yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actstore.errors import InputError
from actstore.layout import MIN_SHARDS, Layout, choose_layout
from actstore.plan import PartPlan
from actstore.schema import (
    PARTS,
    CorpusIdentity,
    Manifest,
    PartRecord,
    RowArray,
    WindowPolicy,
    site_arrays,
)
from pipelines.collect.config import CollectConfig
from pipelines.collect.shard_maker import SegmentText, ShardMaker
from pipelines.models.capture import require_collected, site_width
from pipelines.models.families.registry import family_of
from pipelines.models.forward import blocks_of
from pipelines.models.load import DTYPES, choose_device, load_model, model_identity, resolve_model
from pipelines.models.sites.site import Site
from pipelines.text.corpus import Corpus, open_corpus
from pipelines.text.tokens import TextCodec, TokenTable, load_tokenizer
from pipelines.text.windows import cut_windows


@dataclass(frozen=True)
class Recipe:
    """A collection ready to begin."""

    manifest: Manifest
    tokenizer_files: dict[str, bytes]
    codec: TextCodec
    corpus: Corpus
    maker: ShardMaker

    def layout(self, n_rows: int, part: str, shard_mib: int) -> Layout:
        """How so many rows of a part are cut into shards."""
        return choose_layout(
            n_rows,
            self.manifest.row_bytes,
            max(self.manifest.array(f"acts/{site}").width for site in self.manifest.sites) * np.dtype(np.float32).itemsize,
            shard_bytes=shard_mib << 20,
            min_shards=MIN_SHARDS if part == PARTS[0] else 1,
        )

    def plan(
        self, table: TokenTable, segment: int, shard_mib: int
    ) -> tuple[SegmentText, dict[str, PartRecord], dict[str, NDArray[Any]]]:
        """A token table's windows, their plan, how its rows are cut into shards, and the tables that say so."""
        tables: dict[str, NDArray[Any]] = {
            "tokens/ids": table.ids,
            "documents/offsets": table.offsets,
            "documents/heldout": table.heldout,
            "documents/source": np.frombuffer("\n".join(table.names).encode(), np.uint8),
        }
        windows = {part: cut_windows(table, part, self.manifest.policy) for part in PARTS}
        plans, parts = {}, {}
        for index, part in enumerate(PARTS):
            kept = windows[part].kept_counts()
            layout = self.layout(int(kept.sum()), part, shard_mib)
            plans[part] = PartPlan.build(self.manifest.seed, segment, index, layout, kept)
            parts[part] = PartRecord(len(windows[part]), layout.n_rows, layout.shard_rows, layout.chunk_rows)
            tables[f"{part}/windows/token_start"] = windows[part].token_start
            tables[f"{part}/windows/n_tokens"] = windows[part].n_tokens.astype(np.uint32)
            tables[f"{part}/windows/first_row"] = plans[part].first_rows
        return SegmentText(windows, plans), parts, tables


def prepare(config: CollectConfig) -> Recipe:
    """Load the model, open the corpus, and check that they and the options fit each other.

    Raises InputError, naming what does not fit and both values.
    """
    device = choose_device(config.device)
    model = load_model(config.model, device, "fp32")
    sites = _sites(config, model)
    codec, tokenizer_files = load_tokenizer(resolve_model(config.model))
    _require_same_vocabulary(config, model, codec)
    corpus = open_corpus(config.corpus, config.seed)
    manifest = _manifest(config, model, sites, codec, corpus)
    model = model.to(getattr(torch, DTYPES[config.compute_dtype]))
    return Recipe(manifest, tokenizer_files, codec, corpus, ShardMaker(manifest, model, device, config.batch_windows))


def _sites(config: CollectConfig, model: nn.Module) -> list[Site]:
    """Every asked (site, layer), checked against the model; without a layer, the middle one."""
    layers = config.layer or (len(blocks_of(model)) // 2,)
    sites = [Site(name, layer) for layer in sorted(set(layers)) for name in dict.fromkeys(config.site)]
    for site in sites:
        require_collected(model, site)
    limit = family_of(model).n_positions(model)
    if config.context > limit:
        raise InputError(f"context {config.context}: the model has {limit} positions; choose --context {limit} or less.")
    return sites


def _require_same_vocabulary(config: CollectConfig, model: nn.Module, codec: TextCodec) -> None:
    known, given = cast(Any, model).config.vocab_size, codec.backend.get_vocab_size()
    if given > known:
        raise InputError(
            f"model {config.model}: its tokenizer has {given} tokens, the model knows {known}; put the right one beside it."
        )


def _manifest(config: CollectConfig, model: nn.Module, sites: list[Site], codec: TextCodec, corpus: Corpus) -> Manifest:
    identity = model_identity(model)
    return Manifest(
        kind="activations",
        model=identity,
        tokenizer_sha256=codec.sha256,
        corpus=CorpusIdentity(corpus.spec, corpus.fingerprint),
        policy=WindowPolicy(
            context=config.context,
            bos=config.bos,
            packing=config.packing,
            keep_special=config.keep_special,
            bos_token_id=codec.bos_token_id,
            separator_token_id=codec.separator_token_id,
        ),
        arrays=(
            RowArray("rows/window", 0, "uint32", "raw"),
            RowArray("rows/position", 0, "uint16", "raw"),
            *(array for site in sites for array in site_arrays(site.label, site_width(model, site), config.encoding)),
        ),
        compute_dtype=config.compute_dtype,
        seed=config.seed,
        provenance={"model": config.model},
    )


def unexplained(exact: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Share of the rows' variance that a copy of them misses: Σ‖x − x'‖² / Σ‖x − mean x‖²."""
    wide = exact.astype(np.float64)
    total = np.square(wide - wide.mean(axis=0)).sum()
    return float(np.square(found - wide).sum() / total) if total else 0.0


def compute_error(recipe: Recipe, text: SegmentText, model_name: str) -> dict[str, float]:
    """What computing in another dtype than fp32 does to the rows of the first windows: unexplained variance by site."""
    maker, windows = recipe.maker, text.windows[PARTS[0]]
    exact = replace(maker, model=load_model(model_name, maker.device, "fp32")).first_rows(windows)
    found = maker.first_rows(windows)
    return {label: unexplained(exact[label], found[label]) for label in exact}
