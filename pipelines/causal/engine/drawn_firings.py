"""Firings of features drawn from a code store: one of each window, from windows in one random order.

The order of windows is the same for all features, so that frequent ones share the first windows of it and a model has
few texts to read. A drawn firing stands for all of its feature in its window: that number is its weight, and a weighted
mean over the draw estimates the mean over all firings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.plan import raw_words
from actstore.reader import Shard
from pipelines.codes.code_store import CodeStore, read_codes
from pipelines.codes.feature_index import FeatureIndex, read_index_record
from pipelines.shared.progress import track
from pipelines.text.split import document_halves
from pipelines.text.windows import Windows

ROWS, WINDOWS = 61, 63
"""Purposes of the random words that firings in a window, and windows, are drawn by."""
PART = "train"
SCANNED_A_READ = 100
"""Firings that a scan passes in the time in which the index gives one of a wanted feature: measured 30 to 100."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DrawnFirings:
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

    def take(self, chosen: NDArray[np.bool_] | Ints) -> DrawnFirings:
        """Some of the firings."""
        columns = {name: getattr(self, name)[chosen] for name in COLUMNS}
        return DrawnFirings(**columns, total=self.total, rows=self.rows)


COLUMNS = ("feature", "segment", "window", "position", "document", "next_token", "n_real", "weight", "value")


def draw_firings(
    codes: CodeStore,
    features: Ints | None,
    n: int,
    seed: int,
    half: int | None = None,
    above: NDArray[np.float64] | None = None,
) -> DrawnFirings:
    """At most `n` firings of each of some features (all, by default), from as many windows, each uniform among those of
    its window that have a next token there. Where a shard's bound cuts a window, its two pieces count as two.

    `half` 0 or 1 keeps to the documents of that half (`document_halves`); `above` (F,) counts a feature as firing only
    where its code exceeds that.

    The firings of some features are read from the feature index where that pays (`reads_index`). Otherwise all codes are
    scanned, as they always are in a store without an index of its own codes; the draw is the same. Memory is bounded by
    the draw and one shard, and with the index by the features' firings.
    """
    floor = np.zeros(codes.n_features) if above is None else above
    if features is not None and (index := _index_for(codes, features, floor)) is not None:
        return _draw(codes, _indexed(codes, index, np.unique(features), floor, half), n, seed)
    wanted = np.zeros(codes.n_features, bool)
    wanted[slice(None) if features is None else features] = True
    return _draw(codes, _scanned(codes, wanted, floor, half), n, seed)


def reads_index(n_wanted: int, n_entries: int) -> bool:
    """Whether `n_wanted` firings of the `n_entries` of a code store are read from its index rather than by a scan."""
    return n_wanted * SCANNED_A_READ <= n_entries


def _index_for(codes: CodeStore, features: Ints, floor: NDArray[np.float64]) -> FeatureIndex | None:
    """The index that the firings of some features are read from: None where there is none of these codes, where the
    features have too many firings, or where one counts as firing at a code of 0, which no index has."""
    record = read_index_record(codes)
    if record is None or record.snapshot != codes.snapshot or (floor[features] < 0).any():
        return None
    index = FeatureIndex(codes)
    n_wanted = sum(index.fires(feature) for feature in np.unique(features).tolist())
    return index if reads_index(n_wanted, record.entries) else None


class _ShardRows:
    """Where the rows of a shard stand. `usable` (n_rows,) has a next token in its window, and a document of the half."""

    def __init__(self, codes: CodeStore, shard: Shard, half: int | None):
        self.codes, self.shard = codes, shard
        self._windows = Windows.open(codes, shard.segment, PART)
        self.window, self.position = _window_position(codes, shard)
        self.n_real = self._windows.n_tokens + int(codes.manifest.policy.bos)
        self.usable = self.position + 1 < self.n_real[self.window]
        if half is not None:
            documents = self._documents(np.arange(len(self.window)))
            self.usable &= document_halves(codes.document_keys(shard.segment))[documents] == half

    def _documents(self, rows: Ints) -> Ints:
        tokens = self._windows.token_at(self.window[rows], self.position[rows])
        return self.codes.documents_of(self.shard.segment, tokens)

    def columns(self, rows: Ints) -> dict[str, Ints]:
        """What `DrawnFirings` says of each of some rows."""
        window, position = self.window[rows], self.position[rows]
        return {
            "segment": np.full(len(rows), self.shard.segment, np.int64),
            "window": window,
            "position": position,
            "document": self._documents(rows),
            "n_real": self.n_real[window],
            "next_token": self._windows.next_tokens(window, position),
        }


class _ShardFirings(NamedTuple):
    """A shard's firings that can be drawn, in the order of rows and, in a row, of its codes' places: (n,) each."""

    rows: _ShardRows
    row: Ints
    feature: Ints
    value: NDArray[np.float32]


def _scanned(
    codes: CodeStore, wanted: NDArray[np.bool_], floor: NDArray[np.float64], half: int | None
) -> Iterator[_ShardFirings]:
    """The firings of every shard, from all of its codes."""
    for shard in codes.shards(PART):
        indices, values = read_codes(codes, shard)
        rows = _ShardRows(codes, shard, half)
        row, slot = np.nonzero((values > floor[indices]) & wanted[indices] & rows.usable[:, None])
        yield _ShardFirings(rows, row, indices[row, slot], values[row, slot])


def _indexed(
    codes: CodeStore, index: FeatureIndex, features: Ints, floor: NDArray[np.float64], half: int | None
) -> Iterator[_ShardFirings]:
    """The same from the feature index: one read a feature, and where rows stand, but no codes.

    Codes are read for a row in which several of the features fire: the index does not say which comes first.
    """
    firings = [index.firings(feature) for feature in features.tolist()]
    feature = np.repeat(features, [len(own.rows) for own in firings])
    value = np.concatenate([np.empty(0, np.float32), *(own.values for own in firings)])
    which, row = index.numbers.locate(np.concatenate([np.empty(0, np.int64), *(own.rows for own in firings)]))
    order = np.lexsort((row, which))[: len(row)]
    which, row, feature, value = which[order], row[order], feature[order], value[order]
    for number, shard in enumerate(index.numbers.shards):
        if shard.part != PART:
            continue
        rows = _ShardRows(codes, shard, half)
        mine = slice(*np.searchsorted(which, [number, number + 1]).tolist())
        own_row, own_feature, own_value = row[mine], feature[mine], value[mine]
        can_be_drawn = rows.usable[own_row] & (own_value > floor[own_feature])
        own_row, own_feature, own_value = own_row[can_be_drawn], own_feature[can_be_drawn], own_value[can_be_drawn]
        order = np.lexsort((_places_in_row(codes, shard, own_row, own_feature), own_row))
        yield _ShardFirings(rows, own_row[order], own_feature[order], own_value[order])


def _places_in_row(codes: CodeStore, shard: Shard, row: Ints, feature: Ints) -> Ints:
    """(n,) at which place of its row's codes each firing lies; 0 for a row that is there once. Rows rise."""
    again = np.flatnonzero(row[1:] == row[:-1])
    shared = np.unique(np.concatenate([again, again + 1]))
    places, chunk = np.zeros(len(row), np.int64), row // shard.chunk_rows
    for number in np.unique(chunk[shared]).tolist():
        mine = shared[chunk[shared] == number]
        inside = row[mine] - number * shard.chunk_rows
        indices, values = (codes.read_chunk(shard, name, number)[inside] for name in paths.CODES)
        places[mine] = ((indices == feature[mine, None]) & (values > 0)).argmax(axis=1)
    return places


def _draw(codes: CodeStore, shards: Iterator[_ShardFirings], n: int, seed: int) -> DrawnFirings:
    """At most `n` of each feature's firings, whichever way these come shard by shard."""
    total = np.zeros(codes.n_features, np.int64)
    kept: dict[str, NDArray[Any]]
    kept = {name: np.empty(0, np.float32 if name == "value" else np.int64) for name in COLUMNS}
    keys, n_rows = np.empty(0, np.uint64), 0
    with track("firings", len(codes.shards(PART)), "shards") as progress:
        for rows, row, feature, value in shards:
            n_rows += int(rows.usable.sum())
            total += np.bincount(feature, minlength=codes.n_features)
            words = raw_words(len(row), seed, ROWS, rows.shard.segment, rows.shard.index)
            pick, weight = _one_of_each(feature, rows.window[row], words)
            new: dict[str, NDArray[Any]] = rows.columns(row[pick])
            new |= {"feature": feature[pick], "value": value[pick], "weight": weight}
            window_keys = raw_words(len(rows.n_real), seed, WINDOWS, rows.shard.segment)[new["window"]]
            keys = np.concatenate([keys, window_keys])
            kept = {name: np.concatenate([kept[name], new[name]]) for name in COLUMNS}
            order = np.lexsort((keys, kept["feature"]))
            chosen = order[_rank(kept["feature"][order]) < n]
            keys, kept = keys[chosen], {name: column[chosen] for name, column in kept.items()}
            progress.advance(1)
    order = np.lexsort((kept["position"], kept["window"], kept["segment"], kept["feature"]))
    return DrawnFirings(**{name: column[order] for name, column in kept.items()}, total=total, rows=n_rows)


def _one_of_each(feature: Ints, window: Ints, words: NDArray[np.uint64]) -> tuple[Ints, Ints]:
    """For each pair of feature and window among n firings: which firing has the smallest word, and how many there are."""
    order = np.lexsort((words, window, feature))
    first = np.flatnonzero(np.r_[True, (np.diff(feature[order]) != 0) | (np.diff(window[order]) != 0)][: len(order)])
    return order[first], np.diff(np.r_[first, len(order)])


def window_ids(codes: CodeStore, segment: int, windows: Ints) -> Ints:
    """(n, context) what the model gets of some windows of the training split, and so what their rows come from."""
    return Windows.open(codes, segment, PART).batch(windows)[0]


def next_tokens(codes: CodeStore, shard: Shard) -> Ints:
    """(n_rows,) the token after each row of a shard; -1 where that is not in its window."""
    return Windows.open(codes, shard.segment, PART).next_tokens(*_window_position(codes, shard))


def _window_position(codes: CodeStore, shard: Shard) -> tuple[Ints, Ints]:
    return codes.read(shard, paths.WINDOW).astype(np.int64), codes.read(shard, paths.POSITION).astype(np.int64)


def _rank(sorted_values: Ints) -> Ints:
    """(n,) the place of each of some sorted values among its equals: [3, 3, 5] gives [0, 1, 0]."""
    n = len(sorted_values)
    first = np.r_[True, sorted_values[1:] != sorted_values[:-1]] if n else np.empty(0, bool)
    place = np.arange(n)
    return place - np.maximum.accumulate(np.where(first, place, 0)) if n else place
