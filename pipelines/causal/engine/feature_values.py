"""The values of chosen features in the codes of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.sae.base import Codes


def feature_values(codes: Codes, features: Tensor) -> Tensor:
    """(n_rows, len(features)) what chosen features have in the codes of n rows; 0 where one does not fire."""
    active = codes.active
    if not len(features):
        return codes.values.new_zeros(active.n_rows, 0)
    order = torch.argsort(features)
    place = torch.searchsorted(features[order], active.features).clamp_max(len(features) - 1)
    hit = features[order][place] == active.features
    values = codes.values.new_zeros(active.n_rows, len(features))
    values[active.rows[hit], order[place[hit]]] = codes.values[hit]
    return values
