"""Firings of features drawn from a code store: one of each window, from windows in one random order.

The order of windows is the same for all features, so that frequent ones share the first windows of it and a model has
few texts to read. A drawn firing stands for all of its feature in its window: that number is its weight, and a weighted
mean over the draw estimates the mean over all firings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import IdentityMismatch
from actstore.plan import raw_words
from actstore.reader import Shard
from pipelines.codes.code_store import CodeStore, read_codes
from pipelines.shared.progress import track
from pipelines.text.tokens import document_half
from pipelines.text.windows import Windows

ROWS, WINDOWS = 61, 63
"""Purposes of the random words that firings in a window, and windows, are drawn by."""
PART = "train"

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Firings:
    """n firings, by feature, and for one feature by window and position.

    feature, segment, window, position, document (n,) int64; a document's number is of its segment. `next_token` (n,) is
    the token after each, `n_real` (n,) how many positions of its window are no padding, `value` (n,) its code, and
    `weight` (n,) how many firings it stands for. `total` (F,) counts all firings of each feature, drawn or not, and `rows`
    the rows of the store, both where a next token is in the window.
    """

    feature: Ints
    segment: Ints
    window: Ints
    position: Ints
    document: Ints
    next_token: Ints
    n_real: Ints
    weight: Ints
    value: NDArray[np.float32]
    total: Ints
    rows: int

    def __len__(self) -> int:
        return len(self.feature)

    def take(self, chosen: NDArray[np.bool_] | Ints) -> Firings:
        """Some of the firings."""
        columns = {name: getattr(self, name)[chosen] for name in COLUMNS}
        return Firings(**columns, total=self.total, rows=self.rows)


COLUMNS = ("feature", "segment", "window", "position", "document", "next_token", "n_real", "weight", "value")


def draw_firings(
    codes: CodeStore,
    features: Ints | None,
    n: int,
    seed: int,
    half: int | None = None,
    above: NDArray[np.float64] | None = None,
) -> Firings:
    """At most `n` firings of each of some features (all, by default), from as many windows, each uniform among those of
    its window that have a next token there. Memory is bounded by the draw and one shard. Where a shard's bound cuts a
    window, its two pieces count as two.

    `half` 0 or 1 keeps to the documents of that half (`document_halves`); `above` (F,) counts a feature as firing only
    where its code exceeds that.
    """
    wanted = np.zeros(codes.n_features, bool)
    wanted[slice(None) if features is None else features] = True
    floor = np.zeros(codes.n_features) if above is None else above
    total = np.zeros(codes.n_features, np.int64)
    kept: dict[str, NDArray[Any]]
    kept = {name: np.empty(0, np.float32 if name == "value" else np.int64) for name in COLUMNS}
    keys, n_rows = np.empty(0, np.uint64), 0
    shards = codes.shards(PART)
    with track("firings", len(shards), "shards") as progress:
        for shard in shards:
            indices, values = read_codes(codes, shard)
            places = _places(codes, shard, half)
            usable = places["next_token"] >= 0
            n_rows += int(usable.sum())
            row, slot = np.nonzero((values > floor[indices]) & wanted[indices] & usable[:, None])
            feature = indices[row, slot]
            total += np.bincount(feature, minlength=codes.n_features)
            pick, weight = _one_of_each(feature, places["window"][row], raw_words(len(row), seed, ROWS, *_number(shard)))
            row, slot = row[pick], slot[pick]
            n_windows = len(codes.table(shard.segment, paths.window_table(PART, paths.N_TOKENS)))
            window_keys = raw_words(n_windows, seed, WINDOWS, shard.segment)[places["window"][row]]
            found: dict[str, NDArray[Any]] = {name: column[row] for name, column in places.items()}
            found |= {"feature": indices[row, slot], "value": values[row, slot], "weight": weight}
            keys = np.concatenate([keys, window_keys])
            kept = {name: np.concatenate([kept[name], found[name]]) for name in COLUMNS}
            order = np.lexsort((keys, kept["feature"]))
            chosen = order[_rank(kept["feature"][order]) < n]
            keys, kept = keys[chosen], {name: column[chosen] for name, column in kept.items()}
            progress.advance(1)
    order = np.lexsort((kept["position"], kept["window"], kept["segment"], kept["feature"]))
    return Firings(**{name: column[order] for name, column in kept.items()}, total=total, rows=n_rows)


def _number(shard: Shard) -> tuple[int, int]:
    return shard.segment, shard.index


def _one_of_each(feature: Ints, window: Ints, words: NDArray[np.uint64]) -> tuple[Ints, Ints]:
    """For each pair of feature and window among n firings: which firing has the smallest word, and how many there are."""
    order = np.lexsort((words, window, feature))
    first = np.flatnonzero(np.r_[True, (np.diff(feature[order]) != 0) | (np.diff(window[order]) != 0)][: len(order)])
    return order[first], np.diff(np.r_[first, len(order)])


def document_halves(codes: CodeStore, segment: int) -> NDArray[np.int64]:
    """(n_documents,) which half each document of a segment is of, by `document_half`."""
    names = codes.document_names(segment)
    return np.array([document_half(name) for name in names], np.int64)


def window_ids(codes: CodeStore, segment: int, windows: Ints) -> Ints:
    """(n, context) what the model gets of some windows of the training split, and so what their rows come from."""
    return Windows.open(codes, segment, PART).batch(windows)[0]


def next_tokens(codes: CodeStore, shard: Shard) -> Ints:
    """(n_rows,) the token after each row of a shard; -1 where that is not in its window."""
    return Windows.open(codes, shard.segment, PART).next_tokens(*_window_position(codes, shard))


def _window_position(codes: CodeStore, shard: Shard) -> tuple[Ints, Ints]:
    return codes.read(shard, paths.WINDOW).astype(np.int64), codes.read(shard, paths.POSITION).astype(np.int64)


def _places(codes: CodeStore, shard: Shard, half: int | None) -> dict[str, Ints]:
    """Of each row of a shard: where it stands, and the token after it, -1 where that is not in its window or the
    document not of the half."""
    window, position = _window_position(codes, shard)
    document = codes.documents(shard)
    windows = Windows.open(codes, shard.segment, PART)
    following = windows.next_tokens(window, position)
    if half is not None:
        following = np.where(document_halves(codes, shard.segment)[document] == half, following, -1)
    lead = int(codes.manifest.policy.bos)
    return {
        "segment": np.full(len(window), shard.segment, np.int64),
        "window": window,
        "position": position,
        "document": document,
        "n_real": windows.n_tokens[window] + lead,
        "next_token": following,
    }


def _rank(sorted_values: Ints) -> Ints:
    """(n,) the place of each of some sorted values among its equals: [3, 3, 5] gives [0, 1, 0]."""
    n = len(sorted_values)
    first = np.r_[True, sorted_values[1:] != sorted_values[:-1]] if n else np.empty(0, bool)
    place = np.arange(n)
    return place - np.maximum.accumulate(np.where(first, place, 0)) if n else place


def open_run_codes(codes: str, run_id: str, run: str) -> CodeStore:
    """A code store. Raises IdentityMismatch when it holds the codes of another run."""
    opened = CodeStore(codes)
    if opened.manifest.source["run_id"] != run_id:
        raise IdentityMismatch(
            f"{codes}: holds codes of run {opened.manifest.source['run_id']}, {run} is {run_id}; pass the codes of this run."
        )
    return opened
