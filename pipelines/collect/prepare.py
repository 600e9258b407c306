"""In: what a collection is asked for. Out: the collection, its model, corpus and options checked against each other.

Nothing is written yet.
"""

from __future__ import annotations

import torch
from torch import nn

from actstore.errors import InputError
from actstore.schema import ROW_PLACE_ARRAYS, CorpusIdentity, Manifest, WindowPolicy, site_arrays
from pipelines.collect.collection import Collection, CorpusText
from pipelines.collect.config import CollectConfig
from pipelines.models.capture import require_collected, site_width
from pipelines.models.families.registry import family_of
from pipelines.models.forward import blocks_of
from pipelines.models.load import DTYPES, choose_device, load_model, model_identity, require_own_tokenizer, resolve_model
from pipelines.models.sites.site import Site
from pipelines.text.codec import TextCodec
from pipelines.text.corpus import Corpus, open_corpus
from pipelines.text.tokenizer_files import load_tokenizer


def prepare(config: CollectConfig) -> Collection:
    """Load the model, open the corpus, and check that they and the options fit each other.

    Raises InputError, naming what does not fit and both values.
    """
    device = choose_device(config.device)
    model = load_model(config.model, device, "fp32")
    sites = _sites(config, model)
    codec, tokenizer_files = load_tokenizer(resolve_model(config.model))
    require_own_tokenizer(config.model, model, codec.n_vocabulary)
    corpus = open_corpus(config.corpus, config.seed)
    manifest = _manifest(config, model, sites, codec, corpus)
    model = model.to(getattr(torch, DTYPES[config.compute_dtype]))
    return Collection(config, manifest, model, device, CorpusText(corpus, codec, tokenizer_files))


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
            *ROW_PLACE_ARRAYS,
            *(array for site in sites for array in site_arrays(site.label, site_width(model, site), config.encoding)),
        ),
        compute_dtype=config.compute_dtype,
        seed=config.seed,
        provenance={"model": config.model},
    )
