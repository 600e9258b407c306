"""In: a run and new sentences. Out: the features that are most active on them, and the tokens that fire each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.errors import IdentityMismatch, InputError
from pipelines.models.capture import capture
from pipelines.models.families.registry import family_of
from pipelines.models.load import choose_device, load_model, model_identity, require_own_tokenizer, resolve_model
from pipelines.models.sites.site import Site
from pipelines.sae.checkpoint import load_run
from pipelines.text.tokenizer_files import load_tokenizer

CONTEXT_TOKENS = 6


@dataclass(frozen=True)
class InspectConfig:
    """What `inspect` is asked for; the names are the command's options."""

    run: Path
    texts: Path
    features: int = 20
    tokens: int = 5
    model: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.features < 1 or self.tokens < 1:
            raise InputError(f"features {self.features}, tokens {self.tokens}: need at least 1.")


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Run the model on every line of a file and rank features by their mean activation over all tokens.

    Raises InputError for a file without text or a line longer than the model's context, IdentityMismatch when the
    model is not the one the SAE was trained on.
    """
    sae, record = load_run(config.run)
    texts = _texts(config.texts)
    name = config.model or record.model
    device = choose_device(config.device)
    model = load_model(name, device, "fp32")
    if model_identity(model).weights_sha256 != record.weights_sha256:
        raise IdentityMismatch(f"model {name}: is not the one {config.run} was trained on; name the right one with --model.")
    codec, _ = load_tokenizer(resolve_model(name))
    require_own_tokenizer(name, model, codec.n_vocabulary)
    sae.to(device)
    limit = family_of(model).n_positions(model)
    lead = [codec.bos_token_id] if record.bos else []
    site = Site.parse(record.site)

    ids_of = dict(zip(texts, codec.ids(list(texts.values())), strict=True))
    for line, ids in ids_of.items():
        if len(ids) + len(lead) > limit:
            raise InputError(
                f"{config.texts}: line {line} has {len(ids)} tokens, the model {limit} positions; split the line."
            )

    codes: list[tuple[Tensor, Tensor]] = []
    for ids in ids_of.values():
        rows = capture(model, [site], torch.tensor([lead + ids], device=device))[site.label][0, len(lead) :]
        with torch.inference_mode():
            codes.append(sae.encode(rows))
    values, indices = (torch.cat(parts).cpu().numpy() for parts in zip(*codes, strict=True))
    places = [(line, position) for line, ids in ids_of.items() for position in range(len(ids))]
    ranked = []
    for feature, mean, firings in strongest(values, indices, sae.n_features, config.features, config.tokens):
        shown = []
        for row, value in firings:
            line, position = places[row]
            shown.append(
                {
                    "token": codec.token_text(ids_of[line][position]),
                    "value": value,
                    "before": codec.text(ids_of[line][max(0, position - CONTEXT_TOKENS) : position]),
                    "line": line,
                }
            )
        ranked.append({"feature": feature, "mean": mean, "firings": shown})
    return {"run_id": record.run_id, "texts": len(texts), "tokens": len(places), "features": ranked}


def strongest(
    values: NDArray[np.float32], indices: NDArray[np.int64], n_features: int, features: int, firings: int
) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """The features of highest mean activation over rows with codes (n, k), and where each fires most.

    Gives (feature, mean, [(row, value), …]), both lists by falling value; ties go to the lower number.
    """
    mean = np.bincount(indices.ravel(), values.ravel(), minlength=n_features) / len(values)
    ranked = []
    for feature in np.argsort(-mean, kind="stable")[:features].tolist():
        row, slot = np.nonzero((indices == feature) & (values > 0))
        best = np.argsort(-values[row, slot], kind="stable")[:firings]
        ranked.append(
            (feature, float(mean[feature]), list(zip(row[best].tolist(), values[row, slot][best].tolist(), strict=True)))
        )
    return ranked


def _texts(path: Path) -> dict[int, str]:
    """The lines that are not blank, by their number in the file, from 1."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); pass a file with one text a line.") from error
    texts = {number: line for number, line in enumerate(lines, start=1) if line.strip()}
    if not texts:
        raise InputError(f"{path}: has no text; put one text on each line.")
    return texts
