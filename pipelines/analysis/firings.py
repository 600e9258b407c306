"""Every firing of one feature, read through the feature index of the codes that an analysis was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actstore.errors import InputError
from pipelines.analysis.reader import Analysis
from pipelines.codes.code_store import CodeStore
from pipelines.codes.feature_index import FeatureIndex, RowPlaces
from pipelines.text.codec import TextCodec
from pipelines.text.tokenizer_files import store_tokenizer

BEFORE, AFTER = 8, 4
"""Tokens of text given around a firing's token, within its document."""


@dataclass(frozen=True)
class Firing:
    """One row in which a feature fires: its number in the whole code store, its value there, and where it stands.

    `position` counts within the window; `before` and `after` are the text around `token`, of the same document.
    """

    row: int
    value: float
    document: str
    position: int
    token: str
    before: str
    after: str


def feature_firings(analysis: Analysis, feature: int, codes: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """The firings of a feature, strongest first, ties by row: all, or the first `limit`.

    `codes` says where the code store is, if it was moved from where the analysis was made. One read of the index gives
    rows and values. Raises InputError for a feature or limit that makes no sense, IncompleteStore when the codes have no
    feature index, NotAStore or IdentityMismatch when the codes are not there or are not those of the analysis.
    """
    analysis.require_feature(feature)
    if limit is not None and limit < 1:
        raise InputError(f"top {limit}: need at least 1.")
    store = CodeStore(codes or analysis.record.codes, snapshot=analysis.record.snapshot)
    index = FeatureIndex(store)
    n_firings = index.fires(feature)
    rows, values = index.firings(feature) if limit is None else index.top(feature, limit)
    return {
        "feature": feature,
        "codes": store.url,
        "n_firings": n_firings,
        "firings": [vars(firing) for firing in _in_text(store, index.places(rows), rows.tolist(), values.tolist())],
    }


def _in_text(codes: CodeStore, places: RowPlaces, rows: list[int], values: list[float]) -> list[Firing]:
    codec = store_tokenizer(codes)
    names = {segment: codes.document_names(segment) for segment in np.unique(places.segment).tolist()}
    firings = []
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        segment, document = int(places.segment[i]), int(places.document[i])
        before, token, after = _around(codes, codec, segment, document, int(places.token_index[i]), int(places.token[i]))
        firings.append(Firing(row, value, names[segment][document], int(places.position[i]), token, before, after))
    return firings


def _around(
    codes: CodeStore, codec: TextCodec, segment: int, document: int, token_index: int, token: int
) -> tuple[str, str, str]:
    """The text before a token of a document, its own, and the text after it; a start of text has none around it."""
    if token_index < 0:
        return "", codec.token_text(token), ""
    offsets, ids = codes.table(segment, "documents/offsets"), codes.table(segment, "tokens/ids")
    first = max(token_index - BEFORE, int(offsets[document]))
    last = min(token_index + 1 + AFTER, int(offsets[document + 1]))
    return codec.around(ids[first:last], token_index - first)
