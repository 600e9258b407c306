"""Firings of features drawn from a code store: uniform among a feature's own, the same however the store is cut up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.plan import raw_words
from actstore.reader import Shard
from pipelines.code_store import CodeStore, read_codes
from pipelines.progress import track

PURPOSE = 61
"""Of the random words that firings are drawn by."""
PART = "train"

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Firings:
    """n firings, by feature, and for one feature by window and position.

    feature, segment, window, position, document (n,) int64; a document's number is of its segment. `next_token` (n,) is the
    token after each, and `value` (n,) its code. `total` (F,) counts all firings of each feature, drawn or not, and
    `rows` the rows of the store, both where a next token is in the window.
    """

    feature: Ints
    segment: Ints
    window: Ints
    position: Ints
    document: Ints
    next_token: Ints
    value: NDArray[np.float32]
    total: Ints
    rows: int

    def __len__(self) -> int:
        return len(self.feature)

    def take(self, chosen: NDArray[np.bool_] | Ints) -> Firings:
        """Some of the firings."""
        columns = {name: getattr(self, name)[chosen] for name in COLUMNS}
        return Firings(**columns, total=self.total, rows=self.rows)


COLUMNS = ("feature", "segment", "window", "position", "document", "next_token", "value")


def draw_firings(codes: CodeStore, features: Ints | None, n: int, seed: int, half: int | None = None) -> Firings:
    """At most `n` firings of each of some features (all, by default), each uniform among those with a next token in
    their window. Memory is bounded by the draw and one shard.

    `half` 0 or 1 keeps to the documents of that half (`document_half`).
    """
    wanted = np.zeros(codes.n_features, bool)
    wanted[slice(None) if features is None else features] = True
    total = np.zeros(codes.n_features, np.int64)
    kept = {name: np.empty(0, np.float32 if name == "value" else np.int64) for name in COLUMNS}
    keys, n_rows = np.empty(0, np.uint64), 0
    bound = np.full(codes.n_features, np.iinfo(np.uint64).max, np.uint64)
    shards = codes.shards(PART)
    with track("firings", len(shards), "shards") as progress:
        for shard in shards:
            indices, values = read_codes(codes, shard)
            places = _places(codes, shard, half)
            usable = places["next_token"] >= 0
            n_rows += int(usable.sum())
            words = raw_words(indices.size, seed, PURPOSE, shard.segment, shard.index).reshape(indices.shape)
            fires = (values > 0) & wanted[indices] & usable[:, None]
            total += np.bincount(indices[fires], minlength=codes.n_features)
            row, slot = np.nonzero(fires & (words <= bound[indices]))
            found = {name: column[row] for name, column in places.items()}
            found |= {"feature": indices[row, slot], "value": values[row, slot]}
            keys = np.concatenate([keys, words[row, slot]])
            kept = {name: np.concatenate([kept[name], found[name]]) for name in COLUMNS}
            order = np.lexsort((keys, kept["feature"]))
            rank = _rank(kept["feature"][order])
            chosen = order[rank < n]
            last = order[rank == n - 1]
            bound[kept["feature"][last]] = keys[last]
            keys, kept = keys[chosen], {name: column[chosen] for name, column in kept.items()}
            progress.advance(1)
    order = np.lexsort((kept["position"], kept["window"], kept["segment"], kept["feature"]))
    return Firings(**{name: column[order] for name, column in kept.items()}, total=total, rows=n_rows)


def document_halves(codes: CodeStore, segment: int) -> NDArray[np.int64]:
    """(n_documents,) 0 or 1: one bit of each document's name's hash, the one by which rules of features are chosen and
    scored on different halves."""
    import hashlib

    names = codes.document_names(segment)
    return np.array([hashlib.sha256(name.encode()).digest()[8] & 1 for name in names], np.int64)


def window_ids(codes: CodeStore, segment: int, windows: Ints) -> Ints:
    """(n, context) what the model gets of some windows of the training split, and so what their rows come from."""
    from pipelines.windows import Windows

    table = {name: codes.table(segment, f"{PART}/windows/{name}") for name in ("token_start", "n_tokens")}
    ids, policy = codes.table(segment, "tokens/ids"), codes.manifest.policy
    return Windows(ids, table["token_start"], table["n_tokens"].astype(np.int64), policy).batch(windows)[0]


def _places(codes: CodeStore, shard: Shard, half: int | None) -> dict[str, Ints]:
    """Of each row of a shard: where it stands, and the token after it, -1 where that is not in its window."""
    window = codes.read(shard, "rows/window").astype(np.int64)
    position = codes.read(shard, "rows/position").astype(np.int64)
    document = codes.documents(shard)
    lead = int(codes.manifest.policy.bos)
    n_tokens = codes.table(shard.segment, f"{PART}/windows/n_tokens").astype(np.int64)
    start = codes.table(shard.segment, f"{PART}/windows/token_start")
    has_next = position + 1 < n_tokens[window] + lead
    if half is not None:
        has_next &= document_halves(codes, shard.segment)[document] == half
    ids = codes.table(shard.segment, "tokens/ids")
    place = np.where(has_next, start[window] + position + 1 - lead, 0)
    return {
        "segment": np.full(len(window), shard.segment, np.int64),
        "window": window,
        "position": position,
        "document": document,
        "next_token": np.where(has_next, ids[place].astype(np.int64), -1),
    }


def _rank(sorted_values: Ints) -> Ints:
    """(n,) the place of each of some sorted values among its equals: [3, 3, 5] gives [0, 1, 0]."""
    n = len(sorted_values)
    first = np.r_[True, sorted_values[1:] != sorted_values[:-1]] if n else np.empty(0, bool)
    place = np.arange(n)
    return place - np.maximum.accumulate(np.where(first, place, 0)) if n else place
