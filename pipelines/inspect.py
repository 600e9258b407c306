"""In: a run and new sentences. Out: the features that are most active on them, and the tokens that fire each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actstore.errors import IdentityMismatch, InputError
from pipelines.capture import Site, capture, choose_device, load_model, model_identity, resolve_model
from pipelines.sae.checkpoint import load_run
from pipelines.tokens import load_tokenizer

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
    sae.to(device)
    limit: int = model.config.max_position_embeddings  # type: ignore[union-attr, assignment]
    lead = [codec.bos_token_id] if record.bos else []
    site = Site.parse(record.site)

    places: list[tuple[int, int]] = []
    ids_of: list[list[int]] = []
    dense: list[np.ndarray] = []
    for number, text in enumerate(texts):
        ids = codec.ids([text])[0]
        if len(ids) + len(lead) > limit:
            raise InputError(
                f"{config.texts}: line {number + 1} has {len(ids)} tokens, the model {limit} positions; split the line."
            )
        rows = capture(model, [site], torch.tensor([lead + ids], device=device))[site.label][0, len(lead) :]
        with torch.inference_mode():
            values, indices = sae.encode(rows.clone())
        active = np.zeros((len(ids), sae.n_features), np.float32)
        np.put_along_axis(active, indices.cpu().numpy(), values.cpu().numpy(), axis=1)
        dense.append(active)
        ids_of.append(ids)
        places += [(number, position) for position in range(len(ids))]
    activations = np.concatenate(dense)
    mean = activations.mean(axis=0, dtype=np.float64)
    found = []
    for feature in np.argsort(-mean, kind="stable")[: config.features].tolist():
        rows_by_value = np.argsort(-activations[:, feature], kind="stable")[: config.tokens]
        firings = []
        for row in rows_by_value[activations[rows_by_value, feature] > 0].tolist():
            number, position = places[row]
            before = ids_of[number][max(0, position - CONTEXT_TOKENS) : position]
            firings.append(
                {
                    "token": codec.text([ids_of[number][position]]),
                    "value": float(activations[row, feature]),
                    "before": codec.text(before),
                    "text": number,
                }
            )
        found.append({"feature": feature, "mean": float(mean[feature]), "firings": firings})
    return {"run_id": record.run_id, "texts": len(texts), "tokens": len(activations), "features": found}


def _texts(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); pass a file with one text a line.") from error
    if not lines:
        raise InputError(f"{path}: has no text; put one text on each line.")
    return lines
